"""Magnitude: how many zeros, which ones, and that the rest is untouched."""

from __future__ import annotations

import math
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.zeros import Pattern
from onnxpress.passes.pruning.magnitude import Magnitude, prune_rows
from onnxpress.passes.quantization.rtn import Rtn


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 2**31 - 1), st.integers(1, 40), st.floats(0.05, 0.95))
def test_laws(seed: int, columns: int, sparsity: float) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((5, columns))
    w[0, : columns // 2] = w[0, 0]
    pruned = prune_rows(w, Pattern(sparsity))
    zero = pruned == 0
    assert (zero.sum(axis=1) >= math.floor(sparsity * columns)).all()
    assert np.array_equal(pruned[~zero], w[~zero])
    for row, gone in zip(np.abs(w), zero, strict=True):
        assert not gone.any() or gone.all() or row[gone].max() <= row[~gone].min()
    assert np.array_equal(prune_rows(pruned, Pattern(sparsity)), pruned)
    order = rng.permutation(columns)
    assert np.array_equal(prune_rows(w[1:, order], Pattern(sparsity)), pruned[1:, order])


def network(tied: bool) -> ir.Model:
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64, name="table")
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    for step in ("gated", "biased", "transposed"):
        x = builder.step(step, x, x)
    return builder.finish(x, tied, table)


@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_gets_its_zeros_once(tied: bool) -> None:
    model = network(tied)
    report = Magnitude(sparsity=0.25).run(model, Context())
    assert len(report.changed) == (5 if tied else 6)
    assert report.reasons() == ({"shares its bytes with the embedding": 1} if tied else {})
    for linear in find_linears(model):
        if linear.name in report.changed:
            assert ((linear.w_NK() == 0).sum(axis=1) == linear.num_in // 4).all()
    assert report.metrics["sparsity"] == pytest.approx(0.25)
    assert 0 < report.metrics["weight_error"] < 0.3
    weights = sum(math.prod(one.shape) for one in find_linears(model) if one.name in report.changed)
    assert report.metrics["bytes_saved_if_compressed"] == pytest.approx(weights * (4 * 0.25 - 1 / 8))
    assert report.bytes_after == report.bytes_before
    graphs.run(model)
    again = Magnitude(sparsity=0.25).run(model, Context())
    assert not again.modified
    assert again.reasons()["already this sparse"] == len(report.changed)


def test_zeros_survive_quantization() -> None:
    model = network(tied=False)
    Magnitude(sparsity=0.5).run(model, Context())
    before = {one.name: one.w_NK() == 0 for one in find_linears(model)}
    Rtn(bits=4).run(model, Context())
    for linear in find_linears(model):
        assert (linear.w_NK()[before[linear.name]] == 0).all()
    assert Magnitude(sparsity=0.5).run(model, Context()).reasons() == {"quantized; prune before quantizing": 6}


@pytest.mark.parametrize("options", [{"sparsity": 0.0}, {"sparsity": 1.0}, {"sparsity": "half"}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="magnitude: sparsity"):
        Magnitude(**options)


def test_exclude_must_match() -> None:
    with pytest.raises(OptionError, match="matches no linear"):
        Magnitude(exclude=("nothing",)).run(network(False), Context())
    report = Magnitude(exclude=("head",)).run(network(False), Context())
    assert report.reasons() == {"excluded": 1}
