"""Reads attention off a graph: what lies around a Softmax between two products, or around one operator `Attention`.

Shared by the fusions of attention with a cache and without one.

Axes:    B batch, S sequence, T past + S, H query heads, G key/value heads, D width of a head
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.fusing import Feeds, other, producer, scalar, split_scalar
from onnxpress.compiler.region import SIZE_ARITHMETIC, Array, NotCuttable, random_feed, sized_number

PADDING, SCORE_BIAS = 4, 5  # inputs of MultiHeadAttention
# Attributes that it has in common with the Attention of com.microsoft.
SHARED = ("num_heads", "scale", "unidirectional", "mask_filter_value")

# Operators that move or repeat data without changing a number.
_MOVES = ("Transpose", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Slice", "Identity", "Cast")
_ROUNDS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


@dataclass
class Mask:
    """What is added to the scores, or decides which of them count.

    Attributes:
        value: the summand, or the condition of a Where.
        number: what it is multiplied by afterwards.
        is_added: whether it is a summand.
    """

    value: ir.Value
    number: float = 1.0
    is_added: bool = True


@dataclass
class Attention:
    """What was read off one attention: operands, cache, parameters."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    past_k: ir.Value
    past_v: ir.Value
    present_k: ir.Value
    present_v: ir.Value
    output: ir.Value
    scale: float
    softcap: float
    masks: list[Mask]
    cos: ir.Value | None = None
    sin: ir.Value | None = None
    positions: ir.Value | None = None
    interleaved: int = 0
    unturned: list[ir.Value] = field(default_factory=list)  # operands [B, S, heads, D], not yet turned
    norms: dict[int, ir.Node] = field(default_factory=dict)  # by id of such an operand: the norm over D that follows

    @property
    def num_heads(self) -> int:
        """H, from the width of the queries or of what reads the output."""
        if rank(self.q) == 3:
            return static(self.q, 2) // self.head_size
        for node, index in self.output.uses():
            weight = node.inputs[1] if node.op_type == "MatMul" and index == 0 else None
            if weight is not None and weight.shape is not None and isinstance(weight.shape[0], int):
                return weight.shape[0] // self.head_size
        return static(self.q, 2 if self.q in self.unturned else 1)

    @property
    def num_kv_heads(self) -> int:
        """G, from the cache."""
        return static(self.past_k, 1)

    @property
    def head_size(self) -> int:
        """D, from the cache."""
        return static(self.past_k, 3)


@dataclass
class Core:
    """softmax(softcap(scale q k^T) + masks) v as it stands in the graph.

    Attributes:
        q, k, v: what is multiplied; keys as [B, H, D, T] when `is_turned`.
        output: the product with the values, [B, H, S, D]; [B, S, H D] of an operator that splits heads itself.
        num_heads: that such an operator splits the queries into.
        cached: past and present of keys and of values, when the operator itself joins them.
        is_guarded: a row without any key gives zeros.
    """

    q: ir.Value | None
    k: ir.Value | None
    v: ir.Value | None
    output: ir.Value
    scale: float
    softcap: float
    masks: list[Mask]
    is_turned: bool = True
    num_heads: int | None = None
    cached: list[_Cached] = field(default_factory=list)
    is_guarded: bool = False


def is_anchor(node: ir.Node) -> bool:
    """Whether `node` may be what `read_core` starts from: not the Softmax of a classifier or a router."""
    if node.op_type == "Softmax":
        return _weighs_values(node)
    return node.op_type == "Attention" and node.domain in ("", "ai.onnx")


def read_core(anchor: ir.Node) -> Core:
    """Reads the attention around a Softmax, or that of an operator.

    Raises:
        NotCuttable: it is no attention, or of a kind that no fused operator knows.
    """
    if anchor.op_type == "Attention":
        return _operator_core(anchor)
    scores, masks, scale, softcap = read_scores(anchor)
    product, is_guarded = product_with_values(anchor)
    q, k = scores.inputs[:2]
    return Core(q, k, product.inputs[1], product.outputs[0], scale, softcap, masks, is_guarded=is_guarded)


