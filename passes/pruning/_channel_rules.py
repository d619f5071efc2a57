"""How operators hand channels on, read them, or make new ones; the table of `_channel_walk`.

Operators that only move numbers are in `_channel_moves`.

Axes:    M out channels, C in channels, G groups of a convolution
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxpress.passes.pruning import _channel_moves as moves
from onnxpress.passes.pruning._channel_walk import Alive, Channels, Labels, Shape, Walk, blame, constant_of, follows

_DOMAINS = ("", "ai.onnx")
# Operators that treat every element alone, whatever further inputs (bounds, a share to drop) they have.
_ALONE = (
    *("Abs", "Acos", "Asin", "Atan", "Cast", "Ceil", "Celu", "Clip", "Cos", "Dropout", "Elu", "Erf"),
    *("Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu"),
    *("Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign"),
    *("Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu"),
)
_MICROSOFT_ALONE = frozenset(("Gelu", "QuickGelu"))
_TOGETHER = (
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean"),
    *("Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor"),
)
# What hands on the channels of every input; all others those of the first.
_OF_ALL = frozenset((*_TOGETHER, "Concat", "FastGelu", "Gemm", "MatMul"))
_POOLS = (*("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"),)


def follow(walk: Walk, node: ir.Node) -> bool:
    """Hands channels on through one node; False when nothing is known of such an operator."""
    is_known = _follow(walk, node)
    for value in () if node.op_type in _OF_ALL else node.inputs[1:]:
        if (state := walk.of(value)) is not None:
            walk.freeze(state.labels, blame(node, "reads them beside what it works on"))
    return is_known


def _follow(walk: Walk, node: ir.Node) -> bool:
    kind = node.op_type
    if node.domain == "com.microsoft" and kind == "FastGelu":  # may add a bias
        return together(walk, node, range(len(node.inputs)))
    if node.domain == "com.microsoft" and kind in _MICROSOFT_ALONE:
        return _alone(walk, node)
    if node.domain not in _DOMAINS:
        return False
    if kind in _ALONE:
        return _alone(walk, node)
    if kind in _TOGETHER:
        return together(walk, node, range(len(node.inputs)))
    if kind in _POOLS:
        return _pool(walk, node)
    rule = _RULES.get(kind) or moves.RULES.get(kind)
    return rule is not None and rule(walk, node)


def _alone(walk: Walk, node: ir.Node) -> bool:
    state = walk.of(node.inputs[0])
    if state is not None:
        walk.give(node.outputs[0], state.axis, state.labels)
    return not any(one.uses() or one.is_graph_output() for one in node.outputs[1:])


def _pool(walk: Walk, node: ir.Node) -> bool:
    state = walk.of(node.inputs[0])
    return state is None or (state.axis == 1 and _alone(walk, node))


def together(walk: Walk, node: ir.Node, slots: range) -> bool:
    """Elementwise, operands broadcast: channels that meet are the same, and constants along them are cut."""
    states = [(slot, state) for slot in slots if (state := walk.of(node.inputs[slot])) is not None]
    if not states:
        return True
    ranks = {slot: walk.shape(node.inputs[slot]) for slot in slots if node.inputs[slot] is not None}
    if any(shape is None for shape in ranks.values()):
        return False
    rank = max(len(shape or ()) for shape in ranks.values())
    # From the right, as broadcasting counts.
    ends = {slot: state.axis - len(ranks[slot] or ()) for slot, state in states}
    width = max(len(state.labels) for _, state in states)
    wide = [(slot, state) for slot, state in states if len(state.labels) == width]
    end = ends[wide[0][0]]
    if any(ends[slot] != end for slot, _ in wide) or any(
        len(state.labels) != width and (ends[slot] != end or len(state.labels) != 1) for slot, state in states
    ):
        return False
    labels = wide[0][1].labels
    for _, state in states:
        if len(state.labels) == width:
            walk.join(labels, state.labels)
        else:
            walk.freeze(state.labels, blame(node, "spreads it over all channels"))
    others = [(slot, shape or ()) for slot, shape in ranks.items() if walk.of(node.inputs[slot]) is None]
    for slot, shape in others:
        _meet(walk, node, slot, shape, end, labels)
    # A single channel that meets several others of which nothing is known is spread, and stays.
    if len(labels) > 1 or all(len(shape) < -end or shape[end] == 1 for _, shape in others):
        walk.give(node.outputs[0], rank + end, labels)
    return True


def _meet(walk: Walk, node: ir.Node, slot: int, shape: tuple[int | None, ...], end: int, labels: Labels) -> None:
    """An operand without channels of its own meets some."""
    if len(shape) < -end or shape[end] == 1:
        return
    if constant_of(node.inputs[slot]) is not None and shape[end] == len(labels):
        walk.cut(node, slot, len(shape) + end, labels, "vector")
    else:
        value = node.inputs[slot]
        assert value is not None
        walk.freeze(labels, blame(node, f"combines them with {value.name}, which is not cut"))


def _conv(walk: Walk, node: ir.Node) -> bool:
    state, weight = walk.of(node.inputs[0]), constant_of(node.inputs[1])
    if weight is None or _adds_unknown(node) or (state is not None and state.axis != 1):
        return False
    rows, columns, *_ = (int(one) for one in weight.shape.numpy())
    groups = _int(node, "group", 1)
    if groups > 1 and columns == 1:
        return _depthwise(walk, node, state, rows, groups)
    if state is not None:
        walk.cut(node, 1, 1, _alike(walk, state.labels, groups), "column")
    _produce(walk, node, 0, np.tile(walk.new(rows // groups), groups), 1)
    return True


def _depthwise(walk: Walk, node: ir.Node, state: Channels | None, rows: int, groups: int) -> bool:
    """Each channel has filters of its own, `rows / groups` of them."""
    if state is None:
        return True
    labels = np.repeat(state.labels, rows // groups)
    _produce(walk, node, 0, labels, 1, role="vector")

    def regroup(alive: Alive) -> None:
        node.attributes["group"] = ir.AttrInt64("group", int(alive(state.labels).sum()))

    walk.edit(state.labels, regroup)
    return True


def _alike(walk: Walk, labels: Labels, groups: int) -> Labels:
    """Of a grouped convolution all groups lose channels of the same numbers; labels of one group."""
    parts: list[Labels] = list(labels.reshape(groups, -1))
    for part in parts[1:]:
        walk.join(parts[0], part)
    return parts[0]


def _adds_unknown(node: ir.Node) -> bool:
    """Whether a bias is computed, so that nothing can be cut from it."""
    return len(node.inputs) > 2 and node.inputs[2] is not None and constant_of(node.inputs[2]) is None


def _conv_transpose(walk: Walk, node: ir.Node) -> bool:
    state, weight = walk.of(node.inputs[0]), constant_of(node.inputs[1])
    if weight is None or _adds_unknown(node) or (state is not None and state.axis != 1):
        return False
    channels, columns, *_ = (int(one) for one in weight.shape.numpy())
    groups = _int(node, "group", 1)
    if groups > 1:
        return groups == channels and columns == 1 and _depthwise(walk, node, state, channels, groups)
    if state is not None:
        walk.cut(node, 1, 0, state.labels, "column")
    _produce(walk, node, 1, walk.new(columns), 1)
    return True


def _gemm(walk: Walk, node: ir.Node) -> bool:
    state, weight = walk.of(node.inputs[0]), constant_of(node.inputs[1])
    if any(walk.of(one) is not None for one in node.inputs[1:]):
        for one in node.inputs[1:]:
            if (other := walk.of(one)) is not None:
                walk.freeze(other.labels, blame(node, "multiplies two activations"))
        return False
    if weight is None or _adds_unknown(node) or (state is not None and (_int(node, "transA", 0) or state.axis != 1)):
        return False
    turned = _int(node, "transB", 0)
    rows = int(weight.shape.numpy()[0 if turned else 1])
    if state is not None:
        walk.cut(node, 1, 1 if turned else 0, state.labels, "column")
    labels = walk.new(rows)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    sizes = walk.shape(bias)
    if bias is not None and sizes and sizes[-1] == rows:
        walk.cut(node, 2, len(sizes) - 1, labels, "vector")
    walk.cut(node, 1, 0 if turned else 1, labels, "row")
    walk.give(node.outputs[0], 1, labels)
    return True


def _matmul(walk: Walk, node: ir.Node) -> bool:
    state, weight = walk.of(node.inputs[0]), constant_of(node.inputs[1])
    if (other := walk.of(node.inputs[1])) is not None:
        walk.freeze(other.labels, blame(node, "multiplies two activations, or a matrix with one"))
        return False
    shape = walk.shape(node.inputs[0])
    if weight is None or len(weight.shape) != 2 or shape is None or len(shape) < 2:
        return False
    last = len(shape) - 1
    if state is not None and state.axis != last:
        return False
    if state is not None:
        walk.cut(node, 1, 0, state.labels, "column")
    labels = walk.new(int(weight.shape.numpy()[1]))
    walk.cut(node, 1, 1, labels, "row")
    walk.give(node.outputs[0], last, labels)
    return True


def _produce(walk: Walk, node: ir.Node, axis: int, labels: Labels, out_axis: int, role: str = "row") -> None:
    """A convolution has these out channels, and perhaps a bias for each."""
    walk.cut(node, 1, axis, labels, role)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        walk.cut(node, 2, 0, labels, "vector")
    walk.give(node.outputs[0], out_axis, labels)


def _norm(walk: Walk, node: ir.Node) -> bool:
    """BatchNormalization and InstanceNormalization: vectors along the channels."""
    state = walk.of(node.inputs[0])
    if state is None:
        return True
    if state.axis != 1 or any(constant_of(one) is None for one in node.inputs[1:]):
        return False
    for slot in range(1, len(node.inputs)):
        walk.cut(node, slot, 0, state.labels, "vector")
    return _alone(walk, node)


def _layer_norm(walk: Walk, node: ir.Node) -> bool:
    state, shape = walk.of(node.inputs[0]), walk.shape(node.inputs[0])
    if state is None:
        return True
    if shape is None or state.axis >= _int(node, "axis", -1) % len(shape):
        walk.freeze(state.labels, blame(node, "takes means over them"))
        return True
    return _alone(walk, node)


@follows
def _softmax(walk: Walk, node: ir.Node, state: Channels, shape: Shape) -> bool:
    axis = _int(node, "axis", -1 if walk.opset >= 13 else 1) % len(shape)
    # Before opset 13 all axes from this one on were one.
    if axis == state.axis or (walk.opset < 13 and state.axis > axis):
        walk.freeze(state.labels, blame(node, "normalizes over them"))
        return True
    return _alone(walk, node)


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


_RULES: dict[str, Callable[[Walk, ir.Node], bool]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _norm,
    "InstanceNormalization": _norm,
    "LayerNormalization": _layer_norm,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
}
