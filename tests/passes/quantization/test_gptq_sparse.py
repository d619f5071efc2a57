"""Gptq with zeros: the textbook's sweep, plain gptq where nothing is to go, and codes that keep their zeros."""

from __future__ import annotations

import graphs
import numpy as np
import pytest
from decoders import decoder
from optimal_brain import reference

from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.columns import Moments
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.inspect import summarize
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.stats import damped
from onnxpress.compiler.zeros import Pattern
from onnxpress.passes.quantization import _least_squares as least_squares
from onnxpress.passes.quantization._grids import fit_grid

Array = np.ndarray


def problem(
    columns: int, rows: int, *, bits: int = 4, symmetric: bool = True
) -> tuple[Array, Array, least_squares.Grid]:
    """Weights [K, N], second moments, and a grid for them, all in float64."""
    rng = np.random.default_rng(columns)
    x_TK = rng.standard_normal((8 * columns, columns // 2)) @ rng.standard_normal((columns // 2, columns))
    x_TK += 0.3 * rng.standard_normal(x_TK.shape)
    w_KN, hessian_KK = rng.standard_normal((columns, rows)), x_TK.T @ x_TK / len(x_TK)
    grid = fit_grid(w_KN.astype(np.float32), hessian_KK.diagonal(), bits=bits, block_size=16, symmetric=symmetric)
    grid.scale_GN, grid.zero_GN = grid.scale_GN.astype(np.float64), grid.zero_GN.astype(np.float64)
    return w_KN, hessian_KK, grid


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [48, 160])
def test_law_joint_without_zeros_is_gptq(columns: int, symmetric: bool) -> None:
    w_KN, hessian_KK, grid = problem(columns, 12, symmetric=symmetric)
    moments = Moments(hessian_KK, 0.01)
    steps_KN, keep_KN = least_squares.sparse_sweep(w_KN, moments, grid, Pattern(0.0))
    assert keep_KN is not None
    assert keep_KN.all()
    np.testing.assert_array_equal(steps_KN, least_squares.sweep(w_KN, moments, grid))


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.5, 2, 4)], ids=str)
def test_the_slow_textbook_gives_the_same_codes(pattern: Pattern) -> None:
    w_KN, hessian_KK, grid = problem(32, 3)
    moments = Moments(hessian_KK, 0.01)
    order = [int(one) for one in moments.order(pattern.group)]
    spans = [(one, one + 4, 2) for one in range(0, 32, 4)] if pattern.of else [(0, 32, 16)]

    def quantize(value: float, row: int, column: int) -> float:
        scale = float(grid.scale_GN[column // 16, row])
        return min(max(round(value / scale), -8), 7) * scale

    want_NK, keep_NK = reference(w_KN.T, damped(hessian_KK, 0.01), order, spans, quantize)
    steps_KN, keep_KN = least_squares.sparse_sweep(w_KN, moments, grid, pattern)
    np.testing.assert_array_equal(keep_KN, keep_NK.T)
    np.testing.assert_allclose(steps_KN * grid.spread(grid.scale_GN, 32), want_NK.T, atol=1e-9)


def test_law_descent_leaves_zeros_and_never_loses() -> None:
    w_KN, hessian_KK, grid = problem(64, 8)
    w_KN = w_KN.astype(np.float32)
    grid.scale_GN, grid.zero_GN = grid.scale_GN.astype(np.float32), grid.zero_GN.astype(np.float32)
    moments = Moments(hessian_KK, 0.01)
    steps_KN, keep_KN = least_squares.sparse_sweep(w_KN, moments, grid, Pattern(0.5, 2, 4))
    assert keep_KN is not None

    def loss() -> float:
        return least_squares.quadratic(steps_KN * grid.spread(grid.scale_GN, 64) - w_KN, moments.damped_KK)

    before = loss()
    least_squares.descend(steps_KN, w_KN, moments, grid, keep_KN=keep_KN)
    assert loss() < before
    assert not steps_KN[~keep_KN].any()


def run(passes: str, head: str = "") -> tuple[Report, object]:
    model = decoder()
    context = Context(calibration=CalibrationText(vocab_size=200, seed=1))
    return pipeline.run(model, pipeline.parse(passes), context)[-1][1], model


TEXT = "tokens=1024, length=64, block_size=16"


@pytest.mark.parametrize("pattern", ["sparsity=0.5", "pattern='2:4'"])
def test_codes_have_their_zeros_and_the_head_keeps_all(pattern: str) -> None:
    report, model = run(f"gptq({TEXT}, {pattern})")
    assert report.metrics["sparsity"] >= 0.5
    assert any("nothing faster" in note for note in report.notes)
    for linear in find_linears(model):
        zero = linear.w_NK() == 0
        if linear.kind == "head":
            assert zero.mean() < 0.3
        elif "2:4" in pattern:
            assert (zero.reshape(-1, 4).sum(axis=1) >= 2).all()
        else:
            assert (zero.sum(axis=1) >= linear.num_in // 2).all()
    assert summarize(model, count_zeros=True).kinds["down"].zeros >= 0.5
    assert summarize(model).kinds["down"].zeros is None


def test_jointly_is_better_than_one_after_the_other() -> None:
    want = graphs.logits(decoder())
    errors = []
    for passes in (
        f"gptq({TEXT}, bits=4, pattern='2:4')",
        "wanda(tokens=1024, length=64, pattern='2:4'), rtn(block_size=16)",
    ):
        _, model = run(passes)
        errors.append(float(((graphs.logits(model) - want) ** 2).mean()))
    assert errors[0] < 0.9 * errors[1]


def test_what_cannot_be_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="more than there are") as caught:
        run("gptq(pattern='4:2')")
    assert "'1:2'" in caught.value.hint
    with pytest.raises(OptionError, match="no multiple of 7") as caught:
        run(f"gptq({TEXT}, pattern='5:7')")
    assert "'6:8'" in caught.value.hint
