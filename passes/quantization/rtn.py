"""Rounds every weight to the nearest of 4, 16 or 256 levels, block by block, with the scale of least squared error.

Needs no data. A block of `block_size` weights of a row shares one scale; symmetric blocks use the full range with a
signed scale, so that the largest weight of either sign falls on a level.

Paper:   folklore; "mse" alternates rounding and a least-squares scale from several starts.
Differs: the scale is rounded to its storage type before the codes are computed, so no error is added afterwards.
Axes:    N out features, K in features, G = ceil(K / b) blocks, b columns of a block
"""

from __future__ import annotations

import copy
import fnmatch
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler import packing
from onnxpress.compiler.errors import OptionError, near_miss
from onnxpress.compiler.linears import Embedding, Linear, find_embeddings, find_linears
from onnxpress.compiler.nbits import (
    BITS,
    BLOCK_SIZES,
    CodedMatrix,
    activation_error,
    replace_embedding,
    replace_linear,
    slow_kernel,
    store,
)
from onnxpress.compiler.other_weights import find_other_weights, node_format
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.roles import KINDS

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


_scratch = _Scratch()


def round_blocks(
    w_GbN: Floats, *, bits: int, symmetric: bool, scales: Literal["max", "mse"], scale_dtype: np.dtype[Any]
) -> tuple[Codes, Floats, Codes | None, Floats]:
    """Codes and scales of blocks that lie along axis 1.

    Args:
        w_GbN: weights, float32 or float64; b weights share a scale. Not changed.
        bits: 2, 4 or 8.
        symmetric: the zero point is 2^(bits - 1); else every block has its own.
        scales: "max" spreads the levels over the range of the block; "mse" searches for the least squared error.
        scale_dtype: type in which scales are stored.

    Returns:
        codes_GbN: uint8, unsigned.
        scale_GN: weight per step, `scale_dtype`; negative where the largest weight is positive.
        zero_GN: uint8, None when symmetric.
        loss_GN: squared error of each block, type of `w_GbN`.

    Laws:   |w - (code - zero) scale| <= |scale| / 2 with "max", asymmetric, and for all but the end opposite to the
            largest weight when symmetric; "mse" never has a larger error than "max" on any block, but for the last bits
            of the scale; a block on a grid of integers that uses the whole range is reproduced.
    Cost:   O(K N) for each start, about 1 ns a weight and start.
    """
    scale_GN, zero_GN = _range(w_GbN, bits, symmetric)
    best, zero = _stored(scale_GN, scale_dtype), zero_GN
    if scales == "mse":
        start = best
        found, zero = _search(w_GbN, scale_GN, zero_GN, bits, symmetric)
        best = _stored(found, scale_dtype)
        steps = _steps(w_GbN, best, zero, bits)
        best = _refit(steps, w_GbN, best, scale_dtype)
    else:
        steps = _steps(w_GbN, best, zero, bits)
    loss = _loss(w_GbN, steps, best)
    if scales == "mse" and scale_dtype.itemsize < w_GbN.dtype.itemsize:
        # Rounded to a narrower type, the scale found may do worse than the one that the search began with.
        plain = _steps(w_GbN, start, zero_GN, bits, "plain")
        plain_loss = _loss(w_GbN, plain, start)
        worse = plain_loss < loss
        best, zero = np.where(worse, start, best), np.where(worse, zero_GN, zero)
        loss = np.where(worse, plain_loss, loss)
        np.copyto(steps, plain, where=worse[:, None])
    codes = np.empty(steps.shape, np.uint8)
    with np.errstate(invalid="ignore"):  # of weights that are not finite; the caller sees it in the loss
        np.add(steps, zero[:, None], out=codes, casting="unsafe")
        zeros = None if symmetric else zero.astype(np.uint8)
    return codes, best.astype(scale_dtype), zeros, loss


