"""Linears stored in other formats than the blocks of MatMulNBits: which nodes they are, and what matrix they stand for.

    DynamicQuantizeMatMul            int8 per column; activations are rounded to uint8 when they are known. CPU only
    DequantizeLinear+MatMul          (QDQ) int8 per column; activations are rounded to uint8 in a range fixed beforehand
    MatMulBnb4                       4 bits, of a table of 16 levels (NF4 or FP4), blocks along the flattened rows
    MatMulBlockQuantizedFp8Weight    8-bit floats (e4m3) in blocks of a row, a float32 scale each. CUDA only
    MatMulBlockQuantizedFp4Weight    (NVFP4) 4-bit floats (e2m1), e4m3 scales and one for all. CUDA only

The functions that give a matrix back are what tests hold ONNX Runtime's kernels against.

Axes: N out features, K in features, G blocks of a row
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Float2D = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

FP8_WEIGHT, FP4_WEIGHT = "MatMulBlockQuantizedFp8Weight", "MatMulBlockQuantizedFp4Weight"
QDQ = "DequantizeLinear+MatMul"

# Levels of NF4, arXiv:2305.14314, appendix E: equally likely values of a normal distribution, 0 among them.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip
# FP4 as bitsandbytes has it: e2m1 with a bias of its own, relative to the largest; the high bit is the sign.
_FP4 = np.array([0.0, 0.005208333488553762, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4], np.float32)
FP4 = np.concatenate([_FP4, -_FP4])


@dataclass(frozen=True)
class Stored:
    """A matrix that a node holds in one of the formats.

    Attributes:
        holder: the operator; `QDQ` for a MatMul between DequantizeLinear nodes.
        weights: codes first, then scales and zero points.
        num_out, num_in: N and K.
        bias: an input of the node that is added to the product, None when there is none.
        description: for people, "DynamicQuantizeMatMul, 8 bits per column".
    """

    holder: str
    weights: tuple[ir.Value, ...]
    num_out: int
    num_in: int
    bias: ir.Value | None
    description: str


@dataclass(frozen=True)
class _Operator:
    slots: tuple[int, ...]  # of codes, scales and zero points
    bias: int | None  # slot
    text: Callable[[ir.Node], str]
    read: Callable[[ir.Node], Float2D]


def stored(node: ir.Node) -> Stored | None:
    """What `node` multiplies with, None when it holds no constant matrix in one of these formats."""
    if node.op_type == "MatMul" and not node.domain:
        return _stored_pair(node)
    operator = OPERATORS.get(node.op_type) if node.domain == "com.microsoft" else None
    values = [] if operator is None else [_input(node, slot) for slot in operator.slots]
    if operator is None or not _are_constant([*values[:2], *(one for one in values[2:] if one is not None)]):
        return None
    if node.op_type == "DynamicQuantizeMatMul" and len(_sizes(values[0])) != 2:
        return None  # a stack of matrices
    if node.op_type == "MatMulBnb4":
        shape = integer(node, "N"), integer(node, "K")
    elif node.op_type in (FP8_WEIGHT, FP4_WEIGHT):
        if len(_sizes(values[0])) != 2 or values[-1] is None:
            return None
        rows, columns = _sizes(values[0])
        shape = rows, columns if node.op_type == FP8_WEIGHT else 2 * columns
    else:
        columns, rows = _sizes(values[0])
        shape = rows, columns
    weights = tuple(value for value in values if value is not None)
    bias = None if operator.bias is None else _input(node, operator.bias)
    return Stored(node.op_type, weights, *shape, bias, f"{node.op_type}, {operator.text(node)}")


def _stored_pair(node: ir.Node) -> Stored | None:
    """A MatMul whose activation was quantized too, and whose weight is 8-bit codes per column or of one scale."""
    sides = [None if value is None else value.producer() for value in node.inputs]
    if any(side is None or side.op_type != "DequantizeLinear" for side in sides):
        return None
    weight = sides[1]
    assert weight is not None
    values = list(weight.inputs)
    scale = values[1]
    if not _are_constant(values) or scale is None or len(_sizes(values[0])) != 2:
        return None
    rows, columns = _sizes(values[0])[::-1]
    axis = integer(weight, "axis", 1)
    if integer(weight, "block_size") or (_sizes(scale) not in ((), (1,)) and axis not in (1, -1)):
        return None
    weights = tuple(value for value in values if value is not None)
    return Stored(QDQ, weights, rows, columns, None, f"{QDQ}, 8 bits per column")


def matrix(node: ir.Node) -> Float2D:
    """The float32 matrix [N, K] of a node for which `stored` is not None."""
    return _read_pair(node) if node.op_type == "MatMul" else OPERATORS[node.op_type].read(node)


def levels_matrix(codes: Codes, levels: npt.NDArray[np.float32], absmax: npt.NDArray[Any], block: int) -> Float2D:
    """levels[code] absmax of the block, flat; codes are packed two a byte, the first in the high nibble (bitsandbytes).

    Args:
        codes: uint8 [ceil(n / 2)].
        levels: of each of the 16 codes.
        absmax: scale of each block of `block` weights, [ceil(n / block)].
        block: weights that share a scale.
    """
    flat = np.empty(2 * codes.size, np.uint8)
    flat[0::2], flat[1::2] = codes >> 4, codes & 15
    values = levels[flat]
    scale = np.repeat(absmax.astype(np.float32), block)
    size = min(values.size, scale.size)
    return values[:size] * scale[:size]


def _read_bnb4(node: ir.Node) -> Float2D:
    rows, columns = integer(node, "N"), integer(node, "K")
    levels = NF4 if integer(node, "quant_type") else FP4
    flat = levels_matrix(_array(node, 1).ravel(), levels, _array(node, 2).ravel(), integer(node, "block_size"))
    return flat[: rows * columns].reshape(rows, columns)


def blocks_matrix(values_NK: Float2D, scale_NG: npt.NDArray[Any], block: int) -> Float2D:
    """values times the scale of their block, float32 [N, K].

    Args:
        values_NK: float32; what the codes stand for.
        scale_NG: of each block of a row; the last may be shorter, G = ceil(K / block).
        block: weights that share a scale.
    """
    scale_NK = np.repeat(scale_NG.astype(np.float32), block, axis=1)[:, : values_NK.shape[1]]
    return np.asarray(values_NK * scale_NK, np.float32)


def _read_fp8(node: ir.Node) -> Float2D:
    return blocks_matrix(_array(node, 1).astype(np.float32), _array(node, 2), integer(node, "block_size", 128))


def fp4_matrix(packed: Codes, scale_NG: Codes, scale_of_all: float, block: int) -> Float2D:
    """The matrix of MatMulBlockQuantizedFp4Weight, float32 [N, K].

    Args:
        packed: uint8 [N, K / 2], two e2m1 values a byte, the first in the low nibble.
        scale_NG: uint8, the bytes of e4m3 scales.
        scale_of_all: of the whole matrix.
        block: weights that share a scale.
    """
    codes_NK = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    values_NK = codes_NK.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scale = scale_NG.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale_of_all)
    return blocks_matrix(values_NK, scale, block)


def _read_fp4(node: ir.Node) -> Float2D:
    scale_of_all = float(_array(node, 3).reshape(-1)[0])
    return fp4_matrix(_array(node, 1), _array(node, 2), scale_of_all, integer(node, "block_size", 16))


def _read_columns(node: ir.Node) -> Float2D:
    return columns_matrix(_array(node, 1), _array(node, 2), _array(node, 3) if _input(node, 3) is not None else None)


def columns_matrix(codes_KN: npt.NDArray[Any], scale_N: npt.NDArray[Any], zero_N: npt.NDArray[Any] | None) -> Float2D:
    """(code - zero) scale of each column, turned: float32 [N, K]. A single scale or zero point serves all columns."""
    w_KN = codes_KN.astype(np.float32)
    if zero_N is not None:
        w_KN -= zero_N.astype(np.float32)
    w_KN *= scale_N.astype(np.float32)
    return np.ascontiguousarray(w_KN.T)


def _read_pair(node: ir.Node) -> Float2D:
    weight = node.inputs[1].producer() if node.inputs[1] is not None else None
    assert weight is not None
    zero = _array(weight, 2) if _input(weight, 2) is not None else None
    return columns_matrix(_array(weight, 0), _array(weight, 1), zero)


def float_type(node: ir.Node) -> ir.DataType:
    """Float type of the activations of a node for which `stored` is not None."""
    if node.op_type == "MatMulBnb4":
        scale = node.inputs[2]
        assert scale is not None
        return scale.dtype or ir.DataType.FLOAT
    if node.op_type in (FP8_WEIGHT, FP4_WEIGHT):
        # Its scales are float32 whatever the activation is, which a graph of others need not declare.
        known = [value.dtype for value in (node.inputs[0], node.outputs[0]) if value is not None]
        return next((one for one in known if one is not None), ir.DataType.FLOAT16)
    return ir.DataType.FLOAT


def integer(node: ir.Node, name: str, default: int = 0) -> int:
    """An attribute, or `default`."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