def _operator_core(node: ir.Node) -> Core:
    """The operator of ai.onnx 23: Q, K, V, attn_mask, past_key, past_value, and from 24 on nonpad_kv_seqlen."""
    q, k, v, mask, past_k, past_v, lengths = [*node.inputs, *[None] * 7][:7]
    numbers = {name: attribute.value for name, attribute in node.attributes.items()}
    if lengths is not None:
        raise NotCuttable("the operator is told lengths of its keys")
    if numbers.get("is_causal"):
        raise NotCuttable("the operator makes a causal mask of its own")
    if len(node.outputs) > 3 and node.outputs[3].uses():
        raise NotCuttable("somebody else reads the scores of the operator")
    if q is None or k is None or v is None:
        raise NotCuttable("no queries, keys or values")
    heads = numbers.get("q_num_heads")
    head_size = static(q, 3) if rank(q) == 4 else static(q, 2) // int(heads or 1)
    cached = []
    if past_k is not None and past_v is not None and len(node.outputs) > 2:
        cached = [_Cached(past_k, k, node.outputs[1]), _Cached(past_v, v, node.outputs[2])]
    return Core(
        q,
        k,
        v,
        node.outputs[0],
        scale=float(numbers.get("scale") or head_size**-0.5),
        softcap=float(numbers.get("softcap") or 0.0),
        masks=[] if mask is None else [Mask(mask, is_added=mask.dtype != ir.DataType.BOOL)],
        is_turned=False,
        num_heads=heads if rank(q) == 3 else None,
        cached=cached,
    )


def read_cached(anchor: ir.Node, with_rotary: bool = True) -> Attention:
    """Walks from a Softmax or an operator `Attention` to queries, keys, values, cache, masks and output.

    Raises:
        NotCuttable: the first thing that is not as in attention with a cache.
    """
    core = read_core(anchor)
    q, q_scale = unscaled(core.q)
    q = _heads_apart(q)
    keys, values = core.cached or (None, None)
    k_scale = v_scale = 1.0
    if keys is None or values is None:
        keys, k_scale = to_cache(core.k, "keys")
        values, v_scale = to_cache(core.v, "values")
    if v_scale != 1.0:
        raise NotCuttable("the values are scaled")
    found = Attention(
        q=q,
        k=keys.new,
        v=values.new,
        past_k=keys.past,
        past_v=values.past,
        present_k=keys.present,
        present_v=values.present,
        output=core.output if core.num_heads else joined_output(core.output),
        scale=core.scale * q_scale * k_scale,
        softcap=core.softcap,
        masks=core.masks,
    )
    if with_rotary:
        _absorb_rotary(found)
    found.q, found.k, found.v = (flat(value, found) for value in (found.q, found.k, found.v))
    if rank(found.q) == 3:  # scaled before the heads were taken apart (OPT)
        found.q, q_scale = unscaled(found.q)
        found.scale *= q_scale
    return found


def _heads_apart(value: ir.Value) -> ir.Value:
    """[B, H, S, D] where batch and heads were folded into [B H, S, D] for the product (Bloom)."""
    fold = producer(value, "Reshape")
    apart = None if fold is None else fold.inputs[0]
    return apart if apart is not None and rank(value) == 3 and rank(apart) == 4 else value


def read_scores(softmax: ir.Node) -> tuple[ir.Node, list[Mask], float, float]:
    """The product of queries and keys above a Softmax, the masks, the scale and the softcap between them."""
    value, scale, softcap = softmax.inputs[0], 1.0, 0.0
    masks: list[Mask] = []
    for _ in range(12):
        node = producer(value)
        if node is None:
            break
        if node.op_type == "MatMul":
            return node, masks, scale, softcap
        if node.op_type in ("Cast", "Reshape"):
            value = node.inputs[0]
        elif node.op_type in ("Add", "Where"):
            operands = node.inputs if node.op_type == "Add" else node.inputs[1:]
            up = [one for one in operands if _leads_to_product(one)]
            is_added = node.op_type == "Add"
            mask = None if len(up) != 1 else other(node, up[0]) if is_added else node.inputs[0]
            if mask is None:
                raise NotCuttable(f"cannot tell the scores from the mask at {node.name or node.op_type}")
            masks.append(Mask(mask, scale, is_added))
            value = up[0]
        elif node.op_type in ("Mul", "Div"):
            inner, number = factor(node)
            if inner is None or number is None:
                raise NotCuttable(f"the scores are multiplied by something that is not one number at {node.name}")
            tanh = producer(inner, "Tanh")
            if tanh is not None:
                softcap = number
                value = tanh.inputs[0]
                scale *= softcap  # the division by the cap below the Tanh is not part of the scale
            else:
                scale *= number
                value = inner
        else:
            raise NotCuttable(f"{node.op_type} between the scores and the Softmax")
    raise NotCuttable("no product of queries and keys above the Softmax")


