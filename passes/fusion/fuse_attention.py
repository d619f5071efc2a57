"""Fuses scaled dot-product attention with a key/value cache into GroupQueryAttention, rotary embedding included.

Paper:   Ainslie et al., arXiv:2305.13245 (grouped queries); Vaswani et al., arXiv:1706.03762 (attention).
Anchor:  a Softmax between two products or an operator `Attention`, with a cache joined to the keys and the values.
         From there the graph is walked to the projections; head counts are read off shapes, the scale off constants,
         the sliding window off the mask's own values. Then both forms run on prompts, decode steps, chunks and
         left-padded batches, and must agree.
Masks:   `attention_mask` becomes lengths (index of the last 1, per row) and an additive bias that hides padding on the
         left. Nothing of the mask is dropped; `padding="right"` leaves the bias out for callers that never pad left.
Rotary:  the kernel turns queries and keys by the slot they occupy, not by `position_ids`. Scores depend on distances
         alone, so results are the same also behind padding on the left; only the cached keys of such rows are turned
         by another, constant angle.
Axes:    B batch, S sequence, T past + S, H query heads, G key/value heads, D width of a head
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, constant, discard, producer, scalar
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.region import (
    Array,
    NotCuttable,
    Region,
    Sample,
    build_model,
    first_line,
    random_feed,
    run,
)
from onnxpress.passes.fusion._attention import (
    Attention,
    Mask,
    is_anchor,
    made_from,
    rank,
    read_cached,
    static,
    unscaled,
)

# Added to the scores of padding: far below any score, and finite in float16 (a row of -inf would give NaN).
_HIDDEN = -30000.0
# From here on a number in a mask is where a Slice ends that has no end, and no window.
_TO_THE_END = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class FuseAttention(Pass):
    """One GroupQueryAttention per layer; scale, window, softcap and mask are carried over, or the layer is left."""

    promise: ClassVar[Promise] = Promise.CLOSE
    paper: ClassVar[str] = "arXiv:2305.13245"

    padding: Literal["any", "right"] = "any"  # "right": rows are never padded on the left, so no bias is needed

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        if not any(_joins_cache(node) for node in model.graph):
            return report  # an encoder, or no attention at all
        builder = _Builder(Fuser(model, report, context.seed), context, self.padding == "any")
        for node in list(model.graph):
            if not is_anchor(node):
                continue
            site = node.name or node.outputs[0].name or "attention"
            try:
                found = read_cached(node)
                try:
                    builder.fuse(site, found)
                except NotCuttable as reason:
                    if found.cos is None:
                        raise
                    builder.fuse(site, read_cached(node, with_rotary=False), rotary=f"stays outside: {reason}")
            except NotCuttable as reason:
                report.skip(site, str(reason))
        discard(builder.pending)
        builder.fuser.finish()
        return report


def _uncut(mask: ir.Value) -> ir.Value:
    """The mask before it is cut to the first keys, as many as this layer has, which is all that it has."""
    cut = producer(mask, "Slice")
    if cut is None or cut.inputs[0] is None or rank(cut.inputs[0]) != 4 or len(cut.inputs) < 4:
        return mask
    is_from_first = scalar(cut.inputs[1]) == 0 and scalar(cut.inputs[3]) in (3, -1)
    step = 1.0 if len(cut.inputs) < 5 else scalar(cut.inputs[4])
    return cut.inputs[0] if is_from_first and step == 1.0 else mask


def _joins_cache(node: ir.Node) -> bool:
    """Whether new keys or values are appended to a graph input [B, G, past, D]."""
    past = node.inputs[0] if node.op_type == "Concat" and len(node.inputs) == 2 else None
    if node.op_type == "Attention" and len(node.inputs) > 5:
        past = node.inputs[4]
    return past is not None and past.is_graph_input() and rank(past) == 4


def _rows_of_square(value: ir.Value) -> int:
    """The rows of a constant that is a matrix, or several, of as many rows as columns; 0 for anything else."""
    sizes = [] if value.const_value is None else [int(size) for size in value.const_value.shape.numpy()]
    return sizes[-1] if len(sizes) > 1 and sizes[-1] == sizes[-2] != 1 else 0


@dataclass
class _Builder:
    """Builds, checks and installs the fused operators of one model; what all layers share is made once."""

    fuser: Fuser
    context: Context
    with_bias: bool
    lengths: dict[int, tuple[ir.Value, ir.Value, ir.Value]] = field(default_factory=dict)
    biases: dict[tuple[Any, ...], ir.Value] = field(default_factory=dict)
    windows: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    pending: list[ir.Node] = field(default_factory=list)

    @property
    def graph(self) -> ir.Graph:
        return self.fuser.model.graph

    def fuse(self, site: str, found: Attention, **more: str) -> None:
        """Replaces one attention, or raises NotCuttable with the reason why not; `more` goes to the report."""
        if found.head_size % 8:
            raise NotCuttable(f"the kernel wants a head size that is a multiple of 8, got {found.head_size}")
        if not found.masks:
            raise NotCuttable("no mask: the attention is not causal")
        mask_input = self._mask_input(found)
        window, biases = self._window(found)
        self._check_order(found, biases)
        inputs = [found.q, found.k, found.v]
        outputs = [found.output, found.present_k, found.present_v]
        reason = None
        # Whether the kernel counts the token itself into the window is decided by execution as well.
        for local in [window] if window < 0 else [window, window - 1, window + 1]:
            nodes = self._nodes(found, mask_input, local, biases)
            news = list(nodes[-1].outputs)
            feeds = _Samples(found, mask_input, window, self.context.seed, self.with_bias)
            reason = self.fuser.verdict(inputs, outputs, news, feeds, _blank_padding(mask_input))
            if reason is None:
                self.fuser.insert(self.pending)
                self.pending = []
                facts = {"scale": found.scale, "window": local, "softcap": found.softcap, **more}
                self.fuser.replace(site, outputs, news, nodes, **facts)
                return
            discard(nodes)
        raise NotCuttable(reason or "no form agrees")

    def _mask_input(self, found: Attention) -> ir.Value:
        """The graph input with a 1 for each token that may be seen, shape [B, T]."""
        skip = {"input_ids", "position_ids"}
        region = Region([found.q, found.k, found.v], [mask.value for mask in found.masks])
        integers = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.FLOAT)
        leaves = [
            leaf
            for leaf in region.leaves
            if leaf.is_graph_input() and rank(leaf) == 2 and leaf.dtype in integers and leaf.name not in skip
        ]
        if len(leaves) != 1:
            raise NotCuttable("the mask does not come from one input of shape [batch, total]")
        return leaves[0]

    def _check_order(self, found: Attention, biases: Sequence[Mask]) -> None:
        """What goes into the operator must not come out of it."""
        made = made_from([found.present_k, found.present_v], found.output)
        operands = [found.q, found.k, found.v, found.cos, found.sin, found.positions, *(one.value for one in biases)]
        for operand in operands:
            if operand is not None and id(operand) in made:
                raise NotCuttable(f"{operand.name} depends on the keys that the operator makes")

    def _window(self, found: Attention) -> tuple[int, list[Mask]]:
        """(how many tokens a query sees, itself included, -1 for all; the masks with values of their own, as ALiBi).

        Read off the masks of one decode step.
        """
        # The mask is often cut to the length of the keys, so keys may be among its leaves.
        region = Region([found.q, found.k, found.v], [mask.value for mask in found.masks])
        key = region.signature()
        if key not in self.windows:
            self.windows[key] = self._probe(region, found)
        window, places = self.windows[key]
        return window, [replace(found.masks[place], value=_uncut(found.masks[place].value)) for place in places]

    def _probe(self, region: Region, found: Attention) -> tuple[int, list[int]]:
        """The window, and the places of the masks that do more than hide tokens."""
        constants = [
            int(number)
            for value in region.constants
            if value.const_value is not None
            and value.const_value.size == 1
            and (number := abs(float(value.const_value.numpy().reshape(-1)[0]))) < _TO_THE_END
        ]
        named = [int(self.context.config.get(key) or 0) for key in ("sliding_window", "attention_window_size")]
        # A square of stored flags (GPT-2) ends where the model's positions end.
        stored = [size for value in region.constants if (size := _rows_of_square(value))]
        total = min(max([64, *constants, *named]), 1 << 17) + 9
        try:
            return self._probe_at(total, region, found)
        except NotCuttable:
            if not stored or min(stored) >= total:
                raise
        return self._probe_at(min(stored), region, found)

    def _probe_at(self, total: int, region: Region, found: Attention) -> tuple[int, list[int]]:
        """`_probe` on a step that is token number `total`."""
        mask_input = self._mask_input(found)
        opset = self.fuser.model.opset_imports.get("", 18)
        model = build_model(region.nodes, region.leaves, region.outputs, region.constants, opset)
        feed = next(
            iter(_Samples(found, mask_input, -1, 0, window_known=False).steps(region.leaves, [(1, 1, total - 1, 0)]))
        )
        try:
            rows = run(model, feed)
        except Exception as error:  # ONNX Runtime's exceptions have no common type
            raise NotCuttable(f"the mask does not run by itself: {first_line(error)}") from None
        seen, places = np.ones(total, np.bool_), []
        for place, (mask, row) in enumerate(zip(found.masks, rows, strict=True)):
            visible = row if row.dtype == np.bool_ else row.astype(np.float64) > -1e3
            if row.size == total and (row.dtype == np.bool_ or not row[visible].any()):
                seen &= visible.reshape(-1)
            elif mask.is_added and rank(mask.value) in (3, 4) and row.shape[-1] == total:
                places.append(place)
            else:
                raise NotCuttable("the mask has not one entry for each key")
        count = int(seen.sum())
        if count == 0 or not seen[-count:].all():
            raise NotCuttable("the mask is neither causal nor a sliding window")
        return -1 if count == total else count, places

    def _nodes(self, found: Attention, mask_input: ir.Value, window: int, biases: Sequence[Mask] = ()) -> list[ir.Node]:
        """The fused operator, preceded by what brings its operands to [B, S, heads D]."""
        seqlens, total, visible = self._lengths(mask_input)
        needs_bias = self.with_bias or len(biases) > 0
        bias = self._bias(mask_input, visible, biases, found.num_heads) if needs_bias else None
        before: list[ir.Node] = []
        heads = (found.num_heads, found.num_kv_heads, found.num_kv_heads)
        operands_in = zip((found.q, found.k, found.v), heads, strict=True)
        q, k, v = (self._joined(found, value, count * found.head_size, before) for value, count in operands_in)
        attributes: list[Any] = [
            ir.AttrInt64("num_heads", found.num_heads),
            ir.AttrInt64("kv_num_heads", found.num_kv_heads),
            ir.AttrFloat32("scale", found.scale),
            ir.AttrInt64("local_window_size", window),
        ]
        if found.softcap:
            attributes.append(ir.AttrFloat32("softcap", found.softcap))
        if found.cos is not None:
            attributes += [ir.AttrInt64("do_rotary", 1), ir.AttrInt64("rotary_interleaved", found.interleaved)]
        # No position_ids: for a first prompt the kernel ignores them and counts slots, so it must count slots always.
        operands = [q, k, v, found.past_k, found.past_v, seqlens, total, found.cos, found.sin, None, bias]
        while operands[-1] is None:
            operands.pop()
        name = f"{found.output.name}/attention"
        fused = ir.Node("com.microsoft", "GroupQueryAttention", operands, attributes, num_outputs=3, name=name)
        return [*before, fused]

    def _joined(self, found: Attention, value: ir.Value, width: int, nodes: list[ir.Node]) -> ir.Value:
        """`value` as [B, S, heads D]; a [B, heads, S, D] value is turned first."""
        if rank(value) == 3:
            return value
        if rank(value) != 4:
            raise NotCuttable(f"{value.name} is of unknown rank")
        apart = value
        norm = found.norms.get(id(value))
        if norm is not None:
            again = ir.Node(norm.domain, norm.op_type, [value, *norm.inputs[1:]], list(norm.attributes.values()))
            again.name = f"{value.name}/apart"
            again.outputs[0].type = value.type
            nodes.append(again)
            apart = again.outputs[0]
        elif value not in found.unturned:
            swap = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", [0, 2, 1, 3])], name=f"{value.name}/swap")
            swap.outputs[0].type = value.type
            nodes.append(swap)
            apart = swap.outputs[0]
        shape = constant(self.graph, np.array([0, 0, width], np.int64), f"join_heads_{width}")
        join = ir.Node("", "Reshape", [apart, shape], name=f"{value.name}/join")
        join.outputs[0].shape, join.outputs[0].type = ir.Shape([None, None, width]), value.type
        nodes.append(join)
        return join.outputs[0]

    def _lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(index of the last visible token per row, T, the mask as floats) from the mask; once per model.

        The total comes from a shape, not from a reduction: it must lie in host memory, and a reduction on the device
        would be copied back at every step.
        """
        if id(mask) in self.lengths:
            return self.lengths[id(mask)]
        made = _Chain(self.graph, "mask")
        floats = made.node("Cast", [mask], to=ir.DataType.FLOAT)
        summed = made.node("CumSum", [floats, made.const(np.array(1, np.int64), "axis")])
        # The first maximum of the running count is the last visible token, for padding on either side.
        last = made.node("ArgMax", [summed], axis=1, keepdims=0)
        seqlens = made.node("Cast", [last], to=ir.DataType.INT32)
        seqlens.shape, seqlens.dtype = ir.Shape([None]), ir.DataType.INT32
        whole = made.node("Shape", [mask])
        length = made.node("Gather", [whole, made.const(np.array(1, np.int64), "one")], axis=0)
        total = made.node("Cast", [length], to=ir.DataType.INT32)
        total.shape, total.dtype = ir.Shape([]), ir.DataType.INT32
        self.pending += made.nodes
        self.lengths[id(mask)] = (seqlens, total, floats)
        return self.lengths[id(mask)]

    def _bias(self, mask: ir.Value, visible: ir.Value, biases: Sequence[Mask], heads: int) -> ir.Value:
        """[B, 1 or H, S, T]: `_HIDDEN` for padding, and `biases`, which the model itself adds; once for each set."""
        key: tuple[Any, ...] = (id(mask),)
        if key not in self.biases:
            made = _Chain(self.graph, "mask/padding")
            self.biases[key] = self._padding(made, visible)
            self.pending += made.nodes
        for bias in biases:
            below = self.biases[key]
            value, factor = unscaled(bias.value)
            number = factor * bias.number
            key = (*key, id(value), number, heads)
            if key not in self.biases:
                made = _Chain(self.graph, f"mask/bias_{len(self.biases)}")
                self.biases[key] = self._added(made, below, value, number, heads)
                self.pending += made.nodes
        return self.biases[key]

    def _added(self, made: _Chain, bias: ir.Value, value: ir.Value, number: float, heads: int) -> ir.Value:
        """`bias` plus a value [B, 1 or H, 1 or S, T] or [B H, 1, T] times a number."""
        if rank(value) == 3:
            sizes = made.node("Shape", [value])
            last = made.node("Gather", [sizes, made.const(np.array([2], np.int64), "last")], axis=0)
            first = made.const(np.array([-1, heads, 1], np.int64), f"first_{heads}")
            value = made.node("Reshape", [value, made.node("Concat", [first, last], axis=0)], like=value)
        if number != 1.0:
            dtype = (value.dtype or ir.DataType.FLOAT).numpy()
            value = made.node("Mul", [value, made.const(np.array(number, dtype), f"times_{number:.6g}")], like=value)
        total = made.node("Add", [bias, value], like=bias)
        total.shape = ir.Shape([None, None, None, None])
        return total

    def _padding(self, made: _Chain, visible: ir.Value) -> ir.Value:
        """[B, 1, S, T]: 0 for visible tokens, `_HIDDEN` for padding."""
        ids = next((one for one in self.graph.inputs if one.name in ("input_ids", "inputs_embeds")), None)
        if ids is None:
            raise NotCuttable("no input_ids to take the sequence length from")
        dtype = self.fuser.model.graph.inputs[0].dtype
        dtype = next((one.dtype for one in self.graph.inputs if rank(one) == 4 and one.dtype is not None), dtype)
        hidden = made.node("Sub", [made.const(np.array(1, np.float32), "one_float"), visible])
        scaled = made.node("Mul", [hidden, made.const(np.array(_HIDDEN, np.float32), "hidden")])
        if dtype not in (ir.DataType.FLOAT, None):
            scaled = made.node("Cast", [scaled], to=dtype)
        rows = made.node("Unsqueeze", [scaled, made.const(np.array([1, 2], np.int64), "axes")])
        sizes = made.node("Shape", [ids])
        index = made.const(np.array([1], np.int64), "one_list")
        sequence = made.node("Gather", [sizes, index], axis=0)
        ones = made.const(np.array([1, 1], np.int64), "ones")
        shape = made.node("Concat", [ones, sequence, made.const(np.array([1], np.int64), "one_list")], axis=0)
        bias = made.node("Expand", [rows, shape])
        bias.shape = ir.Shape([None, 1, None, None])
        bias.type = ir.TensorType(dtype or ir.DataType.FLOAT)
        return bias


