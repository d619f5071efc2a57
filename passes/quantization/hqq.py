"""Rounds weights so that many errors are small and a few may be large (half-quadratic quantization).

Minimizes the sum of |w - s (q - z)|^p with p < 1 over the zero point z and the scale s of each block, without data: an
error is split into a part that is shrunk to 0 unless it is large, and a rest that least squares fits.

Paper:   Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023)
Differs: errors are measured in steps, so the unit of the weights does not matter; the zero point is rounded to a whole
         number, as MatMulNBits stores it, and the scale, there fixed, is fitted by the same splitting. It begins with
         the whole range alone: from narrower ones the sum gets smaller and the model worse (outliers are given up).
         The results of `rtn` are among the candidates.
Axes:    N out features, K in features, G = ceil(K / b) blocks, b columns of a block
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

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
    round_blocks,
    scale_unit,
    scratch,
    spread_range,
    stored_scale,
)
from onnxpress.passes.quantization._weight_only import Coded, Site, WeightOnly, rounded

_BETA, _KAPPA = 10.0, 1.01  # weight of the quadratic part, in steps; its growth each round
_SMALLEST = 1e-6  # error in steps from which on it is 0: a negative power of it must stay finite
_FITS = 3  # rounds in which the scale is fitted, the zero point being whole


def hqq(
    w_GbN: Floats,
    *,
    bits: int,
    symmetric: bool,
    scale_dtype: np.dtype[Any],
    scale_bits: int = 32,
    p: float = 0.7,
    rounds: int = 20,
) -> Rounded:
    """Codes and scales of blocks along axis 1: the least sum of |w - (code - zero) scale|^p that is found.

    Args:
        w_GbN: weights, float32 or float64; b weights share a scale. Not changed.
        bits: 2, 4 or 8.
        symmetric: the zero point is 2^(bits - 1) and only the scale is fitted; else every block has its own.
        scale_dtype: type in which scales are stored.
        scale_bits: 8 for scales that are whole multiples of a unit of their row (all G blocks must be given then).
        p: in (0, 1): the smaller, the more a few large errors are preferred to many small ones.
        rounds: in which the zero point moves.

    Laws:   never a larger sum than that of `round_blocks`, "max" or "mse", on any block; a block on a grid that
            `round_blocks` reproduces is reproduced; twice the weights, the same codes and twice the scales.
    Cost:   O(K N) for each round, with one power per weight.
    """
    unit, start_zero = spread_range(w_GbN, bits, symmetric)
    form: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "scale_dtype": scale_dtype, "scale_bits": scale_bits}
    row_unit = scale_unit(unit, bits, scale_dtype, scale_bits)
    best: list[Floats] = []  # steps, scale, zero, sum of |error|^p
    for scales in ("mse", "max"):
        plain = round_blocks(w_GbN, scales=scales, **form)
        zero = start_zero if plain.zero_GN is None else plain.zero_GN.astype(w_GbN.dtype)
        scale = plain.scale_GN.astype(w_GbN.dtype)
        _keep(best, w_GbN, unit, plain.steps_GbN(bits, w_GbN.dtype), scale, zero, p)
    x_GbN = np.divide(w_GbN, unit[:, None], out=scratch.like(w_GbN, "x"))
    if symmetric:
        candidates = [start_zero]
    else:
        below = np.floor(_zero_point(x_GbN, start_zero, bits, p, rounds))
        candidates = [np.clip(one, 0, 2**bits - 1) for one in (below, below + 1)]
    for zero in candidates:
        scale = stored_scale(_scale(x_GbN, zero, bits, p) * unit, scale_dtype, row_unit)
        _keep(best, w_GbN, unit, nearest_steps(w_GbN, scale, zero, bits), scale, zero, p)
    steps, scale, zero, _ = best
    error = steps * scale[:, None] - w_GbN
    return as_stored(steps, scale, zero, dot(error, error), symmetric, scale_dtype)


def _zero_point(x_GbN: Floats, zero_GN: Floats, bits: int, p: float, rounds: int) -> Floats:
    """The zero point, a fraction, to which half-quadratic splitting leads; weights in steps."""
    zero, beta = zero_GN, _BETA
    steps, error = scratch.like(x_GbN, "steps"), scratch.like(x_GbN, "error")
    for _ in range(rounds):
        np.add(x_GbN, zero[:, None], out=steps)
        np.rint(steps, out=steps)
        np.clip(steps, 0, 2**bits - 1, out=steps)
        steps -= x_GbN  # code - w / s: what z would be for this weight alone
        np.subtract(zero[:, None], steps, out=error)
        steps += _shrunk(error, beta, p)
        zero = steps.mean(axis=1)
        beta *= _KAPPA
    return zero


def _scale(x_GbN: Floats, zero_GN: Floats, bits: int, p: float) -> Floats:
    """The scale, relative to that of the steps, to which splitting leads with a whole zero point."""
    scale, beta = np.ones_like(zero_GN), _BETA
    steps, error = scratch.like(x_GbN, "steps"), scratch.like(x_GbN, "error")
    for _ in range(_FITS):
        np.divide(x_GbN, scale[:, None], out=steps)
        clip_to_steps(steps, zero_GN, bits)
        np.multiply(steps, scale[:, None], out=error)
        np.subtract(x_GbN, error, out=error)
        target = np.subtract(x_GbN, _shrunk(error, beta, p), out=error)
        square = dot(steps, steps)
        scale = nonzero(np.divide(dot(steps, target), square, out=scale.copy(), where=square > 0))
        beta *= _KAPPA
    return scale


def _shrunk(error_GbN: Floats, beta: float, p: float) -> Floats:
    """sign(e) max(|e| - |e|^(p - 1) / beta, 0): what least squares need not fit. In scratch memory."""
    size = np.abs(error_GbN, out=scratch.like(error_GbN, "size"))
    np.maximum(size, _SMALLEST, out=size)
    power = np.log(size, out=scratch.like(error_GbN, "power"))  # numpy's own power is slower
    power *= p - 1
    np.exp(power, out=power)
    power /= beta
    size -= power
    np.maximum(size, 0, out=size)
    return np.copysign(size, error_GbN, out=size)


def _keep(
    best: list[Floats], w_GbN: Floats, unit_GN: Floats, steps_GbN: Floats, scale_GN: Floats, zero_GN: Floats, p: float
) -> None:
    """Puts a candidate into `best` where its sum of |error|^p, in units of `unit_GN`, is smaller."""
    error = np.multiply(steps_GbN, scale_GN[:, None], out=scratch.like(w_GbN, "error"))
    error -= w_GbN
    error /= unit_GN[:, None]
    np.abs(error, out=error)
    np.power(error, p, out=error)
    loss = error.sum(axis=1)
    if not best:
        best[:] = steps_GbN.copy(), scale_GN, zero_GN, loss
        return
    better = loss < best[3]
    np.copyto(best[0], steps_GbN, where=better[:, None])
    best[1:] = (np.where(better, new, old) for new, old in zip((scale_GN, zero_GN, loss), best[1:], strict=True))


@dataclass(frozen=True, kw_only=True)
class Hqq(WeightOnly):
    """Rounds weights to 2, 4 or 8 bits with least |error|^p, without data; options as in every weight-only pass."""

    p: float = 0.7  # in (0, 1): the smaller, the more a few large errors are preferred to many small ones
    rounds: int = 20  # in which the zero points move

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 < self.p < 1, "p", "between 0 and 1", "0.7 suits most models")
        self.check(self.rounds >= 0, "rounds", "0 or more", "20 suits most models")

    @classmethod
    def example(cls, model: ir.Model) -> Hqq:
        return cls(block_size=16)

    def code(
        self, model: ir.Model, sites: list[Site], linears: list[Linear], context: Context, report: Report
    ) -> Iterator[tuple[Site, Coded]]:
        return rounded(sites, context, self.name(), self._coded)

    def _coded(self, site: Site) -> Coded:
        form: dict[str, Any] = {**site.format._asdict(), "scale_dtype": site.dtype.numpy()}
        del form["scales"]  # finds its own
        block_size = form.pop("block_size")
        kernel = functools.partial(hqq, p=self.p, rounds=self.rounds, **form)
        del form["scale_bits"]
        return Coded(*code_matrix(site.read(), kernel, block_size=block_size, **form))