def _leads_to_product(value: ir.Value | None) -> bool:
    for _ in range(10):
        node = producer(value, "MatMul", "Add", "Where", "Mul", "Div", "Tanh", "Cast", "Reshape")
        if node is None:
            return False
        if node.op_type == "MatMul":
            return True
        if node.op_type in ("Add", "Where"):
            operands = node.inputs if node.op_type == "Add" else node.inputs[1:]
            return any(_leads_to_product(one) for one in operands)
        value = factor(node)[0] if node.op_type in ("Mul", "Div") else node.inputs[0]
    return False


def factor(node: ir.Node) -> tuple[ir.Value | None, float | None]:
    """`split_scalar`, also for a number that is computed from sizes, as 1 / sqrt(head size) often is."""
    inner, number = split_scalar(node)
    if number is not None:
        return inner, number
    for index in (1, 0):
        number = sized_number(node.inputs[index])
        if number and not (node.op_type == "Div" and index == 0):
            return node.inputs[1 - index], 1.0 / number if node.op_type == "Div" else number
    return None, None


def unscaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """The value below multiplications with one number, and the product of these numbers."""
    scale = 1.0
    while (node := producer(value, "Mul", "Div", "Cast")) is not None:
        inner, number = (node.inputs[0], 1.0) if node.op_type == "Cast" else factor(node)
        if inner is None or number is None:
            break
        value, scale = inner, scale * number
    if value is None:
        raise NotCuttable("no queries")
    return value, scale


@dataclass
class _Cached:
    past: ir.Value
    new: ir.Value
    present: ir.Value


def to_cache(value: ir.Value | None, what: str) -> tuple[_Cached, float]:
    """Walks from an operand of a product up to the Concat with the cache."""
    scale = 1.0
    for _ in range(12):
        node = producer(value)
        if node is None:
            break
        if node.op_type == "Concat" and len(node.inputs) == 2:
            past, new = node.inputs
            if past is None or new is None or not past.is_graph_input():
                break
            return _Cached(past, new, node.outputs[0]), scale
        if node.op_type in _MOVES:
            value = node.inputs[0]
        elif node.op_type in ("Mul", "Div"):
            value, number = factor(node)
            scale *= number or 0.0
        else:
            break
    raise NotCuttable(f"the {what} meet no cache")


def _is_guard(where: ir.Node, value: ir.Value) -> bool:
    """Whether `where` is Where(IsNaN(value), 0, value)."""
    test = producer(where.inputs[0], "IsNaN")
    return test is not None and test.inputs[0] is value and scalar(where.inputs[1]) == 0 and where.inputs[2] is value


def product_with_values(softmax: ir.Node) -> tuple[ir.Node, bool]:
    """The MatMul of probabilities and values, and whether Where(IsNaN(p), 0, p) guards rows without any key."""
    value, is_guarded = softmax.outputs[0], False
    for _ in range(5):
        if value.is_graph_output():
            raise NotCuttable("the probabilities are an output of the graph")
        readers = [node for node in value.consumers() if node.op_type != "IsNaN"]
        if len(readers) != 1:
            break
        node = readers[0]
        if node.op_type == "MatMul" and node.inputs[0] is value:
            return node, is_guarded
        if node.op_type == "Where" and not _is_guard(node, value):
            raise NotCuttable("some probabilities are replaced")
        is_guarded |= node.op_type == "Where"
        if node.op_type not in ("Cast", "Where", "Identity", "Dropout", "Reshape"):
            break
        value = node.outputs[0]
    raise NotCuttable("no product of probabilities and values below the Softmax")


