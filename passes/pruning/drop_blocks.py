"""Removes blocks, or sublayers, of which the model's predictions feel least; what comes before makes up for them.

The only pruning that makes every phase faster, and the least accurate per parameter: one or two of thirty blocks.

Paper:   greedy removal by its measured cost, SLEB, arXiv:2402.09025; compensation, ReplaceMe, arXiv:2505.02819; block
         influence, and which blocks to protect, Men et al., arXiv:2403.03853.
Differs: a cost is the KL divergence from the whole model; a part that cost far more before than the best one does now
         is not measured again. What differs in the compensation stands in `_refit`.
Axes:    B batch, S tokens, H width of the stream
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from onnxpress.compiler import calibration, stats
from onnxpress.compiler import sensitivity as sensitivities
from onnxpress.compiler.blocks import find_blocks
from onnxpress.compiler.calibration import Feeds
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import (
    OptionError,
    StreamingError,
    UnsupportedModelError,
)
from onnxpress.compiler.linears import find_embeddings, find_linears, unique_name
from onnxpress.compiler.mapped import on_disk
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.probe import image_sizes, random_inputs
from onnxpress.compiler.sensitivity import Sensitivity, digest_of
from onnxpress.compiler.threads import workers
from onnxpress.passes.pruning import _network, _parts, _refit
from onnxpress.passes.pruning._layers import TOKENS_PER_SAMPLE
from onnxpress.passes.pruning._network import Gap, Network
from onnxpress.passes.pruning._parts import Part, drop, edit_config, find_parts, may_go

_RANDOM_TOKENS = 64  # in a window where there is no text
# Of what a part costs more than what is gone: it mostly grows as parts go (lazy greedy, Minoux 1978), and falls where
# they did the same. A part of which it would have to fall below this to be the next is not measured again.
_LASTING = 0.8
_RUINED = 1e6  # cost of a part without which the outputs are not finite


def block_influence(in_BSH: npt.NDArray[Any], out_BSH: npt.NDArray[Any]) -> float:
    """1 - E cos(x_in, x_out) over tokens, in [0, 2]: how far a block turns the stream.

    The first token of a sequence is left out: it is an attention sink whose activations dwarf the others'.
    """
    start = 1 if in_BSH.shape[1] > 1 else 0
    x, y = (a[:, start:].reshape(-1, a.shape[-1]).astype(np.float64) for a in (in_BSH, out_BSH))
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(1 - np.mean((x * y).sum(axis=1) / np.maximum(norms, 1e-30)))


@dataclass
class _Study:
    """The network on paper, and what it is measured with."""

    network: Network
    sensitivity: Sensitivity
    windows: list[Feeds]  # that tell how to make up for what is gone
    digest: str  # of the model and the text


@dataclass
class _Plan:
    """Numbers of the parts to drop, why these, and what makes up for them."""

    removed: list[int]
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class DropBlocks(Pass):
    """Removes parts of the network: blocks, or attention and feed-forward sublayers apart.

    Give `count` to let the pass choose: one by one those go without which the model's predictions change least,
    measured anew each time; the first two blocks and the last one stay. Give `indices` to choose yourself. The
    projection before each gap is then fitted to give what the gap gave, as far as that goes; no operator is added.
    Caches are renumbered and the number of layers in the config follows.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    paper: ClassVar[str] = "arXiv:2402.09025"

    count: int | None = None  # parts to drop, those that cost least
    indices: tuple[int, ...] | None = None  # or: numbers of the parts to drop, from 0
    parts: Literal["blocks", "sublayers"] = "blocks"  # "sublayers": attention and feed-forward apart, counted in order
    by: Literal["kl", "stream"] = "kl"  # cost: loss of predictions, measured anew each time; turn of the stream, once
    compensate: bool = True  # fit the projections before the gaps; needs text
    tokens: int = 16384  # of calibration text for that
    length: int = 1024  # tokens of a window
    probe: int = 1024  # tokens on which costs are measured, of a window that fitting does not see

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.count is None) == (self.indices is None):
            raise OptionError("drop_blocks: expected either count or indices", hint="write drop_blocks(count=2)")
        self.check(self.count is None or self.count >= 1, "count", "at least 1")
        if self.indices is not None:
            distinct = len(set(self.indices)) == len(self.indices) > 0 and min(self.indices) >= 0
            self.check(distinct, "indices", "distinct numbers from 0", "write indices=(12, 13)")
        for option, least in (("tokens", 1), ("length", 1), ("probe", 16)):
            self.check(getattr(self, option) >= least, option, f"at least {least}")

    @classmethod
    def example(cls, model: ir.Model) -> DropBlocks:
        blocks = find_blocks(model)
        return cls(indices=(len(blocks) // 2,)) if len(blocks) > 1 else cls(count=1)

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        sublayers = self.parts == "sublayers"
        parts, total = find_parts(model, sublayers=sublayers), len(find_blocks(model))
        if self.indices is not None:
            self._check_indices(parts)
        plan = self._plan(model, parts, self._free(parts, total, report), context, report)
        self._put(model, plan.gaps, context, report)
        before = _elements(model.graph)
        for index in sorted(plan.removed, reverse=True):
            size = _elements(model.graph)
            drop(model, index, sublayers=sublayers)
            size -= _elements(model.graph)
            report.change(parts[index].name, parameters=size, **plan.facts.get(index, {}))
        heads = any(part.has_attention for part in parts)
        gone = sorted({parts[i].block for i in plan.removed if parts[i].has_attention or not heads})
        edit_config(context.config, total, gone, report)
        report.metrics |= {
            f"{self.parts}_before": len(parts),
            f"{self.parts}_after": len(parts) - len(plan.removed),
            "parameters_removed": 1 - _elements(model.graph) / before if before else 0.0,
        }
        return report

    def _check_indices(self, parts: Sequence[Part]) -> None:
        total, indices = len(parts), self.indices or ()
        if max(indices) >= total or len(indices) >= total:
            nearest = sorted(index for index in indices if index < total)[: max(total - 1, 0)] or [max(total - 1, 0)]
            more = f"; the nearest is indices=({', '.join(map(str, nearest))},)" if total > 1 else ""
            raise OptionError(
                f"drop_blocks: indices must name some, not all, of {total} {self.parts}, got {indices!r}",
                hint=f"numbers go from 0 to {total - 1}{more}" if total else "this model has no residual blocks",
            )

    def _free(self, parts: Sequence[Part], total: int, report: Report) -> list[int]:
        """Numbers of the parts that may be chosen; with `count`, the others are reported."""
        free: list[int] = []
        if self.count is not None:
            free, reasons = may_go(parts, total)
            for name, reason in reasons.items():
                report.skip(name, reason)
        if self.count is not None and self.count > len(free):
            nearest = f"the nearest is count={len(free)}; " if free else ""
            raise OptionError(
                f"drop_blocks: count must be at most {len(free)} of {len(parts)} {self.parts}, got {self.count}",
                hint=f"{nearest}the first two and the last block stay unless indices=(...) names them",
            )
        return free

    def _plan(self, model: ir.Model, parts: Sequence[Part], free: list[int], context: Context, report: Report) -> _Plan:
        plan = _Plan(sorted(self.indices or ()))
        is_fitting = self.compensate
        if is_fitting and not (context.arrays or context.calibration.is_text):
            report.skip("compensation", "there is no text, of which the model's tokenizer.json makes tokens")
            is_fitting = False
        if self.indices is not None and not is_fitting:
            return plan
        try:
            study = self._study(model, context, report, is_fitting=is_fitting)
        except (StreamingError, UnsupportedModelError) as error:
            if self.indices is None:
                raise
            report.skip("compensation", error.message)
            return plan
        if self.count is not None:
            choose = self._by_cost if self.by == "kl" else self._by_stream
            plan = choose(study, parts, free, context, report)
            for index in free:
                if index not in plan.removed:
                    more = (
                        "costs more than those dropped" if self.by == "kl" else "has more influence than those dropped"
                    )
                    report.skip(parts[index].name, more)
        else:
            study.sensitivity.bypass(study.network.bypasses(plan.removed))
        key = "kl" if study.sensitivity.measure == "KL divergence" else "output_error"
        report.metrics[key] = report.metrics[f"{key}_plain"] = study.sensitivity.distance({})
        if is_fitting and study.windows:
            plan.gaps = self._fit(study, plan.removed, context, report, key)
        return plan

    def _study(self, model: ir.Model, context: Context, report: Report, *, is_fitting: bool) -> _Study:
        """What costs and gaps are measured with."""
        if any(value.dtype == ir.DataType.BFLOAT16 for value in model.graph.initializers.values()):
            raise UnsupportedModelError(
                "drop_blocks: text is streamed on the CPU, which has no kernels for bfloat16",
                hint="use --target cuda (float16), or name indices=",
            )
        network = Network(model, sublayers=self.parts == "sublayers")
        graph = network.model.graph
        windows: list[Feeds] = []
        try:
            window, windows = self._windows(network.model, context, report, is_fitting=is_fitting)
        except StreamingError:
            if self.indices is not None:
                raise
            window = random_inputs(graph, context.seed, image_sizes(context.config))
            report.calibration = {"text": "random inputs, since the model reads other things than token ids"}
        digest = hashlib.sha256(digest_of(model).encode())
        for name in sorted(window):
            digest.update(np.ascontiguousarray(window[name]).data)
        digest.update(str(report.calibration.get("sha256")).encode())
        sensitivity = Sensitivity(network.model, window, [], ends=network.ends, positions=self.probe)
        size = math.prod(window["input_ids"].shape) if "input_ids" in window else 0
        report.calibration["costs"] = f"{sensitivity.measure} on " + (f"{size} of these tokens" if size else "these")
        return _Study(network, sensitivity, windows, digest.hexdigest())

    def _windows(
        self, model: ir.Model, context: Context, report: Report, *, is_fitting: bool
    ) -> tuple[Feeds, list[Feeds]]:
        """The window that losses are measured on, and those that are fitted to, [] where nothing is."""
        text = context.calibration
        found: list[Feeds] = []
        if context.arrays:
            samples = max(1, self.tokens // TOKENS_PER_SAMPLE) if is_fitting else 1
            given, report.calibration = context.arrays.windows(model.graph, samples)
            found = [*given]
        elif is_fitting:
            ids_WS, report.calibration = text.windows(self.tokens + self.length, self.length)
            found = [*feeds(model.graph, ids_WS)]
        if is_fitting:
            if len(found) == 1:
                report.notes.append("there is one window of data only: losses are measured on what was fitted")
            first: Feeds = found[0] if context.arrays else feeds(model.graph, ids_WS[:1, : self.probe])[0]
            return first, found[1:] or found
        if context.arrays:
            return found[0], []
        if text.is_text:
            ids_WS, report.calibration = text.windows(self.probe, self.probe)
        else:
            length = min(self.probe, text.max_length or _RANDOM_TOKENS)
            vocabulary = max((one.num_rows for one in find_embeddings(model)), default=2)
            ids_WS = np.random.default_rng(context.seed).integers(0, vocabulary, (1, length))
            report.calibration = {"text": f"{length} random tokens, since the model has no tokenizer.json"}
        return feeds(model.graph, ids_WS[:1, : self.probe])[0], []

    def _by_stream(
        self, study: _Study, parts: Sequence[Part], free: list[int], context: Context, report: Report
    ) -> _Plan:
        """The parts that turn the stream least."""
        network, sensitivity = study.network, study.sensitivity
        influences = []
        for part, out, stream in zip(network.parts, network.outs, network.streams, strict=True):
            if out is None or stream is None:
                influences.append(math.nan)
                continue
            after = sensitivity.value(stream)
            influences.append(block_influence(after - sensitivity.value(out) + sensitivity.value(part.stay), after))
        removed = sorted(sorted(free, key=lambda index: influences[index])[: self.count])
        report.metrics["influence_dropped"] = sum(influences[index] for index in removed)
        sensitivity.bypass(network.bypasses(removed))
        return _Plan(removed, {i: {"influence": influences[i], "influences": influences} for i in removed})

    def _by_cost(
        self, study: _Study, parts: Sequence[Part], free: list[int], context: Context, report: Report
    ) -> _Plan:
        """One by one, the part that costs least beside those that are gone."""
        network, sensitivity = study.network, study.sensitivity
        section = context.journal.section(
            self.name(), "costs", str(self), context.target.name, _identity(), study.digest
        )
        plan = _Plan([])
        more_of = dict.fromkeys(free, 0.0)  # what a part cost more than what was gone by then
        cost = 0.0
        gone: dict[int, ir.Value] = {}
        for step in range(self.count or 0):
            label = f"drop_blocks: {step + 1} of {self.count}"
            best = (math.inf, -1)
            for index in context.track(sorted(more_of, key=lambda one: more_of[one]), label):
                if cost + _LASTING * more_of[index] >= best[0]:
                    continue
                record = section.read(f"{step}-{index}", repr(plan.removed))
                if record is None:
                    whole = network.bypasses([*plan.removed, index])
                    new = {key: stay for key, stay in whole.items() if gone.get(key) is not stay}
                    found = sensitivity.distance({}, new)
                    record = {"cost": np.array(found if math.isfinite(found) else _RUINED)}
                    section.write(f"{step}-{index}", repr(plan.removed), record)
                more_of[index] = float(record["cost"]) - cost
                best = min(best, (float(record["cost"]), index))
            cost, index = best
            del more_of[index]
            plan.removed.append(index)
            plan.facts[index] = {"cost": cost, "step": step}
            whole = network.bypasses(plan.removed)
            sensitivity.bypass({key: stay for key, stay in whole.items() if gone.get(key) is not stay})
            gone = whole
        steps = ", ".join(f"{parts[index].name} {plan.facts[index]['cost']:.3g}" for index in plan.removed)
        report.notes.append(f"in order, with the {sensitivity.measure} up to there: {steps}")
        return plan

    def _fit(self, study: _Study, removed: list[int], context: Context, report: Report, key: str) -> list[Gap]:
        """Gaps with the weights that make up for them, [] where the model's predictions do not gain."""
        gaps, reasons = study.network.gaps(removed)
        for name, reason in reasons.items():
            report.skip(f"{name} compensation", reason)
        if not gaps:
            return []
        section = context.journal.section(
            self.name(), "gaps", str(self), context.target.name, _identity(), study.digest, repr(sorted(removed))
        )
        study.network.fit(removed, gaps, study.windows, context.work_dir, section, study.digest, context.track)
        fitted = [gap for gap in gaps if gap.weight is not None]
        for gap in gaps:
            if gap.weight is None:
                report.skip(f"{gap.name} compensation", "no weights serve held-out text better")
        weights = {id(gap.linear.weight): gap.weight for gap in fitted if gap.weight is not None}
        cost = study.sensitivity.distance(weights) if weights else math.inf
        if not cost < report.metrics[key]:
            for gap in fitted:
                report.skip(f"{gap.name} compensation", "the model's predictions do not gain by it")
            return []
        report.metrics[key] = cost
        return fitted

    def _put(self, model: ir.Model, gaps: Sequence[Gap], context: Context, report: Report) -> None:
        linears = {one.weight.name: one for one in find_linears(model, expand_pairs=True)} if gaps else {}
        for gap in gaps:
            linear, new_NK = linears[gap.linear.weight.name], on_disk(gap.new_w_NK(), context.work_dir)
            linear.set_weight(lambda new=new_NK: new, unique_name(model.graph, f"{linear.name}.compensated"))  # type: ignore[misc]
            report.change(linear.name, gap=gap.name, **gap.facts)


def _identity() -> str:
    """Of everything that may change a last bit: results of another state are not resumed."""
    modules = (calibration, sensitivities, stats, _network, _parts, _refit, sys.modules[__name__])
    digest = hashlib.sha256(b"".join(Path(str(one.__file__)).read_bytes() for one in modules))
    return f"{digest.hexdigest()} onnxruntime {ort.__version__} numpy {np.__version__} {workers()} threads"


def _elements(graph: ir.Graph) -> int:
    """Elements of all initializers, shared ones counted once."""
    tensors = {id(value.const_value): value.const_value for value in graph.initializers.values()}
    return sum(tensor.size for tensor in tensors.values() if tensor is not None)
