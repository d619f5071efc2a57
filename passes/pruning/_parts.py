"""What can be taken out of a network, and how: whole blocks, or attention and feed-forward sublayers apart.

A part adds its result to the stream, so that without it whatever reads the sum reads the stream before. Its cache goes
with it, and those that remain are numbered anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from onnxpress.compiler.blocks import Block, attends_in, find_blocks
from onnxpress.compiler.errors import PreconditionError
from onnxpress.compiler.pass_ import Report

_SHAPE_ONLY = ("Shape", "Size")
# Norms by operator: index of gamma and beta among the inputs, index of the output that carries the sum.
NORMS: dict[str, tuple[int, int | None, int | None]] = {
    "SimplifiedLayerNormalization": (1, None, None),
    "RMSNormalization": (1, None, None),
    "LayerNormalization": (1, 2, None),
    "SkipSimplifiedLayerNormalization": (2, None, 3),
    "SkipLayerNormalization": (2, 3, 3),
}
_PLAIN = {
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
    "SkipLayerNormalization": "LayerNormalization",
}
_FIRST, _LAST = 2, 1  # blocks at the ends that are never chosen: without them a model stops making sense
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers")


@dataclass
class Part:
    """Something that can be taken out.

    Attributes:
        name: "block3", "block3.attention", "block3.mlp".
        block: number of the block that it is, or belongs to.
        nodes: its operators in topological order, `join` included.
        join: the operator that adds its result.
        stay: what is left of the sum without it.
        stream: the residual stream in front of it, mostly the same.
        has_attention: whether tokens see each other in it.
    """

    name: str
    block: int
    nodes: list[ir.Node] = field(repr=False)
    join: ir.Node = field(repr=False)
    stay: ir.Value
    stream: ir.Value
    has_attention: bool


def find_parts(model: ir.Model, *, sublayers: bool) -> list[Part]:
    """All parts, in order. The model is not changed.

    Args:
        model: any ONNX model.
        sublayers: attention and feed-forward apart, also where both read the stream at the same place.
    """
    if not sublayers:
        return [_part(f"block{one.index}", one.index, one) for one in find_blocks(model)]
    parts: list[Part] = []
    alone = find_blocks(model, apart=True)
    attends = any(one.has_attention for one in alone)
    number = -1
    for one in alone:
        number += one.has_attention or not attends or number < 0
        if not attends:
            parts.append(_part(f"block{number}", number, one))
        elif one.has_attention and (pair := _side_by_side(one, number)):
            parts += pair
        else:
            name = f"block{number}.{'attention' if one.has_attention else 'mlp'}"
            # Where attention was taken out before, a block has more than one feed-forward sublayer.
            same = sum(part.name.startswith(name) for part in parts)
            parts.append(_part(f"{name}{same + 1}" if same else name, number, one))
    return parts


def may_go(parts: Sequence[Part], total: int) -> tuple[list[int], dict[str, str]]:
    """Numbers of the parts that a pass may choose, and the others' names with the reason.

    Args:
        parts: all of a model.
        total: its blocks.
    """
    free, reasons = [], {}
    for index, part in enumerate(parts):
        try:
            exits(part)
        except PreconditionError as error:
            reasons[part.name] = error.message.partition(": ")[2]
            continue
        if _FIRST <= part.block < total - _LAST:
            free.append(index)
        else:
            reasons[part.name] = "protected"
    return free, reasons


def _part(name: str, number: int, block: Block) -> Part:
    stream = block.stream_in
    return Part(name, number, block.nodes, block.residuals[-1], stream, stream, block.has_attention)


def _side_by_side(block: Block, number: int) -> list[Part]:
    """Attention and feed-forward of a block that adds both at once, [] where it does not."""
    join = block.residuals[-1]
    results = [value for value in join.inputs[:2] if value is not None and value is not block.stream_in]
    inner = results[0].producer() if len(results) == 1 else None
    if inner is None or inner.op_type != "Add" or len(inner.outputs[0].uses()) != 1:
        return []
    inside = {id(node) for node in block.nodes}
    terms = [value for value in inner.inputs if value is not None and value.producer() is not None]
    behind = [_behind(value, inside) for value in terms]
    attend = [any(attends_in(node) for node in nodes.values()) for nodes in behind]
    if sorted(attend) != [False, True] or id(terms[0].producer()) not in inside:
        return []
    parts = []
    for index in sorted((0, 1), key=lambda index: not attend[index]):
        own = behind[index].keys() - behind[1 - index].keys()
        nodes = [node for node in block.nodes if id(node) in own or node is inner]
        kind = "attention" if attend[index] else "mlp"
        name, stay = f"block{number}.{kind}", terms[1 - index]
        parts.append(Part(name, number, nodes, inner, stay, block.stream_in, attend[index]))
    return parts


def _behind(value: ir.Value, inside: set[int]) -> dict[int, ir.Node]:
    """Nodes of the block that `value` is made by, by id."""
    found: dict[int, ir.Node] = {}
    queue = [value]
    while queue:
        node = queue.pop().producer()
        if node is not None and id(node) in inside and id(node) not in found:
            found[id(node)] = node
            queue += [one for one in node.inputs if one is not None]
    return found


def exits(part: Part) -> list[ir.Value]:
    """The values by which data of the part leaves it; a norm behind the sum belongs to it where the stream is normed.

    Raises:
        PreconditionError: not only the sum leaves it.
    """
    inside = {id(node) for node in part.nodes}
    join = part.join
    found = [value for node in part.nodes for value in node.outputs if _leaves(value, inside)]
    if join.op_type in _PLAIN:
        sum_index = NORMS[join.op_type][2]
        assert sum_index is not None
        ends = {id(value): position for position, value in enumerate(join.outputs)}
        allowed = [value for value in found if ends.get(id(value)) in (0, sum_index)]
    else:
        allowed = found[:1]
    if not found or len(allowed) != len(found):
        names = ", ".join(str(value.name) for value in found)
        raise PreconditionError(f"drop_blocks: {part.name} must only feed the stream, but {names} leave it")
    norm = _norm_of_sum(part, found[0])
    return found if norm is None else [norm.outputs[0]]


def _norm_of_sum(part: Part, end: ir.Value) -> ir.Node | None:
    """The norm that closes the last of blocks that norm their sums; `find_blocks` takes it for a part of the head."""
    maker = part.stay.producer()
    if part.join.op_type in _PLAIN or maker is None or maker.op_type not in NORMS or part.stay is not maker.outputs[0]:
        return None
    readers = [node for node in _readers(end) if node.op_type not in _SHAPE_ONLY]
    is_alone = len(readers) == 1 and not end.is_graph_output()
    return readers[0] if is_alone and readers[0].op_type in NORMS and readers[0].op_type not in _PLAIN else None


def _is_normed_stream(part: Part) -> bool:
    """Whether the stream itself is what norms give (BERT), in a graph with norms that add."""
    maker, join = part.stay.producer(), part.join
    sum_index = NORMS[join.op_type][2] or 0
    has_sum = len(join.outputs) > sum_index and bool(join.outputs[sum_index].name)
    return not has_sum and maker is not None and maker.op_type in NORMS and part.stay is maker.outputs[0]


def split_skip_norms(model: ir.Model) -> None:
    """Writes norms that add as an Add and a norm: the same numbers up to rounding, and one value for each sum."""
    graph = model.graph
    for join in [node for node in graph if node.op_type in _PLAIN]:
        gamma, beta, total = NORMS[join.op_type]
        inputs = [*join.inputs, *[None] * 5]
        bias = inputs[(beta or gamma) + 1]
        terms = [one for one in (*inputs[:2], bias) if one is not None]
        first = ir.Node("", "Add", terms[:2], name=f"{join.name}/sum")
        nodes = [first]
        if len(terms) > 2:
            nodes.insert(0, ir.Node("", "Add", terms[1:], name=f"{join.name}/bias"))
            first.replace_input_with(1, nodes[0].outputs[0])
        weights = [inputs[gamma]] + ([inputs[beta]] if beta is not None and inputs[beta] is not None else [])
        epsilon = join.attributes.get("epsilon", ir.AttrFloat32("epsilon", 1e-12))
        norm = ir.Node("", _PLAIN[join.op_type], [first.outputs[0], *weights], [epsilon], name=f"{join.name}/norm")
        graph.insert_before(join, [*nodes, norm])
        replaced = [(join.outputs[0], norm.outputs[0])]
        assert total is not None
        if len(join.outputs) > total:
            replaced.append((join.outputs[total], first.outputs[0]))
        for number, node in enumerate([*nodes, norm]):
            node.outputs[0].name = f"{join.name or join.outputs[0].name}/{number}/split"
        for old, new in replaced:
            new.type, new.shape = old.type, old.shape
            if old.is_graph_output():
                new.name, old.name = old.name, None
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(join, safe=True)


def drop(model: ir.Model, index: int, *, sublayers: bool) -> None:
    """Takes a part out, and numbers the caches that remain anew; parts before it keep their numbers.

    Args:
        model: changed in place.
        index: of the part.
        sublayers: what `find_parts` was asked for.

    Raises:
        PreconditionError: it does not only feed the stream.
    """
    _renumber(model.graph, _drop(model, find_parts(model, sublayers=sublayers), index))


def _drop(model: ir.Model, parts: Sequence[Part], index: int) -> set[str]:
    """Takes one part out; returns the names of the cache inputs and outputs that went with it."""
    graph, part = model.graph, parts[index]
    inside = {id(node) for node in part.nodes}
    living = [value for value in graph.inputs if _is_cache(value) and _reaches_output(value)]
    _forget_removed_readers(part)
    _bypass(graph, part, inside)
    presents = [value for value in graph.outputs if _is_cache(value) and id(value.producer()) in inside]
    for value in presents:
        graph.outputs.remove(value)
    _sweep(model)
    others = [one for one in parts if one is not part and one.has_attention == part.has_attention]
    nearest = min(others, key=lambda one: (abs(one.block - part.block), -one.block), default=None)
    if nearest is not None and _borrow_shapes(part, nearest):
        _sweep(model)
    pasts = [value for value in living if not _reaches_output(value)]
    kept = [value for value in graph.inputs if _is_cache(value) and value not in pasts]
    for value in pasts:
        if _readers(value):  # the length of the past is read off the first cache input
            value.replace_all_uses_with(_substitute(value, kept))
        graph.inputs.remove(value)
    try:
        graph.sort()
    except ValueError as error:
        raise PreconditionError(f"drop_blocks: {part.name} computes shapes that earlier blocks need") from error
    return {str(value.name) for value in (*pasts, *presents)}


def _bypass(graph: ir.Graph, part: Part, inside: set[int]) -> None:
    """Lets everything that reads the stream behind the part read the stream before it."""
    stream, join = part.stay, part.join
    for value in exits(part):
        is_normed = join.op_type in _PLAIN and value is join.outputs[0] and not _is_normed_stream(part)
        new = _renormed(graph, stream, join, inside) if is_normed else stream
        if value.is_graph_output():
            # The output keeps its name, and the stream may be an output of its own.
            copy = ir.Node("", "Identity", [new])
            copy.outputs[0].name, copy.outputs[0].shape, copy.outputs[0].type = value.name, value.shape, value.type
            value.name = None
            graph.append(copy)
            new = copy.outputs[0]
        value.replace_all_uses_with(new, replace_graph_outputs=True)


def _leaves(value: ir.Value, inside: set[int]) -> bool:
    """Whether data of the part leaves through `value`; a reader of its shape does not count, nor does a cache."""
    if value.is_graph_output() and not _is_cache(value):
        return True
    return any(id(node) not in inside and node.op_type not in _SHAPE_ONLY for node in _readers(value))


def _readers(value: ir.Value) -> list[ir.Node]:
    """Nodes of the graph that read `value`; one that a pass has taken out may still be listed as its reader."""
    return [node for node in value.consumers() if node.graph is not None]


def _renormed(graph: ir.Graph, stream: ir.Value, join: ir.Node, inside: set[int]) -> ir.Value:
    """The stream before the block, normed as the join behind the block did it.

    The norm in front of the block has lost its readers; it takes over gamma. Where there is none, a new one is made.
    """
    gamma, beta, _ = NORMS[join.op_type]
    weights = [join.inputs[gamma]] + ([join.inputs[beta]] if beta is not None and len(join.inputs) > beta else [])
    source = stream.producer()
    candidates = [*_readers(stream), *([source] if source is not None else [])]
    plain = _PLAIN[join.op_type]
    # SkipLayerNormalization alone has another default than the plain norms: always write it out.
    epsilon = join.attributes.get("epsilon", ir.AttrFloat32("epsilon", 1e-12))
    for norm in candidates:
        if norm is join or norm.op_type not in (plain, join.op_type):
            continue
        own_gamma, own_beta, own_sum = NORMS[norm.op_type]
        if own_sum is None:
            is_before = norm.inputs[0] is stream
        else:
            is_before = len(norm.outputs) > own_sum and norm.outputs[own_sum] is stream
        readers = [node for node in _readers(norm.outputs[0]) if node.op_type not in _SHAPE_ONLY]
        is_free = not norm.outputs[0].is_graph_output() and all(id(node) in inside for node in readers)
        takes_beta = len(weights) < 2 or (own_beta is not None and len(norm.inputs) > own_beta)
        if is_before and is_free and takes_beta:
            norm.replace_input_with(own_gamma, weights[0])
            if len(weights) > 1 and own_beta is not None:
                norm.replace_input_with(own_beta, weights[1])
            norm.attributes["epsilon"] = epsilon
            return norm.outputs[0]
    norm = ir.Node("", plain, [stream, *weights], [epsilon], name=f"{join.name}/norm")
    norm.outputs[0].shape, norm.outputs[0].type = join.outputs[0].shape, join.outputs[0].type
    norm.outputs[0].name = f"{join.outputs[0].name}/renormed"
    graph.append(norm)
    return norm.outputs[0]


def _borrow_shapes(part: Part, neighbour: Part) -> bool:
    """Lets readers of the shape of an activation in `part` read that of its counterpart in `neighbour`."""
    changed = False
    for node, twin in zip(part.nodes, neighbour.nodes, strict=False):
        if node.graph is None or node.op_type != twin.op_type or twin.graph is None or node is twin:
            continue
        for value, counterpart in zip(node.outputs, twin.outputs, strict=False):
            for reader, index in list(value.uses()):
                if reader.op_type in _SHAPE_ONLY:
                    reader.replace_input_with(index, counterpart)
                    changed = True
    return changed


def _forget_removed_readers(part: Part) -> None:
    """Cuts the ties to nodes that are no longer in the graph: they would keep the part's nodes in use."""
    for node in part.nodes:
        for value in node.outputs:
            for reader, index in list(value.uses()):
                if reader.graph is None:
                    reader.replace_input_with(index, None)


