"""Fuses scaled dot-product attention with as many heads of keys as of queries into MultiHeadAttention.

Paper:   Vaswani et al., arXiv:1706.03762, eq. (1): softmax(scale q k^T + mask) v.
Anchor:  a Softmax between two products, or an operator `Attention`. Masks and position biases are whatever is added to
         the scores: the value itself becomes the operator's additive bias, so nothing of it can be lost. Both forms run
         before one is accepted.
Caches:  what `fuse_attention` left because its mask is no padding mask (T5's position bias, Whisper) gets the cache as
         the operator's past; keys and values of an encoder, inputs of the graph, are read as they lie.
Axes:    B batch, S tokens, P tokens in the cache, H heads, D width of a head
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, constant, discard, producer
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.region import Array, NotCuttable, Region, build_model, first_line, random_feed, run
from onnxpress.passes.fusion._attention import (
    is_anchor,
    joined_output,
    made_from,
    rank,
    read_core,
    same_sizes,
    static,
    to_cache,
    unscaled,
)


@dataclass(frozen=True, kw_only=True)
class FuseEncoderAttention(Pass):
    """One MultiHeadAttention per attention of an encoder, or of a decoder that reads one; scale and bias are kept."""

    promise: ClassVar[Promise] = Promise.CLOSE
    paper: ClassVar[str] = "arXiv:1706.03762"

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        biases: dict[tuple[Any, ...], ir.Value] = {}  # by `_bias_key`
        for node in list(model.graph):
            if not is_anchor(node):
                continue
            site = node.name or node.outputs[0].name or "attention"
            try:
                found = _read(node)
                if found.is_guarded and not _rows_see_a_key(fuser, found):
                    raise NotCuttable("some probabilities are replaced")
                _fuse(fuser, site, found, biases)
            except NotCuttable as reason:
                report.skip(site, str(reason))
        fuser.finish()
        return report


@dataclass
class _Operand:
    """Queries, keys or values.

    Attributes:
        value: [B, S, H D], [B, S, H, D] or [B, H, S, D].
        scale: number that they are multiplied with.
        is_apart: [B, S, H, D].
        past, present: the cache [B, H, P, D] that `value` is appended to, and the result; None without one.
    """

    value: ir.Value
    scale: float
    is_apart: bool = False
    past: ir.Value | None = None
    present: ir.Value | None = None


@dataclass
class _Attention:
    """What was read off one attention."""

    q: _Operand
    k: _Operand
    v: _Operand
    output: ir.Value
    scale: float
    mask: ir.Value | None
    num_heads: int
    head_size: int
    is_written_out: bool = False  # the mask has a row for each query: ONNX Runtime's `Attention` takes no other
    is_guarded: bool = False  # rows without any key give zeros

    @property
    def outputs(self) -> list[ir.Value]:
        """What the operator gives, caches included."""
        return [self.output, *(one.present for one in (self.k, self.v) if one.present is not None)]


def _read(anchor: ir.Node) -> _Attention:
    """Walks from a Softmax or an operator `Attention` to its operands.

    Raises:
        NotCuttable: the first thing that the operator has no place for.
    """
    axis = anchor.attributes.get("axis")
    if axis is not None and axis.as_int() not in (-1, 3):
        raise NotCuttable("the Softmax is not over the last of four axes [batch, heads, queries, keys]")
    core = read_core(anchor)
    if core.softcap:
        raise NotCuttable("the operator has no soft cap")
    if len(core.masks) > 1:
        raise NotCuttable("the scores are masked twice")
    if any(mask.number != 1.0 for mask in core.masks):
        raise NotCuttable("the mask is multiplied after it was added")
    mask = core.masks[0].value if core.masks else None
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        raise NotCuttable("the mask selects scores instead of being added to them")
    heads = core.num_heads or static(core.output, 1)
    width = static(core.output, 3) if rank(core.output) == 4 else static(core.output, 2) // heads
    if core.num_heads is None:
        q = _operand(core.q, [])
        k = _with_cache(_operand(core.k, [0, 1, 3, 2] if core.is_turned else []), heads)
        v = _with_cache(_operand(core.v, []), heads)
    else:
        q, k, v = (_Operand(*unscaled(value)) for value in (core.q, core.k, core.v))
    if (k.past is None) != (v.past is None):
        raise NotCuttable("only one of keys and values meets a cache")
    if core.cached or (k.past is None and _has_cache(core.k)):
        raise NotCuttable("the keys meet a cache, which `fuse_attention` is for")
    if v.scale != 1.0:
        raise NotCuttable("the values are scaled")
    return _Attention(
        q,
        k,
        v,
        core.output if core.num_heads else joined_output(core.output),
        core.scale * q.scale * k.scale,
        mask,
        heads,
        width,
        is_written_out=not core.is_turned,
        is_guarded=core.is_guarded,
    )


def _has_cache(keys: ir.Value | None) -> bool:
    try:
        to_cache(keys, "keys")
    except NotCuttable:
        return False
    return True


def _with_cache(operand: _Operand, heads: int) -> _Operand:
    """The new part of keys or values that are appended to a graph input, the cache noted; else the operand itself."""
    node = producer(operand.value, "Concat")
    if node is None or len(node.inputs) != 2 or operand.is_apart:
        return operand
    past, axis = node.inputs[0], node.attributes["axis"].as_int()
    if past is None or not past.is_graph_input() or rank(past) != 4 or axis not in (2, -2) or static(past, 1) != heads:
        return operand
    new = _operand(node.inputs[1], [])
    if new.scale != 1.0:
        raise NotCuttable("keys or values are scaled before they enter the cache")
    return _Operand(new.value, operand.scale, new.is_apart, past, node.outputs[0])


def _rows_see_a_key(fuser: Fuser, found: _Attention) -> bool:
    """Whether the mask is made from sizes alone, and hides all keys from no query at any of a few sizes."""
    if found.mask is None:
        return True
    above = list(_ancestors(found.mask))
    leaves = list(dict.fromkeys(one for node in above if (one := _asked(node)) is not None))
    region = Region(leaves, [found.mask])
    used = {id(value) for node in region.nodes if node.op_type != "Shape" for value in node.inputs}
    if set(region.leaves) != set(leaves) or any(id(leaf) in used or leaf.shape is None for leaf in leaves):
        return False
    opset = fuser.model.opset_imports.get("", 18)
    model = build_model(region.nodes, leaves, region.outputs, region.constants, opset)
    # By the names that the graph gives its sizes: caches and ids must fit together.
    for batch, tokens, past in ((1, 1, 0), (2, 3, 0), (1, 1, 4), (2, 3, 5)):
        feed = []
        for leaf in leaves:
            assert leaf.shape is not None
            sizes = []
            for axis, size in enumerate(leaf.shape):
                words = "" if isinstance(size, int) else str(size.value)
                unknown = past * ("past" in words) + tokens * ("past" not in words or "+" in words)
                sizes.append(size if isinstance(size, int) else batch if axis == 0 else unknown)
            feed.append(np.zeros(sizes, (leaf.dtype or ir.DataType.FLOAT).numpy()))
        try:
            mask = run(model, feed)[0]
        except Exception as error:  # ONNX Runtime's exceptions have no common type
            raise NotCuttable(f"the mask does not run by itself: {first_line(error)}") from None
        if not np.isfinite(mask).any(axis=-1).all():
            return False
    return True


def _operand(value: ir.Value | None, turn: list[int]) -> _Operand:
    """The operand of a product; keys are turned by `turn`, or with their heads in one Transpose."""
    value, scale = unscaled(value)
    if turn:
        node = producer(value, "Transpose")
        perm = None if node is None else list(node.attributes["perm"].as_ints())
        if node is None or node.inputs[0] is None or perm not in (turn, [0, 2, 3, 1]):
            raise NotCuttable("the keys are not turned by a Transpose")
        value, more = unscaled(node.inputs[0])
        scale *= more
        if perm == [0, 2, 3, 1]:
            return _joined_before(value, scale)
    node = producer(value, "Transpose")
    if node is not None and node.inputs[0] is not None and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]:
        return _joined_before(node.inputs[0], scale)
    if rank(value) != 4:
        raise NotCuttable(f"{value.name} is not split into heads")
    return _Operand(value, scale)


def _joined_before(apart: ir.Value, scale: float) -> _Operand:
    """[B, S, H D] that was split into `apart`, else `apart` itself."""
    split = producer(apart, "Reshape")
    if split is not None and split.inputs[0] is not None and rank(split.inputs[0]) == 3:
        return _Operand(split.inputs[0], scale)
    return _Operand(apart, scale, is_apart=True)


def _fuse(fuser: Fuser, site: str, found: _Attention, biases: dict[tuple[Any, ...], ir.Value]) -> None:
    """Replaces one attention, or raises NotCuttable with the reason why not."""
    presents = found.outputs[1:]
    # Who asks the whole cache for its size is told past + new: see `_sizes_from_past`.
    asked = [node for one in presents for node in one.consumers() if node.op_type == "Shape"]
    if any(node.outputs[0].is_graph_output() for node in asked):
        raise NotCuttable("the size of the cache is an output of the graph")
    operands = [found.q.value, found.k.value, found.v.value]
    made = made_from(presents, found.output, asked)
    for operand in (*operands, found.mask):
        if operand is not None and id(operand) in made:
            raise NotCuttable(f"{operand.name} is made from what the cache holds")
    pasts = [one.past for one in (found.k, found.v) if one.past is not None]
    inputs = [*operands, *pasts, *([found.mask] if found.mask is not None else [])]

    def feeds(leaves: Sequence[ir.Value]) -> Iterable[list[Array]]:
        rng = np.random.default_rng(fuser.seed)
        samples = [(2, 3, 0, None), (1, 5, 0, None), (2, 4, 0, 2), (2, 4, 0, 0)]
        if pasts:
            samples += [(2, 1, 6, None), (1, 3, 4, None), (2, 1, 0, 0)]
        for batch, tokens, before, axis in samples:
            given: dict[int, Array] = {}
            for past in pasts:
                sizes = (batch, found.num_heads, before, found.head_size)
                given[id(past)] = rng.standard_normal(sizes).astype((past.dtype or ir.DataType.FLOAT).numpy())
            for leaf in leaves if pasts else ():  # the bias may have been made for the caches of another layer
                if leaf.is_graph_input() and leaf not in pasts and same_sizes(leaf, pasts[0]):
                    given[id(leaf)] = given[id(pasts[0])]
            if found.mask is not None:
                if axis == 2 and found.is_written_out:
                    continue
                given[id(found.mask)] = _random_mask(found.mask, (batch, 1, tokens, before + tokens), axis, rng)
            yield random_feed(leaves, {"batch": batch, "sequence": tokens}, rng, given)

    reason = None
    # Keys and values of another model, inputs of the graph, need not be turned; execution says where they must be.
    for are_turned in (False, True) if all(_is_given(one) for one in (found.k, found.v)) else (True,):
        nodes = _nodes(fuser.model.graph, found, biases, are_turned)
        new_outputs = list(nodes[-1].outputs)
        reason = fuser.verdict(inputs, found.outputs, new_outputs, feeds)
        if reason is None:
            if pasts:
                nodes[:0] = _sizes_from_past(fuser.model.graph, found, nodes[-1].inputs[1])
            fuser.replace(site, found.outputs, new_outputs, nodes, scale=found.scale)
            return
        if any(node.op_type == "Expand" for node in nodes):
            del biases[_bias_key(found)]
        discard(nodes)
    raise NotCuttable(reason or "no form agrees")


def _ancestors(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that compute `value`; what an activation of which the size is asked is made from does not count."""
    queue, seen = [value.producer()], set()
    while queue:
        node = queue.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if _asked(node) is None:
            queue += [None if one is None else one.producer() for one in node.inputs]


