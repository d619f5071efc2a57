"""Integer codes to bytes and back, in the layout of MatMulNBits and GatherBlockQuantized.

Layout: a row of K columns is cut into G = ceil(K / block_size) blocks; the last one is padded with zero points. Codes
are unsigned, low bits first: byte i of a 4-bit row holds column 2 i in its low nibble. MatMulNBits stores [N, G, block
bytes]; GatherBlockQuantized stores the same bytes as [V, K bits / 8]. Without zero points the zero is 2^(bits - 1).

Axes: N rows, K columns, G blocks, P = ceil(G bits / 8) bytes of packed zero points a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Float2D = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


def pack(codes_NK: Codes, bits: int) -> Codes:
    """Unsigned codes [N, K] to bytes [N, K bits / 8], low bits first; K bits must be a multiple of 8."""
    if bits == 8:
        return np.ascontiguousarray(codes_NK)
    per_byte = 8 // bits
    packed = codes_NK[:, 0::per_byte].copy()
    for slot in range(1, per_byte):
        packed |= codes_NK[:, slot::per_byte] << np.uint8(slot * bits)
    return packed


def unpack(packed_NB: Codes, bits: int) -> Codes:
    """Bytes [N, B] to unsigned codes [N, 8 B / bits], low bits first."""
    if bits == 8:
        return packed_NB
    per_byte, mask = 8 // bits, np.uint8(2**bits - 1)
    codes = np.empty((packed_NB.shape[0], packed_NB.shape[1] * per_byte), np.uint8)
    for slot in range(per_byte):
        codes[:, slot::per_byte] = (packed_NB >> np.uint8(slot * bits)) & mask
    return codes


def pack_zero_points(zeros_NG: Codes, bits: int) -> Codes:
    """Zero points [N, G] to [N, ceil(G bits / 8)]; each row is padded to a whole byte."""
    per_byte = 8 // bits
    padding = -zeros_NG.shape[1] % per_byte
    return pack(np.pad(zeros_NG, ((0, 0), (0, padding))), bits)


def dequantize(
    codes_NK: Codes, scale_NG: npt.NDArray[Any], zero_NG: npt.NDArray[Any] | None, *, bits: int, block_size: int
) -> Float2D:
    """(code - zero) scale per block, float32 [N, K]. K need not be a multiple of `block_size`.

    Args:
        codes_NK: unsigned codes.
        scale_NG: one scale per block, any float type.
        zero_NG: one zero point per block (integer or float), None for the implicit 2^(bits - 1).
    """
    num_rows, num_columns = codes_NK.shape
    num_blocks = scale_NG.shape[1]
    padded = np.zeros((num_rows, num_blocks * block_size), np.float32)
    padded[:, :num_columns] = codes_NK
    blocks_NGb = padded.reshape(num_rows, num_blocks, block_size)
    zero = np.float32(2 ** (bits - 1)) if zero_NG is None else zero_NG.astype(np.float32)[:, :, None]
    blocks_NGb -= zero
    blocks_NGb *= scale_NG.astype(np.float32)[:, :, None]
    return padded[:, :num_columns]


def dequantize_node(node: ir.Node, only: npt.NDArray[Any] | None = None) -> Float2D:
    """The float32 matrix that a MatMulNBits [N, K] or GatherBlockQuantized [V, H] node stands for.

    Args:
        node: of which codes, scales and zero points are constant.
        only: numbers of the rows that are wanted; all by default.
    """
    codes, zero_NG = codes_of(node, only)
    scale_NG = _rows(_array(node.inputs[2]), node, only)
    bits, block_size = _int(node, "bits", 4), _int(node, "block_size", 128)
    return dequantize(codes, scale_NG, zero_NG, bits=bits, block_size=block_size)


def codes_of(node: ir.Node, only: npt.NDArray[Any] | None = None) -> tuple[Codes, npt.NDArray[Any] | None]:
    """Unsigned codes [N, K] of such a node and zero points [N, G], None for the implicit 2^(bits - 1).

    Args:
        node: as for `dequantize_node`.
        only: numbers of the rows that are wanted; all by default.
    """
    gather = node.op_type == "GatherBlockQuantized"
    bits = _int(node, "bits", 4)
    columns = gather_shape(node)[1] if gather else _int(node, "K", 0)
    codes = unpack(_rows(_array(node.inputs[0 if gather else 1]), node, only), bits)[:, :columns]
    if len(node.inputs) <= 3 or node.inputs[3] is None:
        return codes, None
    zero = _rows(_array(node.inputs[3]), node, only)
    num_blocks = _rows(_array(node.inputs[2]), node, None).shape[1]
    return codes, unpack(zero, bits)[:, :num_blocks] if zero.dtype == np.uint8 else zero


def _rows(array: npt.NDArray[Any], node: ir.Node, only: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    rows = gather_shape(node)[0] if node.op_type == "GatherBlockQuantized" else _int(node, "N", 0)
    matrix = array.reshape(rows, -1)
    return matrix if only is None else matrix[only]


def gather_shape(node: ir.Node) -> tuple[int, int]:
    """(V, H) of a GatherBlockQuantized over uint8 codes."""
    codes = node.inputs[0]
    assert codes is not None
    if codes.const_value is None:  # the view of a tied head's bytes
        reshape = codes.producer()
        assert reshape is not None
        codes = reshape.inputs[0]
        assert codes is not None
        assert codes.const_value is not None
    size = codes.const_value.size
    rows = int(codes.const_value.shape[0])  # type: ignore[arg-type]
    return rows, int(size) // rows * 8 // _int(node, "bits", 4)


def _array(value: ir.Value | None) -> npt.NDArray[Any]:
    assert value is not None
    if value.const_value is None:
        node = value.producer()
        assert node is not None  # a Reshape of the shared bytes; the caller reshapes anyway
        return _array(node.inputs[0])
    return value.const_value.numpy()


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