def _substitute(value: ir.Value, kept: Sequence[ir.Value]) -> ir.Value:
    """A remaining cache input of the same role: `past_key_values.1.key` for `past_key_values.0.key`."""
    role = _role(value)
    for other in kept:
        if _role(other) == role:
            return other
    raise PreconditionError(f"drop_blocks: nothing can replace {value.name}, whose shape other nodes read")


def _reaches_output(value: ir.Value) -> bool:
    """Whether data (not just the shape) of `value` flows into a graph output."""
    queue, seen = [value], {id(value)}
    while queue:
        current = queue.pop()
        if current.is_graph_output():
            return True
        for node in _readers(current):
            for output in () if node.op_type in _SHAPE_ONLY else node.outputs:
                if id(output) not in seen:
                    seen.add(id(output))
                    queue.append(output)
    return False


def _sweep(model: ir.Model) -> None:
    common.RemoveUnusedNodesPass()(model)


def _is_cache(value: ir.Value) -> bool:
    return any(word in (value.name or "") for word in ("past", "present", "cache"))


def _role(value: ir.Value) -> str:
    """The name without its number."""
    return re.sub(r"\d+", "#", value.name or "", count=1)


def _number(name: str) -> int | None:
    found = re.search(r"\d+", name)
    return int(found.group()) if found else None


