"""Projections that read the same activation, and how they become one matrix.

Packing puts the rows of several weights [N_i, K] below each other: one product of width sum(N_i) instead of several,
the same numbers. What is stored is not copied: the joined weight reads its parts when it is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, other, producer, vector
from onnxpress.compiler.linears import drop_unused, unique_name


@dataclass
class Projection:
    """x W (+ b).

    Attributes:
        activation: x, [..., K].
        weight: W, an initializer [K, N].
        bias: b, an initializer [N]; None when nothing is added.
        output: what the last of the nodes gives.
    """

    activation: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    output: ir.Value


def read_projection(value: ir.Value | None) -> Projection | None:
    """The projection that gives `value`, if nothing else reads its parts; None when it is something else."""
    if value is None or value.is_graph_output():
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
    return Projection(node.inputs[0], weight, bias, value)


def pack(fuser: Fuser, parts: Sequence[Projection], name: str) -> ir.Value:
    """Adds the nodes of one projection that gives all parts side by side, [..., sum(N_i)]; the parts stay for now.

    Args:
        fuser: of the pass that packs.
        parts: projections of one activation, all with a bias or all without.
        name: of the new MatMul.

    Returns:
        The packed output.
    """
    graph = fuser.model.graph
    weight = _joined(graph, [one.weight for one in parts], f"{name}.weight", axis=1)
    nodes = [ir.Node("", "MatMul", [parts[0].activation, weight], name=name)]
    biases = [one.bias for one in parts if one.bias is not None]
    if biases:
        bias = _joined(graph, biases, f"{name}.bias", axis=0)
        nodes.append(ir.Node("", "Add", [nodes[0].outputs[0], bias], name=f"{name}/bias"))
    width = weight.shape[1] if weight.shape is not None else None
    for node in nodes:
        node.outputs[0].name = f"{node.name}.out"
        node.outputs[0].shape = ir.Shape([None, None, width])
        node.outputs[0].type = weight.type
    fuser.insert(nodes)
    return nodes[-1].outputs[0]


def drop(graph: ir.Graph, part: Projection) -> None:
    """Removes the nodes of a projection that nothing reads any more, and its weights."""
    for value in (part.weight, part.bias):
        if value is None:
            continue
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
