"""Weights that were quantized once are stored as the same numbers, bit for bit, instead of being rounded again.

A checkpoint that was read from a quantized file (GGUF: Q8_0, Q4_0, Q6_K and others) holds floats, but in each block of
a row they are whole multiples of one step. The largest such step is their greatest common divisor, which floats have
just as integers do; with it the codes follow, and code times scale is the weight, exactly. Neither the file nor the
names or the order of its rows are needed, and a matrix that is on no grid is known for certain and left as it is.

Blocks on levels with an offset (Q4_1, Q4_K) are kept too, levels exactly, offsets nearly: see `_offsets`.

Differs: a step that is a multiple of the file's gives smaller codes for the same weights.
Axes:    N out features, K in features, G blocks of a row, b columns of a block
"""

from __future__ import annotations

import fnmatch
import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler import packing
from onnxpress.compiler.errors import OptionError, near_miss
from onnxpress.compiler.linears import Embedding, Linear, find_embeddings, find_linears
from onnxpress.compiler.nbits import BITS, BLOCK_SIZES, CodedMatrix, slow_kernel
from onnxpress.compiler.other_weights import find_other_weights, node_format
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.passes.quantization._offsets import ON_NO_GRID, append_sums, plain_matrix, recover_offsets
from onnxpress.passes.quantization._weight_only import (
    Format,
    Site,
    dtype_of,
    is_tied,
    measure_activations,
    note,
    put,
    threaded,
    token_tables,
    without_kernel,
)

Floats = npt.NDArray[np.float32]
_CHUNK = 1 << 19  # weights worked on at a time
_SAMPLE_ROWS = 16  # looked at first: weights that are on no grid, the most frequent case, are seen here
_FINEST = min(BLOCK_SIZES)
_ON_NO_GRID = "the weights of a block are not whole multiples of one scale"


class _Blocks(NamedTuple):
    """Largest common step of every block, and its smallest and largest weight in steps; all [N, G], float32."""

    step: Floats
    low: Floats
    high: Floats


def common_step(w_NGb: Floats) -> Floats:
    """The largest step of which every weight of a block is a whole multiple, [N, G].

    Args:
        w_NGb: weights, float32. Not changed.

    Returns:
        float32, exact and never negative: 0 for a block of zeros, NaN for one with values that are not finite, or too
        far apart (a factor of 2^38) to be multiples of anything in few bits.

    Laws:   w / step is whole; no multiple of the step has this property; permuting a block changes nothing.
    Cost:   about 30 ns a weight.
    """
    fraction, exponent = np.frexp(np.nan_to_num(w_NGb, posinf=0, neginf=0))
    mantissa = np.abs(fraction * np.float32(1 << 24)).astype(np.int64)
    is_zero = mantissa == 0
    lowest = np.where(is_zero, np.iinfo(exponent.dtype).max, exponent).min(axis=-1, keepdims=True)
    shift = np.where(is_zero, 0, exponent - lowest)
    # The divisor divides a mantissa that was not shifted: it has at most 24 bits, which float32 holds.
    divisor = np.gcd.reduce(mantissa << np.minimum(shift, 38), axis=-1)
    lowest = np.where(divisor == 0, 0, lowest[..., 0])
    step: Floats = np.ldexp(divisor.astype(np.float64), lowest - 24).astype(np.float32)
    step[(shift > 38).any(axis=-1) | ~np.isfinite(w_NGb).all(axis=-1)] = np.nan
    return step


def _measure(w_NK: Floats) -> _Blocks:
    """`_Blocks` of the finest blocks; the last one of a row is filled up with zeros."""
    w_NGb = _in_blocks(w_NK, _FINEST)
    step = common_step(w_NGb)
    return _in_steps(step, w_NGb.min(axis=-1), w_NGb.max(axis=-1))


def _in_steps(step: Floats, low: Floats, high: Floats) -> _Blocks:
    divisor: Floats = np.where(step == 0, np.float32(1), step).astype(np.float32, copy=False)
    return _Blocks(step, low / divisor, high / divisor)


def _doubled(blocks: _Blocks) -> _Blocks:
    """The same of blocks twice as wide."""
    step, low, high = (_in_blocks(one, 2) for one in (blocks.step, blocks.low * blocks.step, blocks.high * blocks.step))
    return _in_steps(common_step(step), low.min(axis=-1), high.max(axis=-1))


def _in_blocks(array_NK: Floats, width: int) -> Floats:
    rows, columns = array_NK.shape
    padded = np.pad(array_NK, ((0, 0), (0, -columns % width))) if columns % width else array_NK
    return np.ascontiguousarray(padded, np.float32).reshape(rows, -1, width)


