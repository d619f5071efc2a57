"""Rounds weights to the nearest of 4, 16 or 256 levels, block by block, with the scale of least squared error.

Paper:   folklore; "mse" alternates rounding and a least-squares scale from several starts.
Differs: the scale is rounded to its storage type before the codes are computed, so no error is added afterwards.
Axes:    N out features, K in features, G = ceil(K / b) blocks, b columns of a block
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxpress.compiler import packing
from onnxpress.compiler.nbits import CodedMatrix
from onnxpress.compiler.scales import multiples, unit_of

Floats = npt.NDArray[Any]
Codes = npt.NDArray[np.uint8]

# Starts of the scale search, relative to the scale that maps the largest weight onto the end of the range. A flipped
# sign (second row) gives the largest weight the short end of a symmetric range, which many blocks prefer.
_SYMMETRIC: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    2: ((0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (0.6, 0.8, 1.0, 1.2, 1.4, 1.6)),
    4: ((0.8, 0.88, 0.95, 1.03), (0.85, 0.93, 1.02, 1.1)),
    # Weights that were on a coarser grid before (any GGUF file) are hit almost exactly by one step size in this range.
    8: (tuple(0.99 + 0.0135 * n for n in range(24)), tuple(1 + 0.036 * n for n in range(8))),
}
# Ranges with their own zero point: scales, and how many steps the range is shifted from where its centre stays. From 4
# bits on, more scales find more than shifts do. Chosen by perplexity: the error of the weights alone misleads here.
_ASYMMETRIC: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    2: (_SYMMETRIC[2][0], (0.0, -0.5, 0.5)),
    4: ((0.85, 0.92, 1.04), (0.0,)),
    8: (_SYMMETRIC[8][0], (0.0,)),
}
# How much larger than the scale that spans the weights one may get that is found by search and refits
_HEADROOM = {2: 1.6, 4: 1.15, 8: 1.25}
# The smallest scale that is stored: normal numbers of float32 and wider, of float16
_SMALLEST = (1.2e-38, 6.2e-5)
# Weights worked on at a time: in a core's share of the cache, and long enough that threads seldom wait for each other
_CHUNK = 1 << 20


class _Scratch(threading.local):
    """Arrays that a thread uses again and again: fresh memory for each step costs a quarter of the search."""

    def __init__(self) -> None:
        self.arrays: dict[str, Floats] = {}

    def like(self, template: Floats, name: str) -> Floats:
        """An array of the template's shape and type with any content, the same memory for the same `name`."""
        flat = self.arrays.get(name)
        if flat is None or flat.size < template.size or flat.dtype != template.dtype:
            flat = self.arrays[name] = np.empty(template.size, template.dtype)
        return flat[: template.size].reshape(template.shape)


scratch = _Scratch()


class Rounded(NamedTuple):
    """Blocks as they are stored.

    Attributes:
        codes_GbN: uint8, unsigned.
        scale_GN: weight per step, in its storage type.
        zero_GN: uint8, the code that stands for 0; None for 2^(bits - 1) everywhere.
        loss_GN: squared error of each block.
    """

    codes_GbN: Codes
    scale_GN: Floats
    zero_GN: Codes | None
    loss_GN: Floats

    def steps_GbN(self, bits: int, dtype: np.dtype[Any]) -> Floats:  # noqa: N802
        """Signed steps, code - zero, as floats."""
        middle = 2 ** (bits - 1) if self.zero_GN is None else self.zero_GN[:, None].astype(dtype)
        steps: Floats = self.codes_GbN.astype(dtype)
        steps -= middle
        return steps


# Codes of blocks [G, b, N]
Kernel = Callable[[Floats], Rounded]


