"""A changed matrix in the format that it had: codes rounded to the nearest, on the old grid of a row or on a new one.

The old grid is exact for what has not changed; a new one follows rows that have outgrown it. Each row takes whichever
is nearer, so rows without a change keep their codes bit for bit.

Axes: N rows, K columns, G = ceil(K / block_size) blocks of a row
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler import packing, scales
from onnxpress.compiler.nbits import CodedMatrix

Floats = npt.NDArray[np.float32]

_ROWS = 4096  # at a time
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a block's range: what is cut off is few, what gains is all


def coded(node: ir.Node) -> CodedMatrix | None:
    """What a MatMulNBits or GatherBlockQuantized stores; None where columns are reordered or zero points are floats."""
    first = 0 if node.op_type == "GatherBlockQuantized" else 1
    values = [*node.inputs[first : first + 1], *node.inputs[2:4]]
    arrays: list[npt.NDArray[Any]] = []
    for value in values:
        while value is not None and value.const_value is None:  # codes that a tied head shares, behind a Reshape
            maker = value.producer()
            value = None if maker is None or maker.op_type != "Reshape" else maker.inputs[0]
        if value is not None and value.const_value is not None:
            arrays.append(value.const_value.numpy())
    if len(arrays) != sum(value is not None for value in values) or len(arrays) < 2:
        return None
    if (len(node.inputs) > 4 and node.inputs[4] is not None) or (len(arrays) > 2 and arrays[2].dtype != np.uint8):
        return None
    bits, block = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    rows = arrays[0].shape[0]
    codes = arrays[0].reshape(rows, -1, block * bits // 8)
    columns = node.attributes["K"].as_int() if first else codes.shape[1] * block
    zero = arrays[2].reshape(rows, -1) if len(arrays) > 2 else None
    return CodedMatrix(codes, arrays[1].reshape(rows, -1), zero, columns, bits, block)


def nearest(w_NK: Floats, like: CodedMatrix) -> CodedMatrix:
    """`w_NK` in the format of `like`.

    Args:
        w_NK: float32, finite.
        like: what was stored; gives bits, block size, zero points or none, and the form of the scales.
    Laws:   what lies on the old grid keeps its codes; a row is never further away than on its old grid.
    """
    is_short = scales.split(like.scale) is not None
    done = [
        _nearest(w_NK[start : start + _ROWS], _rows(like, start), is_short=is_short)
        for start in range(0, len(w_NK), _ROWS)
    ]
    codes, scale = (np.concatenate([getattr(one, name) for one in done]) for name in ("codes", "scale"))
    zero = None if like.zero is None else np.concatenate([one.zero for one in done if one.zero is not None])
    return CodedMatrix(codes, scale, zero, like.num_in, like.bits, like.block_size)


def _rows(matrix: CodedMatrix, start: int) -> CodedMatrix:
    part = slice(start, start + _ROWS)
    zero = None if matrix.zero is None else matrix.zero[part]
    return CodedMatrix(matrix.codes[part], matrix.scale[part], zero, matrix.num_in, matrix.bits, matrix.block_size)


def _nearest(w_NK: Floats, old: CodedMatrix, *, is_short: bool) -> CodedMatrix:
    rows, groups = old.scale.shape
    padded = np.zeros((rows, groups * old.block_size), np.float32)
    padded[:, : old.num_in] = w_NK
    w_NGb = padded.reshape(rows, groups, old.block_size)
    middle = np.full((rows, groups), 2 ** (old.bits - 1), np.uint8)
    zero_NG = middle if old.zero is None else packing.unpack(old.zero, old.bits)[:, :groups]
    best = _coded(w_NGb, old.scale, zero_NG, old)
    error_N = _error(w_NK, best)
    scale_NG, zero_NG = _grid(w_NGb, old.bits, symmetric=old.zero is None)
    if is_short:
        unit_N1 = scales.unit_of(np.abs(scale_NG).max(axis=1, keepdims=True))
        scale_NG = scales.multiples(scale_NG, unit_N1)
    other = _coded(w_NGb, scale_NG.astype(old.scale.dtype), zero_NG, old)
    take = _error(w_NK, other) < error_N
    codes, scale = best.codes.copy(), best.scale.copy()
    codes[take], scale[take] = other.codes[take], other.scale[take]
    zero = None
    if best.zero is not None and other.zero is not None:
        zero = best.zero.copy()
        zero[take] = other.zero[take]
    return CodedMatrix(codes, scale, zero, old.num_in, old.bits, old.block_size)


def _grid(w_NGb: Floats, bits: int, *, symmetric: bool) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Scale and zero point of each block: of several ranges the one that loses least."""
    top = 2**bits - 1
    least, most = np.minimum(w_NGb.min(axis=-1), 0), np.maximum(w_NGb.max(axis=-1), 0)
    best_error = np.full(least.shape, np.inf, np.float32)
    best_scale, best_zero = np.ones_like(least), np.full(least.shape, 2 ** (bits - 1), np.uint8)
    for share in _SHRINK:
        if symmetric:
            # The code range reaches one step further down than up: the larger side gets it.
            largest = np.where(-least >= most, -least, -most)
            scale = (share * largest / 2 ** (bits - 1)).astype(np.float32)
            zero = np.full(scale.shape, 2 ** (bits - 1), np.float32)
        else:
            scale = (share * (most - least) / top).astype(np.float32)
            scale[scale == 0] = 1
            zero = np.clip(np.rint(-share * least / scale), 0, top).astype(np.float32)
        scale[scale == 0] = 1
        codes = np.clip(np.rint(w_NGb / scale[..., None]) + zero[..., None], 0, top)
        error = np.square((codes - zero[..., None]) * scale[..., None] - w_NGb).sum(axis=-1)
        better = error < best_error
        best_error[better], best_scale[better] = error[better], scale[better]
        best_zero[better] = zero[better].astype(np.uint8)
    return best_scale, best_zero


def _coded(w_NGb: Floats, scale_NG: npt.NDArray[Any], zero_NG: npt.NDArray[np.uint8], old: CodedMatrix) -> CodedMatrix:
    rows = len(w_NGb)
    scale = scale_NG.astype(np.float32)[..., None]
    safe = np.where(scale == 0, np.float32(1), scale)
    codes = np.clip(np.rint(w_NGb / safe) + zero_NG[..., None], 0, 2**old.bits - 1).astype(np.uint8)
    if old.num_in % old.block_size:  # what pads the last block stays a zero
        codes[:, -1, old.num_in % old.block_size :] = zero_NG[:, -1, None]
    packed = packing.pack(codes.reshape(rows, -1), old.bits).reshape(old.codes[:rows].shape)
    zero = None if old.zero is None else packing.pack_zero_points(zero_NG, old.bits)
    return CodedMatrix(packed, scale_NG, zero, old.num_in, old.bits, old.block_size)


def _error(w_NK: Floats, matrix: CodedMatrix) -> npt.NDArray[np.float64]:
    """Squared error of each row."""
    error: npt.NDArray[np.float64] = np.square(matrix.w_NK() - w_NK, dtype=np.float64).sum(axis=1)
    return error