OPERATORS = {
    "DynamicQuantizeMatMul": _Operator((1, 2, 3), 4, lambda _: "8 bits per column", _read_columns),
    "MatMulBnb4": _Operator(
        (1, 2),
        None,
        lambda node: f"{('FP4', 'NF4')[integer(node, 'quant_type')]} in blocks of {integer(node, 'block_size')}",
        _read_bnb4,
    ),
    FP8_WEIGHT: _Operator((1, 2), 4, lambda node: _fp8_text(node), _read_fp8),
    FP4_WEIGHT: _Operator(
        (1, 2, 3), 5, lambda node: f"NVFP4 in blocks of {integer(node, 'block_size', 16)}", _read_fp4
    ),
}


def _fp8_text(node: ir.Node) -> str:
    activations = "" if _input(node, 3) is None else ", activations too"
    return f"e4m3 in blocks of {integer(node, 'block_size', 128)}{activations}"


def _input(node: ir.Node, slot: int) -> ir.Value | None:
    return node.inputs[slot] if len(node.inputs) > slot else None


def _array(node: ir.Node, slot: int) -> npt.NDArray[Any]:
    value = node.inputs[slot]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _are_constant(values: list[ir.Value | None]) -> bool:
    return all(value is not None and value.is_initializer() and value.const_value is not None for value in values)


def _sizes(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None
    assert value.const_value is not None
    return tuple(int(size) for size in value.const_value.shape.numpy())
