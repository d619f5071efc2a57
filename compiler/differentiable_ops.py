"""Operators of our graphs as functions of torch tensors, so that gradients flow through them.

Those that lie between token ids and logits in the exports and fused forms of decoders; what decides about shapes and
masks is not here, since ONNX Runtime computes it once (`differentiable`). All floats are float32. An attribute or
operand that would change the result and is not known here is refused.

Imports torch: to be imported where it is used.

Axes: B batch, S tokens, H heads, D features of a head, R rotated features, N out features, K in features, G blocks
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812

from onnxpress.compiler import packing
from onnxpress.compiler.errors import UnsupportedModelError

MICROSOFT = "com.microsoft"
Tensor = Any  # torch.Tensor: mypy does not follow torch
Operands = Sequence[Any]
Operator = Callable[[ir.Node, Operands], Any]

OPERATORS: dict[tuple[str, str], Operator] = {}
_ATTRIBUTES: dict[tuple[str, str], frozenset[str]] = {}


def operator(names: str, attributes: str = "", domain: str = "") -> Callable[[Operator], Operator]:
    """Enters a function for the operators in `names`, which reads these attributes; other attributes are refused."""

    def enter(function: Operator) -> Operator:
        for name in names.split():
            OPERATORS[domain, name] = function
            _ATTRIBUTES[domain, name] = frozenset(attributes.split())
        return function

    return enter


def find(node: ir.Node) -> Operator:
    """The function of a node.

    Raises:
        UnsupportedModelError: there is none, or it knows nothing of one of the node's attributes.
    """
    key = "" if node.domain == "ai.onnx" else node.domain, node.op_type
    if key not in OPERATORS:
        raise refusal(node, "there are no gradients for this operator")
    for name in node.attributes:
        if name not in _ATTRIBUTES[key]:
            raise refusal(node, f"there are no gradients for it with {name}={node.attributes[name].value!r}")
    return OPERATORS[key]


def refusal(node: ir.Node, reason: str) -> UnsupportedModelError:
    """The error that names a node and why no gradients flow through it."""
    kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return UnsupportedModelError(
        f"{kind} {node.name or node.outputs[0].name!r}: {reason}",
        hint="leave heal out for this model, or run it before the pass that puts this operator in",
    )


def number(node: ir.Node, name: str, default: float) -> float:
    """A number of the node's attributes."""
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _whole(node: ir.Node, name: str, default: int) -> int:
    return int(number(node, name, default))


def _numbers(node: ir.Node, operands: Operands, slot: int, name: str) -> list[int] | None:
    """Whole numbers that are an input since some opset, and were an attribute before."""
    if len(operands) > slot and operands[slot] is not None:
        return [int(one) for one in operands[slot].reshape(-1)]
    attribute = node.attributes.get(name)
    return None if attribute is None else [int(one) for one in attribute.value]


def _operand(operands: Operands, slot: int) -> Tensor:
    return operands[slot] if len(operands) > slot else None


def _elementwise(function: Callable[..., Tensor]) -> Operator:
    return lambda node, operands: function(*operands)


for _name, _function in {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Pow": torch.pow,
    "MatMul": torch.matmul,
    "Neg": torch.neg,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Exp": torch.exp,
    "Erf": torch.erf,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Relu": torch.relu,
    "IsNaN": torch.isnan,
    "Where": torch.where,
    "Identity": lambda x: x,
    "Sum": lambda *terms: sum(terms[1:], terms[0]),
}.items():
    operator(_name)(_elementwise(_function))


@operator("Div")
def _div(node: ir.Node, operands: Operands) -> Tensor:
    x, y = operands
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@operator("Cast", "to saturate")
def _cast(node: ir.Node, operands: Operands) -> Tensor:
    dtype = ir.DataType(_whole(node, "to", 0))
    if dtype.is_floating_point():  # narrower types are computed in float32, too
        return operands[0].float()
    return operands[0].bool() if dtype == ir.DataType.BOOL else operands[0].long()


