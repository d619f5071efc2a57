"""Rounds weights with the scale and zero point of least weighted error: large weights count for more (k-quants).

For a block of weights w with importances u, scale s and minimum m of w = s l + m are fitted to the levels l of many
ranges by weighted least squares; the minimum then becomes a whole zero point, which is what MatMulNBits stores, and the
scale is fitted anew. Needs no data; with `importance="activations"` the mean square of each feature on text counts too,
and the ledger has the relative error of every linear's output on that text.

Paper:   none; the search is that of llama.cpp's k-quants (make_qkx2_quants, and make_qx_quants where symmetric)
Differs: whole zero points instead of quantized minima; the mean square beside a weight is that of its own block; the
         result of `rtn` is one of the candidates.
Axes:    N out features, K in features, G = ceil(K / b) blocks, b columns of a block
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.calibration import Calibration
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.quantization._rounding import (
    Floats,
    Rounded,
    as_stored,
    clip_to_steps,
    code_matrix,
    dot,
    nearest_steps,
    nonzero,
    refit,
    round_blocks,
    scale_unit,
    scratch,
    spread_range,
    stored_scale,
)
from onnxpress.passes.quantization._weight_only import (
    FLOATS,
    Coded,
    Site,
    WeightOnly,
    calibration_windows,
    output_error,
    rounded,
)

# Ranges that are tried: how many steps more than there are levels span the weights of a block.
_STEPS: dict[int, tuple[float, ...]] = {
    2: tuple(-0.5 + 0.25 * n for n in range(15)),
    4: tuple(-1.0 + 0.3 * n for n in range(20)),
    8: tuple(-1.0 + 0.5 * n for n in range(9)),
}


def kquant(
    w_GbN: Floats,
    importance_Gb: Floats | None,
    *,
    bits: int,
    symmetric: bool,
    scale_dtype: np.dtype[Any],
    scale_bits: int = 32,
) -> Rounded:
    """Codes and scales of blocks along axis 1: the least sum of u (w - (code - zero) scale)^2 that is found.

    u = a + |w| without importance, a the root mean square of the block; h sqrt(2 a^2 + w^2) with importance h.

    Args:
        w_GbN: weights, float32 or float64; b weights share a scale. Not changed.
        importance_Gb: h, mean square of the feature behind each column; not negative. None: no data.
        bits: 2, 4 or 8.
        symmetric: the zero point is 2^(bits - 1); else every block has its own.
        scale_dtype: type in which scales are stored.
        scale_bits: 8 for scales that are whole multiples of a unit of their row (all G blocks must be given then).

    Laws:   never a larger sum than that of `round_blocks` with "mse", on any block of which a column counts; a block on
            a grid that `round_blocks` reproduces is reproduced; twice the weights, the same codes and twice the scales;
            twice the importance, the same result; a column of importance 0 changes nothing but its own codes.
    Cost:   O(K N) for each of about 15 ranges, 30 where symmetric.
    """
    live_GbN, u_GbN = _importance(w_GbN, importance_Gb)
    form: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "scale_dtype": scale_dtype, "scale_bits": scale_bits}
    plain = round_blocks(live_GbN, scales="mse", **form)
    unit = scale_unit(spread_range(live_GbN, bits, symmetric)[0], bits, scale_dtype, scale_bits)
    first_scale = plain.scale_GN.astype(w_GbN.dtype)
    if plain.zero_GN is None:
        first_zero = np.full_like(first_scale, 2 ** (bits - 1))
    else:
        first_zero = plain.zero_GN.astype(w_GbN.dtype)
    first_loss = _loss(live_GbN, u_GbN, plain.steps_GbN(bits, w_GbN.dtype), first_scale)
    found, zero = _search(live_GbN, u_GbN, first_scale, first_zero, bits, symmetric)
    scale = stored_scale(found, scale_dtype, unit)
    steps = nearest_steps(live_GbN, scale, zero, bits)
    scale = refit(steps, live_GbN, scale, scale_dtype, unit, u_GbN * steps)
    loss = _loss(live_GbN, u_GbN, steps, scale)
    worse = ~(loss < first_loss)
    scale, zero = np.where(worse, first_scale, scale), np.where(worse, first_zero, zero)
    # Columns that do not count get the nearest code; all others the one that the scale was fitted to.
    nearest = nearest_steps(w_GbN, scale, zero, bits, "nearest")
    np.copyto(steps, plain.steps_GbN(bits, w_GbN.dtype), where=worse[:, None])
    np.copyto(steps, nearest, where=live_GbN != w_GbN)
    error = steps * scale[:, None] - w_GbN
    return as_stored(steps, scale, zero, dot(error, error), symmetric, scale_dtype)


def _importance(w_GbN: Floats, importance_Gb: Floats | None) -> tuple[Floats, Floats]:
    """(weights, those of columns that do not count set to 0; u of each)."""
    if importance_Gb is None:
        root = np.sqrt(dot(w_GbN, w_GbN) / w_GbN.shape[1])
        u: Floats = np.abs(w_GbN)
        u += root[:, None]
        return w_GbN, u
    h_Gb1 = importance_Gb.astype(w_GbN.dtype)[:, :, None]
    # Of a block without a feature that ever occurs nothing is known: all columns count alike.
    h_Gb1 = np.where((h_Gb1 > 0).any(axis=1, keepdims=True), h_Gb1, 1)
    live = w_GbN if (h_Gb1 > 0).all() else np.where(h_Gb1 > 0, w_GbN, 0)
    count = (h_Gb1 > 0).sum(axis=1)
    u = live * live
    u += 2 * (dot(live, live) / count)[:, None]
    np.sqrt(u, out=u)
    # Relative to the mean of the block, so that sums stay in the range of float32 whatever the unit of the activation.
    u *= h_Gb1 / h_Gb1.mean(axis=1, keepdims=True)
    return live, u


def _loss(w_GbN: Floats, u_GbN: Floats, steps_GbN: Floats, scale_GN: Floats) -> Floats:
    """Weighted squared error of each block."""
    error = np.multiply(steps_GbN, scale_GN[:, None], out=scratch.like(w_GbN, "error"))
    error -= w_GbN
    np.square(error, out=error)
    return dot(error, u_GbN)


def _search(
    w_GbN: Floats, u_GbN: Floats, scale_GN: Floats, zero_GN: Floats, bits: int, symmetric: bool
) -> tuple[Floats, Floats]:
    """Scale and zero point of the best candidate, the given one among them; each refitted to its own codes.

    With steps q the best scale is (u q).w / (u q).q, and takes ((u q).w)^2 / (u q).q off the weighted error.
    """
    levels = 2**bits - 1
    steps, weighted = scratch.like(w_GbN, "search"), scratch.like(w_GbN, "weighted")
    best, best_zero = scale_GN.copy(), zero_GN.copy()
    best_score = np.full_like(scale_GN, -1)

    def attempt(scale: Floats, zero: Floats) -> None:
        np.divide(w_GbN, scale[:, None], out=steps)
        clip_to_steps(steps, zero, bits)
        np.multiply(u_GbN, steps, out=weighted)
        product, square = dot(weighted, w_GbN), dot(weighted, steps)
        is_zero = square <= 0
        score = np.divide(product * product, square, out=np.zeros_like(product), where=~is_zero)
        better = score > best_score
        np.copyto(best_score, score, where=better)
        np.copyto(best, np.divide(product, square, out=scale.copy(), where=~is_zero), where=better)
        np.copyto(best_zero, zero, where=better)

    attempt(scale_GN, zero_GN)
    widest, middle = spread_range(w_GbN, bits, symmetric)
    if symmetric:
        half = 2 ** (bits - 1)
        for more in _STEPS[bits]:
            # The largest weight lies on the long end of the levels, or (other sign) on the short one.
            attempt(widest * w_GbN.dtype.type(half / (half + more)), middle)
            attempt(widest * w_GbN.dtype.type(-half / (half - 1 + more)), middle)
    else:
        low, high = np.minimum(w_GbN.min(axis=1), 0), np.maximum(w_GbN.max(axis=1), 0)
        sum_u, sum_uw = u_GbN.sum(axis=1), dot(u_GbN, w_GbN)
        for number, more in enumerate(_STEPS[bits]):
            scale = widest * w_GbN.dtype.type(levels / (levels + more))
            # Steps begin at the lower end or, in turn, end at the upper one; the more there are beyond the levels, the
            # more of the other end is cut off.
            origin = low if number % 2 == 0 else high - levels * scale
            np.subtract(w_GbN, origin[:, None], out=steps)
            np.divide(steps, scale[:, None], out=steps)
            np.rint(steps, out=steps)
            np.clip(steps, 0, levels, out=steps)
            np.multiply(u_GbN, steps, out=weighted)
            sum_ul, sum_ull, sum_ulw = weighted.sum(axis=1), dot(weighted, steps), dot(weighted, w_GbN)
            # The normal equations of w = s l + m
            determinant = sum_u * sum_ull - sum_ul * sum_ul
            fitted = nonzero(sum_u * sum_ulw - sum_uw * sum_ul)
            is_fit = (determinant > 0) & (fitted > 0)
            zero = (sum_uw * sum_ull - sum_ul * sum_ulw) / fitted  # m / s
            zero = np.where(is_fit, -zero, -origin / scale)
            np.divide(fitted, determinant, out=scale, where=is_fit)
            attempt(scale, np.clip(np.rint(zero), 0, levels))
    for _ in range(2):  # steps rounded anew to the refitted scale are no worse
        attempt(nonzero(best), best_zero.copy())
    return nonzero(best), best_zero


@dataclass(frozen=True, kw_only=True)
class Kquant(WeightOnly):
    """Rounds weights to 2, 4 or 8 bits by weighted least squares; options as in every weight-only pass."""

    importance: Literal["weights", "activations"] = "weights"  # what says how much an error counts
    tokens: int = 16384  # of calibration text, for "activations"
    length: int = 1024  # tokens of a window

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, plain in (("tokens", 16384), ("length", 1024)):
            is_used = self.importance == "activations" or getattr(self, name) == plain
            self.check(is_used, name, "left out with importance='weights'", "only activations need text")
        self.check(self.tokens >= 1, "tokens", "positive", "16384 suits small models")
        self.check(self.length >= 1, "length", "positive", "1024 suits most models")

    @classmethod
    def example(cls, model: ir.Model) -> Kquant:
        return cls(block_size=16)

    def code(
        self, model: ir.Model, sites: list[Site], linears: list[Linear], context: Context, report: Report
    ) -> Iterator[tuple[Site, Coded]]:
        seen: set[int] = set()
        if self.importance == "activations":
            site_of = {id(linear): site for site in sites for linear in site.linears if linear.holder in FLOATS}
            wanted = [linear for linear in linears if id(linear) in site_of]
            found = dict(self._observed(model, wanted, site_of, context, report) if wanted else ())
            # The streams need the graph as it is: sites are given when all of them have run.
            for site in sites:
                if id(site) in found:
                    seen.add(id(site))
                    coded = found.pop(id(site))
                    if coded is None:
                        report.skip(site.name, "its activation is not finite on the calibration text")
                    else:
                        yield site, coded
        yield from rounded([site for site in sites if id(site) not in seen], context, self.name(), _coded)

    def _observed(
        self, model: ir.Model, wanted: list[Linear], site_of: dict[int, Site], context: Context, report: Report
    ) -> Iterator[tuple[int, Coded | None]]:
        """Codes by the activations that linears read, by site; None where those are not finite."""
        windows = calibration_windows(model, wanted, site_of, context, report, self.tokens, self.length)
        done: set[int] = set()
        with Calibration(model, windows, wanted, context.work_dir) as run:
            for stage in context.track(run.stages, self.name()):
                group = run.observe(stage)
                for linear in group.linears:
                    site = site_of[id(linear)]
                    if id(site) in done:  # where layers share a weight, the first of them decides
                        continue
                    done.add(id(site))
                    if not np.isfinite(group.stats.gram_KK).all():
                        yield id(site), None
                        continue
                    coded = _coded(site, group.stats.importance_K)
                    error = output_error(site.read(), coded.matrix.w_NK(), group.stats)
                    yield id(site), coded._replace(facts={"output_error": error})


def _coded(site: Site, importance_K: Floats | None = None) -> Coded:
    form: dict[str, Any] = {**site.format._asdict(), "scale_dtype": site.dtype.numpy()}
    del form["scales"]  # finds its own
    block_size = form.pop("block_size")
    importance_Gb = None
    if importance_K is not None:
        padded = np.pad(importance_K, (0, -len(importance_K) % block_size))
        importance_Gb = padded.reshape(-1, block_size)
    kernel = functools.partial(kquant, importance_Gb=importance_Gb, **form)
    del form["scale_bits"]
    return Coded(*code_matrix(site.read(), kernel, block_size=block_size, **form))
