"""Store_sparse: what it says of every matrix, and how it is undone."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from decoders import decoder

from onnxpress.compiler import pipeline, sparse
from onnxpress.compiler.pass_ import Context, Report


def run(model: ir.Model, passes: str) -> Report:
    return pipeline.run(model, pipeline.parse(passes), Context())[-1][1]


def test_a_dense_model_has_nothing_to_gain() -> None:
    model = decoder()
    report = run(model, "store_sparse")
    assert not report.modified
    assert set(report.reasons()) == {"dense is the smallest form, or nearly"}
    assert sparse.KEY not in model.metadata_props


def test_the_report_has_the_bytes_and_that_nothing_gets_faster() -> None:
    model = decoder()
    run(model, "magnitude(pattern='2:4', exclude=('head',))")
    report = run(model, "store_sparse")
    metrics = report.metrics
    assert metrics["file_bytes_after"] == pytest.approx(5 / 8 * metrics["file_bytes_before"])
    assert {row["form"] for row in report.ledger} == {"rows"}
    assert any("nothing faster" in note for note in report.notes)
    assert model.metadata_props[sparse.KEY] == "rows"
    assert report.bytes_after == report.bytes_before


def test_sparse_initializers_pay_for_few_weights_only() -> None:
    model = decoder()
    run(model, "magnitude(sparsity=0.5)")
    assert not run(model, "store_sparse(form='initializers')").modified
    run(model, "magnitude(sparsity=0.8)")
    assert model.metadata_props[sparse.KEY] == "initializers"
    report = run(model, "store_sparse(form='initializers')")
    assert report.reasons()["stored so already"] >= 8


def test_dense_undoes_it_once() -> None:
    model = decoder()
    run(model, "magnitude(pattern='2:4'), store_sparse")
    assert run(model, "store_sparse(form='dense')").modified
    assert sparse.KEY not in model.metadata_props
    assert not run(model, "store_sparse(form='dense')").modified
