"""Fuses scaled dot-product attention without a cache into MultiHeadAttention.

Paper:   Vaswani et al., arXiv:1706.03762, eq. (1): softmax(scale q k^T + mask) v.
Anchor:  a Softmax between two products, or an operator `Attention`. Masks and position biases are whatever is added to
         the scores: the value itself becomes the operator's additive bias, so nothing of it can be lost. Both forms run
         before one is accepted.
Axes:    B batch, S tokens, H heads, D width of a head
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, constant, discard, producer
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.region import Array, NotCuttable, random_feed
from onnxpress.passes.fusion._attention import (
    is_anchor,
    joined_output,
    rank,
    read_core,
    static,
    to_cache,
    unscaled,
    weighs_values,
)


@dataclass(frozen=True, kw_only=True)
class FuseEncoderAttention(Pass):
    """One MultiHeadAttention per layer of an encoder; scale and every mask or bias that is added are carried over."""

    promise: ClassVar[Promise] = Promise.CLOSE
    paper: ClassVar[str] = "arXiv:1706.03762"

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        biases: dict[int, ir.Value] = {}  # by id of the mask
        for node in list(model.graph):
            if not is_anchor(node) or (node.op_type == "Softmax" and not weighs_values(node)):
                continue  # of a classifier or a router
            site = node.name or node.outputs[0].name or "attention"
            try:
                _fuse(fuser, site, _read(node), biases)
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
    """

    value: ir.Value
    scale: float
    is_apart: bool = False


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
    nodes: list[ir.Node] = field(default_factory=list)


def _read(anchor: ir.Node) -> _Attention:
    """Walks from a Softmax or an operator `Attention` to its operands.

    Raises:
        NotCuttable: the first thing that is not as in attention without a cache.
    """
    axis = anchor.attributes.get("axis")
    if axis is not None and axis.as_int() not in (-1, 3):
        raise NotCuttable("the Softmax is not over the last of four axes [batch, heads, queries, keys]")
    core = read_core(anchor)
    if core.cached or _has_cache(core.k):
        raise NotCuttable("the keys meet a cache, which `fuse_attention` is for")
    if core.is_guarded:
        raise NotCuttable("some probabilities are replaced")
    if core.softcap:
        raise NotCuttable("the operator has no soft cap")
    if len(core.masks) > 1:
        raise NotCuttable("the scores are masked twice")
    if any(mask.number != 1.0 for mask in core.masks):
        raise NotCuttable("the mask is multiplied after it was added")
    mask = core.masks[0].value if core.masks else None
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        raise NotCuttable("the mask selects scores instead of being added to them")
    if core.num_heads is None:
        q, k = _operand(core.q, []), _operand(core.k, [0, 1, 3, 2] if core.is_turned else [])
        v = _operand(core.v, [])
    else:
        q, k, v = (_Operand(*unscaled(value)) for value in (core.q, core.k, core.v))
    if v.scale != 1.0:
        raise NotCuttable("the values are scaled")
    heads = core.num_heads or static(core.output, 1)
    width = static(core.output, 3) if rank(core.output) == 4 else static(core.output, 2) // heads
    scale, is_written_out = core.scale * q.scale * k.scale, not core.is_turned
    output = core.output if core.num_heads else joined_output(core.output)
    return _Attention(q, k, v, output, scale, mask, heads, width, is_written_out)


def _has_cache(keys: ir.Value | None) -> bool:
    try:
        to_cache(keys, "keys")
    except NotCuttable:
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


def _fuse(fuser: Fuser, site: str, found: _Attention, biases: dict[int, ir.Value]) -> None:
    """Replaces one attention, or raises NotCuttable with the reason why not."""
    operands = [found.q.value, found.k.value, found.v.value]
    inputs = [*operands, *([found.mask] if found.mask is not None else [])]

    def feeds(leaves: Sequence[ir.Value]) -> Iterable[list[Array]]:
        rng = np.random.default_rng(fuser.seed)
        for batch, tokens, axis in ((2, 3, None), (1, 5, None), (2, 4, 2), (2, 4, 0)):
            given = {}
            if found.mask is not None:
                usual = (batch, 1, tokens, tokens)
                if found.mask.shape is None or len(found.mask.shape) != len(usual):
                    raise NotCuttable("the mask is not of rank 4")
                known = found.mask.shape
                sizes = [one if isinstance(one, int) else two for one, two in zip(known, usual, strict=True)]
                if axis == 2 and found.is_written_out:
                    continue
                if axis is not None and not isinstance(found.mask.shape[axis], int):
                    sizes[axis] = 1  # of an unknown size that is 1, all rows or queries get the same
                dtype = (found.mask.dtype or ir.DataType.FLOAT).numpy()
                mask = (3 * rng.standard_normal(sizes)).astype(dtype)
                mask[..., -1] = np.finfo(dtype).min  # the last key is hidden
                given[id(found.mask)] = mask
            yield random_feed(leaves, {"batch": batch, "sequence": tokens}, rng, given)

    nodes = _nodes(fuser.model.graph, found, biases)
    reason = fuser.verdict(inputs, [found.output], [nodes[-1].outputs[0]], feeds)
    if reason is not None:
        if any(node.op_type == "Expand" for node in nodes):
            del biases[id(found.mask)]
        discard(nodes)
        raise NotCuttable(reason)
    fuser.replace(site, [found.output], [nodes[-1].outputs[0]], nodes, scale=found.scale)


def _nodes(graph: ir.Graph, found: _Attention, biases: dict[int, ir.Value]) -> list[ir.Node]:
    """The fused operator, preceded by what brings its operands into form."""
    nodes: list[ir.Node] = []
    name = found.output.name or "attention"

    def add(op: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr] = (), domain: str = "") -> Any:
        node = ir.Node(domain, op, inputs, attributes, name=f"{name}/{op}_{len(nodes)}")
        node.outputs[0].name = f"{node.name}.out"
        node.outputs[0].type = found.output.type
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

    q, k, v = flat(found.q), flat(found.k), flat(found.v)
    bias = found.mask if found.mask is None else biases.get(id(found.mask))
    if found.mask is not None and bias is None:
        # Often the same for all queries, [B, 1, 1, S]; the operator wants it written out. Once for all layers.
        index, ones = (constant(graph, np.ones(count, np.int64), f"attention/ones_{count}") for count in (1, 2))
        sizes = [add("Gather", [add("Shape", [value]), index], [ir.AttrInt64("axis", 0)]) for value in (q, k)]
        shape = add("Concat", [ones, *sizes], [ir.AttrInt64("axis", 0)])
        for node in nodes[-5:]:
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        bias = biases[id(found.mask)] = add("Expand", [found.mask, shape])
    attributes = [ir.AttrInt64("num_heads", found.num_heads), ir.AttrFloat32("scale", found.scale)]
    operands = [q, k, v, None, None, bias]
    while operands[-1] is None:
        operands.pop()
    add("MultiHeadAttention", operands, attributes, domain="com.microsoft")
    return nodes