def round_blocks(
    w_GbN: Floats,
    *,
    bits: int,
    symmetric: bool,
    scales: Literal["max", "mse"],
    scale_dtype: np.dtype[Any],
    scale_bits: int = 32,
) -> Rounded:
    """Codes and scales of blocks that lie along axis 1.

    Args:
        w_GbN: weights, float32 or float64; b weights share a scale. Not changed.
        bits: 2, 4 or 8.
        symmetric: the zero point is 2^(bits - 1); else every block has its own.
        scales: "max" spreads the levels over the range of the block; "mse" searches for the least squared error.
        scale_dtype: type in which scales are stored.
        scale_bits: 8 for scales that are whole multiples of a unit of their row (all G blocks must be given then).

    Returns:
        Codes, scales (negative where the largest weight of a symmetric block is positive), zero points, and the squared
        error of each block in the type of `w_GbN`.

    Laws:   |w - (code - zero) scale| <= |scale| / 2 with "max", asymmetric, and for all but the end opposite to the
            largest weight when symmetric, if scale_bits is 32 (a multiple of the unit may fall short of the scale);
            "mse" never has a larger error than "max" on any block, but for the last bits of the scale; a block on a
            grid of integers that uses the whole range is reproduced.
    Cost:   O(K N) for each start, about 1 ns a weight and start.
    """
    scale_GN, zero_GN = spread_range(w_GbN, bits, symmetric)
    unit = scale_unit(scale_GN, bits, scale_dtype, scale_bits)
    best, zero = stored_scale(scale_GN, scale_dtype, unit), zero_GN
    if scales == "mse":
        start = best
        found, zero = _search(w_GbN, scale_GN, zero_GN, bits, symmetric)
        best = stored_scale(found, scale_dtype, unit)
        steps = nearest_steps(w_GbN, best, zero, bits)
        best = refit(steps, w_GbN, best, scale_dtype, unit)
    else:
        steps = nearest_steps(w_GbN, best, zero, bits)
    loss = _loss(w_GbN, steps, best)
    if scales == "mse" and (unit is not None or scale_dtype.itemsize < w_GbN.dtype.itemsize):
        # Rounded to a narrower type or to multiples, the scale found may do worse than the one the search began with.
        plain = nearest_steps(w_GbN, start, zero_GN, bits, "plain")
        plain_loss = _loss(w_GbN, plain, start)
        worse = plain_loss < loss
        best, zero = np.where(worse, start, best), np.where(worse, zero_GN, zero)
        loss = np.where(worse, plain_loss, loss)
        np.copyto(steps, plain, where=worse[:, None])
    return as_stored(steps, best, zero, loss, symmetric, scale_dtype)


def as_stored(
    steps_GbN: Floats, scale_GN: Floats, zero_GN: Floats, loss_GN: Floats, symmetric: bool, scale_dtype: np.dtype[Any]
) -> Rounded:
    """Signed steps and whole zero points, all floats, in the types in which they are stored."""
    codes = np.empty(steps_GbN.shape, np.uint8)
    with np.errstate(invalid="ignore"):  # of weights that are not finite; the caller sees it in the loss
        np.add(steps_GbN, zero_GN[:, None], out=codes, casting="unsafe")
        zeros = None if symmetric else zero_GN.astype(np.uint8)
    return Rounded(codes, scale_GN.astype(scale_dtype), zeros, loss_GN)


def spread_range(w_GbN: Floats, bits: int, symmetric: bool) -> tuple[Floats, Floats]:
    """Scale and zero point that spread the levels over the weights of each block."""
    low, high = w_GbN.min(axis=1), w_GbN.max(axis=1)
    if symmetric:
        largest = np.where(-low > high, low, high)
        scale = largest / w_GbN.dtype.type(-(2 ** (bits - 1)))
        return nonzero(scale), np.full_like(scale, 2 ** (bits - 1))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = nonzero((high - low) / w_GbN.dtype.type(2**bits - 1))
    return scale, np.clip(np.rint(-low / scale), 0, 2**bits - 1)


def nonzero(scale: Floats) -> Floats:
    """1 in the place of 0, to divide by."""
    return np.where(scale == 0, scale.dtype.type(1), scale)


def scale_unit(scale_GN: Floats, bits: int, dtype: np.dtype[Any], scale_bits: int) -> Floats | None:
    """The unit of each row [N] of which scales are to be whole multiples; None where they may be any number.

    Args:
        scale_GN: scales that span the weights; those that are found in the end may be somewhat larger.
        bits: of the codes.
        dtype: type in which scales are stored.
        scale_bits: 8 asks for multiples, which only float32 scales gain from.
    """
    if scale_bits != 8 or dtype != np.float32:
        return None
    return unit_of(np.abs(scale_GN).max(axis=0) * scale_GN.dtype.type(_HEADROOM[bits]))


