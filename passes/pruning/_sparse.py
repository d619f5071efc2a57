"""What passes that zero single weights share: which matrices, how text gets to them, and what is said afterwards.

Axes: N out features, K in features
"""

from __future__ import annotations

import abc
import fnmatch
import functools
import hashlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from onnxpress.compiler import calibration, columns, sparse, stats, zeros
from onnxpress.compiler.calibration import Calibration
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.columns import quadratic
from onnxpress.compiler.errors import OptionError, UnsupportedModelError, near_miss
from onnxpress.compiler.linears import Float2D, Linear, find_embeddings, find_linears, unique_name
from onnxpress.compiler.mapped import on_disk
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.roles import KINDS
from onnxpress.compiler.stats import Stats
from onnxpress.compiler.threads import workers
from onnxpress.compiler.zeros import NO_SPEED, Pattern

Floats = npt.NDArray[Any]
Solver = Callable[[Float2D], Float2D]

_SMALL_OR_LAST = {"head": "the head decides between words", "router": "it picks the experts, and is small"}


def prunable(
    model: ir.Model,
    pattern: Pattern,
    report: Report,
    label: str,
    *,
    kinds: Sequence[str] = (),
    exclude: Sequence[str] = (),
    careful: bool = False,
) -> list[Linear]:
    """The float matrices that can have these zeros and lack them; all others go to the report.

    Args:
        model: not changed.
        pattern: of the zeros.
        report: gets the reasons.
        label: name of the pass.
        kinds, exclude: options of the pass.
        careful: leave head and routers alone unless `kinds` names them.

    Raises:
        OptionError: a kind or a pattern of names means nothing in this model, or no matrix can have these zeros.
    """
    linears = find_linears(model, expand_pairs=True)
    tied = {id(one.head) for one in find_embeddings(model, linears) if one.head is not None}
    shared = Counter(id(linear.weight) for linear in linears)
    names = [linear.name for linear in linears]
    for one in exclude:
        if not fnmatch.filter(names, one):
            raise OptionError(
                f"{label}: exclude={one!r} matches no linear", hint=f"{near_miss(one, names)}; names are {names[:3]} .."
            )
    for kind in kinds:
        if all(linear.kind != kind for linear in linears):
            known = ", ".join(sorted({linear.kind for linear in linears}))
            raise OptionError(f"{label}: this model has no linear of kind {kind!r}", hint=f"it has: {known}")
    found: list[Linear] = []
    misfits: list[tuple[str, str]] = []
    for linear in linears:
        reason = _refused(linear, tied, shared, kinds, exclude, careful=careful)
        if reason is None and (misfit := pattern.refuses(linear.num_in)) is not None:
            misfits.append((linear.name, misfit))
            reason = misfit
        if reason is None and pattern.has(linear.w_NK()):
            reason = "already this sparse"
        if reason is None:
            found.append(linear)
        else:
            report.skip(linear.name, reason)
    if misfits and not found and "already this sparse" not in report.reasons():
        name, reason = misfits[0]
        raise OptionError(
            f"{label}: no matrix can have these zeros; {name}: {reason.partition(';')[0]}",
            hint=reason.partition("; ")[2],
        )
    return found


def _refused(
    linear: Linear,
    tied: set[int],
    shared: Counter[int],
    kinds: Sequence[str],
    exclude: Sequence[str],
    *,
    careful: bool,
) -> str | None:
    if kinds and linear.kind not in kinds:
        return "not among the kinds asked for"
    if any(fnmatch.fnmatchcase(linear.name, one) for one in exclude):
        return "excluded"
    if linear.is_quantized:
        return "quantized; prune before quantizing"
    if id(linear) in tied:
        return "shares its bytes with the embedding"
    if shared[id(linear.weight)] > 1:
        return "several linears share its weight"
    if careful and not kinds and linear.kind in _SMALL_OR_LAST:
        return f"{_SMALL_OR_LAST[linear.kind]}; kinds=({linear.kind!r},) prunes it"
    return None


@dataclass
class Tally:
    """Sums over pruned matrices, for the report."""

    zeros: int = 0
    weights: int = 0
    loss: float = 0.0
    norm: float = 0.0
    saved: float = 0.0

    def add(self, w_NK: Floats, pruned_NK: Floats, nbytes: int) -> float:
        """Counts a matrix that takes `nbytes`; gives the share of its weights that are zero."""
        count = pruned_NK.size - int(np.count_nonzero(pruned_NK))
        difference = (w_NK - pruned_NK).reshape(-1)
        self.loss += float(difference @ difference)
        self.norm += float(np.square(w_NK, dtype=np.float64).sum())
        self.zeros, self.weights = self.zeros + count, self.weights + pruned_NK.size
        self.saved += max(count * nbytes / pruned_NK.size - pruned_NK.size / 8, 0)
        return count / pruned_NK.size

    def sum_up(self, model: ir.Model, report: Report) -> None:
        """Metrics, and what zeros are good for; sparse initializers where they are smaller than the matrix."""
        if not self.weights:
            return
        report.metrics |= {
            "sparsity": self.zeros / self.weights,
            "weight_error": math.sqrt(self.loss / self.norm) if self.norm else 0.0,
            "bytes_saved_if_compressed": self.saved,
        }
        model.metadata_props.setdefault(sparse.KEY, sparse.INITIALIZERS)
        report.notes.append(NO_SPEED)


