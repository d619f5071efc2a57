"""Rounds weights so that the outputs stay what they were: each column makes up for the errors of those before it.

Text is streamed through the model; every linear is fitted to the outputs that the uncompressed model has (its teacher),
given the activation that the compressed one sees. Then columns are revisited one by one, and scales refitted.

Paper:   arXiv:2210.17323 (GPTQ), arXiv:2504.02692 (GPTAQ: teacher's targets), arXiv:2309.01885 (coordinate descent)
Differs: the target is the exact least-squares matrix, not a correction inside the sweep; columns in order of importance
         while blocks keep their scales, so that the graph needs no column index; scales are refitted afterwards.
Axes:    N out features, K in features, G = ceil(K / b) blocks, b columns of a block
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from onnxpress.compiler import calibration, columns, packing, scales, stats, whitening, zeros
from onnxpress.compiler.calibration import Calibration, Group
from onnxpress.compiler.errors import StreamingError, UnsupportedModelError
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.nbits import CodedMatrix
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.threads import workers
from onnxpress.compiler.zeros import Pattern
from onnxpress.passes.quantization import _grids, _rounding
from onnxpress.passes.quantization import _least_squares as least_squares
from onnxpress.passes.quantization._grids import Floats, fit_grid
from onnxpress.passes.quantization._rounding import pack_columns, scale_unit, stored_scale
from onnxpress.passes.quantization._weight_only import (
    FLOATS,
    Coded,
    Format,
    Site,
    WeightOnly,
    calibration_windows,
    require_text,
    rounded,
)

_ROWS = 4096  # rows of a matrix that are worked on at a time: bounds memory for a head


@dataclass(frozen=True, kw_only=True)
class Calibrated(WeightOnly):
    """Base of passes that round weights with the help of calibration text; options as in every weight-only pass."""

    tokens: int = 16384  # of calibration text
    length: int = 1024  # tokens of a window
    damping: float = 0.01  # added to the diagonal of the second moments, relative to its mean
    teacher: bool = True  # fit to the outputs of the uncompressed model, not to those of the layer itself
    ridge: float = 0.05  # holds targets near the weights, relative to the mean second moment
    rounds: int = 2  # of coordinate descent and refitted scales after the sweep
    fallback: bool = False  # round to the nearest, and say so, what no text can be streamed to; else that is an error

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.tokens >= 1, "tokens", "positive", "16384 suits small models")
        self.check(self.length >= 1, "length", "positive", "1024 suits most models")
        self.check(self.damping > 0, "damping", "positive", "0.01 suits most models")
        self.check(self.ridge > 0, "ridge", "positive", "0.05 suits most models")
        self.check(self.rounds >= 0, "rounds", "0 or more", "2 suits most models")

    def code(
        self, model: ir.Model, sites: list[Site], linears: list[Linear], context: Context, report: Report
    ) -> Iterator[tuple[Site, Coded]]:
        site_of = {id(linear): site for site in sites for linear in site.linears if linear.holder in FLOATS}
        wanted = [linear for linear in linears if id(linear) in site_of]
        found: dict[int, Coded] = {}
        unfit: set[int] = set()
        try:
            if wanted and self.fallback:
                require_text(model, context)
            if wanted:
                self._stream(model, wanted, site_of, found, unfit, context, report)
        except (StreamingError, UnsupportedModelError) as error:
            if not self.fallback:
                raise
            report.notes.append(f"rounded to the nearest, not fitted to text, from here on: {error.message}")
            site_of = {id(linear): site for site in sites if id(site) in found for linear in site.linears}
        for site in sites:
            if id(site) in found:
                yield site, found.pop(id(site))
            elif id(site) in unfit:
                report.skip(site.name, "its activation is not finite on the calibration text")
        # Tables that are only gathered, and what is stored in integers already, see no activation of their own.
        rest = [
            site
            for site in sites
            if id(site) not in unfit and not any(id(linear) in site_of for linear in site.linears)
        ]
        yield from rounded(rest, context, self.name())

    def _stream(
        self,
        model: ir.Model,
        wanted: list[Linear],
        site_of: dict[int, Site],
        found: dict[int, Coded],
        unfit: set[int],
        context: Context,
        report: Report,
    ) -> None:
        """Puts the codes of every site into `found`, or its id into `unfit`, as text gets there."""
        windows = calibration_windows(model, wanted, site_of, context, report, self.tokens, self.length)
        ranks = repr(sorted((site.name, site.rank) for site in site_of.values() if site.rank))
        state = identity(sys.modules[type(self).__module__], whitening)
        section = context.journal.section(str(self), context.target.name, state, ranks)
        resumed = 0
        with Calibration(model, windows, wanted, context.work_dir) as run:
            for number, stage in enumerate(context.track(run.stages, self.name())):
                digest = run.digest(stage)
                record = section.read(str(number), digest)
                resumed += record is not None
                group = run.observe(stage, with_stats=record is None)
                if record is not None:
                    done = [_read(record, index) for index, _ in enumerate(group.linears)]
                elif is_finite(group):
                    done = self._fit(group, site_of)
                    section.write(str(number), digest, _record(done))
                else:
                    unfit |= {id(site_of[id(linear)]) for linear in group.linears}
                    continue
                for linear, coded in zip(group.linears, done, strict=True):
                    # Where layers share a weight, the first of them decides.
                    coded = found.setdefault(id(site_of[id(linear)]), coded)
                    group.replace(linear, coded.w_NK())
        if resumed:
            report.notes.append(f"an earlier run was stopped: {resumed} of {len(run.stages)} groups are its results")

    def prepared(self, group: Group) -> tuple[least_squares.Moments, Floats | None]:
        """Second moments of what a group reads, and C: W^T + C W^T is what its codes are to be like; None for W^T."""
        # Few tokens (an expert that is seldom chosen) say little about how features go together: the more damping, the
        # more the fit becomes rounding by importance.
        scarcity = group.stats.scarcity
        moments = least_squares.Moments(group.stats.hessian_KK, self.damping * scarcity)
        if not self.teacher or group.stats.drift_KK is None:
            return moments, None
        drift_KK = group.stats.drift_KK / group.stats.count
        return moments, stats.teacher_correction(moments.hessian_KK, drift_KK, self.ridge * scarcity)

    def pattern_of(self, site: Site) -> Pattern | None:
        """Which weights of a site become zero, None where none need to."""
        return None

    def _fit(self, group: Group, site_of: dict[int, Site]) -> list[Coded]:
        """Codes of the linears of a group, which share an activation; those of one format are fitted together."""
        together: dict[tuple[Format, Any, Pattern | None], list[Linear]] = {}
        for linear in group.linears:
            site = site_of[id(linear)]
            together.setdefault((site.format, site.dtype.numpy(), self.pattern_of(site)), []).append(linear)
        moments, correction_KK = self.prepared(group)
        parts: dict[int, list[Coded]] = {id(linear): [] for linear in group.linears}
        for (chosen, dtype, pattern), linears in together.items():
            for pieces in _batches(linears):
                w_KN = np.concatenate([w_NK.T for _, w_NK in pieces], axis=1)
                target_KN = w_KN if correction_KK is None else w_KN + correction_KK @ w_KN
                steps_KN, grid = solve(target_KN, chosen, dtype, moments, rounds=self.rounds, pattern=pattern)
                start = 0
                for linear, w_NK in pieces:
                    rows = slice(start, start + len(w_NK))
                    start = rows.stop
                    own = steps_KN[:, rows], grid.rows(rows)
                    parts[id(linear)].append(coded_steps(w_NK, *own, chosen, dtype, moments))
        return [_joined(parts[id(linear)]) for linear in group.linears]


def solve(
    target_KN: Floats,
    chosen: Format,
    dtype: np.dtype[Any],
    moments: least_squares.Moments,
    *,
    rounds: int,
    pattern: Pattern | None = None,
) -> tuple[Floats, least_squares.Grid]:
    """Signed steps [K, N] and the grid they lie on, scales as they will be stored.

    Args:
        target_KN: what the product of steps and scales is to be like, turned, float32.
        chosen: the format.
        dtype: of the activation.
        moments: of it.
        rounds: of coordinate descent and refitted scales after the sweep.
        pattern: of weights that become zero, if any.
    """
    grid = fit_grid(
        target_KN,
        moments.hessian_KK.diagonal(),
        bits=chosen.bits,
        block_size=chosen.block_size,
        symmetric=chosen.symmetric,
    )
    unit = scale_unit(grid.scale_GN, chosen.bits, dtype, chosen.scale_bits)
    grid.scale_GN = stored_scale(grid.scale_GN, dtype, unit)
    steps_KN, keep_KN = least_squares.sparse_sweep(target_KN, moments, grid, pattern)
    for _ in range(rounds):
        least_squares.descend(steps_KN, target_KN, moments, grid, keep_KN=keep_KN)
        grid.scale_GN = stored_scale(least_squares.refit(steps_KN, target_KN, moments, grid), dtype, unit)
    if rounds:
        least_squares.descend(steps_KN, target_KN, moments, grid, keep_KN=keep_KN)
    return steps_KN, grid


def identity(*others: ModuleType) -> str:
    """Of everything that may change a last bit, and with it a code: results of another state are not resumed."""
    modules = (calibration, columns, stats, scales, zeros, least_squares, _grids, _rounding, *others)
    sources = [__file__, *(module.__file__ for module in modules)]
    digest = hashlib.sha256(b"".join(Path(one).read_bytes() for one in sources if one is not None))
    return f"{digest.hexdigest()} onnxruntime {ort.__version__} numpy {np.__version__} {workers()} threads"


def is_finite(group: Group) -> bool:
    """Whether both streams gave finite activations."""
    drift_KK = group.stats.drift_KK
    return bool(np.isfinite(group.stats.gram_KK).all() and (drift_KK is None or np.isfinite(drift_KK).all()))


def _batches(linears: list[Linear]) -> Iterator[list[tuple[Linear, Floats]]]:
    """The matrices of `linears` in batches of a bounded number of rows."""
    batch: list[tuple[Linear, Floats]] = []
    size = 0
    for linear in linears:
        w_NK = linear.w_NK()
        for start in range(0, linear.num_out, _ROWS):
            piece = w_NK[start : start + _ROWS]
            if batch and size + len(piece) > _ROWS:
                yield batch
                batch, size = [], 0
            batch.append((linear, piece))
            size += len(piece)
    if batch:
        yield batch


def coded_steps(
    w_NK: Floats,
    steps_KN: Floats,
    grid: least_squares.Grid,
    chosen: Format,
    dtype: np.dtype[Any],
    moments: least_squares.Moments,
    side: tuple[CodedMatrix, CodedMatrix] | None = None,
) -> Coded:
    """Codes in the layout of ONNX Runtime, and how far they, and what is added to them, are from the weights."""
    columns, rows = steps_KN.shape
    groups, b = len(grid.scale_GN), grid.block_size
    codes = np.full((groups * b, rows), grid.zero_GN.flat[0], np.uint8)  # what pads the last block does not matter
    with np.errstate(invalid="ignore"):  # of weights that are not finite; the caller sees it in the norm
        np.add(steps_KN, grid.spread(grid.zero_GN, columns), out=codes[:columns], casting="unsafe")
    packed = pack_columns(codes.reshape(groups, b, rows), chosen.bits).transpose(2, 0, 1)
    zero = None
    if not chosen.symmetric:
        zero = packing.pack_zero_points(np.ascontiguousarray(grid.zero_GN.T.astype(np.uint8)), chosen.bits)
    scale_NG = np.ascontiguousarray(grid.scale_GN.T).astype(dtype)
    matrix = CodedMatrix(np.ascontiguousarray(packed), scale_NG, zero, columns, chosen.bits, b)
    error_KN = steps_KN * grid.spread(grid.scale_GN, columns) - w_NK.T
    if side is not None:
        error_KN += (side[1].w_NK() @ side[0].w_NK()).T
    facts = {
        "error": least_squares.quadratic(error_KN, moments.plain_KK),
        "energy": least_squares.quadratic(w_NK.T, moments.plain_KK),
    }
    return Coded(matrix, float(np.vdot(error_KN, error_KN)), float(np.vdot(w_NK, w_NK)), facts, side)


def _record(done: list[Coded]) -> dict[str, Any]:
    """What `_read` makes the same `Coded` of again."""
    record: dict[str, Any] = {}
    for index, coded in enumerate(done):
        for name, matrix in zip(
            (f"{index}", f"{index}.A", f"{index}.B"), (coded.matrix, *(coded.side or ())), strict=False
        ):
            record[f"{name}.codes"], record[f"{name}.scale"] = matrix.codes, matrix.scale
            if matrix.zero is not None:
                record[f"{name}.zero"] = matrix.zero
            record[f"{name}.sizes"] = np.array([matrix.num_in, matrix.bits, matrix.block_size])
        record[f"{index}.numbers"] = np.array([coded.loss, coded.norm, coded.facts["output_error"]])
    return record


def _read(record: dict[str, Any], index: int) -> Coded:
    loss, norm, error = (float(number) for number in record[f"{index}.numbers"])
    side = None
    if f"{index}.A.codes" in record:
        side = _matrix(record, f"{index}.A"), _matrix(record, f"{index}.B")
    facts = {"output_error": error, **({} if side is None else {"rank": len(side[0].codes)})}
    return Coded(_matrix(record, f"{index}"), loss, norm, facts, side)


def _matrix(record: dict[str, Any], name: str) -> CodedMatrix:
    num_in, bits, block_size = (int(number) for number in record[f"{name}.sizes"])
    zero = record.get(f"{name}.zero")
    return CodedMatrix(record[f"{name}.codes"], record[f"{name}.scale"], zero, num_in, bits, block_size)


def _joined(parts: list[Coded]) -> Coded:
    """Rows one below the other."""
    matrices = [one.matrix for one in parts]
    first = matrices[0]
    zeros = [one.zero for one in matrices if one.zero is not None]
    matrix = CodedMatrix(
        np.concatenate([one.codes for one in matrices]),
        np.concatenate([one.scale for one in matrices]),
        np.concatenate(zeros) if zeros else None,
        first.num_in,
        first.bits,
        first.block_size,
    )
    energy = sum(one.facts["energy"] for one in parts)
    facts = {"output_error": math.sqrt(sum(one.facts["error"] for one in parts) / energy) if energy else 0.0}
    return Coded(matrix, sum(one.loss for one in parts), sum(one.norm for one in parts), facts)
