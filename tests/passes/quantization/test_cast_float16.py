"""CastFloat16: what becomes float16, what must not, and that nothing turns into an infinity."""

from __future__ import annotations

from typing import Any

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.compiler.errors import PreconditionError
from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.quantization.cast_float16 import HALF, LARGEST, CastFloat16, to_half
from onnxpress.passes.quantization.rtn import Rtn

CUDA = Context(target=TARGETS["cuda"])
HALF_TOLERANCE = 5e-3  # of the largest logit: eleven bits through a handful of layers


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1))
def test_law_finite_stays_finite_and_the_rest_stays(numbers: list[float]) -> None:
    array = np.array(numbers, np.float32)
    half = to_half(array)
    assert np.array_equal(np.isfinite(half), np.isfinite(array))
    assert np.array_equal(np.isnan(half), np.isnan(array))
    inside = np.abs(array) <= LARGEST[HALF]
    assert np.array_equal(half[inside], array[inside].astype(np.float16))


def network(*steps: str, tied: bool = True) -> graphs.Builder:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table")
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    for step in steps:
        x = builder.step(step, x, x)
    builder.model = builder.finish(x, tied, table)  # type: ignore[attr-defined]
    return builder


def model_of(*steps: str, tied: bool = True) -> ir.Model:
    model: ir.Model = network(*steps, tied=tied).model  # type: ignore[attr-defined]
    return model


def ops(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("steps", [("gated", "residual"), ("norm", "linear", "silu"), ("biased", "transposed", "norm")])
def test_outputs_stay_close(steps: tuple[str, ...], tied: bool) -> None:
    model = model_of(*steps, tied=tied)
    before = graphs.run(model)["logits"]
    report = CastFloat16().run(model, CUDA)
    after = graphs.run(model)["logits"]
    assert after.dtype == np.float16
    assert report.bytes_after < 0.52 * report.bytes_before
    assert 0 < report.metrics["weight_error"] < 2.0**-11
    check.close(before, after.astype(np.float32), tolerance=HALF_TOLERANCE)
    again = CastFloat16().run(model, CUDA)
    assert not again.modified
    assert again.reasons() == {"it has no weights or activations in float32": 1}


def test_an_unfused_norm_is_computed_in_float32() -> None:
    """Activations of 1,000 have squares beyond float16; the norm must not notice."""
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table", scale=1000.0)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    model = builder.finish(builder.norm(x), False, table)
    before = graphs.run(model)["logits"]
    CastFloat16().run(model, CUDA)
    after = graphs.run(model)["logits"]
    assert np.isfinite(after).all()
    check.close(before, after.astype(np.float32), tolerance=HALF_TOLERANCE)
    kept = [value for value in model.graph.initializers.values() if value.const_value.dtype == ir.DataType.FLOAT]  # type: ignore[union-attr]
    assert all(value.const_value.size == 1 for value in kept)  # type: ignore[union-attr]


def test_rotary_angles_stay_in_float32() -> None:
    """cos(position * frequency) at position 30,011 is right to float16's last bit, which float16 angles are not."""
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table")
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    positions = ir.val("position_ids", ir.DataType.INT64, ["batch", "sequence"])
    frequencies = (10000.0 ** -(np.arange(16) / 16)).astype(np.float32)
    angle = builder.op(
        "Mul",
        builder.op("Cast", builder.op("Unsqueeze", positions, builder.axes(-1)), to=int(ir.DataType.FLOAT)),
        builder.const(frequencies, "inv_freq"),
    )
    builder.nodes[-3].outputs[0].dtype = ir.DataType.INT64
    cos = builder.op("Cos", builder.op("Concat", angle, angle, axis=-1), width=32)
    last = builder.op("Mul", x, cos, width=32)
    model = builder.finish(last, False, table)
    model.graph.inputs.append(positions)
    feeds = {"input_ids": np.arange(8)[None], "position_ids": 30011 + np.arange(8)[None]}
    before = graphs.run(model, feeds)["logits"]
    CastFloat16().run(model, CUDA)
    check.close(before, graphs.run(model, feeds)["logits"].astype(np.float32), tolerance=HALF_TOLERANCE)
    types = {node.op_type: node.outputs[0].dtype for node in model.graph}
    assert types["Cos"] == ir.DataType.FLOAT
    assert types["MatMul"] == ir.DataType.FLOAT16


@pytest.mark.parametrize("computed", [True, False])
def test_a_mask_is_saturated_where_it_meets_activations(computed: bool) -> None:
    """-3.4e38 becomes -65504, not -inf: a row that is masked throughout must not turn into NaN."""
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table")
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    lowest = builder.scalar(float(np.finfo(np.float32).min))
    if computed:
        attended = builder.op("Cast", builder.op("Unsqueeze", builder.ids, builder.axes(-1)), to=int(ir.DataType.FLOAT))
        builder.nodes[-2].outputs[0].dtype = ir.DataType.INT64
        lowest = builder.op("Mul", builder.op("Min", attended, builder.scalar(1.0)), lowest)
    probabilities = builder.op("Softmax", builder.op("Add", x, lowest, width=32), width=32, axis=-1)
    model = builder.finish(probabilities, False, table)
    CastFloat16().run(model, CUDA)
    after = graphs.run(model, {"input_ids": np.array([[0, 3, 5]])})["logits"]
    assert np.isfinite(after).all()
    assert ("Clip" in ops(model)) == computed


def test_weights_beyond_the_range_are_named() -> None:
    model = model_of("linear", tied=False)
    weight = find_linears(model)[0].weight
    array = weight.const_value.numpy().copy()  # type: ignore[union-attr]
    array[3, 4], array[5, 6] = 1e6, -np.inf
    weight.const_value = ir.tensor(array, name=weight.name)
    report = CastFloat16().run(model, CUDA)
    assert report.metrics["overflows"] == 2
    assert [skip.site for skip in report.skipped] == [f"values of {weight.name}"]
    stored = find_linears(model)[0].weight.const_value.numpy()  # type: ignore[union-attr]
    assert stored[3, 4] == LARGEST[HALF]
    assert stored[5, 6] == -np.inf


def test_float_inputs_and_outputs_change_and_names_stay() -> None:
    x = ir.val("past", ir.DataType.FLOAT, ["n", 8])
    nodes = [ir.node("Cast", [x], {"to": int(ir.DataType.FLOAT)})]
    nodes.append(ir.node("Neg", [nodes[0].outputs[0]]))
    nodes.append(ir.node("Shape", [x]))
    for node, name in zip(nodes, ("a", "present", "size"), strict=True):
        node.outputs[0].name = name
    nodes[1].outputs[0].dtype, nodes[2].outputs[0].dtype = ir.DataType.FLOAT, ir.DataType.INT64
    outputs = [nodes[1].outputs[0], nodes[2].outputs[0]]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=[], opset_imports={"": 18}, name="g")
    model = ir.Model(graph, ir_version=9)
    report = CastFloat16().run(model, CUDA)
    assert set(report.changed) == {"input past", "output present"}
    assert [value.dtype for value in (*graph.inputs, *graph.outputs)] == [
        ir.DataType.FLOAT16,
        ir.DataType.FLOAT16,
        ir.DataType.INT64,
    ]
    got = graphs.run(model, {"past": np.ones((2, 8), np.float16)})
    assert got["present"].dtype == np.float16


