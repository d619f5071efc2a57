"""What taking something out of a model saves, found by building the smaller model and timing or weighing it.

Weights do not matter for either, so the first of everything stays.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler import sizes
from onnxpress.compiler.blocks import find_blocks
from onnxpress.compiler.errors import PreconditionError
from onnxpress.compiler.linears import find_linears, unique_name
from onnxpress.compiler.pass_ import Context, Report, Stopwatch
from onnxpress.passes.pruning._coded import FLOATS, to_floats
from onnxpress.passes.pruning._ffn import ffn_layers
from onnxpress.passes.pruning._layers import Structure, columns_of, put
from onnxpress.passes.pruning._parts import drop, edit_config, find_parts

_SHARES = (0.25, 0.5, 0.75)  # of the channels that are gone while their share of the time is measured


@dataclass(frozen=True)
class Plan:
    """What to take out.

    Attributes:
        gone: numbers of the sublayers that go.
        counts: channels that stay, by the name of a layer.
    """

    gone: tuple[int, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Variants:
    """A model, smaller ones like it, and how much of it they take.

    Attributes:
        model: not changed.
        context: of the pass.
        then: text of passes that will follow.
        multiple: what widths are a multiple of, as in `ffn_layers`.
        phase: what is timed; None: files are weighed.
        rounds: of timing.
    """

    model: ir.Model
    context: Context
    then: str
    multiple: int | None
    phase: str | None
    rounds: int
    _whole: Any = None

    def share(self, plan: Plan) -> tuple[float, float]:
        """Time, or bytes, of the smaller model over those of the whole one, and how wrong that may be."""
        if self._whole is None:
            self._whole = self._measured(Plan())
        other = self._measured(plan)
        if isinstance(other, float):
            return other / float(self._whole), 0.0
        return _ratio(self._whole, other, self.rounds)

    def nbytes(self) -> float:
        """Of the whole model's files; only where files are weighed."""
        if self._whole is None:
            self._whole = self._measured(Plan())
        return float(self._whole)

    def rest(self) -> None:
        """Lets go of the whole model where it is open, until it is needed again."""
        if self.phase is not None:
            self._whole = None

    def _measured(self, plan: Plan) -> Any:
        """Bytes, or an open model."""
        model, context = self._variant(plan)
        if self.phase is None:
            # What makes up for a gap gets a longer name.
            return float(sizes.bytes_besides(model, []) + 64 * len(plan.gone))
        if context.stopwatch is None:
            raise PreconditionError(
                "nothing here can run the model to time it", hint="give size=, or call onnxpress.optimize"
            )
        return context.stopwatch(model, context, self.phase)

    def _variant(self, plan: Plan) -> tuple[ir.Model, Context]:
        model = self.model.clone()
        context = dataclasses.replace(self.context, config=copy.deepcopy(self.context.config), history=[])
        for one in ffn_layers(find_linears(model), lambda _: lambda _: False, self.multiple, Report()):
            count = plan.counts.get(one.name, one.total)
            if count < one.total:
                _narrow(one, count)
        if plan.gone:
            parts, total = find_parts(model, sublayers=True), len(find_blocks(model))
            for index in sorted(plan.gone, reverse=True):
                drop(model, index, sublayers=True)
            edit_config(context.config, total, blocks_gone(parts, plan.gone), Report())
        if self.then:
            assert context.compose is not None
            context.compose(model, self.then, context)
        return model, context


def blocks_gone(parts: Sequence[Any], gone: Sequence[int]) -> list[int]:
    """Numbers of the blocks that configs no longer count once these parts are gone: those without attention."""
    attend = any(part.has_attention for part in parts)
    return sorted({parts[index].block for index in gone if parts[index].has_attention or not attend})