def _range(w_GbN: Floats, bits: int, symmetric: bool) -> tuple[Floats, Floats]:
    """Scale and zero point that spread the levels over the weights of each block."""
    low, high = w_GbN.min(axis=1), w_GbN.max(axis=1)
    if symmetric:
        largest = np.where(-low > high, low, high)
        scale = largest / w_GbN.dtype.type(-(2 ** (bits - 1)))
        return _nonzero(scale), np.full_like(scale, 2 ** (bits - 1))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = _nonzero((high - low) / w_GbN.dtype.type(2**bits - 1))
    return scale, np.clip(np.rint(-low / scale), 0, 2**bits - 1)


def _nonzero(scale: Floats) -> Floats:
    return np.where(scale == 0, scale.dtype.type(1), scale)


def _stored(scale: Floats, dtype: np.dtype[Any]) -> Floats:
    """The scale as it will be read back; one that would underflow becomes the smallest normal number, not zero."""
    smallest = scale.dtype.type(_SMALLEST[dtype == np.float16])
    safe = np.where(np.abs(scale) < smallest, np.copysign(smallest, scale), scale)
    return safe.astype(dtype).astype(scale.dtype)


def _steps(w_GbN: Floats, scale_GN: Floats, zero_GN: Floats, bits: int, name: str = "steps") -> Floats:
    """Signed steps code - zero of each weight, in scratch memory called `name`."""
    steps: Floats = np.divide(w_GbN, scale_GN[:, None], out=_scratch.like(w_GbN, name))
    _clip_to_steps(steps, zero_GN, bits)
    return steps


def _loss(w_GbN: Floats, steps_GbN: Floats, scale_GN: Floats) -> Floats:
    """Squared error of each block."""
    error = np.multiply(steps_GbN, scale_GN[:, None], out=_scratch.like(w_GbN, "floats"))
    error -= w_GbN
    return _dot(error, error)


def _refit(steps_GbN: Floats, w_GbN: Floats, scale_GN: Floats, dtype: np.dtype[Any]) -> Floats:
    """The stored scale of least squared error for these steps; `scale_GN` where there is none that can be stored."""
    product, square = _dot(steps_GbN, w_GbN), _dot(steps_GbN, steps_GbN)
    scale = np.divide(product, square, out=np.zeros_like(product), where=square != 0)
    return np.where(np.abs(scale) < _SMALLEST[dtype == np.float16], scale_GN, _stored(scale, dtype))


def _dot(a_GbN: Floats, b_GbN: Floats) -> Floats:
    product: Floats = np.einsum("gbn,gbn->gn", a_GbN, b_GbN)
    return product


def _clip_to_steps(x_GbN: Floats, zero_GN: Floats, bits: int) -> None:
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
    u_GbN = np.divide(w_GbN, scale_GN[:, None], out=_scratch.like(w_GbN, "floats"))
    one = scale_GN.dtype.type(1)
    best, best_zero = np.ones_like(scale_GN), zero_GN.copy()
    best_score = np.full_like(scale_GN, -1)
    steps = _scratch.like(u_GbN, "steps")

    def attempt(factor: Any, zero: Floats) -> None:
        np.multiply(u_GbN, one / factor, out=steps)
        _clip_to_steps(steps, zero, bits)
        product, square = _dot(steps, u_GbN), np.maximum(_dot(steps, steps), 1)
        score = product * product / square
        better = score > best_score
        np.copyto(best_score, score, where=better)
        np.copyto(best, _nonzero(product / square), where=better)
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
    return _nonzero(best * scale_GN), best_zero


