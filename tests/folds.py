"""Networks and laws shared by the tests of passes that fold factors into weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import check
import graphs
import numpy as np
import onnx_ir as ir

from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context, Pass, Report


def network(*, layers: int = 2, tied: bool = False, biased: bool = False, outliers: float = 20.0) -> ir.Model:
    """Gated layers behind norms of which some gains are large: features that get large."""
    builder = graphs.Builder(64, 200, 0)
    table = builder.weight(200, 64, name="table", scale=1.0)
    stream = builder.op("Gather", table, builder.ids, width=64, axis=0)
    rng = np.random.default_rng(7)
    for _ in range(layers):
        x = builder.norm(stream)
        gate, up = (builder.op("MatMul", x, builder.weight(64, 128), width=128) for _ in range(2))
        if biased:
            up = builder.op("Add", up, builder.weight(128), width=128)
        silu = builder.op("Mul", gate, builder.op("Sigmoid", gate, width=128), width=128)
        inner = builder.op("MatMul", builder.op("Mul", silu, up, width=128), builder.weight(128, 64), width=64)
        stream = builder.step("residual", stream, inner)
    model = builder.finish(builder.norm(stream), tied, table)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        if value.const_value.shape.numpy() == (64,):
            gain = value.const_value.numpy() * np.where(rng.random(64) < 0.05, outliers, 1)
            value.const_value = ir.Tensor(gain.astype(np.float32), name=value.name)
    return model


def ids(rows: int = 4, length: int = 32) -> dict[str, Any]:
    return {"input_ids": np.random.default_rng(1).integers(0, 200, (rows, length))}


def law_the_model_stays_the_same(pass_: Pass, model: ir.Model) -> Report:
    """Runs the pass; outputs, nodes and bytes are those from before."""
    nodes = [node.op_type for node in model.graph]
    weights = {one.name: one.w_NK().copy() for one in find_linears(model)}
    before = graphs.run(model, ids())["logits"]
    report = pass_.run(model, Context())
    after = graphs.run(model, ids())["logits"]
    assert report.changed, report.reasons()
    check.close(before, after, tolerance=2e-6)
    assert [node.op_type for node in model.graph] == nodes
    assert report.bytes_before == report.bytes_after
    assert any(not np.array_equal(weights[one.name], one.w_NK()) for one in find_linears(model))
    return report


def loss(make: Callable[[], ir.Model], *passes: Pass) -> float:
    """Mean squared distance of the logits after `passes`."""
    before, model = graphs.run(make(), ids())["logits"], make()
    for one in passes:
        one.run(model, Context(calibration=CalibrationText(vocab_size=200)))
    after = graphs.run(model, ids())["logits"]
    return float(np.square(after.astype(np.float64) - before).mean())
