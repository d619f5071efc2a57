"""Which channels hang together: one walk through the graph gives every place along an axis a label.

A producer (Conv, Gemm, MatMul with a constant matrix) makes new labels, one for each of its rows. Everything that
treats channels alone hands them on: an addition says that two labels are one channel, Concat puts rows of labels
together, Flatten repeats each. What mixes channels reads them: its columns bear labels too. An operator that is not
understood freezes what it reads, and its name is the reason. Afterwards a label that is not frozen can go, with every
row, column and constant that bears it.

Paper:   arXiv:2301.12900 (DepGraph)
Differs: labels for single places instead of edges between layers: Concat, Split, Reshape and groups need no offsets
Axes:    C channels
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxpress.compiler.pass_ import subgraphs

Labels = npt.NDArray[np.int64]
Alive = Callable[[Labels], npt.NDArray[np.bool_]]
Shape = tuple[int | None, ...]

_INLINE = 1024  # elements up to which shape inference is told a constant's numbers: targets of Reshape, bounds of Slice


@dataclass(frozen=True)
class Channels:
    """The labels [C] of a value along one of its axes; other axes hold none."""

    axis: int
    labels: Labels


@dataclass(frozen=True)
class Cut:
    """A constant that a node reads as input `slot`, of which places along `axis` bear labels.

    `role` is "row" of a producer, "column" of a reader, or "vector" for whatever goes along (biases, norms).
    """

    node: ir.Node
    slot: int
    axis: int
    labels: Labels
    role: str


@dataclass
class Walk:
    """What is known after a walk.

    Attributes:
        channels: of each value that has any, by its id.
        cuts: constants to be cut, in the order of the graph.
        edits: functions that rewrite attributes and small constants, once it is known which labels stay.
        parts: labels of values that hold some of another's channels, and must not be left without any.
        shapes: of each value, by its id, as far as they can be inferred.
    """

    opset: int
    shapes: dict[int, Shape]
    channels: dict[int, Channels] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    edits: list[tuple[Labels, Callable[[Alive], None]]] = field(default_factory=list)
    parts: list[Labels] = field(default_factory=list)
    _parents: list[int] = field(default_factory=list)
    _frozen: dict[int, str] = field(default_factory=dict)
    _weights: dict[tuple[int, int, str], Labels] = field(default_factory=dict)

    def new(self, count: int) -> Labels:
        """Labels of channels that were not there before."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, label: int) -> int:
        """The label that stands for all that are the same channel."""
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    def roots(self, labels: Labels) -> Labels:
        """`root` of each."""
        return np.array([self.root(int(one)) for one in labels], np.int64)

    def join(self, left: Labels, right: Labels) -> None:
        """These are the same channels, one by one."""
        for one, other in zip(left, right, strict=True):
            kept, gone = sorted((self.root(int(one)), self.root(int(other))))
            if kept != gone:
                self._parents[gone] = kept
                if gone in self._frozen:
                    self._frozen.setdefault(kept, self._frozen.pop(gone))

    def freeze(self, labels: Labels, reason: str) -> None:
        """These stay, and why."""
        for one in labels:
            self._frozen.setdefault(self.root(int(one)), reason)

    def reason(self, label: int) -> str | None:
        """Why a channel stays, None when it may go."""
        return self._frozen.get(self.root(label))

    def of(self, value: ir.Value | None) -> Channels | None:
        """The channels of a value."""
        return None if value is None else self.channels.get(id(value))

    def give(self, value: ir.Value, axis: int, labels: Labels) -> None:
        """A value has these channels, one for each place along the axis; else they stay, and it has none."""
        sizes = self.shape(value)
        if sizes is not None and not (0 <= axis < len(sizes) and sizes[axis] in (None, len(labels))):
            self.freeze(labels, f"{value.name} has another size than their number")
            return
        self.channels[id(value)] = Channels(axis, labels)

    def cut(self, node: ir.Node, slot: int, axis: int, labels: Labels, role: str) -> None:
        """A constant bears labels; a matrix that several nodes read has the same in all, so that it stays one."""
        self.cuts.append(Cut(node, slot, axis, labels, role))
        value = node.inputs[slot]
        assert value is not None
        if role == "vector":  # equal constants are often one, whatever they belong to
            return
        known = self._weights.setdefault((id(origin(value)), axis, role), labels)
        if known is not labels:
            if len(known) == len(labels):
                self.join(known, labels)
            else:
                for one in (known, labels):
                    self.freeze(one, f"{value.name} is read in several ways")

    def edit(self, labels: Labels, rewrite: Callable[[Alive], None]) -> None:
        """Something beside constants along the channels has to change when some of these go."""
        self.edits.append((labels, rewrite))

    def shape(self, value: ir.Value | None) -> Shape | None:
        """Sizes of a value, None for those that are not known."""
        if value is None:
            return None
        tensor = constant_of(value)
        return tuple(int(one) for one in tensor.shape.numpy()) if tensor is not None else self.shapes.get(id(value))


