"""Magnitude: its laws, and its honesty."""

from __future__ import annotations

import graphs
import numpy as np
import pytest

from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.pruning.magnitude import Magnitude, keep_largest

W = np.random.default_rng(0).standard_normal((6, 20)).astype(np.float32)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.95])
def test_law_kept_are_unchanged_and_largest(sparsity: float) -> None:
    pruned = keep_largest(W, sparsity)
    assert (pruned == 0).sum(axis=1).tolist() == [int(sparsity * 20)] * 6
    kept = pruned != 0
    assert np.array_equal(pruned[kept], W[kept])
    for row, mask in zip(np.abs(W), kept, strict=True):
        assert row[mask].min() >= row[~mask].max()


def test_law_a_second_run_changes_nothing() -> None:
    once = keep_largest(W, 0.4)
    assert np.array_equal(keep_largest(once, 0.4), once)


def test_the_report_says_that_nothing_is_saved_as_stored() -> None:
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64)
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    model = builder.finish(builder.step("gated", x, x), True, table)
    report = Magnitude(sparsity=0.5).run(model, Context())
    assert report.metrics["sparsity"] == pytest.approx(0.5)
    assert report.metrics["bytes_saved_as_stored"] == report.bytes_before - report.bytes_after == 0
    linear = find_linears(model)[0]
    assert (linear.w_NK() == 0).mean() == pytest.approx(0.5)
