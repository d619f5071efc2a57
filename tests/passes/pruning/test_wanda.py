"""Wanda: the paper's own loop gives the same, and what each law says."""

from __future__ import annotations

import graphs
import numpy as np
import pytest
from decoders import decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration_text import CalibrationText, feeds
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.zeros import Pattern
from onnxpress.passes.pruning.magnitude import prune_rows
from onnxpress.passes.pruning.wanda import wanda

Array = np.ndarray
few = settings(max_examples=40, deadline=None, derandomize=True)
PATTERNS = [Pattern(0.5), Pattern(0.3), Pattern(0.5, 2, 4), Pattern(0.25, 6, 8), Pattern(2 / 3, 1, 3)]


def textbook(w_NK: Array, x_TK: Array, pattern: Pattern) -> Array:
    """Section 3 of the paper, one weight after the other."""
    norms = [float(np.sqrt(sum(value * value for value in x_TK[:, column]))) for column in range(x_TK.shape[1])]
    result = w_NK.copy()
    width, count = (
        (pattern.of, pattern.of - pattern.kept)
        if pattern.of
        else (w_NK.shape[1], int(pattern.sparsity * w_NK.shape[1] + 1e-9))
    )
    for row in range(len(w_NK)):
        for first in range(0, w_NK.shape[1], width):
            scores = sorted((abs(float(w_NK[row, one])) * norms[one], one) for one in range(first, first + width))
            for _, column in scores[:count]:
                result[row, column] = 0
    return result


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@few
@given(seed=st.integers(0, 2**31 - 1), times=st.integers(1, 3))
def test_the_papers_loop_gives_the_same(pattern: Pattern, seed: int, times: int) -> None:
    rng = np.random.default_rng(seed)
    w_NK, x_TK = rng.standard_normal((6, 24 * times)), rng.standard_normal((50, 24 * times))
    x_TK *= 10.0 ** rng.uniform(-2, 2, 24 * times)
    found = wanda(w_NK, (x_TK**2).mean(axis=0), pattern)
    np.testing.assert_array_equal(found, textbook(w_NK, x_TK, pattern))


@few
@given(seed=st.integers(0, 2**31 - 1))
def test_laws(seed: int) -> None:
    rng = np.random.default_rng(seed)
    w_NK, importance_K = rng.standard_normal((6, 24)), rng.uniform(0.1, 3, 24)
    importance_K[3] = 0
    found = wanda(w_NK, importance_K, Pattern(0.25))
    assert ((found == 0).sum(axis=1) == 6).all()
    assert (found[:, 3] == 0).all()
    assert np.array_equal(found[found != 0], w_NK[found != 0])
    assert np.array_equal(wanda(w_NK[::-1], importance_K, Pattern(0.25)), found[::-1])
    assert np.array_equal(wanda(w_NK, np.full(24, 2.0), Pattern(0.5, 2, 4)), prune_rows(w_NK, Pattern(0.5, 2, 4)))


def test_each_matrix_sees_the_activation_of_the_pruned_model() -> None:
    model, before = decoder(), decoder()
    text = CalibrationText(vocab_size=200, seed=1)
    ids_WS, _ = text.windows(512, 64)
    pipeline.run(model, pipeline.parse("wanda(tokens=512, length=64)"), Context(calibration=text))
    old = {one.name: one for one in find_linears(before)}
    checked = 0
    for linear in find_linears(model):
        if linear.kind == "head":
            assert np.array_equal(linear.w_NK(), old["head"].w_NK())
            continue
        model.graph.outputs.append(linear.activation)
        session = graphs.session(model)
        name = linear.activation.name
        x_TK = np.concatenate(
            [session.run([name], one)[0].reshape(-1, linear.num_in) for one in feeds(before.graph, ids_WS)]
        )
        model.graph.outputs.pop()
        want = textbook(old[linear.name].w_NK(), x_TK, Pattern(0.5))
        assert np.mean((want != 0) == (linear.w_NK() != 0)) > 0.999
        checked += 1
    assert checked >= 8