def _asked(node: ir.Node) -> ir.Value | None:
    """The activation or graph input of which `node` asks the size."""
    value = node.inputs[0] if node.op_type == "Shape" else None
    is_float = value is not None and (value.dtype is None or value.dtype.is_floating_point())
    return value if value is not None and (is_float or value.is_graph_input()) else None


def _sizes_from_past(graph: ir.Graph, found: _Attention, keys: ir.Value | None) -> list[ir.Node]:
    """Lets readers of the size of the whole cache, often the mask itself, read past + new; gives the new nodes."""
    readers = [
        node
        for one in (found.k, found.v)
        for node in (() if one.present is None else one.present.consumers())
        if node.op_type == "Shape"
    ]
    if not readers or keys is None:
        return []
    place = constant(graph, np.array([0, 0, 1, 0], np.int64), "attention/place_of_tokens")
    index = constant(graph, np.ones(1, np.int64), "attention/ones_1")
    whole = ir.Node("", "Shape", [found.k.past])
    sizes = ir.Node("", "Shape", [keys])
    count = ir.Node("", "Gather", [sizes.outputs[0], index], [ir.AttrInt64("axis", 0)])
    more = ir.Node("", "Mul", [place, count.outputs[0]])
    total = ir.Node("", "Add", [whole.outputs[0], more.outputs[0]])
    nodes = [whole, sizes, count, more, total]
    for number, node in enumerate(nodes):
        node.name = f"{found.output.name}/size_{number}"
        node.outputs[0].name = f"{node.name}.out"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    for reader in readers:
        again = total.outputs[0]
        cuts = [reader.attributes.get("start"), reader.attributes.get("end")]
        if any(cut is not None for cut in cuts):
            edges = [end if cut is None else cut.as_int() for cut, end in zip(cuts, (0, 4), strict=True)]
            bounds = [constant(graph, np.array([edge], np.int64), f"attention/edge_{edge}") for edge in edges]
            cut_node = ir.Node("", "Slice", [again, *bounds], name=f"{found.output.name}/size_{len(nodes)}")
            nodes.append(cut_node)
            again = cut_node.outputs[0]
            again.name, again.type = f"{cut_node.name}.out", ir.TensorType(ir.DataType.INT64)
        reader.outputs[0].replace_all_uses_with(again)
    return nodes