def scales_for(blocks: _Blocks, bits: int, dtype: np.dtype[Any]) -> Floats | None:
    """Scales [N, G] of type `dtype` with which every block has codes of `bits`; None when a block has none.

    Negative where a block needs the longer end of the range, 2^(bits - 1) steps, on the positive side. Where a step has
    too many bits for `dtype`, a whole part of it is taken.
    """
    end = 2 ** (bits - 1)
    step, low, high = blocks
    as_is, turned = (low >= -end) & (high < end), (low > -end) & (high <= end)
    if not (as_is | turned).all():  # a NaN step too
        return None
    scale = np.where(step == 0, np.float32(1), np.where(as_is, step, -step))
    stored = _stored(scale, dtype)
    largest = np.maximum(-low, high)
    for part in range(2, end):
        left = stored != scale
        if not left.any():
            break
        found = (np.abs(scale[left]).astype(np.float64) / part).astype(dtype).astype(np.float64)
        fits = (found * part == np.abs(scale[left])) & (largest[left] * part < end)
        chosen = stored[left]
        chosen[fits] = found[fits]
        scale[left] = np.where(fits, chosen, scale[left])
        stored[left] = chosen
    return stored if (stored == scale).all() else None


@np.errstate(invalid="ignore", over="ignore")  # of weights that are not finite, and scales beyond float16's range
def recover(
    w_NK: npt.NDArray[Any], formats: list[tuple[int, int]], *, scale_dtype: np.dtype[Any], exact_in: np.dtype[Any]
) -> CodedMatrix | str:
    """Codes and scales that give `w_NK` bit for bit, in the first of `formats` that can; or why none can.

    Args:
        w_NK: float32, any strides. Not changed.
        formats: (bits, block size), the best first.
        scale_dtype: in which scales are stored.
        exact_in: type that the scales must fit as well, since the graph is going to be cast to it.

    Laws:   dequantizing gives `w_NK`; permuting rows permutes codes; a matrix of codes times scales is always found.
    Cost:   O(N K), a few ns a weight where the largest weight of every block is on the last level, else about 50.
    """
    rows, columns = w_NK.shape
    narrow = min(scale_dtype, exact_in, key=lambda dtype: dtype.itemsize)
    bands = [slice(row, row + max(1, _CHUNK // columns)) for row in range(0, rows, max(1, _CHUNK // columns))]
    sample = _all_sizes(_measure(np.asarray(w_NK[:_SAMPLE_ROWS], np.float32)))
    # The whole matrix needs no less than its first rows.
    formats = [one for one in formats if scales_for(sample[one[1]], one[0], np.dtype(np.float32)) is not None]
    if not formats:
        return _ON_NO_GRID if np.isfinite(w_NK[:_SAMPLE_ROWS]).all() else "weights are not finite"
    bits, size = formats[0]
    guess = np.concatenate([_outermost(np.asarray(w_NK[band], np.float32), bits, size) for band in bands])
    if np.array_equal(_stored(guess, narrow), guess):
        found = _coded(w_NK, guess.astype(scale_dtype), bits, size, bands)
        if found is not None:
            return found
    parts = [_measure(np.asarray(w_NK[band], np.float32)) for band in bands]
    sizes = _all_sizes(_Blocks(*(np.concatenate(column) for column in zip(*parts, strict=True))))
    for bits, size in formats:
        scale = scales_for(sizes[size], bits, narrow)
        if scale is not None:
            scale = scale[:, : -(-columns // size)].astype(scale_dtype)
            return _coded(w_NK, scale, bits, size, bands) or _ON_NO_GRID
    if any(scales_for(sizes[size], bits, np.dtype(np.float32)) is not None for bits, size in formats):
        return f"its scales need more bits than {narrow.name} has"
    return _ON_NO_GRID if np.isfinite(w_NK).all() else "weights are not finite"


def _all_sizes(finest: _Blocks) -> dict[int, _Blocks]:
    sizes = {_FINEST: finest}
    for size in BLOCK_SIZES[1:]:
        sizes[size] = _doubled(sizes[size // 2])
    return sizes


def _outermost(w_NK: Floats, bits: int, size: int) -> Floats:
    """Scales [N, G] that put the largest weight of a block where llama.cpp does: on 127, or with few bits on the end of
    the range that is longer. Ten times as fast as a divisor, and right for whole files."""
    w_NGb = _in_blocks(w_NK, size)
    low, high = w_NGb.min(axis=-1), w_NGb.max(axis=-1)
    if bits == 8:
        scale = np.maximum(-low, high) / np.float32(127)
    else:
        scale = np.where(-low >= high, low, high) / np.float32(-(2 ** (bits - 1)))
    return np.where(scale == 0, np.float32(1), scale).astype(np.float32, copy=False)


def _stored(scale: Floats, dtype: np.dtype[Any]) -> Floats:
    read: Floats = scale.astype(dtype).astype(np.float32)
    return read


def _coded(
    w_NK: npt.NDArray[Any], scale_NG: npt.NDArray[Any], bits: int, size: int, bands: list[slice]
) -> CodedMatrix | None:
    """The coded matrix; it is read back, and None if a single weight is not what it was."""
    rows, columns = w_NK.shape
    codes = np.empty((rows, scale_NG.shape[1], size * bits // 8), np.uint8)
    for band in bands:
        w = np.asarray(w_NK[band], np.float32)
        steps = _in_blocks(w, size)
        steps = np.rint(steps / scale_NG[band].astype(np.float32)[:, :, None]) + np.float32(2 ** (bits - 1))
        if not (steps.min() >= 0 and steps.max() < 2**bits):
            return None
        plain = steps.astype(np.uint8).reshape(len(w), -1)
        codes[band] = packing.pack(plain, bits).reshape(len(w), scale_NG.shape[1], -1)
        again = packing.dequantize(plain[:, :columns], scale_NG[band], None, bits=bits, block_size=size)
        if not np.array_equal(again, w):
            return None
    return CodedMatrix(codes, scale_NG, None, columns, bits, size)


@dataclass(frozen=True, kw_only=True)
class KeepQuantization(Pass):
    """Stores weights that lie on a grid of 2, 4 or 8 bits as they are: weight times weight the same float.

    Linears become MatMulNBits, embeddings GatherBlockQuantized, in the smallest format that is exact; everything else
    stays float for the next pass. `optimize --keep-quantization` runs it before anything else rounds. LOSSY since
    kernels of the CPU round activations to int8, which the report has as `activation_error`, and since `offsets` lose
    a little, its `weight_error`; other weights lose nothing.
    """

    promise: ClassVar[Promise] = Promise.LOSSY

    accuracy_level: int = 4  # of 4-bit linears on the CPU: 4 int8 activations, 0 float activations
    # Weights on evenly spaced levels that are no multiples of a step (Q4_1, Q4_K): levels are kept, the offset of each
    # block to 2 % of a step, in columns of its own. False: they stay float.
    offsets: bool = True
    # Of steps beside offsets. 8: whole multiples of a unit of their row, which costs some accuracy.
    scale_bits: int = 32
    exclude: tuple[str, ...] = ()  # patterns of names that stay float: "block0.*", "*.down", "head", "embedding"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.scale_bits in (8, 32), "scale_bits", "8 or 32", "8 makes the files smaller")
        self.check(self.accuracy_level in (0, 4), "accuracy_level", "0 or 4", "4 is fast, 0 keeps activations in float")

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        linears = find_linears(model, expand_pairs=True)
        tables = find_embeddings(model, linears)
        sites = list(self._sites(linears, token_tables(tables), context, report))
        for other in find_other_weights(model, linears, tables):
            report.skip(other.site, other.reason)
        weights = nbytes = 0
        loss = norm = 0.0
        exact_in = context.target.dtype.numpy()
        for site, found in threaded(
            functools.partial(_recover, exact_in=exact_in, provider=context.target.provider, options=self),
            sites,
            context,
            self.name(),
        ):
            tensor, kind = context.stored_types.get(site.name, ("", ""))
            if isinstance(found, str):
                layers = re.sub(r"\.\d+\.", ".*.", tensor)
                report.skip(site.name, f"{layers} is {kind}: {found}" if kind else found)
                continue
            put(model.graph, site, found.matrix, self.accuracy_level, context)
            weights, nbytes = weights + site.shape[0] * site.shape[1], nbytes + found.matrix.nbytes
            loss, norm = loss + found.loss, norm + found.norm
            for linear in site.linears:
                append_sums(model.graph, linear, found.matrix.num_in)
            source: dict[str, Any] = {"source_tensor": tensor, "source_type": kind} if kind else {}
            if found.loss and found.norm:
                source["snr_db"] = 10 * math.log10(found.norm / found.loss)
            note(
                report,
                site,
                found.matrix,
                found.matrix.nbytes,
                weight_error=_relative(found.loss, found.norm),
                **source,
            )
        model.graph.sort()
        report.metrics["weight_error"] = _relative(loss, norm)
        if weights:
            report.metrics["bits_per_weight"] = 8 * nbytes / weights
            measure_activations(sites, context, report)
        return report

    def _sites(
        self, linears: list[Linear], embeddings: list[Embedding], context: Context, report: Report
    ) -> Iterator[Site]:
        """One site per float matrix, with all nodes that read it; reasons against go to the report."""
        names = [one.name for one in linears] + ["embedding"] * bool(embeddings)
        for pattern in self.exclude:
            if not fnmatch.filter(names, pattern):
                hint = f"{near_miss(pattern, names)}; names are like {names[:3]}"
                raise OptionError(f"{self.name()}: exclude={pattern!r} matches no linear", hint=hint)
        tied = {id(one.head): one for one in embeddings if is_tied(one)}
        sites: dict[tuple[int, bool], Site] = {}
        for linear in linears:
            table = tied.get(id(linear))
            own = [linear.name] + ["embedding"] * (table is not None)
            reason = self._refuse(own, linear.node, linear.weight, context)
            if linear.kind == "router":
                reason = reason or "it picks the experts, and is small"
            if reason is not None:
                report.skip(linear.name, reason)
                continue
            dtype = dtype_of(linear.node, linear.weight)
            new = Site(linear.name, _WIDEST, linear.w_NK, dtype, linear.shape)
            site = sites.setdefault((id(linear.weight), linear.is_turned()), new)
            site.linears.append(linear)
            if table is not None:
                site.embeddings.append(table)
        for number, table in enumerate(one for one in embeddings if not is_tied(one)):
            name = "embedding" if number == 0 else f"embedding.{number + 1}"
            reason = self._refuse([name], table.node, table.table, context)
            if reason is not None:
                report.skip(name, reason)
                continue
            shape = table.num_rows, table.width
            new = Site(name, _WIDEST, table.table_VH, dtype_of(table.node, table.table), shape)
            sites.setdefault((id(table.table), False), new).embeddings.append(table)
        yield from sites.values()

    def _refuse(self, names: list[str], node: ir.Node, weight: ir.Value, context: Context) -> str | None:
        if stored := node_format(node):
            return f"already quantized: {stored}"
        if any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.exclude):
            return "excluded"
        return without_kernel(dtype_of(node, weight), context)


_WIDEST = Format(max(BITS), _FINEST, True)  # of a site before its own format is known


class _Kept(NamedTuple):
    """The matrix of a site as it is stored, its squared error and the squared norm of the weights."""

    matrix: CodedMatrix
    loss: float
    norm: float


def _recover(site: Site, *, exact_in: np.dtype[Any], provider: str, options: KeepQuantization) -> _Kept | str:
    """`recover` in the formats that have a kernel, the smallest first; else with offsets, where they are allowed."""
    columns = site.shape[1]
    scale_dtype = site.dtype.numpy()
    scale_bits = 8 * min(scale_dtype.itemsize, exact_in.itemsize)
    formats = [
        (bits, size)
        for bits in BITS
        for size in BLOCK_SIZES
        if slow_kernel(bits, size, provider) is None
        and (size == _FINEST or size // 2 < columns)
        and not (site.embeddings and columns % size)
    ]
    formats.sort(key=lambda one: one[0] + scale_bits / one[1])
    if not formats:
        return f"width {columns} is not a multiple of any block size"
    w_NK = site.read()
    found = recover(w_NK, formats, scale_dtype=scale_dtype, exact_in=exact_in)
    loss = 0.0
    if found == _ON_NO_GRID and options.offsets and not site.embeddings:
        with_offsets = recover_offsets(w_NK, scale_dtype, scale_bits=options.scale_bits)
        if with_offsets != ON_NO_GRID:
            found = with_offsets
        if isinstance(with_offsets, CodedMatrix):
            loss = _square(plain_matrix(with_offsets, columns) - w_NK)
    if isinstance(found, str):
        return found
    if found.nbytes >= site.shape[0] * columns * scale_dtype.itemsize:
        return "codes and scales would take no less than the weights do"
    return _Kept(found, loss, _square(w_NK))


def _relative(loss: float, norm: float) -> float:
    return math.sqrt(loss / norm) if norm else 0.0


def _square(w_NK: npt.NDArray[Any]) -> float:
    return float(np.einsum("nk,nk->", w_NK, w_NK, dtype=np.float64))
