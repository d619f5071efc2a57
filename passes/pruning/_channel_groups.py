"""Groups of channels that go alike, what they weigh, and how they are cut out of the graph.

Axes:    G channels of a group
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.linears import derived
from onnxpress.compiler.pass_ import Report
from onnxpress.passes.pruning._channel_moves import forget
from onnxpress.passes.pruning._channel_readers import find_readers
from onnxpress.passes.pruning._channel_walk import Alive, Cut, Labels, Walk, constant_of, name_of, origin, uses

Floats = npt.NDArray[np.float64]
Key = tuple[int, int]  # id of a node, number of its input

_UNREAD = "no product reads its channels"
_ENTRY = 240  # bytes of a graph that a constant takes beside its name and numbers, at most
_EDIT = 300  # bytes of a graph that a changed target or bound takes more, at most


@dataclass
class Group:
    """Channels that stand in the same places: what is true of one is true of all, and any of them may go.

    Attributes:
        name: of the node that makes them, the first where several do (they are added up).
        makers: names of all of these.
        roots: [G], the labels that stand for them.
        cuts: where they stand: numbers of `Walk.cuts`.
        counts: numbers of channels that may be left, from all of them to the fewest.
        losses: at each of `counts`, relative.
        kept: at each of `counts`, which of the channels are left, ascending.
    """

    name: str
    makers: list[str]
    roots: Labels
    cuts: list[int]
    counts: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    kept: list[npt.NDArray[np.integer]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """G."""
        return len(self.roots)

    def set_counts(self, multiple: int) -> None:
        """Counts are multiples of this, and the whole."""
        self.counts = [self.total, *range((self.total - 1) // multiple * multiple, 0, -multiple)]


def find_groups(walk: Walk, report: Report) -> list[Group]:
    """The groups of which channels may go; makers of all others go to the report, each with the reason.

    Args:
        walk: of a graph.
        report: gets skipped sites.
    """
    places: dict[int, dict[int, int]] = {}
    stays: dict[str, str] = {}
    for number, cut in enumerate(walk.cuts):
        for root in map(int, walk.roots(cut.labels)):
            if (reason := walk.reason(root)) is None:
                seen = places.setdefault(root, {})
                seen[number] = seen.get(number, 0) + 1
            elif cut.role == "row":
                stays.setdefault(name_of(cut.node), reason)
    for number, labels in enumerate(walk.parts, len(walk.cuts)):  # each keeps some: they are groups of their own
        for root in map(int, walk.roots(labels)):
            if root in places:
                places[root][number] = places[root].get(number, 0) + 1
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for root, seen in places.items():
        alike.setdefault(tuple(sorted(seen.items())), []).append(root)
    groups: list[Group] = []
    names: set[str] = set()
    for signature, roots in alike.items():
        numbers = [number for number, _ in signature if number < len(walk.cuts)]
        cuts = [walk.cuts[number] for number in numbers]
        makers = list(dict.fromkeys(name_of(one.node) for one in cuts if one.role == "row"))
        name, again = makers[0], 1
        while name in names:  # a Split gave each part to others
            again += 1
            name = f"{makers[0]} part {again}"
        names.add(name)
        if not any(one.role == "column" for one in cuts):
            stays.setdefault(name, _UNREAD)
            continue
        groups.append(Group(name, makers, np.sort(np.array(roots)), numbers))
    for name, reason in stays.items():
        report.skip(name, reason)
    return groups


def weigh(walk: Walk, groups: Sequence[Group]) -> None:
    """Fills in losses by the weights alone: a channel is worth the mean of what its rows and columns weigh.

    Each matrix is measured by the mean square of its own rows (or columns), so that all count alike.

    Paper: arXiv:2301.12900 (DepGraph, section 3.3)
    """
    squares: dict[int, dict[int, float]] = {}
    for group in groups:
        worth = np.zeros(group.total)
        for number in group.cuts:
            cut = walk.cuts[number]
            if number not in squares:
                squares[number] = _squares(walk, cut)
            worth += np.array([squares[number].get(int(root), 0.0) for root in group.roots])
        order = np.argsort(worth, kind="stable")
        gone = np.concatenate([[0.0], np.cumsum(worth[order])])
        whole = float(gone[-1]) or 1.0
        group.losses = [float(gone[group.total - count]) / whole for count in group.counts]
        group.kept = [np.sort(order[group.total - count :]) for count in group.counts]


def _squares(walk: Walk, cut: Cut) -> dict[int, float]:
    """Sum of squares of the places of each channel, relative to the mean; nothing of vectors."""
    tensor = constant_of(cut.node.inputs[cut.slot])
    assert tensor is not None
    if len(tensor.shape) < 2 or cut.role == "vector":
        return {}
    array = np.moveaxis(tensor.numpy().astype(np.float32, copy=False), cut.axis, 0)
    each = np.square(array.reshape(len(array), -1)).sum(axis=1, dtype=np.float64)
    mean = float(each.mean()) or 1.0
    found: dict[int, float] = {}
    for root, one in zip(map(int, walk.roots(cut.labels)), each, strict=True):
        found[root] = found.get(root, 0.0) + float(one) / mean
    return found


def alive_without(walk: Walk, gone: Labels) -> Alive:
    """A function that tells which labels stay when the channels `gone` (roots) go."""
    return lambda labels: ~np.isin(walk.roots(labels), gone)


def bytes_saved(walk: Walk, gone: Labels, *, fits: bool = False) -> float:
    """Bytes of a model's files that go with these channels, rather too few.

    Args:
        walk: of a graph that is still whole.
        gone: roots of the channels that go.
        fits: whether readers of them are fitted: each then has a bias of its own, and a matrix unless several read it.
    """
    alive = alive_without(walk, gone)
    fitted = {id(one.node): one for one in find_readers(walk) if fits and not alive(one.cut.labels).all()}
    rows = {id(one.node): one.labels for one in walk.cuts if one.role == "row"}
    made: dict[tuple[object, ...], float] = {
        (key, "new bias"): float(alive(rows[key]).sum()) * one.itemsize + 2 * len(name_of(one.node)) + _ENTRY
        for key, one in fitted.items()
        if _is_bare(one.node) and one.bias() is not None
    }
    replaced: dict[int, list[ir.Value]] = {}
    for (node, slot), cuts in _by_input(walk).items():
        value, reader = cuts[0].node.inputs[slot], fitted.get(node)
        tensor = constant_of(value)
        assert value is not None
        assert tensor is not None
        stays = {one.axis: alive(one.labels) for one in cuts}
        left = math.prod(float(one.mean()) for one in stays.values())
        is_own = reader is not None and slot == 2 and reader.bias() is not None
        if left < 1 or is_own:
            source = origin(value)
            alike = (id(source), *((axis, one.tobytes()) for axis, one in sorted(stays.items())))
            made[(node, slot) if is_own else alike] = tensor.nbytes * left + 2 * len(value.name or "") + _ENTRY
            replaced.setdefault(id(source), []).append(source)
    saved = 0.0
    for source, *others in replaced.values():
        tensor = constant_of(source)
        if tensor is not None and 1 + len(others) >= uses(source):  # nobody else needs it as it was
            saved += tensor.nbytes + 2 * len(source.name or "") + 200
    return saved - sum(made.values()) - _EDIT * sum(not alive(labels).all() for labels, _ in walk.edits)


def cut_out(model: ir.Model, walk: Walk, gone: Labels, fitted: Mapping[Key, npt.NDArray[np.floating]]) -> None:
    """Takes channels out of every constant, attribute and declared shape.

    Args:
        model: that of the walk; changed.
        walk: of no use afterwards.
        gone: roots of the channels that go.
        fitted: new arrays for inputs of nodes, of the shape before, or a bias [M] where there was none.
    """
    alive = alive_without(walk, gone)
    made: dict[tuple[object, ...], ir.Value] = {}
    for (_, slot), cuts in _by_input(walk).items():
        node = cuts[0].node
        if (array := fitted.get((id(node), slot))) is not None:
            index = {one.axis: np.flatnonzero(alive(one.labels)) for one in cuts}
            _fit(model.graph, node, slot, _choose(array, index))
        else:
            _replace(model.graph, node, slot, cuts, alive, made)
        row = next((one for one in cuts if one.role == "row"), None)
        if row is not None and _is_bare(node) and (bias := fitted.get((id(node), 2))) is not None:
            _fit(model.graph, node, 2, bias[alive(row.labels)])
    for labels, rewrite in walk.edits:
        if not alive(labels).all():
            rewrite(alive)
    for node in model.graph:
        for value in node.outputs:
            channels = walk.of(value)
            if channels is not None and value.shape is not None and not alive(channels.labels).all():
                sizes = list(value.shape)
                sizes[channels.axis] = int(alive(channels.labels).sum())
                value.shape = ir.Shape(sizes)


def _is_bare(node: ir.Node) -> bool:
    """Whether a product has no bias yet."""
    return len(node.inputs) < 3 or node.inputs[2] is None


def _by_input(walk: Walk) -> dict[Key, list[Cut]]:
    """Cuts of each input of each node."""
    found: dict[Key, list[Cut]] = {}
    for cut in walk.cuts:
        found.setdefault((id(cut.node), cut.slot), []).append(cut)
    return found


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    slot: int,
    cuts: Sequence[Cut],
    alive: Alive,
    made: dict[tuple[object, ...], ir.Value],
) -> None:
    """Cuts one input of one node; nodes that read the same constant, cut alike, read the same one afterwards."""
    old = node.inputs[slot]
    tensor = constant_of(old)
    assert old is not None
    assert tensor is not None
    index = {one.axis: np.flatnonzero(alive(one.labels)) for one in cuts}
    before = [int(size) for size in tensor.shape.numpy()]
    sizes = [len(index[axis]) if axis in index else size for axis, size in enumerate(before)]
    if sizes == before:
        return
    key = (id(tensor), *((axis, places.tobytes()) for axis, places in sorted(index.items())))
    if key not in made:
        made[key] = derived(graph, tensor, _pruned(old.name), sizes, lambda array: _choose(array, index))
    node.replace_input_with(slot, made[key])
    forget(graph, old)


def _fit(graph: ir.Graph, node: ir.Node, slot: int, array: npt.NDArray[np.generic]) -> None:
    """Lets a node read new numbers, of the type of its weight."""
    old = node.inputs[slot] if slot < len(node.inputs) else None
    weight = constant_of(node.inputs[1])
    assert weight is not None
    base = old.name if old is not None else f"{name_of(node)}.bias"
    made = derived(graph, weight, _pruned(base), array.shape, lambda _: array.astype(weight.dtype.numpy()))
    if slot >= len(node.inputs):
        node.resize_inputs(slot + 1)
    node.replace_input_with(slot, made)
    forget(graph, old)


def _choose(array: npt.NDArray[np.generic], index: Mapping[int, npt.NDArray[np.integer]]) -> npt.NDArray[np.generic]:
    for axis, places in index.items():
        array = np.take(array, places, axis=axis)
    return array


def _pruned(name: str | None) -> str:
    return f"{(name or 'weight').removesuffix('.pruned')}.pruned"
