"""Joins the query, key and value projections of a GroupQueryAttention into one matrix.

One product of width (H + 2 G) D instead of three: fewer launches, one quantization of the activation, the same numbers.
The operator takes the packed result as its query and leaves key and value empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, other, producer, vector
from onnxpress.compiler.linears import drop_unused, unique_name
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report


@dataclass(frozen=True, kw_only=True)
class PackQkv(Pass):
    """One projection for queries, keys and values."""

    promise: ClassVar[Promise] = Promise.CLOSE

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        for node in list(model.graph):
            if node.op_type != "GroupQueryAttention" or node.inputs[1] is None:
                continue
            site = node.name or "attention"
            operands = [_projection(value) for value in node.inputs[:3]]
            if any(one is None for one in operands):
                report.skip(site, "queries, keys or values do not come straight from a projection")
                continue
            found = [one for one in operands if one is not None]
            if len({id(one.activation) for one in found}) != 1:
                report.skip(site, "the projections do not share their input")
                continue
            if len({one.bias is None for one in found}) != 1:
                report.skip(site, "some projections have a bias and some have none")
                continue
            if any(producer(node.inputs[place], "Transpose", "Reshape") for place in (3, 4)):
                report.skip(site, "the cache is no graph input")
                continue
            _pack(fuser, node, found)
            report.change(site)
        fuser.finish()
        return report


@dataclass
class _Projection:
    activation: ir.Value
    weight: ir.Value  # [K, N]
    bias: ir.Value | None


def _projection(value: ir.Value | None) -> _Projection | None:
    """Reads x W (+ b) behind an operand that nothing else reads; None when it is something else."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    bias = None
    node = producer(value, "MatMul", "Add")
    if node is not None and node.op_type == "Add":
        bias = next((one for one in node.inputs if vector(one) is not None), None)
        inner = other(node, bias)
        if bias is None or inner is None or len(inner.uses()) != 1:
            return None
        node = producer(inner, "MatMul")
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None:
        return None
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
        return None
    return _Projection(node.inputs[0], weight, bias)


def _pack(fuser: Fuser, attention: ir.Node, found: list[_Projection]) -> None:
    graph = fuser.model.graph
    base = (attention.name or "attention").removesuffix("/attention")
    weights = [one.weight for one in found]
    weight = _joined(graph, weights, f"{base}/qkv.weight", axis=1)
    nodes = [ir.Node("", "MatMul", [found[0].activation, weight], name=f"{base}/qkv")]
    biases = [one.bias for one in found if one.bias is not None]
    if biases:
        bias = _joined(graph, biases, f"{base}/qkv.bias", axis=0)
        nodes.append(ir.Node("", "Add", [nodes[0].outputs[0], bias], name=f"{base}/qkv/bias"))
    width = weight.shape[1] if weight.shape is not None else None
    for node in nodes:
        node.outputs[0].name = f"{node.name}.out"
        node.outputs[0].shape = ir.Shape([None, None, width])
        node.outputs[0].type = weight.type
    fuser.insert(nodes)
    attention.replace_input_with(0, nodes[-1].outputs[0])
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)
    for value in [*weights, *biases]:
        _drop_branch(graph, value)


def _drop_branch(graph: ir.Graph, value: ir.Value) -> None:
    """Removes the nodes that only fed the unpacked operator, then the weight they read."""
    for node in list(value.consumers()):
        readers = [reader for output in node.outputs for reader in output.consumers()]
        for reader in readers:
            if reader.op_type == "Add" and not reader.outputs[0].uses():
                graph.remove(reader, safe=True)
        if not any(output.uses() for output in node.outputs):
            graph.remove(node, safe=True)
    drop_unused(graph, value)


def _joined(graph: ir.Graph, parts: list[ir.Value], base: str, axis: int) -> ir.Value:
    """A lazily concatenated initializer."""
    name = unique_name(graph, base)
    tensors = [part.const_value for part in parts if part.const_value is not None]
    sizes = [list(tensor.shape.numpy()) for tensor in tensors]
    size = list(sizes[0])
    size[axis] = sum(one[axis] for one in sizes)
    dtype = tensors[0].dtype

    def read() -> ir.Tensor[Any]:
        return ir.Tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=axis), dtype=dtype, name=name)

    lazy = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(size), name=name)
    value = ir.Value(name=name, shape=ir.Shape(size), type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(value)
    return value
