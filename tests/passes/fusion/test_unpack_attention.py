"""UnpackAttention: operators that others made come apart, with every mask that means the same; others stay."""

from __future__ import annotations

from typing import Any

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.fusion.unpack_attention import UnpackAttention

B, S, K, HEADS = 2, 4, 12, 3


def attention(
    *,
    mask: str = "",
    bias: str = "random",
    past: bool = False,
    present: bool = False,
    shared: bool = False,
    **more: Any,
) -> ir.Model:
    """com.microsoft.Attention(x, W, b, mask, past); mask "raw" [B, S], "counts", "input" [B], "causal" [B, S, S]."""
    builder = graphs.Builder(K, 8, 0)
    x = ir.val("x", ir.DataType.FLOAT, ["batch", "tokens", K])
    inputs, operands = [x], [x, builder.weight(K, 3 * K), None, None, None]
    if bias == "random":
        operands[2] = builder.weight(3 * K)
    elif bias == "zero":
        operands[2] = builder.const(np.zeros(3 * K, np.float32), "zeros")
    elif bias == "input":
        operands[2] = ir.val("bias", ir.DataType.FLOAT, [3 * K])
        inputs.append(operands[2])
    if mask:
        shapes = {"input": ["batch"], "one": ["batch", 1], "causal": ["batch", "tokens", "tokens"]}
        operands[3] = ir.val("mask", ir.DataType.INT32, shapes.get(mask, ["batch", "tokens"]))
        inputs.append(operands[3])
        if mask == "counts":
            counts = builder.op("ReduceSum", operands[3], builder.axes(1), keepdims=0)
            counts.dtype, counts.shape = ir.DataType.INT32, ir.Shape(["batch"])
            operands[3] = counts
    if past:
        operands[4] = ir.val("past", ir.DataType.FLOAT, [2, "batch", HEADS, "past", K // HEADS])
        inputs.append(operands[4])
    node = ir.node(
        "Attention", operands, {"num_heads": HEADS, **more}, domain="com.microsoft", name="attention", num_outputs=2
    )
    builder.nodes.append(node)
    outputs = list(node.outputs[: 2 if present else 1])
    node.resize_outputs(len(outputs))
    for value, name, shape in zip(
        outputs, ("y", "present"), ([None, None, K], [2, None, HEADS, None, 4]), strict=False
    ):
        value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape(shape)
    if shared:
        assert operands[1] is not None
        outputs.append(builder.op("MatMul", x, operands[1]))
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=builder.nodes,
        initializers=builder.weights,
        opset_imports={"": 18, "com.microsoft": 1},
        name="attention",
    )
    return ir.Model(graph, ir_version=10)


def feeds(model: ir.Model) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    sizes = {"batch": B, "tokens": S}
    given = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else sizes[str(size.value)] for size in value.shape or ()]
        numbers = rng.standard_normal(shape).astype(np.float32)
        given[str(value.name)] = np.array([[1] * S, [1] * (S - 1) + [0]], np.int32) if value.name == "mask" else numbers
    return given


APART: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({}, {"Add"}),
    "a bias of zeros": ({"bias": "zero"}, set()),
    "raw mask": ({"mask": "raw"}, {"Add"}),
    "raw mask of another strength": ({"mask": "raw", "mask_filter_value": -1.0}, {"Add"}),
    "counts of tokens": ({"mask": "counts"}, {"Add", "ReduceSum"}),
    "causal": ({"unidirectional": 1}, {"Add"}),
    "a scale": ({"scale": 0.9}, {"Add"}),
}


@pytest.mark.parametrize("case", APART)
def test_three_products_and_the_same_output(case: str) -> None:
    options, others = APART[case]
    model = attention(**options)
    before = graphs.run(model, feeds(model))
    report = UnpackAttention().run(model, Context())
    assert not report.skipped
    assert len(report.changed) == 1
    assert {node.op_type for node in model.graph} == {"MatMul", "MultiHeadAttention"} | others
    assert [one.shape for one in find_linears(model)] == [(K, K)] * 3
    check.close(before["y"], graphs.run(model, feeds(model))["y"], tolerance=1e-5)


WHOLE: dict[str, tuple[dict[str, Any], str]] = {
    "a cache": ({"past": True}, "attention has a cache"),
    "a present": ({"present": True}, "attention has a cache"),
    "no bias": (
        {"bias": ""},
        "the operator has no bias: ONNX Runtime's kernel ends the process then, so nothing can be tried",
    ),
    "rotary": ({"do_rotary": 1}, "the operator rotates queries and keys"),
    "a bias that is given": ({"bias": "input"}, "the weight is no constant"),
    "starts and ends, perhaps": ({"mask": "input"}, "the mask is none of padding"),
    "a mask of one column": (
        {"mask": "one"},
        "the mask has one column, which MultiHeadAttention does not take",
    ),
    "a mask for each query": ({"mask": "causal"}, "the mask is none of padding"),
    "a weight with other readers": ({"shared": True}, "other nodes read the packed weight too"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_stays_whole(case: str) -> None:
    options, reason = WHOLE[case]
    model = attention(**options)
    text = graphs.text(model)
    report = UnpackAttention().run(model, Context())
    assert not report.changed
    assert list(report.reasons()) == [reason]
    assert graphs.text(model) == text


def test_names_may_be_taken() -> None:
    model = attention()
    other = ir.node("Neg", [model.graph.inputs[0]], name="attention/q")
    other.outputs[0].name, other.outputs[0].dtype = "attention/k.out", ir.DataType.FLOAT
    other.outputs[0].shape = ir.Shape(["batch", "tokens", K])
    model.graph.append(other)
    model.graph.outputs.append(other.outputs[0])
    before = graphs.run(model, feeds(model))
    assert UnpackAttention().run(model, Context()).changed
    for name, want in graphs.run(model, feeds(model)).items():
        check.close(before[name], want, tolerance=1e-5)
