"""Blocks whose weights are code times step plus an offset that is no multiple of the step (GGUF: Q4_1, Q4_K).

MatMulNBits has zero points, whole numbers of steps. What an offset has beyond that (c, at most half a step where 0 is
within reach) is the same for all weights of a block, so its share of the output is c times the sum of the block's
activations:

    x W^T = x Q^T + s C^T,   s_e = sum of x over block e

The sums s are appended to x and the columns C [N, E] to Q [N, K], in 4 bits with a step of their own per row: still one
MatMulNBits, of E = K / 32 more columns, between two small operators that all readers of x share. Codes are kept as they
are, steps to float16 and offsets to a thirtieth of the widest of the row: weights of SmolLM2 are off by 2 % of a step,
where rounding anew takes 29 %. A matrix with a row that would be off by a fifth of its steps is left.

Axes:    N out features, K in features, G blocks of a row, b = 32 columns of a block, E offsets of a row, padded to 8
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler import packing
from onnxpress.compiler.fusing import constant
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.nbits import CodedMatrix
from onnxpress.compiler.scales import multiples, unit_of
from onnxpress.passes.quantization._rounding import round_matrix

Floats = npt.NDArray[np.float32]

BITS, SIZE = 4, 32
_LEVELS = 2**BITS
_EVEN = 2e-3  # of a step, by which a weight may miss its level: offsets are added in float32
_SMALLEST = 2.0**-24  # number above 0 of float16
_LOST = 0.2  # of a step, on the average of a row: seven tenths of what rounding anew costs, 1 / sqrt(12)
_MULTIPLE = 8  # of columns that kernels of CUDA want
ON_NO_GRID = "the weights of a block are not evenly spaced"


def offset_columns(num_in: int) -> int:
    """E: columns that hold the offsets of K = `num_in` columns, those that fill up included."""
    groups = -(-num_in // SIZE)
    return groups + -groups % _MULTIPLE


def even_steps(w_NGb: Floats) -> tuple[Floats, Floats] | None:
    """(step, lowest weight) of every block, [N, G], the weights being lowest + step times 0 to 15, or None.

    The step is the largest with which they are. Equal weights are 0 or 1 steps above the lowest, 0 or below.
    """
    low = w_NGb.min(axis=-1)
    span = w_NGb.max(axis=-1) - low
    step = np.zeros_like(span)
    is_flat = span == 0
    step[is_flat] = np.where(low[is_flat] == 0, np.float32(1), np.abs(low[is_flat]))
    low = np.where(is_flat, np.minimum(low, 0), low)
    above = w_NGb - low[..., None]
    # Files put the largest weight 15 steps above the lowest, most of the time; of such blocks the largest step fits a
    # divisor of 15 times. So the first count of this order that fits is the smallest.
    for count in (1, 3, 5, 15, 2, 4, *range(6, 15)):
        left = step == 0
        if not left.any():
            break
        guess = span[left] / np.float32(count)
        levels = above[left] / guess[:, None]
        fits = (np.abs(levels - np.rint(levels)) < _EVEN).all(axis=-1)
        step[left] = np.where(fits, guess, np.float32(0))
    return None if (step == 0).any() else (step, low)


def recover_offsets(w_NK: npt.NDArray[Any], scale_dtype: np.dtype[Any], *, scale_bits: int = 32) -> CodedMatrix | str:
    """Codes of [N, K + E]: the levels of `w_NK`, exactly, and its offsets; or why it has none.

    Args:
        w_NK: float32 [N, K], K a multiple of 32. Not changed.
        scale_dtype: in which steps are stored; they are rounded to float16 before.
        scale_bits: 8 for steps that are whole multiples of a unit of their row instead.
    """
    rows, columns = w_NK.shape
    if columns % SIZE:
        return f"width {columns} is not a multiple of {SIZE}"
    w = np.asarray(w_NK, np.float32)
    if not np.isfinite(w).all():
        return "weights are not finite"
    if even_steps(w[:16].reshape(-1, columns // SIZE, SIZE)) is None:  # the most frequent case is seen here
        return ON_NO_GRID
    w_NGb = w.reshape(rows, -1, SIZE)
    found = even_steps(w_NGb)
    if found is None:
        return ON_NO_GRID
    step, low = found
    codes = np.rint((w_NGb - low[..., None]) / step[..., None])
    is_flat = codes.max(axis=-1) == codes.min(axis=-1)
    usual_N1 = np.where(is_flat, np.inf, step).min(axis=1, keepdims=True).astype(np.float32)
    # A block of zeros may have any step, and must not coarsen the unit of its row.
    step = np.where((step == 1) & ~w_NGb.any(axis=-1) & np.isfinite(usual_N1), usual_N1, step)
    wanted = np.where(is_flat & np.isfinite(usual_N1), usual_N1, step)
    unit = unit_of(step.max(axis=1, keepdims=True)) if scale_bits == 8 else None
    step = _stored(step, unit)
    if not np.isfinite(step).all():
        return "its steps are too large for float16"
    zero = np.clip(np.rint(-low / step), 0, _LEVELS - 1)
    # The mean over the block: rounding the step has moved high levels more than low ones.
    offset_NG = (w_NGb - step[..., None] * (codes - zero[..., None])).mean(axis=-1)
    extra = offset_columns(columns)
    offset_NE = np.pad(offset_NG, ((0, 0), (0, extra - offset_NG.shape[1])))
    more, _, _ = round_matrix(
        offset_NE, bits=BITS, block_size=SIZE, symmetric=True, scales="mse", scale_dtype=np.dtype(np.float32)
    )
    scale = _stored(more.scale, unit)
    levels = np.pad(offset_NE, ((0, 0), (0, -extra % SIZE))).reshape(rows, -1, SIZE) / scale[..., None]
    levels = np.clip(np.rint(levels) + _LEVELS // 2, 0, _LEVELS - 1)
    got = (scale[..., None] * (levels - _LEVELS // 2)).reshape(rows, -1)[:, : offset_NG.shape[1]]
    left = w_NGb - (step[..., None] * (codes - zero[..., None]) + got[..., None])
    lost_N = np.sqrt((np.square(left).mean(axis=-1) / np.square(wanted)).mean(axis=1))
    if not (lost_N <= _LOST).all():  # nor where the scale of the offsets is too large for float16
        return "the blocks of a row differ too much for one step of their offsets"
    zero = np.pad(zero, ((0, 0), (0, scale.shape[1])), constant_values=_LEVELS // 2).astype(np.uint8)
    codes = np.concatenate([codes, levels], axis=1).astype(np.uint8)
    return CodedMatrix(
        packing.pack(codes.reshape(rows, -1), BITS).reshape(rows, zero.shape[1], -1),
        np.concatenate([step, scale], axis=1).astype(scale_dtype),
        packing.pack_zero_points(zero, BITS),
        columns + extra,
        BITS,
        SIZE,
    )


def _stored(step: Floats, unit_N1: Floats | None) -> Floats:
    if unit_N1 is not None:
        return multiples(step, unit_N1)
    with np.errstate(over="ignore"):
        half = step.astype(np.float16).astype(np.float32)
    # Steps below its range would become 0.
    return np.where(np.abs(half) < np.float32(_SMALLEST), np.copysign(np.float32(_SMALLEST), step), half)


def plain_matrix(matrix: CodedMatrix, num_in: int) -> Floats:
    """The matrix [N, K] that a coded one of K + E columns stands for."""
    w = matrix.w_NK()
    groups = num_in // SIZE
    kept: Floats = w[:, :num_in] + np.repeat(w[:, num_in : num_in + groups], SIZE, axis=1)
    return kept


def append_sums(graph: ir.Graph, linear: Linear, num_in: int) -> None:
    """Lets a linear of `num_in` = K + E columns read x with the sums of its blocks behind it; `linear` knows then.

    Nothing happens to one of K columns. The two nodes are there once for all that read x; the graph has to be sorted.
    """
    if num_in == linear.num_in:
        return
    both = _with_sums(graph, linear.activation, linear.num_in, linear.node)
    linear.node.replace_input_with(0, both)
    linear.activation, linear.num_in = both, num_in


def _with_sums(graph: ir.Graph, x: ir.Value, num_in: int, before: ir.Node) -> ir.Value:
    for node in x.consumers():
        if node.op_type == "Concat" and str(node.outputs[0].name).endswith(_SUMS):
            return node.outputs[0]
    extra = offset_columns(num_in)
    dtype = x.dtype or ir.DataType.FLOAT
    sums = ir.Node("", "MatMul", [x, _blocks(graph, num_in, dtype)], name=f"{x.name}/block_sums")
    both = ir.Node("", "Concat", [x, sums.outputs[0]], [ir.AttrInt64("axis", -1)], name=f"{x.name}{_SUMS}")
    for node, width in ((sums, extra), (both, num_in + extra)):
        value = node.outputs[0]
        value.name, value.dtype = node.name, dtype
        value.shape = None if x.shape is None else ir.Shape([*list(x.shape)[:-1], width])
    graph.insert_before(before, [sums, both])
    return both.outputs[0]


def _blocks(graph: ir.Graph, num_in: int, dtype: ir.DataType) -> ir.Value:
    """[K, E], 1 where a column belongs to a block: a byte each in the file, cast as the session opens."""
    member = np.zeros((num_in, offset_columns(num_in)), np.bool_)
    member[np.arange(num_in), np.arange(num_in) // SIZE] = True
    table = constant(graph, member, f"blocks_of_{num_in}")
    for node in table.consumers():
        if node.op_type == "Cast" and node.outputs[0].dtype == dtype:
            return node.outputs[0]
    cast = ir.Node("", "Cast", [table], [ir.AttrInt64("to", dtype.value)], name=f"{table.name}/cast")
    value = cast.outputs[0]
    value.name, value.dtype, value.shape = f"{cast.name}.out", dtype, table.shape
    graph.insert_before(graph[0], cast)
    return value


_SUMS = "/with_block_sums"