def _renumber(graph: ir.Graph, removed: Iterable[str]) -> None:
    """Gives the remaining caches consecutive numbers, in order."""
    gone = {number for number in map(_number, removed) if number is not None}
    if not gone:
        return
    for value in sorted((*graph.inputs, *graph.outputs), key=lambda one: _number(one.name or "") or 0):
        number = _number(value.name or "")
        if number is None or not _is_cache(value):
            continue
        new = number - sum(one < number for one in gone)
        if new != number:
            value.name = re.sub(r"\d+", str(new), value.name or "", count=1)


def edit_config(config: dict[str, Any], total: int, dropped: Sequence[int], report: Report) -> None:
    """Number of layers and every list with one entry per layer; also in a nested text config.

    Args:
        config: changed in place.
        total: blocks that the graph had.
        dropped: those that are gone, or have lost their attention, by which configs count.
        report: told of a config that counts otherwise.
    """
    nested = config.get("text_config")
    if isinstance(nested, dict):
        edit_config(nested, total, dropped, report)
    keys = [key for key in _COUNTS if isinstance(config.get(key), int)]
    for key in keys:
        if config[key] != total:
            report.skip(f"config {key}", f"says {config[key]}, but the graph has {total} blocks")
            return
        config[key] = total - len(dropped)
    if not keys:
        return
    for key, value in config.items():
        if isinstance(value, list) and len(value) == total and "layer" in key:
            config[key] = [one for index, one in enumerate(value) if index not in dropped]
    if isinstance(config.get("max_window_layers"), int):
        config["max_window_layers"] -= sum(index < config["max_window_layers"] for index in dropped)
