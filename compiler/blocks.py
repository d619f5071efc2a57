"""Finds the blocks of a network by the dominators of its data-flow graph, not by names.

Every path from the embedding to the output of a residual network runs through its residual additions, and through
little else: they are the dominators of the output. Two sublayers (attention, then feed-forward) make a block; networks
with a parallel residual have one addition per block, plain residual networks count each addition as a block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

# Operators that join the residual stream with the result of a sublayer, with the outputs that carry the sum.
_SKIP_NORMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
_ATTENTION = ("GroupQueryAttention", "MultiHeadAttention", "Attention", "Softmax")
# Types of token tables; indices and sizes are of wider ones.
_TABLES = (
    *(ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE),
    *(ir.DataType.INT8, ir.DataType.UINT8),
)
# Operators through which no activation flows, only its shape.
_SHAPE_ONLY = ("Shape", "Size", "ConstantOfShape", "Range")


@dataclass
class Block:
    """One repeated part of the network.

    Attributes:
        index: position in the network, from 0.
        nodes: its operators in topological order, the residual joins included.
        residuals: the joins that close its sublayers, in order.
        stream_in: the residual stream that enters (before any norm).
        stream_out: the residual stream that leaves; None when a fused final norm swallowed it.
        has_attention: whether tokens see each other in it.
    """

    index: int
    nodes: list[ir.Node] = field(repr=False)
    residuals: list[ir.Node] = field(repr=False)
    stream_in: ir.Value
    stream_out: ir.Value | None
    has_attention: bool


def find_blocks(model: ir.Model, *, apart: bool = False) -> list[Block]:
    """The blocks of `model`, [] when it has no residual structure. The model is not changed.

    Args:
        model: any ONNX model.
        apart: each sublayer, attention or feed-forward, as a block of its own, where the stream runs between them.

    Cost: one pass over the nodes, each edge climbing the dominator tree at most once around a block.
    """
    order, parents = _dominator_tree(model.graph)
    end = _end(model.graph, order)
    if end is None:
        return []
    chain = _chain(parents, id(end))
    residuals = [key for key in chain if _is_residual(order[key], parents)]
    if not residuals:
        return []
    segments = _segments(order, parents, chain, residuals)
    return _group(segments, order, parents, residuals, apart=apart)


_ROOT = 0


def _dominator_tree(graph: ir.Graph) -> tuple[dict[int, ir.Node], dict[int, int]]:
    """The nodes (by id) that activations flow through, and of each the nearest node on all ways to it from the root.

    In topological order that is the nearest common ancestor of a node's sources in the tree so far (Cooper, Harvey,
    Kennedy, "A simple, fast dominance algorithm", 2001; without cycles one pass is enough).
    """
    order: dict[int, ir.Node] = {}
    parents: dict[int, int] = {_ROOT: _ROOT}
    depth: dict[int, int] = {_ROOT: 0}

    def common(one: int, two: int) -> int:
        while one != two:
            if depth[one] < depth[two]:
                one, two = two, one
            one = parents[one]
        return one

    starts = {id(node) for node in _entries(graph)}
    for node in graph:
        key = id(node)
        sources = [_ROOT] if key in starts else []
        if node.op_type not in _SHAPE_ONLY:
            producers = (value.producer() for value in node.inputs if value is not None)
            sources += [id(one) for one in producers if one is not None and id(one) in order]
        if sources:
            order[key] = node
            parents[key] = functools.reduce(common, sources)
            depth[key] = depth[parents[key]] + 1
    return order, parents


def _entries(graph: ir.Graph) -> list[ir.Node]:
    """Where activations begin: the widest embedding gather and those beside it, else whatever reads a float input."""
    gathers = [node for node in graph if node.op_type in ("Gather", "GatherBlockQuantized") and _width(node) > 1]
    if gathers:
        largest = max(gathers, key=lambda node: _rows(node) * _width(node))
        return [node for node in gathers if _width(node) == _width(largest)]
    images = [v for v in graph.inputs if v.dtype is not None and v.dtype.is_floating_point() and not _is_cache(v)]
    return [node for value in images for node in value.consumers()]


def _is_cache(value: ir.Value) -> bool:
    return "past" in (value.name or "") or "cache" in (value.name or "")


def _rows(node: ir.Node) -> int:
    """Rows of the gathered table, 0 when they are unknown."""
    table, is_turned = _table(node)
    return int(table.shape[1 if is_turned else 0]) if table is not None else 0  # type: ignore[arg-type]


def _width(node: ir.Node) -> int:
    """Width of a gathered table, 0 when the node gathers something else."""
    if node.op_type == "GatherBlockQuantized":
        return _width_of_scales(node)
    table, is_turned = _table(node)
    if table is None or len(table.shape) != 2 or table.dtype not in _TABLES:
        return 0
    return int(table.shape[0 if is_turned else 1])  # type: ignore[arg-type]


def _table(node: ir.Node) -> tuple[ir.TensorProtocol | None, bool]:
    """The constant that a node gathers from, and whether it is read through a Transpose, as a tied head's may be.

    A quantized one may be read through a DequantizeLinear, the codes of a tied head through a Reshape.
    """
    value, is_turned = node.inputs[0], False
    while value is not None and value.const_value is None:
        view = value.producer()
        if view is None or view.op_type not in ("Transpose", "DequantizeLinear", "Reshape"):
            return None, False
        is_turned ^= view.op_type == "Transpose"
        value = view.inputs[0]
    return (None if value is None else value.const_value), is_turned


def _width_of_scales(node: ir.Node) -> int:
    attribute = node.attributes.get("block_size")
    block = 128 if attribute is None else attribute.as_int()
    scales = node.inputs[2]
    if scales is None or scales.shape is None:
        return 0
    return int(scales.shape[-1]) * block  # type: ignore[arg-type]


def _end(graph: ir.Graph, order: dict[int, ir.Node]) -> ir.Node | None:
    """The node behind the first graph output that activations reach and that is no cache."""
    for value in graph.outputs:
        node = value.producer()
        if node is not None and id(node) in order and not (value.name or "").startswith("present"):
            return node
    return None


def _chain(parents: dict[int, int], end: int) -> list[int]:
    """Dominators of `end` from the root's child down to `end` itself."""
    chain, key = [], end
    while key != _ROOT:
        chain.append(key)
        key = parents[key]
    return chain[::-1]


