"""FuseSkipNorm: sum and norm in one operator, the sum still readable."""

from __future__ import annotations

from collections import Counter

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler.pass_ import Context
from onnxpress.passes.fusion.fuse_rmsnorm import FuseRmsnorm
from onnxpress.passes.fusion.fuse_skip_norm import FuseSkipNorm


def residual(reads_sum: bool, constant: bool = False) -> ir.Model:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    branch = builder.step("linear", x, x)
    total = builder.op("Add", x, builder.weight(32) if constant else branch, width=32)
    last = builder.norm(total, 1e-3)
    if reads_sum:
        last = builder.op("Add", builder.step("linear", last, last), total, width=32)
    return builder.finish(last, False, table)


def fuse(model: ir.Model) -> Counter[str]:
    FuseRmsnorm().run(model, Context())
    FuseSkipNorm().run(model, Context())
    return Counter(node.op_type for node in model.graph)


def test_sum_that_is_read_again_is_an_output() -> None:
    model = residual(True)
    before = graphs.run(model)
    assert fuse(model)["SkipSimplifiedLayerNormalization"] == 1
    check.close(before["logits"], graphs.run(model)["logits"])


def test_sum_that_nobody_reads_is_no_output() -> None:
    model = residual(False)
    before = graphs.run(model)
    fuse(model)
    node = next(node for node in model.graph if node.op_type == "SkipSimplifiedLayerNormalization")
    assert len(node.outputs) == 1
    assert node.attributes["epsilon"].as_float() == np.float32(1e-3)
    check.close(before["logits"], graphs.run(model)["logits"])


def test_an_added_constant_is_no_residual() -> None:
    model = residual(False, constant=True)
    FuseRmsnorm().run(model, Context())
    report = FuseSkipNorm().run(model, Context())
    assert report.reasons() == {"a constant is added, not a residual": 1}


def test_layer_norm_with_its_bias() -> None:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    total = builder.op("Add", x, builder.step("linear", x, x), width=32)
    norm = builder.op("LayerNormalization", total, builder.weight(32), builder.weight(32), width=32, epsilon=1e-3)
    last = builder.op("Add", builder.step("linear", norm, norm), total, width=32)
    model = builder.finish(last, False, table)
    before = graphs.run(model)
    assert fuse(model)["SkipLayerNormalization"] == 1
    check.close(before["logits"], graphs.run(model)["logits"])


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        (["batch", "sequence", 32], ["other", "sequence", 32], "the operands differ in size"),
        (["batch", 1, 32], ["batch", "sequence", 32], "the operands differ in size"),
        (["batch", "sequence", 32], ["unk__1", "unk__2", 32], None),
    ],
)
def test_operands_of_different_sizes_stay(left: list[object], right: list[object], reason: str | None) -> None:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    y = builder.step("linear", x, x)
    x.shape, y.shape = ir.Shape(left), ir.Shape(right)
    last = builder.op("LayerNormalization", builder.op("Add", x, y, width=32), builder.weight(32), width=32)
    report = FuseSkipNorm().run(builder.finish(last, False, table), Context())
    assert [skip.reason for skip in report.skipped] == ([] if reason is None else [reason])