def stored_scale(scale: Floats, dtype: np.dtype[Any], unit_N: Floats | None = None) -> Floats:
    """The scale as it will be read back; one that would underflow becomes the smallest normal number, not zero."""
    if unit_N is not None:
        return multiples(scale, unit_N)
    smallest = scale.dtype.type(_SMALLEST[dtype == np.float16])
    safe = np.where(np.abs(scale) < smallest, np.copysign(smallest, scale), scale)
    return safe.astype(dtype).astype(scale.dtype)


def nearest_steps(w_GbN: Floats, scale_GN: Floats, zero_GN: Floats, bits: int, name: str = "steps") -> Floats:
    """Signed steps code - zero of each weight, in scratch memory called `name`."""
    steps: Floats = np.divide(w_GbN, scale_GN[:, None], out=scratch.like(w_GbN, name))
    clip_to_steps(steps, zero_GN, bits)
    return steps


def _loss(w_GbN: Floats, steps_GbN: Floats, scale_GN: Floats) -> Floats:
    """Squared error of each block."""
    error = np.multiply(steps_GbN, scale_GN[:, None], out=scratch.like(w_GbN, "floats"))
    error -= w_GbN
    return dot(error, error)


def refit(
    steps_GbN: Floats,
    w_GbN: Floats,
    scale_GN: Floats,
    dtype: np.dtype[Any],
    unit_N: Floats | None = None,
    weighted_GbN: Floats | None = None,
) -> Floats:
    """The stored scale of least squared error for these steps; `scale_GN` where there is none that can be stored.

    Where some weights count for more, `weighted_GbN` are the steps times how much they count.
    """
    weighted = steps_GbN if weighted_GbN is None else weighted_GbN
    product, square = dot(weighted, w_GbN), dot(weighted, steps_GbN)
    scale = np.divide(product, square, out=np.zeros_like(product), where=square != 0)
    return np.where(np.abs(scale) < _SMALLEST[dtype == np.float16], scale_GN, stored_scale(scale, dtype, unit_N))


def dot(a_GbN: Floats, b_GbN: Floats) -> Floats:
    """Sum of products over each block, [G, N]."""
    product: Floats = np.einsum("gbn,gbn->gn", a_GbN, b_GbN)
    return product


def clip_to_steps(x_GbN: Floats, zero_GN: Floats, bits: int) -> None:
    """Rounds to whole steps that have a code, in place."""
    np.rint(x_GbN, out=x_GbN)
    levels, zero = 2**bits - 1, zero_GN.flat[0]
    if (zero_GN == zero).all():
        np.clip(x_GbN, -zero, levels - zero, out=x_GbN)
    else:  # numpy's clip is seven times slower when its bounds are arrays
        low = -zero_GN
        np.maximum(x_GbN, low[:, None], out=x_GbN)
        np.minimum(x_GbN, (low + levels)[:, None], out=x_GbN)


def _search(w_GbN: Floats, scale_GN: Floats, zero_GN: Floats, bits: int, symmetric: bool) -> tuple[Floats, Floats]:
    """Scale and zero point of least squared error among the starts, each refitted to its own codes.

    With steps q the best scale is q.w / q.q and leaves the error w.w - (q.w)^2 / q.q. The given scale is the first
    start, and steps rounded anew to a refitted scale are no worse than those it was fitted to: so the result is never
    worse than the given scale. All this in units of the given scale, in which a start is one number for all blocks.
    """
    u_GbN = np.divide(w_GbN, scale_GN[:, None], out=scratch.like(w_GbN, "floats"))
    one = scale_GN.dtype.type(1)
    best, best_zero = np.ones_like(scale_GN), zero_GN.copy()
    best_score = np.full_like(scale_GN, -1)
    steps = scratch.like(u_GbN, "steps")

    def attempt(factor: Any, zero: Floats) -> None:
        np.multiply(u_GbN, one / factor, out=steps)
        clip_to_steps(steps, zero, bits)
        product, square = dot(steps, u_GbN), np.maximum(dot(steps, steps), 1)
        score = product * product / square
        better = score > best_score
        np.copyto(best_score, score, where=better)
        np.copyto(best, nonzero(product / square), where=better)
        np.copyto(best_zero, zero, where=better)

    attempt(one, zero_GN)
    if symmetric:
        tight, flipped = _SYMMETRIC[bits]
        for factor in (*tight, *(-number for number in flipped)):
            attempt(one * factor, zero_GN)
    else:
        low = np.minimum(u_GbN.min(axis=1), 0)
        factors, shifts = _ASYMMETRIC[bits]
        for factor in factors:
            # The cut range keeps its centre.
            zero = -low / factor - (1 - factor) / factor * (2**bits - 1) / 2
            for shift in shifts:
                attempt(one * factor, np.clip(np.rint(zero + shift), 0, 2**bits - 1))
    if bits == 8:  # beside so many starts one more refit is cheap
        attempt(best[:, None].copy(), best_zero.copy())
    return nonzero(best * scale_GN), best_zero


