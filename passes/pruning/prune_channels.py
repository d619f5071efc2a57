"""Takes channels out of convolutional and other plain networks, through the whole graph.

What hangs together goes together: the channels of a residual stream in all convolutions that add to it, those of a
depthwise convolution, a norm, a gate. The graph stays an ordinary one of the same operators with smaller matrices.

Paper:   arXiv:2301.12900 (DepGraph), arXiv:1707.06342 (ThiNet)
Differs: labels for places along axes instead of edges; all readers of a channel judge it, and make up for it
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler import sizes
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import CalibrationError, OptionError
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.passes.pruning import _channel_fit as fitting
from onnxpress.passes.pruning._channel_groups import Group, bytes_saved, cut_out, find_groups, weigh
from onnxpress.passes.pruning._channel_rules import follow
from onnxpress.passes.pruning._channel_walk import Labels, Walk, walk

_LENGTH = 256  # tokens of a window, for models that read text
_STEPS = 24  # in which a group is emptied at most: more choose a little better, and each costs as much


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Pass):
    """Narrows convolutions and linears of a plain network; give ratio or size, and calibration data if there is any.

    `--calibration images.npz` lets the rest make up for what is gone. By weights alone accuracy falls quickly.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    paper: ClassVar[str] = "arXiv:2301.12900"

    ratio: float | None = None  # share of the channels to remove, in (0, 1)
    size: str | None = None  # of the model's files together, instead: "10MB" is 10,000,000 bytes
    exclude: tuple[str, ...] = ()  # patterns of names of nodes whose channels stay: "/layer1/*"
    multiple: int = 8  # what numbers of channels are a multiple of afterwards, where they are cut
    refit: bool = True  # with calibration data: fit what reads fewer channels to what it gave before
    samples: int = 256  # of calibration data (windows of 256 tokens, of text)
    positions: int = 16384  # at which the outputs of a convolution are looked at, over all samples

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.size is None):
            raise OptionError(
                f"{self.name()}: expected one of ratio and size, got {'none' if self.ratio is None else 'both'}",
                hint=f"write {self.name()}(ratio=0.3)",
            )
        self.check(self.ratio is None or 0 < self.ratio < 1, "ratio", "between 0 and 1", "0.3 removes 30 %")
        self.check(self.size is None or sizes.read(self.size) is not None, "size", "a size such as '10MB' or '1.2GiB'")
        for option in ("multiple", "samples", "positions"):
            self.check(getattr(self, option) >= 1, option, "at least 1")

    @classmethod
    def example(cls, model: ir.Model) -> PruneChannels:
        return cls(ratio=0.3, samples=2)

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        walked = walk(model, follow)
        groups = self._groups(walked, report)
        besides = float(sizes.bytes_besides(model, []))
        data = self._data(model, context, report)
        fits = data is not None and self.refit and data.has_judges
        if data is not None and self.refit and not fits:
            report.skip("refit", "there is one sample, and none is left to judge a fit by")
        self._check_ratio(groups)
        self._check_size(walked, groups, besides, fits=fits)
        if data is None:
            weigh(walked, groups)
        else:
            for group in groups:
                self._thin(group)
            groups = fitting.measure(model, walked, groups, data, context, report)
            if not groups:
                raise CalibrationError(
                    f"{self.name()}: what the model computes from the calibration data is not finite",
                    hint="give samples as the model reads them: scaled, no numbers missing",
                )
            self._check_size(walked, groups, besides, fits=fits)
        chosen = self._choose(walked, groups, besides, fits=fits)
        gone = _gone(groups, chosen)
        fitted: dict[tuple[int, int], npt.NDArray[np.floating]] = {}
        if data is not None and fits and gone.size:
            fitted = fitting.refit(model, walked, gone, data, context, report)
        cut_out(model, walked, gone, fitted)
        left = float(sizes.bytes_besides(model, []))
        self._check_met(left)
        errors = [report.metrics.get(name, 0.0) for name in ("output_error", "output_error_unfitted")]
        self._tell(groups, chosen, report, besides - left, fitted=errors[0] < errors[1])
        return report

    def _groups(self, walked: Walk, report: Report) -> list[Group]:
        """What may be cut, with its counts; the rest goes to the report."""
        found = find_groups(walked, report)
        names = [
            *(name for group in found for name in (group.name, *group.makers)),
            *(one.site for one in report.skipped),
        ]
        for pattern in self.exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise OptionError(
                    f"{self.name()}: exclude={pattern!r} matches no node that makes channels",
                    hint=f"they are called {', '.join(names[:3])}" if names else "this model has none",
                )
        kept = []
        for group in found:
            group.set_counts(self.multiple)
            if any(fnmatch.fnmatchcase(name, one) for name in (group.name, *group.makers) for one in self.exclude):
                report.skip(group.name, "excluded")
            elif len(group.counts) < 2:
                report.skip(group.name, f"has {group.total} channels, and keeps a multiple of {self.multiple}")
            else:
                kept.append(group)
        if not kept:
            reasons = sorted(report.reasons().items(), key=lambda item: -item[1])
            why = f": {reasons[0][0]}" if reasons else ": no convolution or product of a constant matrix"
            raise OptionError(
                f"{self.name()}: this model has no channels that can go{why}",
                hint="prune_ffn and prune_heads cut transformers; prune before quantizing",
            )
        return kept

    def _data(self, model: ir.Model, context: Context, report: Report) -> fitting.Data | None:
        """What the user gave to look at: arrays, or text where the model reads it."""
        if context.arrays:
            windows, report.calibration = context.arrays.windows(model.graph, self.samples)
            return fitting.Data(windows, self.positions)
        reads_text = any(value.name == "input_ids" for value in model.graph.inputs)
        if reads_text:
            report.notes.append("prune_ffn and prune_heads measure what a layer of a text model costs its predictions")
        if reads_text and context.calibration.is_text:
            ids_WS, report.calibration = context.calibration.windows(self.samples * _LENGTH, _LENGTH)
            return fitting.Data(feeds(model.graph, ids_WS), self.positions)
        missing = (
            "the model has no tokenizer.json" if reads_text else "give --calibration data.npz (an array per input)"
        )
        report.notes.append(f"by weights alone, and nothing makes up for what is gone: {missing}")
        return None

    def _check_ratio(self, groups: Sequence[Group]) -> None:
        """Refuses what cannot be before anything long begins."""
        reach = 1 - sum(group.counts[-1] for group in groups) / sum(group.total for group in groups)
        if reach < (self.ratio or 0):
            raise OptionError(
                f"{self.name()}: ratio={self.ratio} cannot be met: of channels that can go each group keeps "
                f"{self.multiple}, which removes {reach:.0%}",
                hint=f"the nearest is ratio={math.floor(reach * 1000) / 1000}; or a smaller multiple",
            )

    def _check_size(self, walked: Walk, groups: Sequence[Group], besides: float, *, fits: bool) -> None:
        """The same for a size."""
        if self.size is None:
            return
        asked = sizes.read(self.size) or 0
        if besides <= asked:
            raise OptionError(
                f"{self.name()}: size={self.size} is met as it is: the model takes {sizes.written(besides)}",
                hint="ask for less than that, or leave the pass out",
            )
        gone = np.concatenate([group.roots[group.counts[-1] :] for group in groups])
        nbytes = besides - bytes_saved(walked, gone, fits=fits)
        if nbytes > asked:
            raise OptionError(
                f"{self.name()}: size={self.size} cannot be met, with the fewest channels the model takes "
                f"{sizes.written(nbytes)}",
                hint=f"the nearest is size='{sizes.written(nbytes)}'; less needs a quantizer",
            )

    def _check_met(self, nbytes: float) -> None:
        """What was asked for holds of what was made, too."""
        if self.size is not None and nbytes > (sizes.read(self.size) or 0):
            raise OptionError(
                f"{self.name()}: size={self.size} is not met, the model takes {sizes.written(nbytes)} in the end",
                hint=f"the nearest is size='{sizes.written(nbytes)}'",
            )

    def _choose(self, walked: Walk, groups: Sequence[Group], besides: float, *, fits: bool) -> list[int]:
        """Which of its counts each group gets."""
        if self.size is None:
            chosen = [_nearest(group, self.ratio or 0.0) for group in groups]
            if not any(chosen):
                nearest = min((group.total - group.counts[1]) / 2 / group.total for group in groups)
                raise OptionError(
                    f"{self.name()}: ratio={self.ratio} removes nothing at multiples of {self.multiple}",
                    hint=f"the nearest is ratio={math.ceil(nearest * 1000 + 1) / 1000}; or a smaller multiple",
                )
            return chosen
        asked = sizes.read(self.size) or 0
        low, high = 0.0, 1.0
        best = [len(group.counts) - 1 for group in groups]
        for _ in range(20):
            middle = (low + high) / 2
            chosen = [_nearest(group, middle) for group in groups]
            if besides - bytes_saved(walked, _gone(groups, chosen), fits=fits) <= asked:
                high, best = middle, chosen
            else:
                low = middle
        return best

    def _thin(self, group: Group) -> None:
        """Leaves out counts that are not asked for: each costs time."""
        last = len(group.counts) - 1 if self.ratio is None else _nearest(group, self.ratio)
        step = max(1, -(-last // _STEPS))
        group.counts = [group.counts[index] for index in sorted({0, *range(last, 0, -step)})]

    def _tell(
        self, groups: Sequence[Group], chosen: Sequence[int], report: Report, saved: float, *, fitted: bool
    ) -> None:
        before = sum(group.total for group in groups)
        after = sum(group.counts[index] for group, index in zip(groups, chosen, strict=True))
        for group, index in zip(groups, chosen, strict=True):
            if index == 0:
                report.skip(group.name, f"stays whole: that is the nearest at multiples of {self.multiple}")
                continue
            facts = {"channels_before": group.total, "channels_after": group.counts[index], "loss": group.losses[index]}
            report.change(group.name, **facts, nodes=group.makers)
        report.metrics |= {"channels_before": before, "channels_after": after, "loss": _loss(groups, chosen)}
        what = f"{1 - after / before:.1%} of the channels of {len(groups)} groups and {sizes.written(saved)} removed"
        report.notes.insert(0, f"{what}, {'fitted' if fitted else 'not fitted'}")


def _nearest(group: Group, ratio: float) -> int:
    """The index of the count nearest to this share."""
    wanted = (1 - ratio) * group.total
    distances: list[float] = [abs(count - wanted) for count in group.counts]
    return distances.index(min(distances))


def _gone(groups: Sequence[Group], chosen: Sequence[int]) -> Labels:
    """Roots of all channels that go."""
    parts = [np.delete(group.roots, group.kept[index]) for group, index in zip(groups, chosen, strict=True)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _loss(groups: Sequence[Group], chosen: Sequence[int]) -> float:
    """Mean over groups of what their readers' outputs lose, relative."""
    return float(np.mean([group.losses[index] for group, index in zip(groups, chosen, strict=True)]))