@pytest.mark.parametrize("first", ["rtn", "cast"])
def test_goes_with_quantization_in_either_order(first: str) -> None:
    model = model_of("gated", "biased", tied=True)
    before = graphs.run(model)["logits"]
    passes: list[Any] = [Rtn(bits=8), CastFloat16()]
    for pass_ in passes if first == "rtn" else passes[::-1]:
        pass_.run(model, CUDA)
    for linear in find_linears(model):
        assert linear.is_quantized
        assert linear.node.inputs[2].dtype == ir.DataType.FLOAT16  # type: ignore[union-attr]
    (embedding,) = find_embeddings(model)
    assert embedding.node.inputs[2].dtype == ir.DataType.FLOAT16  # type: ignore[union-attr]
    check.close(before, graphs.run(model)["logits"].astype(np.float32), tolerance=4e-2)


def test_control_flow_is_refused() -> None:
    model = model_of("linear")
    body = ir.Graph([], [], nodes=[], initializers=[], opset_imports={"": 18}, name="body")
    node = ir.Node("", "If", [model.graph.inputs[0]], [ir.AttrGraph("then_branch", body)])
    model.graph.append(node)
    with pytest.raises(PreconditionError, match="without If"):
        CastFloat16().run(model, CUDA)


def test_bfloat16_keeps_float32_where_the_opset_knows_no_such_operator() -> None:
    """TopK takes bfloat16 from opset 24 on; a mask of float32's smallest number becomes no infinity."""
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table")
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    x = builder.op("Add", x, builder.scalar(float(np.finfo(np.float32).min)), width=32)
    top = ir.node("TopK", [x, builder.axes(32)], num_outputs=2)
    builder.nodes.append(top)
    top.outputs[0].dtype, top.outputs[1].dtype = ir.DataType.FLOAT, ir.DataType.INT64
    model = builder.finish(builder.op("Neg", top.outputs[0], width=32), False, table)
    report = CastFloat16(dtype="bfloat16").run(model, CUDA)
    assert 2.0**-11 < report.metrics["weight_error"] < 2.0**-8
    types = {node.op_type: node.inputs[0].dtype for node in model.graph if node.op_type != "Cast"}  # type: ignore[union-attr]
    assert (types["TopK"], types["Neg"], types["MatMul"]) == (ir.DataType.FLOAT, *2 * [ir.DataType.BFLOAT16])
    weights = [value.const_value.numpy() for value in model.graph.initializers.values()]  # type: ignore[union-attr]
    assert all(np.isfinite(array.astype(np.float32)).all() for array in weights)
    assert not CastFloat16(dtype="bfloat16").run(model, CUDA).modified
