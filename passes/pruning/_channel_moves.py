"""How operators that only move, choose or sum numbers hand channels on, and what of them is rewritten afterwards.

Axes:    C channels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.fusing import constant
from onnxpress.compiler.linears import drop_unused
from onnxpress.passes.pruning._channel_walk import Alive, Channels, Labels, Shape, Walk, blame, constant_of, follows


def _concat(walk: Walk, node: ir.Node) -> bool:
    states = [walk.of(one) for one in node.inputs]
    known = [state for state in states if state is not None]
    if not known:
        return True
    shapes = [walk.shape(one) for one in node.inputs]
    rank = next((len(shape) for shape in shapes if shape is not None), None)
    if rank is None or len({state.axis for state in known}) != 1:
        return False
    axis = known[0].axis
    if node.attributes["axis"].as_int() % rank != axis:
        if len(known) < len(states):
            return False
        for other in known[1:]:
            walk.join(known[0].labels, other.labels)
        walk.give(node.outputs[0], axis, known[0].labels)
        return True
    parts: list[Labels] = []
    for value, state, shape in zip(node.inputs, states, shapes, strict=True):
        size = None if shape is None else shape[axis]
        if state is None and size is None:
            return False
        part = walk.new(size or 0) if state is None else state.labels
        if state is None:
            walk.freeze(part, blame(node, f"puts {value.name if value else ''} beside them, which is not cut"))
        parts.append(part)
    walk.give(node.outputs[0], axis, np.concatenate(parts))
    return True


@follows
def _split(walk: Walk, node: ir.Node, state: Channels, shape: Shape) -> bool:
    attribute = node.attributes.get("axis")
    if (0 if attribute is None else attribute.as_int()) % len(shape) != state.axis:
        for value in node.outputs:
            walk.give(value, state.axis, state.labels)
        return True
    sizes = _split_sizes(node, len(state.labels))
    if sizes is None:
        return False
    parts = np.split(state.labels, np.cumsum(sizes)[:-1])
    for value, part in zip(node.outputs, parts, strict=True):
        walk.give(value, state.axis, part)
    walk.parts += parts

    def resize(alive: Alive) -> None:
        left = np.array([alive(part).sum() for part in parts], np.int64)
        if walk.opset < 13:
            node.attributes["split"] = ir.AttrInt64s("split", left.tolist())
            return
        node.attributes.pop("num_outputs", None)
        set_constant(node, 1, left)

    walk.edit(state.labels, resize)
    return True


def _split_sizes(node: ir.Node, total: int) -> list[int] | None:
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        tensor = constant_of(node.inputs[1])
        return None if tensor is None else [int(one) for one in tensor.numpy()]
    if (given := node.attributes.get("split")) is not None:
        return list(given.as_ints())
    count = len(node.outputs)
    size = -(-total // count)
    return [*[size] * (count - 1), total - size * (count - 1)]


@follows
def _slice(walk: Walk, node: ir.Node, state: Channels, shape: Shape) -> bool:
    given = [_numbers(one) for one in node.inputs[1:]]
    if len(given) < 2 or any(one is None for one in given):
        return False
    starts, ends = given[0] or [], given[1] or []
    axes = given[2] if len(given) > 2 and given[2] is not None else list(range(len(starts)))
    steps = given[3] if len(given) > 3 and given[3] is not None else [1] * len(starts)
    places = [place for place, axis in enumerate(axes) if axis % len(shape) == state.axis]
    if not places:
        walk.give(node.outputs[0], state.axis, state.labels)
        return True
    (place,) = places
    if steps[place] != 1:
        return False
    start, end, _ = slice(starts[place], ends[place]).indices(len(state.labels))
    walk.give(node.outputs[0], state.axis, state.labels[start:end])
    walk.parts.append(state.labels[start:end])

    def resize(alive: Alive) -> None:
        first = int(alive(state.labels[:start]).sum())
        last = first + int(alive(state.labels[start:end]).sum())
        dtype = np.asarray(_array(node.inputs[1])).dtype
        for slot, values, new in ((1, starts, first), (2, ends, last)):
            changed = list(values)
            changed[place] = new
            set_constant(node, slot, np.array(changed, dtype))

    walk.edit(state.labels, resize)
    return True


@follows
def _gather(walk: Walk, node: ir.Node, state: Channels, shape: Shape) -> bool:
    indices = constant_of(node.inputs[1])
    if indices is None:
        return False
    attribute = node.attributes.get("axis")
    axis = (0 if attribute is None else attribute.as_int()) % len(shape)
    if axis != state.axis:
        shift = len(indices.shape) - 1 if axis < state.axis else 0
        walk.give(node.outputs[0], state.axis + shift, state.labels)
        return True
    if len(indices.shape) != 1:
        return False
    chosen = indices.numpy() % len(state.labels)
    walk.give(node.outputs[0], axis, state.labels[chosen])
    walk.parts.append(state.labels[chosen])

    def renumber(alive: Alive) -> None:
        is_alive = alive(state.labels)
        places = np.cumsum(is_alive) - 1
        set_constant(node, 1, places[chosen[is_alive[chosen]]].astype(indices.numpy().dtype))

    walk.edit(state.labels, renumber)
    return True


@follows
def _reduce(walk: Walk, node: ir.Node, state: Channels, shape: Shape) -> bool:
    axes = _axes(node)
    if axes is None:
        return False
    gone = {axis % len(shape) for axis in axes} if axes else set(range(len(shape)))
    if state.axis in gone:
        walk.freeze(state.labels, blame(node, "mixes them"))
        return True
    keeps = node.attributes.get("keepdims")
    shift = 0 if keeps is None or keeps.as_int() else sum(axis < state.axis for axis in gone)
    walk.give(node.outputs[0], state.axis - shift, state.labels)
    return True


def _squeeze(walk: Walk, node: ir.Node) -> bool:
    state, shape, axes = walk.of(node.inputs[0]), walk.shape(node.inputs[0]), _axes(node)
    if state is None:
        return True
    if shape is None or not axes:
        return False
    gone = {axis % len(shape) for axis in axes}
    if state.axis in gone:
        return False
    walk.give(node.outputs[0], state.axis - sum(axis < state.axis for axis in gone), state.labels)
    return True


def _unsqueeze(walk: Walk, node: ir.Node) -> bool:
    state, shape, axes = walk.of(node.inputs[0]), walk.shape(node.inputs[0]), _axes(node)
    if state is None:
        return True
    if shape is None or not axes:
        return False
    rank = len(shape) + len(axes)
    new = {axis % rank for axis in axes}
    old = [axis for axis in range(rank) if axis not in new]
    walk.give(node.outputs[0], old[state.axis], state.labels)
    return True


@follows
def _transpose(walk: Walk, node: ir.Node, state: Channels, shape: Shape) -> bool:
    attribute = node.attributes.get("perm")
    perm = list(range(len(shape)))[::-1] if attribute is None else list(attribute.as_ints())
    walk.give(node.outputs[0], perm.index(state.axis), state.labels)
    return True


@follows
def _flatten(walk: Walk, node: ir.Node, state: Channels, shape: Shape) -> bool:
    attribute = node.attributes.get("axis")
    axis = 1 if attribute is None else attribute.as_int()
    axis += len(shape) if axis < 0 else 0  # the rank itself is one, too: all before it
    moved = reshaped(walk, state, shape, (_product(shape[:axis]), _product(shape[axis:])))
    if moved is None:
        return False
    walk.give(node.outputs[0], moved.axis, moved.labels)
    return True


def _reshape(walk: Walk, node: ir.Node) -> bool:
    state, shape, target = walk.of(node.inputs[0]), walk.shape(node.inputs[0]), walk.shape(node.outputs[0])
    if state is None:
        return True
    if shape is None or target is None:
        return False
    moved = reshaped(walk, state, shape, target)
    if moved is None:
        return False
    written = _target(walk, node, moved.axis)
    if written is None:
        walk.freeze(state.labels, blame(node, "computes its target"))
        return False
    holder, slot, place, number = written
    if number == 0 and (moved.axis != state.axis or len(moved.labels) != len(state.labels)):
        return False  # a copy of another size
    walk.give(node.outputs[0], moved.axis, moved.labels)
    if number > 0:

        def resize(alive: Alive) -> None:
            numbers = np.array(_array(holder.inputs[slot]))
            numbers[place] = alive(moved.labels).sum()
            set_constant(holder, slot, numbers)

        walk.edit(moved.labels, resize)
    return True


def _target(walk: Walk, node: ir.Node, axis: int) -> tuple[ir.Node, int, int, int] | None:
    """(node, input, place, number) of the constant that is a Reshape's target along an axis, or None."""
    numbers = _numbers(node.inputs[1])
    if numbers is not None:
        return node, 1, axis, numbers[axis]
    value = node.inputs[1]
    assert value is not None
    joined = value.producer()
    if joined is None or joined.op_type != "Concat" or len(value.uses()) > 1 or value.is_graph_output():
        return None  # what another reads as well keeps its numbers
    start = 0
    for slot, part in enumerate(joined.inputs):
        shape = walk.shape(part)
        if shape is None or len(shape) != 1 or shape[0] is None:
            return None
        if start <= axis < start + shape[0]:
            known = _numbers(part)
            return None if known is None else (joined, slot, axis - start, known[axis - start])
        start += shape[0]
    return None


