"""Projections that read the same activation, and how they become one matrix.

Packing puts the rows of several weights [N_i, K] below each other: one product of width sum(N_i) instead of several,
the same numbers. Rows are quantized one by one, so codes are packed as floats are. Nothing is copied: the joined
weight reads its parts when it is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, other, producer, vector
from onnxpress.compiler.linears import drop_unused, unique_name

_QUANTIZED = "MatMulNBits"


@dataclass
class Projection:
    """x W (+ b).

    Attributes:
        node: the MatMul or MatMulNBits.
        bias: b, an initializer [N]; None when nothing is added.
        output: what the last of the nodes gives.
    """

    node: ir.Node
    bias: ir.Value | None
    output: ir.Value

    @property
    def activation(self) -> ir.Value | None:
        """x, [..., K]."""
        return self.node.inputs[0]

    @property
    def weights(self) -> list[ir.Value]:
        """Initializers that hold the matrix: [K, N], or codes, scales and zero points."""
        return [value for value in self.node.inputs[1:] if value is not None]

    @property
    def width(self) -> int:
        """N."""
        axis = _axis(self.node)
        return _sizes(self.weights[0])[axis]

    @property
    def format(self) -> tuple[Any, ...]:
        """What two projections must have in common to be stored as one."""
        attributes = {key: one.value for key, one in self.node.attributes.items() if key != "N"}
        types = [value.dtype for value in self.weights]
        return self.node.op_type, sorted(attributes.items()), types, self.bias is None


def read_projection(value: ir.Value | None) -> Projection | None:
    """The projection that gives `value`, if nothing else reads its parts; None when it is something else."""
    if value is None or value.is_graph_output():
        return None
    node, bias = find_product(value), None
    if node is None:
        return None
    if node.outputs[0] is not value:
        inner, add = node.outputs[0], value.producer()
        if len(inner.uses()) != 1 or inner.is_graph_output() or add is None:
            return None
        bias = other(add, inner)
    if any(one is None or one.const_value is None for one in node.inputs[1:4]):
        return None
    if any(one is not None for one in node.inputs[4:]):  # an order of columns, or a bias of its own
        return None
    weight = node.inputs[1]
    if node.op_type == "Gemm" or weight is None or (node.op_type == "MatMul" and len(_sizes(weight)) != 2):
        return None
    found = Projection(node, bias, value)
    return None if bias is not None and _sizes(bias) != [found.width] else found


def find_product(value: ir.Value | None) -> ir.Node | None:
    """The product with a matrix behind `value`, at most a constant vector added; whatever else reads it."""
    node = producer(value, "MatMul", _QUANTIZED, "Gemm", "Add")
    if node is not None and node.op_type == "Add":
        inner = other(node, next((one for one in node.inputs if vector(one) is not None), None))
        has_bias = any(vector(one) is not None for one in node.inputs)
        node = producer(inner, "MatMul", _QUANTIZED, "Gemm") if has_bias else None
    return node


def obstacle(parts: Sequence[Projection]) -> str | None:
    """Why the projections cannot become one; None when they can."""
    if len({id(one.activation) for one in parts}) != 1:
        return "the projections do not share their input"
    if len({one.bias is None for one in parts}) != 1:
        return "some projections have a bias and some have none"
    if any(one.format != parts[0].format for one in parts):
        return "the projections are stored in different formats"
    stored = [value for one in parts for value in (*one.weights, one.bias) if value is not None]
    if any(len(value.uses()) != 1 or value.is_graph_output() for value in stored):
        return "other nodes read a weight too: joined, it would be stored twice"
    return None


def pack(fuser: Fuser, parts: Sequence[Projection], name: str) -> ir.Value:
    """Adds the nodes of one projection that gives all parts side by side, [..., sum(N_i)]; the parts stay for now.

    Args:
        fuser: of the pass that packs.
        parts: projections without an `obstacle`.
        name: of the new product.

    Returns:
        The packed output.
    """
    graph, first = fuser.model.graph, parts[0].node
    name = unused_name(graph, name)
    axis, width = _axis(first), sum(one.width for one in parts)
    roles = ("weight",) if axis else ("codes", "scale", "zero")
    columns = zip(*(one.weights for one in parts), strict=True)
    whole = [joined(graph, values, f"{name}.{role}", axis) for role, values in zip(roles, columns, strict=False)]
    attributes = [ir.AttrInt64("N", width) if key == "N" else one for key, one in first.attributes.items()]
    nodes = [ir.Node(first.domain, first.op_type, [first.inputs[0], *whole], attributes, name=name)]
    biases = [one.bias for one in parts if one.bias is not None]
    if biases:
        bias = joined(graph, biases, f"{name}.bias", axis=0)
        nodes.append(ir.Node("", "Add", [nodes[0].outputs[0], bias], name=f"{name}/bias"))
    output = parts[0].output
    for node in nodes:
        node.outputs[0].name = f"{node.name}.out"
        node.outputs[0].shape = None if output.shape is None else ir.Shape([*list(output.shape)[:-1], width])
        node.outputs[0].type = output.type
    fuser.insert(nodes)
    return nodes[-1].outputs[0]


def drop(graph: ir.Graph, part: Projection) -> None:
    """Removes the nodes of a projection that nothing reads any more, and its weights."""
    add = part.output.producer()
    dead = [part.node] if add is part.node or add is None else [add, part.node]
    weights = part.weights if part.bias is None else [*part.weights, part.bias]
    graph.remove(dead, safe=True)
    for value in weights:
        drop_unused(graph, value)


def unused_name(graph: ir.Graph, base: str) -> str:
    """`base`, or `base_1`, `base_2`, ... when nodes, values or weights of the graph are called so."""
    taken = {name for node in graph for name in (node.name, *(value.name for value in node.outputs))}
    name, number = base, 0
    while name in taken or f"{name}.out" in taken or any(key.startswith(f"{name}.") for key in graph.initializers):
        number += 1
        name = f"{base}_{number}"
    return name


def _axis(node: ir.Node) -> int:
    """Where the rows of the matrix lie in what is stored."""
    return 1 if node.op_type == "MatMul" else 0


def _sizes(value: ir.Value) -> list[int]:
    assert value.const_value is not None
    return [int(size) for size in value.const_value.shape.numpy()]


def joined(graph: ir.Graph, parts: Sequence[ir.Value], base: str, axis: int) -> ir.Value:
    """A lazily concatenated initializer."""
    name = unique_name(graph, base)
    tensors = [part.const_value for part in parts if part.const_value is not None]
    size = _sizes(parts[0])
    size[axis] = sum(_sizes(part)[axis] for part in parts)
    dtype = tensors[0].dtype

    def read() -> ir.Tensor[Any]:
        return ir.Tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=axis), dtype=dtype, name=name)

    lazy = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(size), name=name)
    value = ir.Value(name=name, shape=ir.Shape(size), type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(value)
    return value