def round_matrix(
    w_NK: Floats,
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
    scales: Literal["max", "mse"],
    scale_dtype: np.dtype[Any],
) -> tuple[CodedMatrix, float, float]:
    """`round_blocks` over a whole matrix, in pieces that fit the cache; the last block of a row is padded with zeros.

    Returns:
        The coded matrix, its squared error and the squared norm of `w_NK`.
    """
    rows, columns = w_NK.shape
    num_blocks = -(-columns // block_size)
    codes = np.empty((rows, num_blocks, block_size * bits // 8), np.uint8)
    scale = np.empty((rows, num_blocks), scale_dtype)
    zero = None if symmetric else np.empty((rows, num_blocks), np.uint8)
    loss = norm = 0.0
    step_rows = min(rows, 1024)
    step_blocks = max(1, _CHUNK // (step_rows * block_size))
    for row in range(0, rows, step_rows):
        band = slice(row, row + step_rows)
        for block in range(0, num_blocks, step_blocks):
            part = slice(block, min(block + step_blocks, num_blocks))
            # The codes run along the rows of memory: numpy then adds whole rows instead of 32 numbers at a time.
            w_KN = w_NK[band, block * block_size : part.stop * block_size].T
            missing = (part.stop - block) * block_size - w_KN.shape[0]
            if missing:
                w_KN = np.pad(w_KN, ((0, missing), (0, 0)))
            w_GbN = _scratch.like(w_KN, "weights")
            np.copyto(w_GbN, w_KN)
            w_GbN = w_GbN.reshape(part.stop - block, block_size, -1)
            q_GbN, scale_GN, zero_GN, loss_GN = round_blocks(
                w_GbN, bits=bits, symmetric=symmetric, scales=scales, scale_dtype=scale_dtype
            )
            codes[band, part] = _pack_columns(q_GbN, bits).transpose(2, 0, 1)
            scale[band, part] = scale_GN.T
            if zero is not None and zero_GN is not None:
                zero[band, part] = zero_GN.T
            loss += float(loss_GN.sum(dtype=np.float64))
            norm += float(_dot(w_GbN, w_GbN).sum(dtype=np.float64))
    packed = None if zero is None else packing.pack_zero_points(zero, bits)
    return CodedMatrix(codes, scale, packed, columns, bits, block_size), loss, norm


def _pack_columns(codes_GbN: Codes, bits: int) -> Codes:
    """`packing.pack` along axis 1."""
    per_byte = 8 // bits
    packed = codes_GbN[:, 0::per_byte]
    for slot in range(1, per_byte):
        packed = packed | codes_GbN[:, slot::per_byte] << np.uint8(slot * bits)
    return packed


class _Format(NamedTuple):
    """How a matrix is stored."""

    bits: int
    block_size: int
    symmetric: bool
    scales: Literal["max", "mse"]


@dataclass
class _Site:
    """One matrix to quantize, with every node that reads it."""

    name: str
    format: _Format
    read: Callable[[], Floats]
    dtype: ir.DataType
    shape: tuple[int, int]
    linears: list[Linear] = field(default_factory=list)
    embeddings: list[Embedding] = field(default_factory=list)


_ROLES = {*KINDS, "embedding"}
_OVERRIDABLE: dict[str, tuple[Any, ...]] = {
    "bits": BITS,
    "block_size": BLOCK_SIZES,
    "symmetric": (False, True),
    "scales": ("max", "mse"),
}


@dataclass(frozen=True, kw_only=True)
class Rtn(Pass):
    """Rounds weights to 2, 4 or 8 bits in blocks; embedding and head share one set of bytes.

    Linears become MatMulNBits, embeddings GatherBlockQuantized. `accuracy_level=4` computes with int8 activations on
    the CPU, which is what makes it fast, and adds an error of its own: the report keeps `weight_error` (relative, over
    all matrices) and `activation_error` (relative, level 4 against exact products) apart. The level does not apply to
    2 and 8 bits, for which the CPU has no other fast kernel.
    """

    promise: ClassVar[Promise] = Promise.LOSSY

    bits: int = 4  # of linears: 2, 4 or 8
    block_size: int = 32  # weights that share a scale: 16, 32, 64, 128 or 256
    symmetric: bool = True  # False: zero points too; smaller error, slower on CUDA
    scales: Literal["max", "mse"] = "mse"  # "max": quicker, larger error
    head_bits: int | None = None  # of embedding and head; None: as the linears
    head_block_size: int | None = None
    accuracy_level: int = 4  # of 4-bit linears on the CPU: 4 int8 activations, 0 float activations
    requantize: bool = False  # matrices that MatMulNBits or GatherBlockQuantized holds already: read back, rounded anew
    exclude: tuple[str, ...] = ()  # patterns of names that stay float: "block0.*", "*.down", "head", "embedding"
    # Role ("gate_up") or pattern of names ("block0.*") to options of its own: {"gate_up": {"block_size": 64}}. The last
    # one that fits counts. A role that the model lacks is no error, a pattern without a match is.
    overrides: dict[str, dict[str, int | bool | str]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("bits", "head_bits"):
            self.check(getattr(self, option) in (*BITS, None), option, "2, 4 or 8", "use 4 or 8")
        for option in ("block_size", "head_block_size"):
            expected = f"one of {', '.join(map(str, BLOCK_SIZES))}"
            self.check(getattr(self, option) in (*BLOCK_SIZES, None), option, expected, "use 32 or 128")
        self.check(self.accuracy_level in (0, 4), "accuracy_level", "0 or 4", "4 is fast, 0 keeps activations in float")
        if self.accuracy_level != 4 and self.bits != 4:
            raise OptionError(
                f"rtn: accuracy_level={self.accuracy_level} has no fast kernel at {self.bits} bits on the CPU",
                hint="leave it at 4, or use bits=4",
            )
        for name, changes in self.overrides.items():
            for option, value in changes.items():
                self.check(option in _OVERRIDABLE, "overrides", f"of the options {', '.join(_OVERRIDABLE)}")
                if value not in _OVERRIDABLE[option]:
                    allowed = " or ".join(map(str, _OVERRIDABLE[option]))
                    raise OptionError(
                        f"rtn: overrides, {name}: {option} must be {allowed}, got {value!r}",
                        hint="the options of an override are those of rtn, for one role or name",
                    )
        object.__setattr__(self, "overrides", copy.deepcopy(self.overrides))  # nobody else's dict
        for is_head in (False, True):
            self._check_kernel(self._format([], "", is_head=is_head), "cpu")

    @classmethod
    def example(cls, model: ir.Model) -> Rtn:
        return cls(block_size=16)

    def _format(self, names: list[str], kind: str, *, is_head: bool) -> _Format:
        """What the options say about a matrix of these names."""
        found = _Format(self.bits, self.block_size, self.symmetric, self.scales)
        if is_head:
            found = found._replace(bits=self.head_bits or self.bits, block_size=self.head_block_size or self.block_size)
        for pattern, changes in self.overrides.items():
            if pattern == kind or any(fnmatch.fnmatchcase(name, pattern) for name in names):
                found = found._replace(**changes)  # type: ignore[arg-type]  # checked in __post_init__
        return found

    def _check_kernel(self, chosen: _Format, provider: str) -> None:
        reason = slow_kernel(chosen.bits, chosen.block_size, provider)
        if reason is not None:
            raise OptionError(f"rtn: {reason}", hint="use block_size=64" if chosen.bits == 2 else "use block_size=128")

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        for is_head in (False, True):
            self._check_kernel(self._format([], "", is_head=is_head), context.target.provider)
        report = Report()
        linears = find_linears(model, expand_pairs=True)
        tables = find_embeddings(model, linears)
        embeddings = _token_tables(tables)
        self._check_effect(linears, embeddings)
        sites = self._plan(linears, embeddings, context, report)
        for table in tables:
            if table not in embeddings:
                report.skip(table.table.name or "table", "narrower than the token table: kept exact")
        for other in find_other_weights(model, linears, tables):
            unread = ", which requantize does not read" if self.requantize and other.format else ""
            report.skip(other.site, other.reason + unread)
        for site in sites:
            self._check_kernel(site.format, context.target.provider)
        loss = norm = 0.0
        weights = nbytes = 0
        with _workers() as pool:
            futures = {}
            # Large matrices first: one that starts last would keep a single core busy at the end.
            for site in sorted(sites, key=lambda one: one.shape[0] * one.shape[1] < 1 << 22):
                futures[id(site)] = pool.submit(self._quantize, site)
            for site in context.track(sites, "rtn"):
                matrix, site_loss, site_norm = _take(futures, site)
                if not math.isfinite(site_norm):
                    report.skip(site.name, "weights are not finite")
                    continue
                self._apply(model.graph, site, matrix, context)
                loss, norm = loss + site_loss, norm + site_norm
                weights, nbytes = weights + site.shape[0] * site.shape[1], nbytes + matrix.nbytes
                report.change(
                    site.name,
                    kind=site.linears[0].kind if site.linears else "embedding",
                    shape=list(site.shape),
                    bits=matrix.bits,
                    block_size=matrix.block_size,
                    bytes=matrix.nbytes,
                    weight_error=math.sqrt(site_loss / site_norm) if site_norm else 0.0,
                    snr_db=10 * math.log10(site_norm / site_loss) if site_loss and site_norm else math.inf,
                )
        if weights:
            report.metrics["weight_error"] = math.sqrt(loss / norm) if norm else 0.0
            report.metrics["bits_per_weight"] = 8 * nbytes / weights
            self._measure_activations(sites, context, report)
        return report

    def _check_effect(self, linears: list[Linear], embeddings: list[Embedding]) -> None:
        names = [one.name for one in linears] + ["embedding"] * bool(embeddings)
        for option, patterns in (("exclude", self.exclude), ("overrides", [*self.overrides])):
            for pattern in patterns:
                is_role = option == "overrides" and pattern in _ROLES
                if not is_role and not fnmatch.filter(names, pattern):
                    known = sorted(_ROLES) if option == "overrides" else names
                    raise OptionError(
                        f"rtn: {option}={pattern!r} matches no linear",
                        hint=f"{near_miss(pattern, known)}; names are like {names[:3]}",
                    )
        has_head = bool(embeddings) or any(one.kind == "head" for one in linears)
        for option in ("head_bits", "head_block_size"):
            if getattr(self, option) is not None and not has_head:
                raise OptionError(
                    f"rtn: {option} has no effect, the model has no head and no embedding", hint="leave it out"
                )

    def _plan(
        self, linears: list[Linear], embeddings: list[Embedding], context: Context, report: Report
    ) -> list[_Site]:
        """One site per matrix; nodes that share a matrix share the site. Reasons against go to the report."""
        tied = {id(one.head): one for one in embeddings if _is_tied(one)}
        sites: dict[tuple[int, bool], _Site] = {}
        for linear in linears:
            embedding = tied.get(id(linear))
            is_head = linear.kind == "head" or embedding is not None
            names = [linear.name] + ["embedding"] * (embedding is not None)
            chosen = self._format(names, linear.kind, is_head=is_head)
            block = _fitting_block(linear.num_in, chosen.block_size, chosen.bits, exact=embedding is not None)
            reason = self._refuse(names, linear.node, chosen._replace(block_size=block or 0), linear.weight, context)
            if linear.kind == "router" and not {"router", *names} & self.overrides.keys():
                reason = reason or "it picks the experts, and is small"
            if block is None:
                reason = reason or f"embedding width {linear.num_in} is not a multiple of any block size"
            if reason is None and block is not None:
                key = id(linear.weight), linear.holder == "MatMul"
                chosen = chosen._replace(block_size=block)
                new = _Site(linear.name, chosen, linear.w_NK, _dtype(linear.node, linear.weight), linear.shape)
                if (
                    not linear.is_quantized
                    and new.shape[0] * -(-new.shape[1] // block) * (block * chosen.bits // 8 + 4) >= linear.nbytes
                ):
                    report.skip(linear.name, "codes and scales would take no less than the weights do")
                    continue
                site = sites.setdefault(key, new)
                if site.format != new.format:
                    raise OptionError(
                        f"rtn: {site.name} and {linear.name} share a weight, but the options store it in two ways: "
                        f"{site.format} and {new.format}",
                        hint="give overrides that fit both names",
                    )
                site.linears.append(linear)
                if embedding is not None:
                    site.embeddings.append(embedding)
            elif reason is not None:
                report.skip(linear.name, reason)
        for number, embedding in enumerate(one for one in embeddings if not _is_tied(one)):
            name = "embedding" if number == 0 else f"embedding.{number + 1}"
            chosen = self._format([name], "embedding", is_head=True)
            block = _fitting_block(embedding.width, chosen.block_size, chosen.bits, exact=True)
            chosen = chosen._replace(block_size=block or 0)
            reason = self._refuse([name], embedding.node, chosen, embedding.table, context)
            if reason is not None or block is None:
                report.skip(name, reason or f"width {embedding.width} is not a multiple of any block size")
                continue
            key = id(embedding.table), False
            shape = embedding.num_rows, embedding.width
            dtype = _dtype(embedding.node, embedding.table)
            site = sites.setdefault(key, _Site(name, chosen, embedding.table_VH, dtype, shape))
            site.embeddings.append(embedding)
        return list(sites.values())

    def _refuse(
        self, names: list[str], node: ir.Node, chosen: _Format, weight: ir.Value, context: Context
    ) -> str | None:
        if stored := node_format(node):
            if not self.requantize:
                return f"already quantized: {stored}; requantize=True rounds it anew"
            if stored == _described(node.op_type, chosen):
                return f"already quantized: {stored}, as asked for"
            if len(node.inputs) > 4 and node.op_type == "MatMulNBits" and node.inputs[4] is not None:
                return f"already quantized: {stored}, with its columns in another order (g_idx)"
        if any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.exclude):
            return "excluded"
        dtype = _dtype(node, weight)
        if dtype == ir.DataType.DOUBLE or (dtype == ir.DataType.BFLOAT16 and context.target.provider == "cpu"):
            return f"there is no kernel for {dtype.name.lower()} activations"
        return None

    def _quantize(self, site: _Site) -> tuple[CodedMatrix, float, float]:
        return round_matrix(
            site.read(),
            **site.format._asdict(),
            scale_dtype=site.dtype.numpy(),
        )

    def _apply(self, graph: ir.Graph, site: _Site, matrix: CodedMatrix, context: Context) -> None:
        stored = store(graph, site.name, matrix)
        level = self.accuracy_level if matrix.bits == 4 else 4
        for linear in site.linears:
            replace_linear(linear, stored, level)
        for embedding in site.embeddings:
            is_cuda = context.target.provider == "cuda"
            replace_embedding(embedding, stored, shared=bool(site.linears), explicit_zero=is_cuda)

    def _measure_activations(self, sites: list[_Site], context: Context, report: Report) -> None:
        linears = [linear for site in sites for linear in site.linears]
        if context.target.provider == "cpu" and linears:
            errors = activation_error(linears, seed=context.seed)
            squares = [error * error for error in errors.values()]
            report.metrics["activation_error"] = math.sqrt(sum(squares) / len(linears))
            for row in report.ledger:
                row["activation_error"] = errors.get(row["site"], 0.0)


def _take(futures: dict[int, Future[Any]], site: _Site) -> Any:
    """The result of a site, once: a finished future would keep its arrays alive."""
    return futures.pop(id(site)).result()


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """A thread per core (numpy lets go of the interpreter lock); what has not begun is dropped on an error."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(count, thread_name_prefix="rtn")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _token_tables(embeddings: list[Embedding]) -> list[Embedding]:
    """The tables that are as wide as the largest: narrower ones are rotary caches, which must stay exact."""
    if not embeddings:
        return []
    width = max(embeddings, key=lambda one: one.num_rows * one.width).width
    return [one for one in embeddings if one.width == width]


def _is_tied(embedding: Embedding) -> bool:
    """Whether the head multiplies with the very rows that are gathered."""
    head = embedding.head
    return head is not None and head.shape == (embedding.num_rows, embedding.width) and head.holder != "MatMul"


def _fitting_block(width: int, block_size: int, bits: int, *, exact: bool) -> int | None:
    """The block size to use for rows of `width`: no wider than the row, and a divisor of it where that is a must."""
    smallest = 32 if bits == 2 else 16
    block = block_size
    while block > smallest and (block // 2 >= width or (exact and width % block)):
        block //= 2
    return None if exact and width % block else block


def _described(operator: str, chosen: _Format) -> str:
    """What `node_format` says of a matrix that is stored so."""
    zeros = "" if chosen.symmetric else ", zero points"
    return f"{operator}, {chosen.bits} bits in blocks of {chosen.block_size}{zeros}"


def _dtype(node: ir.Node, weight: ir.Value) -> ir.DataType:
    """Float type of a weight; of codes that of their scales."""
    value = node.inputs[2] if node_format(node) else weight
    return ir.DataType.FLOAT if value is None or value.const_value is None else value.const_value.dtype