def reshaped(walk: Walk, state: Channels, shape: Shape, target: Shape) -> Channels | None:
    """Channels after a change of shape, None where they are no longer places along one axis.

    Three things may happen: the axis stays; it is joined with axes after it (each label is repeated) or before it (all
    labels are); or it falls apart into (g, m), where m numbers the channels and all g parts lose the same.
    """
    count, inner = len(state.labels), _product(shape[state.axis + 1 :])
    behind, axis = 1, len(target) - 1
    if inner is None or count == 1:
        return None
    # The axis in which the next channel is `inner` elements away.
    while axis >= 0 and (size := target[axis]) is not None and behind * size <= inner:
        behind, axis = behind * size, axis - 1
    size = target[axis] if axis >= 0 else None
    if size is None or inner % behind or size % (inner // behind):
        return None
    repeats = inner // behind
    wide = size // repeats
    if wide % count == 0 and _ends_with(shape[: state.axis], wide // count):
        return Channels(axis, np.repeat(np.tile(state.labels, wide // count), repeats))
    if count % wide == 0 and repeats == 1:
        parts = state.labels.reshape(-1, wide)
        for part in parts[1:]:
            walk.join(parts[0], part)
        return Channels(axis, parts[0])
    return None


def _ends_with(shape: Shape, factor: int) -> bool:
    """Whether the last sizes of a shape multiply to a factor."""
    product = 1
    for size in reversed(shape):
        if product == factor:
            return True
        product *= size or 0
    return product == factor


@follows
def _pad(walk: Walk, node: ir.Node, state: Channels, shape: Shape) -> bool:
    attribute = node.attributes.get("pads")
    pads = list(attribute.as_ints()) if attribute is not None else _numbers(node.inputs[1])
    if pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
        return False
    if pads[state.axis] or pads[state.axis + len(shape)]:
        walk.freeze(state.labels, blame(node, "adds channels"))
        return True
    walk.give(node.outputs[0], state.axis, state.labels)
    return True


def _resize(walk: Walk, node: ir.Node) -> bool:
    """Resize and Upsample: the channels' own scale must be 1."""
    state = walk.of(node.inputs[0])
    if state is None:
        return True
    if "axes" in node.attributes:
        shape = walk.shape(node.inputs[0])
        if shape is None or state.axis in [axis % len(shape) for axis in node.attributes["axes"].as_ints()]:
            return False
        walk.give(node.outputs[0], state.axis, state.labels)
        return True
    slots = range(1, len(node.inputs)) if walk.opset < 11 else range(2, len(node.inputs))
    for slot in slots:
        tensor = constant_of(node.inputs[slot])
        if tensor is None and node.inputs[slot] is not None:
            return False
        if tensor is None or tensor.size == 0:
            continue
        number = float(tensor.numpy()[state.axis])
        if slot < 3 and number != 1:
            return False
        if slot == 3:
            if number != len(state.labels):
                return False
            walk.edit(state.labels, _literal(node, slot, state.axis, state.labels))
    walk.give(node.outputs[0], state.axis, state.labels)
    return True


def _expand(walk: Walk, node: ir.Node) -> bool:
    state, shape, numbers = walk.of(node.inputs[0]), walk.shape(node.inputs[0]), _numbers(node.inputs[1])
    if state is None:
        return True
    if shape is None or numbers is None:
        return False
    end = state.axis - len(shape)
    if len(numbers) >= -end and numbers[end] not in (1, len(state.labels)):
        return False
    if len(numbers) >= -end and numbers[end] != 1:
        walk.edit(state.labels, _literal(node, 1, len(numbers) + end, state.labels))
    walk.give(node.outputs[0], max(len(shape), len(numbers)) + end, state.labels)
    return True


def _literal(node: ir.Node, slot: int, place: int, labels: Labels) -> Callable[[Alive], None]:
    """An edit that writes the number of channels into a constant."""

    def write(alive: Alive) -> None:
        numbers = np.array(_array(node.inputs[slot]))
        numbers[place] = alive(labels).sum()
        set_constant(node, slot, numbers)

    return write


@follows
def _shape(walk: Walk, node: ir.Node, state: Channels, shape: Shape) -> bool:
    """Sizes other than the number of channels may be read by anybody; where that one goes nobody follows."""
    bounds = [node.attributes.get(name) for name in ("start", "end")]
    start, end, _ = slice(*(None if one is None else one.as_int() for one in bounds)).indices(len(shape))
    place = state.axis - start
    if not 0 <= place < end - start:
        return True
    output = node.outputs[0]
    if not output.is_graph_output() and all(_avoids(reader, place, end - start) for reader, _ in output.uses()):
        return True
    walk.freeze(state.labels, blame(node, "reads their number"))
    return True


def _avoids(reader: ir.Node, place: int, count: int) -> bool:
    """Whether a reader of sizes takes others than that at `place`."""
    if reader.op_type == "Gather":
        indices = _numbers(reader.inputs[1])
        return indices is not None and place not in [one % count for one in indices]
    if reader.op_type == "Slice":
        start, end = _numbers(reader.inputs[1]), _numbers(reader.inputs[2])
        return bool(start and end and len(reader.inputs) < 5) and place not in range(
            *slice(start[0] if start else 0, end[0] if end else 0).indices(count)
        )
    return False


def set_constant(node: ir.Node, slot: int, array: npt.NDArray[np.generic]) -> None:
    """Lets a node read these numbers."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    old = node.inputs[slot] if slot < len(node.inputs) else None
    base = f"{node.name or node.outputs[0].name}/{slot}"
    new = constant(graph, array, base)
    if slot >= len(node.inputs):
        node.resize_inputs(slot + 1)
    node.replace_input_with(slot, new)
    forget(graph, old)


def forget(graph: ir.Graph, value: ir.Value | None) -> None:
    """Removes a constant that nothing reads any more, initializer or node."""
    drop_unused(graph, value)
    maker = None if value is None else value.producer()
    if maker is None or value is None or value.uses() or value.is_graph_output():
        return
    if maker.op_type in ("Constant", "Identity"):
        sources = list(maker.inputs)
        graph.remove(maker, safe=True)
        for one in sources:
            forget(graph, one)


def _axes(node: ir.Node) -> list[int] | None:
    """Of a reduction or squeeze: [] for all, None when they are computed."""
    if (attribute := node.attributes.get("axes")) is not None:
        return list(attribute.as_ints())
    if len(node.inputs) < 2 or node.inputs[1] is None:
        empty = node.attributes.get("noop_with_empty_axes")
        return None if empty is not None and empty.as_int() else []
    return _numbers(node.inputs[1])


def _array(value: ir.Value | None) -> npt.NDArray[np.generic]:
    tensor = constant_of(value)
    assert tensor is not None
    return tensor.numpy()


def _numbers(value: ir.Value | None) -> list[int] | None:
    tensor = constant_of(value)
    return None if tensor is None else [int(one) for one in tensor.numpy().reshape(-1)]


def _product(sizes: Sequence[int | None]) -> int | None:
    known = [one for one in sizes if one is not None]
    return math.prod(known) if len(known) == len(sizes) else None


_REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
)
RULES: dict[str, Callable[[Walk, ir.Node], bool]] = {
    "Concat": _concat,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": _resize,
    **dict.fromkeys(_REDUCTIONS, _reduce),
}