def origin(value: ir.Value) -> ir.Value:
    """What Identity copied a value from: torch's exporter stores equal weights once."""
    maker = value.producer()
    if maker is None or maker.op_type != "Identity" or maker.inputs[0] is None:
        return value
    return origin(maker.inputs[0])


def uses(value: ir.Value) -> int:
    """How many inputs of nodes read a value, through Identity too; an output of the graph is one more."""
    copies = [node.outputs[0] for node, _ in value.uses() if node.op_type == "Identity"]
    return len(value.uses()) - len(copies) + sum(map(uses, copies)) + value.is_graph_output()


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or Constant that no caller can replace."""
    value = None if value is None else origin(value)
    if value is None or value.is_graph_input():
        return None
    maker = value.producer()
    held = maker.attributes.get("value") if maker is not None and maker.op_type == "Constant" else None
    # `get_const_tensor` would give the attribute's tensor a name.
    return held.as_tensor() if held is not None else ir.convenience.get_const_tensor(value)


def follows(rule: Callable[[Walk, ir.Node, Channels, Shape], bool]) -> Callable[[Walk, ir.Node], bool]:
    """A rule for operators that move or keep the channels of their first input, where there are any of known sizes."""

    @functools.wraps(rule)
    def run(walk: Walk, node: ir.Node) -> bool:
        state, shape = walk.of(node.inputs[0]), walk.shape(node.inputs[0])
        if state is None:
            return True
        return shape is not None and rule(walk, node, state, shape)

    return run


def name_of(node: ir.Node) -> str:
    """What people find a node by."""
    return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type


def blame(node: ir.Node, what: str) -> str:
    """A reason that names the node."""
    return f"{node.op_type} {name_of(node)} {what}"


def walk(model: ir.Model, rules: Callable[[Walk, ir.Node], bool]) -> Walk:
    """Follows channels through a graph.

    Args:
        model: not changed.
        rules: hands channels on through one node; False when it does not know the operator.
    """
    found = Walk(model.graph.opset_imports.get("", 18), infer_shapes(model))
    for node in model.graph:
        touched = [one for one in map(found.of, node.inputs) if one is not None]
        for value in _captured(node):
            if (inside := found.of(value)) is not None:
                found.freeze(inside.labels, blame(node, "reads them inside of its graph"))
        if not rules(found, node):
            for one in touched:
                found.freeze(one.labels, blame(node, "reads them, which this pass does not see through"))
    for value in model.graph.outputs:
        if (last := found.of(value)) is not None:
            found.freeze(last.labels, f"{value.name} is an output of the model")
    return found


def _captured(node: ir.Node) -> list[ir.Value]:
    """Values that the graphs inside of a node take from around it."""
    found = []
    for graph in subgraphs(node):
        for inner in ir.traversal.RecursiveGraphIterator(graph):
            found += [value for value in inner.inputs if value is not None]
        found += list(graph.outputs)
    return found


def infer_shapes(model: ir.Model) -> dict[int, Shape]:
    """Shapes of values by id, from those that the graph declares and what follows from them; the model stays as it is.

    Large weights are told by their shapes alone, so that nothing of them is read.
    """
    graph = model.graph
    proto = onnx.ModelProto(ir_version=max(model.ir_version or 10, 4))
    proto.opset_import.extend(onnx.OperatorSetIdProto(domain=key, version=one) for key, one in _opsets(graph))
    known = {value.name for value in graph.inputs}
    proto.graph.name = "shapes"
    proto.graph.input.extend(ir.to_proto(value) for value in graph.inputs)
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or name in known:
            continue
        if tensor.size <= _INLINE:
            inline = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)
            proto.graph.initializer.append(ir.to_proto(inline))
        else:
            weight = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
            proto.graph.input.append(ir.to_proto(weight))
    proto.graph.node.extend(ir.to_proto(node) for node in graph)
    outputs = {value.name for value in graph.outputs}
    proto.graph.output.extend(ir.to_proto(value) for value in graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value.name and value.name not in outputs and value.type is not None and value.shape is not None:
                proto.graph.value_info.append(ir.to_proto(value))
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    by_name = {one.name: one for one in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input)}
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    return {id(value): dims for value in values if (dims := _dims(by_name.get(value.name or ""))) is not None}


def _opsets(graph: ir.Graph) -> list[tuple[str, int]]:
    return [(domain, version) for domain, version in graph.opset_imports.items() if version is not None]


def _dims(info: Any) -> Shape | None:
    if info is None or not info.type.tensor_type.HasField("shape"):
        return None
    return tuple(one.dim_value if one.dim_value > 0 else None for one in info.type.tensor_type.shape.dim)