@dataclass(frozen=True, kw_only=True)
class Streamed(Pass):
    """Base of passes that zero weights by what text shows of their activations."""

    promise: ClassVar[Promise] = Promise.LOSSY

    sparsity: float | None = None  # share of each row that becomes zero; 0.5 where no pattern is given
    pattern: str | None = None  # "2:4": two of every four neighbours of a row stay; instead of sparsity
    kinds: tuple[str, ...] = ()  # roles to prune: "q", "gate", "down", ...; () for all but head and routers
    exclude: tuple[str, ...] = ()  # patterns of names that stay dense: "block0.*", "*.down"
    tokens: int = 8192  # of calibration text
    length: int = 1024  # tokens of a window

    def __post_init__(self) -> None:
        super().__post_init__()
        zeros.read(self.name(), self.sparsity, self.pattern)
        self.check(set(self.kinds) <= set(KINDS), "kinds", f"among {', '.join(KINDS)}")
        self.check(self.tokens >= 1, "tokens", "positive", "8192 suits most models")
        self.check(self.length >= 1, "length", "positive", "1024 suits most models")

    @abc.abstractmethod
    def solver(self, stats: Stats, pattern: Pattern) -> Solver:
        """What turns the matrices [N, K] that read an activation into pruned ones, float32 [N, K]."""

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report, tally = Report(), Tally()
        pattern = zeros.read(self.name(), self.sparsity, self.pattern, default=0.5)
        assert pattern is not None
        linears = prunable(model, pattern, report, self.name(), kinds=self.kinds, exclude=self.exclude, careful=True)
        if not linears:
            return report
        if any(linear.weight.dtype == ir.DataType.BFLOAT16 for linear in linears):
            raise UnsupportedModelError(
                f"{self.name()}: text is streamed on the CPU, which has no kernels for bfloat16",
                hint="use --target cuda (float16), or magnitude",
            )
        ids_WS, report.calibration = context.calibration.windows(self.tokens, self.length)
        done = self._stream(model, linears, feeds(model.graph, ids_WS), pattern, context, report)
        squares = []
        for linear in linears:
            if linear.name not in done:
                report.skip(linear.name, "its weights or its activation are not finite on the calibration text")
                continue
            pruned_NK, error = done[linear.name]
            share = tally.add(linear.w_NK(), np.asarray(pruned_NK, np.float32), linear.nbytes)
            squares.append(error * error)
            report.change(linear.name, kind=linear.kind, shape=list(linear.shape), sparsity=share, output_error=error)
            later = functools.partial(np.asarray, pruned_NK, np.float32)
            linear.set_weight(later, unique_name(model.graph, f"{linear.name}.pruned"))
        if squares:
            report.metrics["output_error"] = math.sqrt(sum(squares) / len(squares))
        tally.sum_up(model, report)
        return report

    def _stream(
        self,
        model: ir.Model,
        linears: list[Linear],
        windows: list[dict[str, Any]],
        pattern: Pattern,
        context: Context,
        report: Report,
    ) -> dict[str, tuple[Floats, float]]:
        """Pruned matrices [N, K] in their stored type, by name, each with the relative error of its outputs."""
        section = context.journal.section(self.name(), str(self), context.target.name, identity(type(self)))
        done: dict[str, tuple[Floats, float]] = {}
        resumed = 0
        with Calibration(model, windows, linears, context.work_dir) as run:
            for number, stage in enumerate(context.track(run.stages, self.name())):
                digest = run.digest(stage)
                record = section.read(str(number), digest)
                resumed += record is not None
                group = run.observe(stage, with_stats=record is None)
                if record is None:
                    record = self._fitted(group.linears, group.stats, pattern)
                    section.write(str(number), digest, record)
                for index, linear in enumerate(group.linears):
                    if f"{index}" in record:
                        pruned_NK = on_disk(record[f"{index}"], context.work_dir)
                        group.replace(linear, np.asarray(pruned_NK, np.float32))
                        done[linear.name] = pruned_NK, float(record[f"{index}.error"])
        if resumed:
            report.notes.append(f"an earlier run was stopped: {resumed} of {len(run.stages)} groups are its results")
        return done

    def _fitted(self, linears: list[Linear], seen: Stats, pattern: Pattern) -> dict[str, Floats]:
        """Pruned matrices and their errors; nothing of what is not finite."""
        record: dict[str, Floats] = {}
        drift_KK = seen.drift_KK
        if not (np.isfinite(seen.gram_KK).all() and (drift_KK is None or np.isfinite(drift_KK).all())):
            return record
        solve, plain_KK = self.solver(seen, pattern), seen.hessian_KK.astype(np.float32)
        for index, linear in enumerate(linears):
            w_NK = linear.w_NK()
            if not np.isfinite(w_NK).all():
                continue
            dtype = linear.weight.dtype
            assert dtype is not None
            pruned_NK = solve(w_NK).astype(dtype.numpy())
            energy = quadratic(w_NK.T, plain_KK)
            error = quadratic((pruned_NK.astype(np.float32) - w_NK).T, plain_KK)
            record[f"{index}"] = pruned_NK
            record[f"{index}.error"] = np.array(math.sqrt(error / energy) if energy > 0 else 0.0)
        return record


def identity(kind: type[Pass]) -> str:
    """Of everything that may change a last bit: results of another state are not resumed."""
    modules = (calibration, columns, stats, zeros, sys.modules[kind.__module__])
    sources = [__file__, *(one.__file__ for one in modules)]
    digest = hashlib.sha256(b"".join(Path(one).read_bytes() for one in sources if one is not None))
    return f"{digest.hexdigest()} onnxruntime {ort.__version__} numpy {np.__version__} {workers()} threads"