def _is_given(operand: _Operand) -> bool:
    """Whether it is a graph input [B, H, S, D]."""
    return operand.value.is_graph_input() and rank(operand.value) == 4 and not operand.is_apart


def _random_mask(mask: ir.Value, usual: Sequence[int], axis: int | None, rng: np.random.Generator) -> Array:
    """Numbers to add to the scores, the last key hidden; of unknown sizes the one at `axis` is 1.

    An unknown size that is 1 says that all rows or queries get the same.
    """
    if mask.shape is None or len(mask.shape) != len(usual):
        raise NotCuttable("the mask is not of rank 4")
    sizes = [one if isinstance(one, int) else two for one, two in zip(mask.shape, usual, strict=True)]
    if axis is not None and not isinstance(mask.shape[axis], int):
        sizes[axis] = 1
    dtype = (mask.dtype or ir.DataType.FLOAT).numpy()
    numbers = (3 * rng.standard_normal(sizes)).astype(dtype)
    if sizes[-1] > 1:
        numbers[..., -1] = np.finfo(dtype).min
    return numbers


def _bias_key(found: _Attention) -> tuple[Any, ...]:
    """Equal where one mask is written out to one size: by its own sizes, else by those of queries and keys."""
    assert found.mask is not None
    key: list[Any] = [id(found.mask)]
    shape = found.mask.shape
    for axis, operand in ((2, found.q), (3, found.k)):
        own = None if shape is None or len(shape) != 4 else shape[axis]
        if own == 1 or own is None or (not isinstance(own, int) and own.value is None):
            key.append(_length(operand))
    return tuple(key)