def _is_residual(node: ir.Node, parents: dict[int, int]) -> bool:
    if node.op_type not in ("Add", "Sum", *_SKIP_NORMS) or parents[id(node)] == _ROOT:
        return False
    sources = [value.producer() if value is not None else None for value in node.inputs[:2]]
    joined = [source for source in sources if source is not None and id(source) in parents]
    if len(joined) != 2:
        return False
    # The stream runs straight from the dominator into the join; the other operand went through the sublayer.
    return any(id(source) == parents[id(node)] for source in joined)


def _segments(
    order: dict[int, ir.Node], parents: dict[int, int], chain: list[int], residuals: list[int]
) -> list[list[ir.Node]]:
    """Nodes per residual: those below the same dominator, up to and including the join."""
    index_of = {parents[key]: number for number, key in enumerate(residuals)}
    on_chain = set(chain)
    anchor: dict[int, int] = {}
    segments: list[list[ir.Node]] = [[] for _ in residuals]
    closing = {key: number for number, key in enumerate(residuals)}
    previous: dict[int, int] = {}  # chain node -> number of the last residual at or before it
    last = -1
    total = _sum_output(order[residuals[-1]]) if residuals else None
    for key in chain:
        last = closing.get(key, last)
        previous[key] = last
    for key, node in order.items():
        if key in closing:
            segments[closing[key]].append(node)
            anchor[key] = key
            continue
        if key in on_chain:
            # A post-norm that ends on the chain belongs to the sublayer before it, as does a bias that is added behind
            # the residual; prelude and head belong to none.
            if 0 <= previous[key] < len(residuals) - 1 or (total is not None and total.producer() is node):
                segments[previous[key]].append(node)
            anchor[key] = key
            continue
        parent = parents[key]
        anchor[key] = parent if parent in on_chain or parent == _ROOT else anchor.get(parent, parent)
        number = index_of.get(anchor[key])
        if number is None and 0 <= previous.get(anchor[key], -1) < len(residuals) - 1:
            number = previous[anchor[key]]
        if number is not None:
            segments[number].append(node)
    return segments


def _group(
    segments: list[list[ir.Node]],
    order: dict[int, ir.Node],
    parents: dict[int, int],
    residuals: list[int],
    *,
    apart: bool,
) -> list[Block]:
    attends = [any(attends_in(node) for node in segment) for segment in segments]
    groups: list[list[int]] = []
    for number, seen in enumerate(attends):
        if apart or seen or not any(attends) or not groups:
            groups.append([number])
        else:
            groups[-1].append(number)
    blocks = []
    for index, group in enumerate(groups):
        joins = [order[residuals[number]] for number in group]
        blocks.append(
            Block(
                index=index,
                nodes=[node for number in group for node in segments[number]],
                residuals=joins,
                stream_in=_stream_into(joins[0], order[parents[residuals[group[0]]]]),
                stream_out=_sum_output(joins[-1]),
                has_attention=any(attends[number] for number in group),
            )
        )
    return blocks


def attends_in(node: ir.Node) -> bool:
    """Whether tokens see each other in the node; the probabilities of a router are not those of attention."""
    if node.op_type != "Softmax":
        return node.op_type in _ATTENTION
    before = [value.producer() for value in node.inputs[:1] if value is not None]
    behind = [reader for value in node.outputs for reader in value.consumers()]
    behind += [reader for one in behind if one.op_type == "Cast" for reader in one.outputs[0].consumers()]
    return all(one is None or one.op_type != "TopK" for one in (*before, *behind))


def _stream_into(join: ir.Node, source: ir.Node) -> ir.Value:
    """The operand of `join` that comes straight from `source`."""
    for value in join.inputs[:2]:
        if value is not None and value.producer() is source:
            return value
    raise AssertionError("a residual join reads its dominator")


def _sum_output(join: ir.Node) -> ir.Value | None:
    """The output of a join that carries the sum, or that of the bias which is added behind the residual."""
    if join.op_type not in _SKIP_NORMS:
        readers = [] if join.outputs[0].is_graph_output() else join.outputs[0].consumers()
        is_bias = len(readers) == 1 and readers[0].op_type == "Add"
        is_bias &= any(value is not None and value.const_value is not None for one in readers for value in one.inputs)
        return readers[0].outputs[0] if is_bias else join.outputs[0]
    return join.outputs[3] if len(join.outputs) > 3 and join.outputs[3].name else None


def chain_names(blocks: Iterable[Block]) -> list[str]:
    """Names of the residual joins of `blocks`, for messages and tests."""
    return [join.name or join.op_type for block in blocks for join in block.residuals]