def _weighs_values(softmax: ir.Node) -> bool:
    """Whether a product reads what the Softmax makes, as in any attention, however it is written."""
    values, seen = list(softmax.outputs), 0
    while values and seen < 16:
        seen += 1
        for node in values.pop().consumers():
            if node.op_type in ("MatMul", "Einsum", "MatMulInteger", "QLinearMatMul"):
                return True
            if node.op_type in (*_MOVES, "Where", "Dropout", "Mul", *_ROUNDS):
                values += node.outputs[:1]
    return False


def joined_output(value: ir.Value) -> ir.Value:
    """The value [B, S, H D] that the heads of a product with the values are joined into."""
    walked: list[ir.Node] = []
    sizes: list[ir.Node] = []
    for _ in range(6):
        if value.is_graph_output():
            raise NotCuttable("the product with the values is an output of the graph")
        readers = [node for node in value.consumers() if node.op_type != "Shape"]
        sizes += [node for node in value.consumers() if node.op_type == "Shape"]
        if len(readers) != 1 or readers[0].op_type not in ("Transpose", "Reshape", "Cast", "Identity"):
            break
        walked.append(readers[0])
        value = readers[0].outputs[0]
        if readers[0].op_type == "Reshape" and (
            rank(value) == 3 or (rank(value) is None and _sizes_asked(walked[-1]) == 3)
        ):
            if not all(ends_in(node, walked) for node in sizes):
                raise NotCuttable("somebody else asks for the size of the attention's product")
            return value
    raise NotCuttable("the heads are not joined by Transpose and Reshape")


def _sizes_asked(reshape: ir.Node) -> int | None:
    """Rank that a Reshape gives, from the length of its second operand."""
    shape = None if reshape.inputs[1] is None else reshape.inputs[1].shape
    return shape[0] if shape is not None and len(shape) == 1 and isinstance(shape[0], int) else None


def ends_in(node: ir.Node, walked: list[ir.Node]) -> bool:
    """Whether what is computed from a size is used by the `walked` nodes alone."""
    queue = [node]
    for _ in range(40):
        if not queue:
            return True
        above = queue.pop()
        if any(value.is_graph_output() for value in above.outputs):
            return False
        for below in (one for value in above.outputs for one in value.consumers()):
            if below in walked:
                continue
            if below.op_type not in SIZE_ARITHMETIC:
                return False
            queue.append(below)
    return False


def _absorb_rotary(found: Attention) -> None:
    """Takes the rotary embeddings of queries and keys in, when both have the same."""
    q, k = producer(found.q, "RotaryEmbedding"), producer(found.k, "RotaryEmbedding")
    if q is None or k is None or (q.domain, k.domain) != ("com.microsoft",) * 2:
        return
    same = all(one is two for one, two in zip(q.inputs[1:], k.inputs[1:], strict=True))
    if not same or q.inputs[0] is None or k.inputs[0] is None:
        return
    found.q, found.k = q.inputs[0], k.inputs[0]
    found.positions, found.cos, found.sin = q.inputs[1], q.inputs[2], q.inputs[3]
    attribute = q.attributes.get("interleaved")
    found.interleaved = 0 if attribute is None else attribute.as_int()


def made_from(sources: Sequence[ir.Value], stop: ir.Value, passed: Collection[ir.Node] = ()) -> set[int]:
    """Ids of the values that are computed from `sources`, sizes included, by other nodes than `passed`.

    What is computed from `stop` is not followed: where `stop` is made from the sources and an operand were among its
    results, the graph would have been a circle before.
    """
    found: set[int] = set()
    queue = list(sources)
    while queue:
        for node in queue.pop().consumers():
            for value in () if node in passed else node.outputs:
                if id(value) not in found and value is not stop:
                    found.add(id(value))
                    queue.append(value)
    return found


