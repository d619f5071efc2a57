"""Takes whole structures out of layers, channels or heads, and lets the rest make up for them.

Text is streamed twice. The first time nothing is changed: every layer tells what each number of structures would cost
at the outputs of the linear that reads them (by the optimal brain surgeon), and the divergence of the model's
predictions is measured with this layer alone cut. A knapsack solver then gives every layer its size within one budget.
The second time each layer is cut, in order, and fitted to what the uncompressed model has there, given the activation
that the compressed one sees; matrices between make up for what was lost before them.

Axes:    N out features, K in features, G structures of U columns each
"""

from __future__ import annotations

import abc
import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler import sizes
from onnxpress.compiler.allocation import Option, allocate, choose_within
from onnxpress.compiler.calibration import Calibration, Group
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import Linear, find_linears
from onnxpress.compiler.mapped import on_disk
from onnxpress.compiler.obs import eliminate
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.stats import shrunk, teacher_correction
from onnxpress.passes.pruning._coded import FLOATS, set_matrix, to_codes
from onnxpress.passes.pruning._layers import PROBED, Structure, columns_of, identity, prepared, price, put, spread

Floats = npt.NDArray[Any]
Index = npt.NDArray[np.integer]


@dataclass(frozen=True, kw_only=True)
class Structured(Pass):
    """Base of passes that take structures out by what text shows of their activations."""

    promise: ClassVar[Promise] = Promise.LOSSY
    structure: ClassVar[str]  # what people call what is taken out: "channels"

    ratio: float | None = None  # share of the structures to remove, in (0, 1), of all layers together
    size: str | None = None  # of the model's files together: "90MB" is 90,000,000 bytes
    # KL divergence (nats per token) that may be lost: an estimate, the sum of what each layer costs alone
    kl: float | None = None
    counts: tuple[int, ...] | None = None  # or: what each layer that may be cut keeps, in their order
    allocation: Literal["kl", "loss", "uniform"] = "kl"  # sizes by loss of the model, of outputs, or the same for all
    exclude: tuple[str, ...] = ()  # patterns of names of layers that stay whole: "block0.*"
    # Fit to the outputs of the uncompressed model, not to those of the layer itself; asks for much text.
    teacher: bool = False
    refit: bool = False  # with `teacher`: let other matrices, too, make up for the loss of those before them
    ridge: float = 0.05  # holds targets near the weights, relative to the mean second moment
    tokens: int = 16384  # of calibration text
    length: int = 1024  # tokens of a window
    probe: int = 512  # tokens on which costs are measured

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [option for option in ("ratio", "size", "kl", "counts") if getattr(self, option) is not None]
        if len(given) != 1:
            raise OptionError(
                f"{self.name()}: expected one of ratio, size, kl and counts, got {' and '.join(given) or 'none'}",
                hint=f"write {self.name()}(ratio=0.1)",
            )
        self.check(self.ratio is None or 0 < self.ratio < 1, "ratio", "between 0 and 1", "0.1 removes 10 %")
        self.check(self.size is None or sizes.read(self.size) is not None, "size", "a size such as '90MB' or '1.2GiB'")
        self.check(self.kl is None or self.kl > 0, "kl", "positive", "0.1 is a mild loss")
        self.check(self.counts is None or min(self.counts, default=0) >= 1, "counts", "numbers of at least 1")
        given_away = self.ratio is not None or self.counts is not None
        self.check(self.allocation != "uniform" or given_away, "allocation", "'kl' or 'loss' without a ratio")
        self.check(self.kl is None or self.allocation == "kl", "allocation", "'kl' where kl is given")
        self.check(self.teacher or not self.refit, "refit", "False without teacher", "write teacher=True, refit=True")
        self.check(self.ridge > 0, "ridge", "positive", "0.05 suits most models")
        for option, least in (("tokens", 1), ("length", 1), ("probe", 16)):
            self.check(getattr(self, option) >= least, option, f"at least {least}")

    @abc.abstractmethod
    def structures(self, model: ir.Model, linears: Sequence[Linear], report: Report) -> list[Structure]:
        """The layers that may be cut; others go to the report."""

    def excluded(self, names: Sequence[str]) -> Callable[[str], bool]:
        """Whether a layer is excluded.

        Args:
            names: of all layers.

        Raises:
            OptionError: a pattern matches none of them.
        """
        for pattern in self.exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise OptionError(
                    f"{self.name()}: exclude={pattern!r} matches no layer",
                    hint=f"they are called {', '.join(names[:3])}" if names else "this model has no such layers",
                )
        return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)

    def finish(self, structures: Sequence[Structure], context: Context, report: Report) -> None:
        """Edits the config, once all layers are cut."""

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        linears = find_linears(model)
        found = self.structures(model, linears, report)
        if not found:
            return report
        besides = sizes.bytes_besides(model, []) - sum(one.total * one.nbytes for one in found)
        self._check_size(found, besides)
        self._take_counts(found)
        windows = prepared(model, found, context, report, self.tokens, self.length)
        if self.counts is not None:
            pass
        elif self.allocation == "uniform":
            for one in found:
                one.count = one.nearest(self.ratio or 0.0)
        else:
            self._check_kl(model)
            cut = self.ratio or PROBED
            probe = self.probe if self.allocation == "kl" else None
            found = price(self, model, found, windows, context, report, cut=cut, probe=probe)
            self._allocate(found, besides)
        results = self._fit(model, linears, found, windows, context, report)
        is_kl = "KL divergence" in report.calibration.get("costs", "")
        for one in found:
            self._put(one, results, report, is_kl=is_kl)
        self._refit(linears, results, report)
        self.finish(found, context, report)
        self._sum_up(found, report, is_kl=is_kl)
        return report

    def _take_counts(self, found: list[Structure]) -> None:
        """Gives every layer the count that `counts` says, before text is read."""
        if self.counts is None:
            return
        if len(self.counts) != len(found):
            raise OptionError(
                f"{self.name()}: counts must have one number for each of {len(found)} layers, got {len(self.counts)}",
                hint=f"as it is: counts=({', '.join(str(one.total) for one in found)},)",
            )
        for one, count in zip(found, self.counts, strict=True):
            if count not in one.counts:
                nearest = min(one.counts, key=lambda each: abs(each - count))
                raise OptionError(
                    f"{self.name()}: counts: {one.name} has {one.total} {self.structure}, and can keep a multiple of "
                    f"{one.step}, got {count}",
                    hint=f"the nearest is {nearest}",
                )
            one.count = count

    def _check_kl(self, model: ir.Model) -> None:
        if self.kl is not None and all(value.name != "logits" for value in model.graph.outputs):
            raise OptionError(
                f"{self.name()}: kl has no meaning for a model without logits", hint="give ratio= or size="
            )

    def _check_size(self, found: list[Structure], besides: float) -> None:
        """Raises OptionError for a size that the model has without this pass, or cannot have, before text is read."""
        if self.size is None:
            return
        asked, present = sizes.read(self.size) or 0, besides + sum(one.total * one.nbytes for one in found)
        if present <= asked:
            raise OptionError(
                f"{self.name()}: size={self.size} is met as it is: the model takes {sizes.written(present)}",
                hint="ask for less than that, or leave the pass out",
            )
        least = besides + sum(one.counts[-1] * one.nbytes for one in found)
        if least > asked:
            self._refuse(f"size='{sizes.written(least)}'")

    def _refuse(self, nearest: str) -> NoReturn:
        raise OptionError(
            f"{self.name()}: {'size' if self.size else 'ratio'}={self.size or self.ratio} cannot be met, all "
            f"layers at the smallest size take {nearest}",
            hint=f"the nearest is {nearest}; less needs a quantizer, or drop_blocks",
        )

    def _allocate(self, found: list[Structure], besides: float) -> None:
        """Gives every layer its count; `besides` are bytes of everything else."""
        options = [
            [
                Option(one.cost * float(loss), round(count * one.nbytes))
                for count, loss in zip(one.counts, one.losses, strict=True)
            ]
            for one in found
        ]
        whole = sum(some[0].nbytes for some in options)
        least = sum(some[-1].nbytes for some in options)
        if self.kl is not None:
            chosen = choose_within(options, self.kl, self.name())
        else:
            budget = (1 - (self.ratio or 0.0)) * whole
            if self.size is not None:
                budget = (sizes.read(self.size) or 0) - besides
            met = allocate(options, budget)
            if met is None:
                nearest = f"ratio={math.floor(1e4 * (1 - least / whole)) / 1e4}"
                self._refuse(nearest if self.size is None else f"size='{sizes.written(least + besides)}'")
            chosen = met
        for one, some, index in zip(found, options, chosen, strict=True):
            one.count, one.expected = one.counts[index], some[index].cost

    def _fit(
        self,
        model: ir.Model,
        linears: Sequence[Linear],
        found: list[Structure],
        windows: list[dict[str, Any]],
        context: Context,
        report: Report,
    ) -> dict[int, Floats]:
        """New matrices [N, K] by id of a linear's output; those of readers have the columns that are kept."""
        of_reader = {id(one.reader): one for one in found}
        wanted = [one.reader for one in found]
        if self.refit:
            wanted = [one for one in linears if id(one) in of_reader or _may_change(one)]
        plan = repr([(one.name, one.count) for one in found])
        section = context.journal.section(self.name(), str(self), plan, context.target.name, identity(type(self)))
        results: dict[int, Floats] = {}
        resumed = 0
        with Calibration(model, windows, wanted, context.work_dir) as run:
            for number, stage in enumerate(context.track(run.stages, self.name())):
                digest = run.digest(stage)
                record = section.read(str(number), digest)
                resumed += record is not None
                group = run.observe(stage, with_stats=record is None)
                if record is None:
                    record = self._fitted(group, of_reader)
                    section.write(str(number), digest, record)
                for index, linear in enumerate(group.linears):
                    if f"{index}.w" not in record:
                        continue
                    w_NK, one = record[f"{index}.w"], of_reader.get(id(linear))
                    if one is not None and one.count < one.total:
                        one.kept, one.error = record[f"{index}.kept"], float(record[f"{index}.error"])
                        seen_NK = w_NK if one.codes is None else one.codes.nearest(w_NK).w_NK()
                        group.replace(linear, spread(seen_NK, one))
                    else:
                        group.replace(linear, w_NK)
                    results[id(linear.output)] = on_disk(w_NK, context.work_dir)
        if resumed:
            report.notes.append(f"an earlier run was stopped: {resumed} of {len(run.stages)} groups are its results")
        return results

    def _fitted(self, group: Group, of_reader: dict[int, Structure]) -> dict[str, Floats]:
        """A new matrix for each linear of a group that gets one, float32."""
        record: dict[str, Floats] = {}
        seen = group.stats
        correction_KK = None
        if self.teacher and seen.drift_KK is not None and np.isfinite(seen.drift_KK).all():
            drift_KK = seen.drift_KK / max(seen.count, 1)
            correction_KK = teacher_correction(seen.hessian_KK, drift_KK, self.ridge * seen.scarcity)
        for index, linear in enumerate(group.linears):
            one = of_reader.get(id(linear))
            stays = one is None or one.count == one.total
            # A matrix that stays whole makes up for others, if that is wanted and it can be told any weights.
            if stays and (correction_KK is None or not self.refit or (one is not None and one.codes is not None)):
                continue
            w_NK = linear.w_NK()
            target_NK = w_NK if correction_KK is None else w_NK + w_NK @ correction_KK.T
            if not (np.isfinite(target_NK).all() and np.isfinite(seen.gram_KK).all()):
                continue
            if one is None or one.count == one.total:
                record[f"{index}.w"] = np.asarray(target_NK, np.float32)
                continue
            hessian_KK = shrunk(seen.hessian_KK, seen.count)
            counts = [count for count in one.counts if count >= one.count]
            *_, last = eliminate(target_NK, hessian_KK, one.unit, counts)
            columns = columns_of(one, last.kept)
            whole = float(np.einsum("nk,nk->", target_NK @ hessian_KK, target_NK)) or 1.0
            record |= {
                f"{index}.w": last.w_NK[:, columns].astype(np.float32),
                f"{index}.kept": last.kept,
                f"{index}.error": np.array(math.sqrt(max(last.loss, 0.0) / whole)),
            }
        return record

    def _put(self, one: Structure, results: dict[int, Floats], report: Report, *, is_kl: bool) -> None:
        """Cuts a layer in the graph; a matrix that stays whole is left to `_refit`."""
        key = id(one.reader.output)
        if one.kept is None or len(one.kept) == one.total:
            what = "no smaller size is worth what it costs" if self.counts is None else "counts says so"
            if one.kept is None and one.count < one.total:
                what = "its weights or its activation are not finite on the calibration text"
            report.skip(one.name, f"stays whole: {what}")
            if one.codes is not None:
                to_codes(one.reader, one.codes.matrix, one.codes.level)
            return
        report.change(
            one.name,
            structures_before=one.total,
            structures_after=len(one.kept),
            parameters_before=one.total * one.parameters,
            parameters_after=len(one.kept) * one.parameters,
            output_error=one.error,
            **({"expected_kl": one.expected} if is_kl else {}),
        )
        put(one, one.kept, results.pop(key), results)

    def _refit(self, linears: Sequence[Linear], results: dict[int, Floats], report: Report) -> None:
        """Stores the matrices that make up for what others have lost."""
        for linear in linears:
            new = results.get(id(linear.output))
            if new is not None:
                set_matrix(linear, new, "refitted")
                report.change(linear.name)
        if results:
            report.notes.append(f"{len(results)} other matrices make up for what was taken out before them")

    def _sum_up(self, found: Sequence[Structure], report: Report, *, is_kl: bool) -> None:
        before = sum(one.total * one.parameters for one in found)
        after = sum((one.total if one.kept is None else len(one.kept)) * one.parameters for one in found)
        report.metrics |= {"parameters_before": before, "parameters_after": after}
        errors = [one.error for one in found if one.kept is not None]
        if errors:
            report.metrics["output_error"] = math.sqrt(sum(error**2 for error in errors) / len(errors))
        if is_kl:
            report.metrics["expected_kl"] = sum(one.expected for one in found)
        left = " ".join(str(one.total if one.kept is None else len(one.kept)) for one in found)
        removed = f"{1 - after / before:.1%} of the parameters of {len(found)} layers removed"
        report.notes.insert(0, f"{removed}; {self.structure} left: {left}")


def _may_change(linear: Linear) -> bool:
    """Whether a matrix may make up for others: a float one inside of a block that nobody else reads."""
    return linear.block is not None and linear.holder in FLOATS and linear.kind != "router" and not linear.is_shared
