"""The features inside a feed-forward layer: who makes them, what they pass through, who reads them.

Between the projections up (and gate) and the projection down, features do not see each other: activation functions and
the gated product work on each alone. So they may be put in another order, or some of them left out, if rows of the
first and columns of the second are treated alike. This is found by walking back from the reader, whatever the
activation is made of and however the projections are packed; a walk that meets anything else says what it met.

Axes: I inner features, N out features and K in features of a linear
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.fusing import constant
from onnxpress.compiler.linears import Linear, derived, drop_unused

Index = npt.NDArray[np.integer]

# Operators that treat every element alone, and have no operand besides.
_UNARY = (
    *("Sigmoid", "Tanh", "Relu", "Erf", "Gelu", "Softplus", "Swish", "HardSigmoid", "HardSwish", "Elu", "LeakyRelu"),
    *("Exp", "Neg", "Abs", "Sqrt", "Reciprocal", "Cast", "Identity", "QuickGelu", "FastGelu", "Mish", "Selu", "Celu"),
    *("Softsign", "Log"),
)
_MOVES = ("Slice", "Reshape", "Transpose", "Gather", "Squeeze", "Unsqueeze")
_ELEMENTWISE = ("Mul", "Add", "Sub", "Div", "Pow", "Min", "Max", "Clip", "BiasGelu", "Where")


@dataclass
class Part:
    """Rows `start` to `start + I` of what a linear makes are the features, in order.

    Attributes:
        linear: up, gate, or both below each other.
        start: 0, or I where it is the second of two.
    """

    linear: Linear
    start: int


@dataclass
class Vector:
    """A constant that is added to, or multiplied with, values of which the features are a part.

    Attributes:
        node, slot: reads it as this input.
        starts: where the features begin along its last axis.
    """

    node: ir.Node
    slot: int
    starts: tuple[int, ...]


@dataclass
class InnerFeatures:
    """The I features of one layer.

    Attributes:
        reader: the linear whose columns they are.
        parts: the linears whose rows they are; one that packs two has two parts.
        vectors: biases and gains along them; those inside of a product (Gemm, MatMulNBits) are none of them.
        cuts: Splits that take a packed product apart.
        values: all activations that hold them.
    """

    reader: Linear
    parts: list[Part] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    cuts: list[ir.Node] = field(default_factory=list)
    values: list[ir.Value] = field(default_factory=list)

    @property
    def width(self) -> int:
        """I."""
        return self.reader.num_in

    @property
    def makers(self) -> list[Linear]:
        """Each linear of `parts` once."""
        return list({id(part.linear): part.linear for part in self.parts}.values())

    def rows(self, linear: Linear, order_I: Index) -> Index:
        """The rows of a maker that are left, or their new order, when the features are `order_I`."""
        starts = sorted(part.start for part in self.parts if part.linear is linear)
        return np.concatenate([order_I + start for start in starts])

    def choose_vectors(self, order_I: Index) -> None:
        """Cuts or reorders the constants; linears and Splits are left to the caller."""
        for vector in self.vectors:
            choose_constant(vector.node, vector.slot, np.concatenate([order_I + start for start in vector.starts]))

    def resize(self, width: int) -> None:
        """Tells Splits and the shapes of activations that `width` features are left."""
        for node in self.cuts:
            if len(node.inputs) > 1:
                graph, count = node.graph, len(node.outputs)
                assert isinstance(graph, ir.Graph)
                old = node.inputs[1]
                sizes = np.full(count, width, np.int64)
                node.replace_input_with(1, constant(graph, sizes, "split/" + "x".join([str(width)] * count)))
                drop_unused(graph, old)
        for value in self.values:
            if value.shape is not None and isinstance(value.shape[-1], int):
                value.shape = ir.Shape([*list(value.shape)[:-1], value.shape[-1] // self.width * width])


def choose_constant(node: ir.Node, slot: int, index: Index) -> ir.Value:
    """Lets a node read these elements of the last axis of a constant; other nodes that read it keep theirs."""
    old, graph = node.inputs[slot], node.graph
    assert old is not None
    assert old.const_value is not None
    assert isinstance(graph, ir.Graph)
    sizes = [*old.const_value.shape.numpy()[:-1], len(index)]
    new = derived(graph, old.const_value, f"{old.name}.chosen", sizes, lambda array: array[..., index])
    node.replace_input_with(slot, new)
    drop_unused(graph, old)
    return new


def find_inner_features(reader: Linear, linears: Iterable[Linear]) -> InnerFeatures | str:
    """The features that `reader` (of kind "down") reads, or why they cannot be told apart.

    Args:
        reader: one of `linears`.
        linears: of `find_linears(model)`.
    """
    makers = {id(one.output): one for one in linears}
    found = InnerFeatures(reader)
    seen: dict[int, ir.Value] = {}
    walked: dict[int, ir.Node] = {id(reader.node): reader.node}
    if reader.factors is not None:
        walked |= {id(node): node for value in [reader.activation] for node in value.consumers()}
    starts: dict[int, set[int]] = {}
    queue = [(reader.activation, 0)]
    while queue:
        value, start = queue.pop()
        places = starts.setdefault(id(value), set())
        if start in places:
            continue
        places.add(start)
        seen[id(value)] = value
        maker = makers.get(id(value))
        if maker is not None:
            found.parts.append(Part(maker, start))
            continue
        node = value.producer()
        if node is None:
            return f"{value.name} is an input of the model"
        sources = _sources(node, value, start, found)
        if isinstance(sources, str):
            return sources
        walked[id(node)] = node
        queue += sources
    found.values = list(seen.values())
    for value in found.values:
        if value.is_graph_output():
            return f"{value.name} is an output of the model"
        for node in value.consumers():
            if id(node) not in walked:
                return f"{node.op_type} reads them too"
    for vector in found.vectors:
        vector.starts = tuple(sorted(starts[id(vector.node.outputs[0])]))
    return _checked(found)


def _sources(node: ir.Node, value: ir.Value, start: int, found: InnerFeatures) -> list[tuple[ir.Value, int]] | str:
    """Values that `value` is made of, and where in them the features begin; constants along them are noted."""
    if node.op_type == "Split":
        return _cut(node, value, start, found)
    if node.op_type not in _UNARY and node.op_type not in _ELEMENTWISE:
        return f"{node.op_type} makes them" + (": fuse before" if node.op_type in _MOVES else "")
    if value is not node.outputs[0]:
        return f"{node.op_type} gives more than one value"
    sources: list[tuple[ir.Value, int]] = []
    for slot, operand in enumerate(node.inputs):
        made = None if operand is None else operand.producer()
        if operand is None or (made is not None and made.op_type == "Constant" and _is_scalar(made)):
            continue
        if operand.const_value is None:
            sources.append((operand, start))
        elif operand.const_value.size > 1:
            if operand.is_graph_input():
                return f"a caller may replace {operand.name}"
            if not any(one.node is node and one.slot == slot for one in found.vectors):
                found.vectors.append(Vector(node, slot, ()))
    return sources or f"{node.op_type} makes them of constants"


def _is_scalar(constant: ir.Node) -> bool:
    """Whether a Constant holds one number."""
    value = constant.attributes.get("value")
    return value is None or value.as_tensor().size == 1


def _cut(node: ir.Node, value: ir.Value, start: int, found: InnerFeatures) -> list[tuple[ir.Value, int]] | str:
    """What a Split takes apart, and where in it the features begin."""
    axis = node.attributes.get("axis")
    source = node.inputs[0]
    rank = None if source is None or source.shape is None else len(source.shape)
    if source is None or axis is None or axis.as_int() not in (-1, *([rank - 1] if rank else [])):
        return "a Split along another axis makes them"
    if start != 0:
        return "a Split of a Split makes them"
    width = found.width
    sizes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if len(node.inputs) > 1 and (sizes is None or any(int(size) != width for size in sizes.numpy())):
        return "a Split into unequal parts makes them"
    if node not in found.cuts:
        found.cuts.append(node)
    return [(source, list(node.outputs).index(value) * width)]


def _checked(found: InnerFeatures) -> InnerFeatures | str:
    """The features if all rows of their makers are theirs, and nobody else reads a matrix."""
    for maker in found.makers:
        starts = sorted(part.start for part in found.parts if part.linear is maker)
        if starts != list(range(0, maker.num_out, found.width)) or maker.num_out != len(starts) * found.width:
            return f"{maker.name} makes something else too"
    for linear in (found.reader, *found.makers):
        if any(one.is_shared for one in linear.factors or (linear,)):
            return f"the weight of {linear.name} is shared"
    for vector in found.vectors:
        constant = vector.node.inputs[vector.slot]
        assert constant is not None
        assert constant.const_value is not None
        sizes = constant.const_value.shape.numpy()
        if constant.const_value.size != sizes[-1] or sizes[-1] != len(vector.starts) * found.width:
            return f"{constant.name} is no vector along them"
    return found


def inner_biases(linear: Linear) -> list[int]:
    """Inputs of a linear's own node that are its bias."""
    return [slot for slot, value in enumerate(linear.node.inputs) if value is not None and value is linear.bias]


def all_inner_features(linears: Sequence[Linear]) -> tuple[list[InnerFeatures], dict[str, str]]:
    """Of every linear of kind "down", and why others have none, by their name."""
    found: list[InnerFeatures] = []
    reasons: dict[str, str] = {}
    for one in linears:
        if one.kind == "down":
            features = find_inner_features(one, linears)
            if isinstance(features, str):
                reasons[one.name] = features
            else:
                found.append(features)
    return found, reasons