def flat(value: ir.Value, found: Attention) -> ir.Value:
    """The [B, S, heads D] value whose heads were split into `value`; else [B, S, heads, D], noted in `unturned`, where
    something was done per head before the heads were turned forward; else `value` itself."""
    reshape = producer(value, "Reshape")
    if reshape is not None and reshape.inputs[0] is not None and same_sizes(value, reshape.inputs[0]):
        value = reshape.inputs[0]  # changes nothing (Falcon)
    norm, turned = _normed_after_turning(value)
    if norm is not None:
        found.norms[id(turned)] = norm
        found.unturned.append(turned)
        return turned
    transpose = producer(value, "Transpose")
    if transpose is None or list(transpose.attributes["perm"].as_ints()) != [0, 2, 1, 3] or not transpose.inputs[0]:
        return value
    apart = transpose.inputs[0]
    reshape = producer(apart, "Reshape")
    if reshape is None or reshape.inputs[0] is None or rank(reshape.inputs[0]) != 3:
        found.unturned.append(apart)
        return apart
    return reshape.inputs[0]


def _normed_after_turning(value: ir.Value) -> tuple[ir.Node | None, ir.Value]:
    """The norm of each head [B, H, S, D] and the [B, S, H, D] it came from; a norm over D may come before the turn."""
    norm = producer(value, "SimplifiedLayerNormalization", "LayerNormalization")
    turn = None if norm is None else producer(norm.inputs[0], "Transpose")
    if norm is None or turn is None or list(turn.attributes["perm"].as_ints()) != [0, 2, 1, 3] or not turn.inputs[0]:
        return None, value
    axis = norm.attributes.get("axis")
    return (norm, turn.inputs[0]) if axis is None or axis.as_int() in (-1, 3) else (None, value)


def same_sizes(one: ir.Value, two: ir.Value) -> bool:
    """Whether both shapes are known and equal, symbols included."""
    if one.shape is None or two.shape is None or len(one.shape) != len(two.shape):
        return False
    known = all(isinstance(size, int) or size.value is not None for size in one.shape)
    return known and list(one.shape) == list(two.shape)


def rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def static(value: ir.Value, axis: int) -> int:
    """A size that must be known."""
    size = value.shape[axis] if value.shape is not None and len(value.shape) > axis else None
    if not isinstance(size, int):
        raise NotCuttable(f"axis {axis} of {value.name} has no fixed size")
    return size


def keeps_a_cache(node: ir.Node) -> bool:
    """Whether a MultiHeadAttention has a cache, gives more than its output, or adds a bias of its own."""
    is_read = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    return any(node.inputs[3:4]) or any(node.inputs[6:]) or is_read


def attention_samples(inputs: Sequence[ir.Value | None], seed: int) -> Feeds:
    """Sample inputs of a MultiHeadAttention: streams of equal sizes, whatever names the graph gives them, and masks.

    Args:
        inputs: of the operator, in its order; None for those that are not sampled.
        seed: of the numbers.
    """

    def feeds(leaves: Sequence[ir.Value]) -> Iterable[list[Array]]:
        rng = np.random.default_rng(seed)
        batch, tokens = 2, 3
        given: dict[int, Array] = {}
        for place, value in enumerate(inputs):
            if value is None:
                continue
            dtype = (value.dtype or ir.DataType.FLOAT).numpy()
            if place == PADDING:
                seen = np.array([[1] * tokens, [1] * (tokens - 1) + [0]], dtype)
                given[id(value)] = seen if rank(value) == 2 else seen.sum(axis=1, dtype=dtype)
            elif place == SCORE_BIAS:
                given[id(value)] = rng.standard_normal((1, 1, tokens, tokens)).astype(dtype)
            else:
                width = value.shape[-1] if value.shape is not None else None
                if not isinstance(width, int):
                    raise NotCuttable(f"the width of {value.name} is unknown")
                given[id(value)] = rng.standard_normal((batch, tokens, width)).astype(dtype)
        yield random_feed(leaves, {"batch": batch, "sequence": tokens}, rng, given)

    return feeds