def _narrow(one: Structure, count: int) -> None:
    """Leaves the first structures; what the reader's weights are does not matter: they are made when they are read."""
    one.codes = to_floats(one.reader) if one.reader.holder not in FLOATS else None
    kept, rows = np.arange(count), one.reader.num_out
    columns = len(columns_of(one, kept))
    if one.codes is None:
        one.cut(kept, {})
        graph = one.reader.node.graph
        assert isinstance(graph, ir.Graph)
        name = unique_name(graph, f"{one.reader.name}.pruned")
        one.reader.set_weight(lambda: np.full((rows, columns), 0.01, np.float32), name, (rows, columns))
    else:
        put(one, kept, np.full((rows, columns), 0.01, np.float32), {})


def _ratio(whole: Stopwatch, other: Stopwatch, rounds: int) -> tuple[float, float]:
    """Seconds of `other` over those of `whole`, and the standard error.

    The median over rounds in which they take turns; its error by the median distance of rounds from it.
    """
    ratios = []
    for number in range(rounds + 1):
        turns = (whole, other) if number % 2 else (other, whole)
        seconds = {id(one): one.seconds() for one in turns}
        ratios.append(seconds[id(other)] / seconds[id(whole)])
    ratios = ratios[1:]  # the first warms up
    middle = statistics.median(ratios)
    # For normal noise 1.48 median distances are a standard deviation, and a median has 1.25 times the error of a mean.
    spread = 1.48 * statistics.median(abs(one - middle) for one in ratios)
    return middle, 1.25 * spread / math.sqrt(len(ratios))


@dataclass
class Savings:
    """Shares of the whole model's time or bytes.

    Attributes:
        attention, feed_forward: of one sublayer; NaN where none may go.
        channels: that a layer of the usual size saves when these `shares` of its channels are gone.
        error: the largest standard error of a smaller model's share of the whole.
        best: the most that any of the smaller models saved.
    """

    attention: float = np.nan
    feed_forward: float = np.nan
    shares: list[float] = field(default_factory=list)
    channels: list[float] = field(default_factory=list)
    error: float = 0.0
    best: float = 0.0

    def narrowed(self, shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """What a layer saves that loses these shares of its channels: a line through what was measured.

        Work is proportional to channels, while a single measurement is wrong by more than kernels are uneven; a table
        with an error in it would draw all layers to the same few sizes.
        """
        x, y = np.array(self.shares), np.array(self.channels)
        return shares * max(float(x @ y / (x @ x)), 0.0)

    def record(self) -> dict[str, npt.NDArray[Any]]:
        """For a journal."""
        return {name: np.array(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def of(cls, record: Mapping[str, npt.NDArray[Any]]) -> Savings:
        """What `record` gave."""
        return cls(**{name: array.tolist() for name, array in record.items()})


def measure(
    variants: Variants, attention: Sequence[int], feed_forward: Sequence[int], layers: Sequence[Structure]
) -> Savings:
    """Builds and measures a handful of smaller models.

    Args:
        variants: of the model.
        attention, feed_forward: numbers of the sublayers that may go.
        layers: that may be narrowed.
    """
    found = Savings()
    plans: list[tuple[str, Plan, float]] = []
    for kind, numbers in (("attention", attention), ("feed_forward", feed_forward)):
        if half := tuple(numbers[::2]):
            plans.append((kind, Plan(half), len(half)))
    for share in _SHARES if layers else ():
        counts = {one.name: one.nearest(share) for one in layers}
        gone = statistics.fmean(1 - counts[one.name] / one.total for one in layers)
        if gone > (found.shares or [0.0])[-1]:
            found.shares.append(gone)
            plans.append(("channels", Plan((), counts), len(layers)))
    what = "weights" if variants.phase is None else variants.phase
    for kind, plan, number in variants.context.track(plans, f"prune: what smaller models save of {what}"):
        share, error = variants.share(plan)
        saved = (1 - share) / number
        found.error, found.best = max(found.error, error), max(found.best, 1 - share)
        if kind == "channels":
            found.channels.append(saved)
        else:
            setattr(found, kind, max(saved, 0.0))
    return found
