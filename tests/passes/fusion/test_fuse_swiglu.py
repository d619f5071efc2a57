"""FuseSwiglu: x sigmoid(x) fires, its neighbours do not."""

from __future__ import annotations

import check
import graphs
import onnx_ir as ir
import pytest

from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.fusion.fuse_swiglu import FuseSwiglu


def network(kind: str) -> object:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    y = builder.step("linear", x, x)
    if kind == "silu":
        last = builder.step("silu", x, x)
    elif kind == "other operand":
        last = builder.op("Mul", y, builder.op("Sigmoid", x, width=32), width=32)
    else:  # the sigmoid is read twice
        sigmoid = builder.op("Sigmoid", x, width=32)
        last = builder.op("Add", builder.op("Mul", x, sigmoid, width=32), sigmoid, width=32)
    return builder.finish(last, False, table)


@pytest.mark.parametrize(("kind", "count"), [("silu", 1), ("other operand", 0), ("read twice", 0)])
def test_fires_only_on_silu(kind: str, count: int) -> None:
    model = network(kind)
    before = graphs.run(model)
    report = FuseSwiglu().run(model, Context())
    assert len(report.changed) == count
    assert not report.skipped, "what is no SiLU is no SiLU that was left"
    assert sum(node.op_type == "QuickGelu" for node in model.graph) == count
    check.close(before["logits"], graphs.run(model)["logits"])


def silu(dtype: str, outputs: str = "") -> ir.Model:
    return ir.from_onnx_text(
        f"""<ir_version: 9, opset_import: ["" : 18]> g ({dtype}[batch, seq, 8] x) =>
        ({dtype}[batch, seq, 8] y{outputs}) {{ s = Sigmoid(x) y = Mul(x, s) }}"""
    )


def test_a_sigmoid_that_is_an_output_stays() -> None:
    assert not FuseSwiglu().run(silu("float", ", float[batch, seq, 8] s"), Context()).changed


def test_half_precision_is_for_the_target_that_has_a_kernel() -> None:
    report = FuseSwiglu().run(silu("float16"), Context())
    assert report.reasons() == {"QuickGelu has no FLOAT16 kernel on the CPU": 1}
    model = silu("float16")
    assert FuseSwiglu().run(model, Context(target=TARGETS["cuda"])).changed == ["y"]
    assert model.graph[0].attributes["alpha"].as_float() == 1.0