def _length(operand: _Operand) -> Any:
    """How many tokens, as the graph names it; the operand itself where that is unknown or made up by inference."""
    shape = operand.value.shape
    axis = 1 if rank(operand.value) == 3 or operand.is_apart else 2
    size = None if shape is None else shape[axis]
    name = size if isinstance(size, int) or size is None else size.value
    return id(operand.value) if name is None or str(name).startswith("unk__") else (name, operand.past is None)


def _nodes(
    graph: ir.Graph, found: _Attention, biases: dict[tuple[Any, ...], ir.Value], are_turned: bool
) -> list[ir.Node]:
    """The fused operator, preceded by what brings its operands into form."""
    nodes: list[ir.Node] = []
    name = found.output.name or "attention"

    def add(
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
        domain: str = "",
        outputs: int = 1,
    ) -> Any:
        node = ir.Node(domain, op, inputs, attributes, num_outputs=outputs, name=f"{name}/{op}_{len(nodes)}")
        for index, output in enumerate(node.outputs):
            output.name = f"{node.name}.out{index or ''}"
            output.type = found.output.type
        nodes.append(node)
        return node.outputs[0]

    def flat(operand: _Operand) -> ir.Value:
        value: ir.Value = operand.value
        if rank(value) == 3:
            return value
        if not operand.is_apart:
            value = add("Transpose", [value], [ir.AttrInt64s("perm", [0, 2, 1, 3])])
        width = found.num_heads * found.head_size
        value = add(
            "Reshape", [value, constant(graph, np.array([0, 0, width], np.int64), f"attention/join_heads_{width}")]
        )
        value.shape = ir.Shape([None, None, width])
        return value

    q = flat(found.q)
    k, v = (flat(one) if are_turned else one.value for one in (found.k, found.v))
    bias = found.mask if found.mask is None else biases.get(_bias_key(found))
    if found.mask is not None and bias is None:
        # Often the same for all queries, [B, 1, 1, S]; the operator wants it written out. Once for all layers.
        start = len(nodes)
        index, ones = (constant(graph, np.ones(count, np.int64), f"attention/ones_{count}") for count in (1, 2))
        third = constant(graph, np.array([2], np.int64), "attention/third")

        def size(value: ir.Value, place: ir.Value) -> Any:
            return add("Gather", [add("Shape", [value]), place], [ir.AttrInt64("axis", 0)])

        keys = size(k, index if are_turned else third)
        if found.k.past is not None:
            keys = add("Add", [size(found.k.past, third), keys])
        shape = add("Concat", [ones, size(q, index), keys], [ir.AttrInt64("axis", 0)])
        for node in nodes[start:]:
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        bias = biases[_bias_key(found)] = add("Expand", [found.mask, shape])
    attributes = [ir.AttrInt64("num_heads", found.num_heads), ir.AttrFloat32("scale", found.scale)]
    operands = [q, k, v, None, None, bias, found.k.past, found.v.past]
    while operands[-1] is None:
        operands.pop()
    add("MultiHeadAttention", operands, attributes, domain="com.microsoft", outputs=len(found.outputs))
    return nodes