@operator("Transpose", "perm")
def _transpose(node: ir.Node, operands: Operands) -> Tensor:
    (x,) = operands
    order = node.attributes.get("perm")
    return x.permute(list(range(x.ndim))[::-1] if order is None else list(order.value))


@operator("Reshape", "allowzero")
def _reshape(node: ir.Node, operands: Operands) -> Tensor:
    x, wanted = operands
    sizes = [int(one) for one in wanted]
    if not _whole(node, "allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten", "axis")
def _flatten(node: ir.Node, operands: Operands) -> Tensor:
    (x,) = operands
    rows = math.prod(x.shape[: _whole(node, "axis", 1)])
    return x.reshape(rows, -1)


@operator("Unsqueeze", "axes")
def _unsqueeze(node: ir.Node, operands: Operands) -> Tensor:
    axes, rank = _numbers(node, operands, 1, "axes") or [], operands[0].ndim
    x = operands[0]
    for axis in sorted(axis % (rank + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze", "axes")
def _squeeze(node: ir.Node, operands: Operands) -> Tensor:
    axes = _numbers(node, operands, 1, "axes")
    return operands[0].squeeze() if axes is None else operands[0].squeeze(tuple(axes))


@operator("Concat", "axis")
def _concat(node: ir.Node, operands: Operands) -> Tensor:
    return torch.cat(list(operands), dim=_whole(node, "axis", 0))


@operator("Split", "axis num_outputs split")
def _split(node: ir.Node, operands: Operands) -> Any:
    axis = _whole(node, "axis", 0)
    sizes = _numbers(node, operands, 1, "split")
    if sizes is None:
        return operands[0].split(-(-operands[0].shape[axis] // len(node.outputs)), dim=axis)
    return operands[0].split(sizes, dim=axis)


@operator("Slice")
def _slice(node: ir.Node, operands: Operands) -> Tensor:
    x = operands[0]
    starts, ends = ([int(one) for one in operands[slot]] for slot in (1, 2))
    axes = _numbers(node, operands, 3, "axes") or list(range(len(starts)))
    steps = _numbers(node, operands, 4, "steps") or [1] * len(starts)
    place = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise refusal(node, "there are no gradients for it backwards")
        place[axis] = slice(start, end, step)
    return x[tuple(place)]


@operator("Gather", "axis")
def _gather(node: ir.Node, operands: Operands) -> Tensor:
    x, index = operands
    axis = _whole(node, "axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index).long()
    if axis == 0:
        return F.embedding(index, x) if x.ndim == 2 else x[index]
    found = x.index_select(axis, index.reshape(-1))
    return found.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@operator("Expand")
def _expand(node: ir.Node, operands: Operands) -> Tensor:
    x, wanted = operands
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(int(one) for one in wanted)))


@operator("ReduceMean ReduceSum", "axes keepdims noop_with_empty_axes")
def _reduce(node: ir.Node, operands: Operands) -> Tensor:
    axes, keep = _numbers(node, operands, 1, "axes"), bool(_whole(node, "keepdims", 1))
    if not axes:
        if _whole(node, "noop_with_empty_axes", 0):
            return operands[0]
        axes = list(range(operands[0].ndim))
    x = operands[0]
    return x.mean(axes, keepdim=keep) if node.op_type == "ReduceMean" else x.sum(axes, keepdim=keep)


@operator("Softmax", "axis")
def _softmax(node: ir.Node, operands: Operands) -> Tensor:
    return torch.softmax(operands[0], dim=_whole(node, "axis", -1))


@operator("Gemm", "alpha beta transA transB")
def _gemm(node: ir.Node, operands: Operands) -> Tensor:
    a, b = operands[:2]
    a, b = (a.T if _whole(node, "transA", 0) else a), (b.T if _whole(node, "transB", 0) else b)
    product = a @ b
    alpha, bias = number(node, "alpha", 1.0), _operand(operands, 2)
    product = product if alpha == 1.0 else alpha * product
    return product if bias is None else product + number(node, "beta", 1.0) * bias


@operator("LayerNormalization", "axis epsilon stash_type")
def _layer_norm(node: ir.Node, operands: Operands) -> Tensor:
    x, scale, bias = operands[0], operands[1], _operand(operands, 2)
    axis = _whole(node, "axis", -1) % x.ndim
    return F.layer_norm(x, x.shape[axis:], scale, bias, number(node, "epsilon", 1e-5))


def _rms_norm(x: Tensor, scale: Tensor, epsilon: float, axis: int = -1) -> Tensor:
    axes = list(range(axis % x.ndim, x.ndim))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale


@operator("SimplifiedLayerNormalization RMSNormalization", "axis epsilon stash_type")
def _simplified_layer_norm(node: ir.Node, operands: Operands) -> Tensor:
    return _rms_norm(operands[0], operands[1], number(node, "epsilon", 1e-5), _whole(node, "axis", -1))


@operator("SkipSimplifiedLayerNormalization", "epsilon", MICROSOFT)
def _skip_simplified_layer_norm(node: ir.Node, operands: Operands) -> Any:
    x, skip, scale, bias = (_operand(operands, slot) for slot in range(4))
    total = x + skip if bias is None else x + skip + bias
    return _rms_norm(total, scale, number(node, "epsilon", 1e-12)), None, None, total


@operator("SkipLayerNormalization", "epsilon", MICROSOFT)
def _skip_layer_norm(node: ir.Node, operands: Operands) -> Any:
    x, skip, scale, shift, bias = (_operand(operands, slot) for slot in range(5))
    total = x + skip if bias is None else x + skip + bias
    normed = F.layer_norm(total, total.shape[-1:], scale, shift, number(node, "epsilon", 1e-12))
    return normed, None, None, total


@operator("Gelu", "approximate")
@operator("Gelu", "", MICROSOFT)
def _gelu(node: ir.Node, operands: Operands) -> Tensor:
    attribute = node.attributes.get("approximate")
    return F.gelu(operands[0], approximate="none" if attribute is None else str(attribute.value))


@operator("BiasGelu FastGelu", "", MICROSOFT)
def _bias_gelu(node: ir.Node, operands: Operands) -> Tensor:
    bias = _operand(operands, 1)
    x = operands[0] if bias is None else operands[0] + bias
    return F.gelu(x, approximate="tanh" if node.op_type == "FastGelu" else "none")


@operator("QuickGelu", "alpha", MICROSOFT)
def _quick_gelu(node: ir.Node, operands: Operands) -> Tensor:
    (x,) = operands
    alpha = number(node, "alpha", 1.702)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def rotate(x_BHSD: Tensor, cos_SR: Tensor, sin_SR: Tensor, *, interleaved: bool) -> Tensor:
    """Turns pairs of the first 2 R features of each head by the angle of their token.

    Args:
        x_BHSD: queries or keys.
        cos_SR, sin_SR: of the angles; R is half the number of features that are turned.
        interleaved: pairs are neighbors; else the halves of the rotated part.
    """
    width = 2 * cos_SR.shape[-1]
    turned, rest = x_BHSD[..., :width], x_BHSD[..., width:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    pair = first * cos_SR - second * sin_SR, first * sin_SR + second * cos_SR
    joined = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([joined, rest], dim=-1) if rest.shape[-1] else joined


def _angles(positions: Tensor, cache: Tensor, length: int) -> Tensor:
    """Rows of a cache of cosines or sines for the tokens, [S, R] or [B, 1, S, R]."""
    if positions is None:
        return cache[:length]
    if positions.numel() == 1:  # of the first token
        return cache[int(positions) : int(positions) + length]
    return cache[positions.long()][:, None]


@operator("RotaryEmbedding", "interleaved num_heads rotary_embedding_dim scale is_packed_batching", MICROSOFT)
def _rotary(node: ir.Node, operands: Operands) -> Tensor:
    x, positions, cos, sin = operands
    if _whole(node, "is_packed_batching", 0) or number(node, "scale", 1.0) != 1.0:
        raise refusal(node, "there are no gradients for packed batches and scaled angles")
    is_flat = x.ndim == 3
    heads = _heads(x, _whole(node, "num_heads", 0) or x.shape[-1] // (2 * cos.shape[-1])) if is_flat else x
    length = heads.shape[2]
    table = [_angles(positions, one, length) for one in (cos, sin)]
    turned = rotate(heads, *table, interleaved=bool(_whole(node, "interleaved", 0)))
    return _joined(turned) if is_flat else turned


def _heads(x_BSX: Tensor, count: int) -> Tensor:
    """[B, S, H D] to [B, H, S, D]."""
    batch, length, width = x_BSX.shape
    return x_BSX.reshape(batch, length, count, width // count).transpose(1, 2)


def _joined(x_BHSD: Tensor) -> Tensor:
    """[B, H, S, D] to [B, S, H D]."""
    return x_BHSD.transpose(1, 2).flatten(2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int = -1,
    softcap: float = 0.0,
    bias: Tensor = None,
) -> Tensor:
    """softmax(cap(q k^T scale) + bias) v over all tokens of a window.

    Args:
        q: [B, H, S, D].
        k, v: [B, H or fewer, S, D]; each head of them serves as many of q.
        scale: of the products.
        causal: no token sees a later one.
        window: tokens that one sees, itself included; -1 for all.
        softcap: bound c of the products, c tanh(x / c); 0 for none.
        bias: added, [1 or B, 1 or H, S, S].
    """
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    if not softcap and window < 0 and bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=groups > 1)
    visible = torch.ones(length, length, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    visible = visible if window < 0 else visible.triu(1 - window)
    added = torch.zeros(length, length).masked_fill(~visible, -torch.inf)
    added = added if bias is None else added + bias.float()
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, enable_gqa=groups > 1)
    k, v = (one.repeat_interleave(groups, dim=1) for one in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) + added
    return torch.softmax(scores, dim=-1) @ v


_GQA = "num_heads kv_num_heads scale softcap local_window_size do_rotary rotary_interleaved smooth_softmax causal"


@operator("GroupQueryAttention", f"{_GQA} k_quant_type v_quant_type qk_output", MICROSOFT)
def _group_query_attention(node: ir.Node, operands: Operands) -> Any:
    """Without a past: windows begin with an empty cache, so the lengths in slots 5 and 6 are those of the window."""
    q, k, v, past = (_operand(operands, slot) for slot in range(4))
    kinds = [node.attributes.get(f"{one}_quant_type") for one in "kv"]
    if any(one is not None and one.value != "NONE" for one in kinds):
        raise refusal(node, "there are no gradients through a quantized cache")
    if _whole(node, "smooth_softmax", 0) or any(one is not None for one in operands[11:]):
        raise refusal(node, "there are no gradients for sinks, smooth softmax, and norms inside of attention")
    if past is not None and past.shape[2]:
        raise refusal(node, "there are no gradients for a cache that is not empty")
    heads, pairs = _whole(node, "num_heads", 1), _whole(node, "kv_num_heads", 1)
    if k is None:
        width = q.shape[-1] // (heads + 2 * pairs)
        q, k, v = q.split([heads * width, pairs * width, pairs * width], dim=-1)
    q, k, v = _heads(q, heads), _heads(k, pairs), _heads(v, pairs)
    if _whole(node, "do_rotary", 0):
        table = [_angles(_operand(operands, 9), operands[slot], q.shape[2]) for slot in (7, 8)]
        interleaved = bool(_whole(node, "rotary_interleaved", 0))
        q, k = (rotate(one, *table, interleaved=interleaved) for one in (q, k))
    attended = attend(
        q,
        k,
        v,
        scale=number(node, "scale", 0.0) or q.shape[-1] ** -0.5,
        causal=bool(_whole(node, "causal", 1)),
        window=_whole(node, "local_window_size", -1),
        softcap=number(node, "softcap", 0.0),
        bias=_operand(operands, 10),
    )
    return _joined(attended), None, None


@operator("MultiHeadAttention", "num_heads scale unidirectional mask_filter_value", MICROSOFT)
def _multi_head_attention(node: ir.Node, operands: Operands) -> Any:
    q, k, v, bias, mask, added = (_operand(operands, slot) for slot in range(6))
    if mask is not None and not bool((mask != 0).all()):
        raise refusal(node, "there are no gradients for a mask of padding")
    if k is None or v is None or k.ndim != 3 or any(one is not None and one.numel() for one in operands[6:]):
        raise refusal(node, "there are no gradients for packed operands and a cache that is not empty")
    if bias is not None:
        parts = bias.split([q.shape[-1], k.shape[-1], v.shape[-1]])
        q, k, v = (one + part for one, part in zip((q, k, v), parts, strict=True))
    heads = _whole(node, "num_heads", 1)
    q, k, v = (_heads(one, heads) for one in (q, k, v))
    scale = number(node, "scale", 0.0) or q.shape[-1] ** -0.5
    causal = bool(_whole(node, "unidirectional", 0))
    return _joined(attend(q, k, v, scale=scale, causal=causal, bias=added)), None, None


class Codes:
    """A quantized matrix [N, K], which is made of its codes each time it is needed."""

    def __init__(self, matrix: Callable[[], Any], shape: tuple[int, int], block_size: int = 0) -> None:
        """Takes what gives the matrix.

        Args:
            matrix: float32 [N, K]; of blocks, code minus zero point, to be multiplied with scales.
            shape: (N, K).
            block_size: columns that share a scale; 0 when `matrix` holds the scales already.
        """
        self.matrix, self.shape, self.block_size = matrix, shape, block_size

    def weight(self, scales: Tensor) -> Tensor:
        """[N, K], with scales [N, G] of its blocks."""
        matrix = torch.from_numpy(np.ascontiguousarray(self.matrix()))
        if self.block_size:
            matrix = matrix * self._spread(scales)
        return matrix

    def gradient(self, gradient_NK: Tensor, scales: Tensor) -> Tensor:
        """Of the scales, shaped as they are, from that of the matrix."""
        product = gradient_NK * torch.from_numpy(np.ascontiguousarray(self.matrix()))
        product = F.pad(product, (0, -self.shape[1] % self.block_size))
        return product.reshape(self.shape[0], -1, self.block_size).sum(2).reshape(scales.shape)

    def _spread(self, scales: Tensor) -> Tensor:
        rows = scales.reshape(self.shape[0], -1)
        return rows.repeat_interleave(self.block_size, dim=1)[:, : self.shape[1]]


class Product(torch.autograd.Function):  # type: ignore[misc]
    """x [..., K] w_NK^T of codes; what waits for the way back are the codes, not the matrix."""

    @staticmethod
    def forward(context: Any, x: Tensor, scales: Tensor, codes: Codes) -> Tensor:
        """The product."""
        context.save_for_backward(x, scales)
        context.codes = codes
        return x @ codes.weight(scales).T

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and of the scales, as far as somebody wants them."""
        x, scales = context.saved_tensors
        to_x = gradient @ context.codes.weight(scales) if context.needs_input_grad[0] else None
        to_scales = None
        if context.needs_input_grad[1]:
            to_weight = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            to_scales = context.codes.gradient(to_weight, scales)
        return to_x, to_scales, None


def blocks(node: ir.Node) -> Codes:
    """The codes of a MatMulNBits, without its scales."""
    size, bits = _whole(node, "block_size", 0), _whole(node, "bits", 4)
    shape = _whole(node, "N", 0), _whole(node, "K", 0)
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        raise refusal(node, "there are no gradients for columns in another order")

    def matrix() -> Any:
        levels, zeros = packing.codes_of(node)
        ones = np.ones((shape[0], -(-shape[1] // size)), np.float32)
        return packing.dequantize(levels, ones, zeros, bits=bits, block_size=size)

    return Codes(matrix, shape, size)


def gathered(node: ir.Node, index: Tensor) -> Tensor:
    """Rows of a GatherBlockQuantized, of which only those are dequantized."""
    rows, places = np.unique(index.numpy(), return_inverse=True)
    table = torch.from_numpy(np.array(packing.dequantize_node(node, rows)))
    return table[torch.from_numpy(places.reshape(-1))].reshape(*index.shape, -1)
