"""A graph of self-attention with its projections, in every form that the passes around it must tell apart."""

from __future__ import annotations

from collections.abc import Collection

import graphs
import numpy as np
import onnx_ir as ir

B, S, K, OUT = 2, 5, 12, 10


def self_attention(
    *,
    width: int = K,
    heads: int = 2,
    value_width: int = K,
    biases: Collection[str] = "qkv",
    keys_of: str = "x",
    own_bias: bool = False,
    cache: bool = False,
    padding: bool = False,
    score_bias: bool = False,
    scale: float | None = None,
    unidirectional: int | None = None,
    mask_filter_value: float | None = None,
    reads: str = "",
    shared: bool = False,
    one_bias: bool = False,
    dtype: ir.DataType = ir.DataType.FLOAT,
    seed: int = 0,
) -> ir.Model:
    """y = MultiHeadAttention(x Wq + a, x Wk + b, x Wv + c) W.

    Args:
        width, value_width: of queries and keys, and of values; x has K columns.
        heads: of all of them.
        biases: which of "qkv" have one.
        keys_of: "x", another input "y", or "direct": the input itself.
        own_bias, cache, padding, score_bias: inputs of the operator.
        scale, unidirectional, mask_filter_value: its attributes, where given.
        reads: an operator that reads the keys too, its result an output.
        shared: another product reads the matrix of the queries too.
        one_bias: all projections add the same vector.
        dtype: of all floats.
    """
    if value_width == K:
        value_width = width
    builder = graphs.Builder(K, 8, seed)
    x = ir.val("x", dtype, ["batch", "tokens", K])
    inputs, streams = [x], []
    for kind, size in (("q", width), ("k", width), ("v", value_width)):
        source = x
        if kind == "k" and keys_of != "x":
            source = ir.val("keys", dtype, ["batch", "tokens", K if keys_of == "y" else width])
            inputs.append(source)
        if kind == "k" and keys_of == "direct":
            streams.append(source)
            continue
        value = builder.op("MatMul", source, builder.weight(K, size), width=size)
        if kind in biases:
            bias = next((one for one in builder.weights if one_bias and one.shape == [size]), None)
            value = builder.op("Add", value, builder.weight(size) if bias is None else bias, width=size)
        streams.append(value)
    operands: list[ir.Value | None] = [*streams, *[None] * 5]
    more = {
        3: (own_bias, "bias", dtype, [2 * width + value_width]),
        4: (padding, "padding", ir.DataType.INT32, ["batch", "tokens"]),
        5: (score_bias, "scores", dtype, ["batch", 1, "tokens", "tokens"]),
        6: (cache, "past_key", dtype, ["batch", heads, "past", width // heads]),
        7: (cache, "past_value", dtype, ["batch", heads, "past", value_width // heads]),
    }
    for place, (is_there, name, kind_of, shape) in more.items():
        if is_there:
            operands[place] = ir.val(name, kind_of, shape)
            inputs.append(operands[place])
    attributes = {
        "num_heads": heads,
        "scale": scale,
        "unidirectional": unidirectional,
        "mask_filter_value": mask_filter_value,
    }
    given = {name: value for name, value in attributes.items() if value is not None}
    node = ir.node("MultiHeadAttention", operands, attributes=given, domain="com.microsoft", name="attention")
    builder.nodes.append(node)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = "given", dtype, ir.Shape(["batch", "tokens", value_width])
    outputs = [builder.op("MatMul", output, builder.weight(value_width, OUT), width=OUT)]
    outputs[0].name = "y"
    if reads:
        outputs.append(builder.op(reads, streams[1]))
        outputs[1].name, outputs[1].dtype = "read", ir.DataType.INT64 if reads == "Shape" else dtype
    if shared:
        matrix = builder.nodes[0].inputs[1]
        assert matrix is not None
        outputs.append(builder.op("MatMul", x, matrix))
        outputs[-1].name = "other"
    if dtype != ir.DataType.FLOAT:
        for value in [*builder.weights, *(one for made in builder.nodes for one in made.outputs)]:
            value.dtype = dtype
            if value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), name=value.name)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=builder.nodes,
        initializers=builder.weights,
        opset_imports={"": 18, "com.microsoft": 1},
        name="self_attention",
    )
    return ir.Model(graph, ir_version=10)


def feeds(model: ir.Model, seed: int = 1) -> dict[str, graphs.Array]:
    """Random inputs; the last of 5 keys is hidden from the second row by padding, most keys by a score bias."""
    rng = np.random.default_rng(seed)
    sizes = {"batch": B, "tokens": S, "past": 3}
    given: dict[str, graphs.Array] = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else sizes[str(size.value)] for size in value.shape or ()]
        given[str(value.name)] = rng.standard_normal(shape).astype(np.float32)
    if "padding" in given:
        given["padding"] = np.array([[1] * S, [1] * (S - 1) + [0]], np.int32)
    if "scores" in given:
        given["scores"] = np.where(given["scores"] > 0.5, 0.0, -3.0).astype(np.float32)
    return given