class _Chain:
    """A few small nodes with common name prefix."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self.prefix = graph, prefix
        self.nodes: list[ir.Node] = []

    def const(self, array: Array, name: str) -> ir.Value:
        return constant(self.graph, array, f"{self.prefix}/{name}")

    def node(self, op: str, inputs: Sequence[ir.Value], like: ir.Value | None = None, **attributes: int) -> ir.Value:
        """The output of a new node, of the type of `like`."""
        given = [ir.AttrInt64(name, int(value)) for name, value in attributes.items()]
        node = ir.Node("", op, inputs, given, name=f"{self.prefix}/{op}_{len(self.nodes)}")
        node.outputs[0].name = f"{self.prefix}/{op}_{len(self.nodes)}.out"
        # Written down, so that a placement audit can tell shape arithmetic from activations.
        integer = op in ("Shape", "ArgMax") or (op in ("Gather", "Concat") and inputs[0].dtype == ir.DataType.INT64)
        dtype = attributes.get("to", ir.DataType.INT64 if integer else ir.DataType.FLOAT)
        node.outputs[0].type = ir.TensorType(ir.DataType(dtype)) if like is None else like.type
        self.nodes.append(node)
        return node.outputs[0]


@dataclass
class _Samples:
    """Sample inputs of an attention region: prompt, decode, chunk, and padding on the left."""

    found: Attention
    mask: ir.Value
    window: int
    seed: int
    left: bool = True  # whether rows may be padded on the left
    window_known: bool = True  # while it is probed, positions stay at 0: the cache of angles may be shorter

    def __call__(self, leaves: Sequence[ir.Value]) -> Iterable[list[Array]]:
        steps = [(2, 5, 0, 0), (2, 1, 7, 0), (1, 3, 4, 0)]
        if self.window > 0:
            steps += [(1, 1, self.window + 3, 0), (1, self.window + 4 if self.window < 64 else 3, 0, 0)]
        yield from self.steps(leaves, steps)
        if not self.left:
            return
        # With padding on the left, a prompt and then a decode step on the cache that each form made for itself.
        prompt, decode = self.steps(leaves, [(2, 6, 0, 2), (2, 1, 6, 2)])
        places = {id(leaf): place for place, leaf in enumerate(leaves)}
        carry = {places[id(self.found.past_k)]: 1, places[id(self.found.past_v)]: 2}
        yield prompt
        yield Sample(decode, carry=carry)

    def steps(self, leaves: Sequence[ir.Value], steps: Sequence[tuple[int, int, int, int]]) -> Iterable[list[Array]]:
        """Feeds for (batch, sequence, past, left padding of the last row)."""
        rng = np.random.default_rng(self.seed)
        for batch, sequence, past, padding in steps:
            total = past + sequence
            mask = np.ones((batch, total), np.int64)
            mask[batch - 1, :padding] = 0
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, past:]
            given: dict[int, Array] = {}
            for leaf in leaves:
                if leaf is self.mask:
                    given[id(leaf)] = mask.astype((leaf.dtype or ir.DataType.INT64).numpy())
                elif leaf is self.found.positions or (leaf.is_graph_input() and leaf.name == "position_ids"):
                    positions = positions if self.window_known else np.zeros_like(positions)
                    given[id(leaf)] = positions.astype((leaf.dtype or ir.DataType.INT64).numpy())
                elif leaf.is_graph_input() and rank(leaf) == 4:
                    size = (batch, static(leaf, 1), past, static(leaf, 3))
                    given[id(leaf)] = rng.standard_normal(size).astype((leaf.dtype or ir.DataType.FLOAT).numpy())
                elif rank(leaf) == 4 and leaf in (self.found.q, self.found.k, self.found.v):
                    heads = self.found.num_heads if leaf is self.found.q else self.found.num_kv_heads
                    size = (batch, heads, sequence, self.found.head_size)
                    if leaf in self.found.unturned:
                        size = (batch, sequence, heads, self.found.head_size)
                    given[id(leaf)] = rng.standard_normal(size).astype((leaf.dtype or ir.DataType.FLOAT).numpy())
            yield random_feed(leaves, {"batch": batch, "sequence": sequence}, rng, given)


def _blank_padding(mask: ir.Value) -> Any:
    """Rows of padding tokens may differ: what a hidden token attends to has no meaning."""

    def valid(leaves: Sequence[ir.Value], feed: Sequence[Array], index: int, array: Array) -> Array:
        seen = next(one for leaf, one in zip(leaves, feed, strict=True) if leaf is mask) != 0
        if index == 0:
            array = array * seen[:, -array.shape[1] :, None]
        elif index == 1:  # keys of padded rows are turned by another angle
            whole = np.asarray(seen.all(axis=1))
            array = array * whole[:, None, None, None]
        return array

    return valid