def round_matrix(
    w_NK: Floats,
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
    scales: Literal["max", "mse"],
    scale_dtype: np.dtype[Any],
    scale_bits: int = 32,
) -> tuple[CodedMatrix, float, float]:
    """`round_blocks` over a whole matrix, as `code_matrix` does it."""

    def kernel(w_GbN: Floats) -> Rounded:
        return round_blocks(
            w_GbN, bits=bits, symmetric=symmetric, scales=scales, scale_dtype=scale_dtype, scale_bits=scale_bits
        )

    return code_matrix(w_NK, kernel, bits=bits, block_size=block_size, symmetric=symmetric, scale_dtype=scale_dtype)


def code_matrix(
    w_NK: Floats, kernel: Kernel, *, bits: int, block_size: int, symmetric: bool, scale_dtype: np.dtype[Any]
) -> tuple[CodedMatrix, float, float]:
    """A whole matrix by a kernel that knows blocks: in pieces that fit the cache, the last block padded with zeros.

    Args:
        w_NK: weights, float32 or float64. Not changed.
        kernel: gives the codes of a piece, which consists of whole rows.
        bits, block_size, symmetric: of the codes.
        scale_dtype: type in which scales are stored.

    Returns:
        The coded matrix, its squared error and the squared norm of `w_NK`.
    """
    rows, columns = w_NK.shape
    num_blocks = -(-columns // block_size)
    codes = np.empty((rows, num_blocks, block_size * bits // 8), np.uint8)
    scale = np.empty((rows, num_blocks), scale_dtype)
    zero = None if symmetric else np.empty((rows, num_blocks), np.uint8)
    loss = norm = 0.0
    step_rows = min(rows, max(16, _CHUNK // (num_blocks * block_size)))
    missing = num_blocks * block_size - columns
    for row in range(0, rows, step_rows):
        band = slice(row, row + step_rows)
        # The codes run along the rows of memory: numpy then adds whole rows instead of 32 numbers at a time.
        w_KN = w_NK[band].T
        if missing:
            w_KN = np.pad(w_KN, ((0, missing), (0, 0)))
        w_GbN = scratch.like(w_KN, "weights")
        np.copyto(w_GbN, w_KN)
        w_GbN = w_GbN.reshape(num_blocks, block_size, -1)
        q_GbN, scale_GN, zero_GN, loss_GN = kernel(w_GbN)
        codes[band] = pack_columns(q_GbN, bits).transpose(2, 0, 1)
        scale[band] = scale_GN.T
        if zero is not None and zero_GN is not None:
            zero[band] = zero_GN.T
        loss += float(loss_GN.sum(dtype=np.float64))
        norm += float(dot(w_GbN, w_GbN).sum(dtype=np.float64))
    packed = None if zero is None else packing.pack_zero_points(zero, bits)
    return CodedMatrix(codes, scale, packed, columns, bits, block_size), loss, norm


def pack_columns(codes_GbN: Codes, bits: int) -> Codes:
    """`packing.pack` along axis 1."""
    per_byte = 8 // bits
    packed = codes_GbN[:, 0::per_byte]
    for slot in range(1, per_byte):
        packed = packed | codes_GbN[:, slot::per_byte] << np.uint8(slot * bits)
    return packed
