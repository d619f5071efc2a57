"""Chooses what to take out for a speed, a size or a loss: attention, feed-forward sublayers, channels of each layer.

What each of them costs is measured on text, one at a time; what each saves is measured on the target, on smaller
models that are built for it. One solver then takes what saves most for what it costs, and the smaller model is timed;
where the sum of the parts was wrong, the choice is made again.

Paper:   arXiv:2302.04089 (ZipLM: losses of sizes, a latency table of the target, one solver)
Differs: depth is an option of the same solver; what saves is timed in whole models, next to the one it came from
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn

import numpy as np
import onnx_ir as ir

from onnxpress.compiler import sizes
from onnxpress.compiler.allocation import Option, allocate, choose_within
from onnxpress.compiler.blocks import find_blocks
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import OptionError, PreconditionError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report, weight_bytes
from onnxpress.compiler.sensitivity import Sensitivity, digest_of
from onnxpress.passes.pruning import _network, _parts, _savings
from onnxpress.passes.pruning._ffn import ffn_layers
from onnxpress.passes.pruning._layers import PROBED, Structure, identity, prepared, price
from onnxpress.passes.pruning._network import Network
from onnxpress.passes.pruning._parts import Part, find_parts, may_go
from onnxpress.passes.pruning._savings import Plan, Savings, Variants, measure

_KINDS = ("attention", "channels", "feed_forward")
_FINE = 1e9  # of the whole, in the solver's whole numbers
_RUINED = 1e6  # cost of a sublayer without which the outputs are not finite
_TRIES = 4  # choices that are timed or weighed
_SURE = 2  # standard errors that a saving must be above
_BELOW, _ABOVE = 0.98, 1.06  # of the speed asked for, which is as good as met: timing is no more exact


@dataclass(frozen=True)
class _Choice:
    """One sublayer: what may become of it, at what cost, and what that saves.

    Attributes:
        part: its number, None where it may not go.
        layer: what may be narrowed of it.
        options: (cost, share of the whole that is saved, channels that stay: None all, 0 it goes).
    """

    part: int | None
    layer: Structure | None
    options: list[tuple[float, float, int | None]]

    @property
    def most(self) -> float:
        return max(saved for _, saved, _ in self.options)

    def sized(self) -> list[Option]:
        return [Option(cost, round(_FINE * (self.most - saved))) for cost, saved, _ in self.options]


@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """Makes a decoder faster, or smaller, by what costs its predictions least; give one of speedup, size and kl.

    It times models, so run it where the result will run and where nothing else does. The first two blocks and the last
    one are only narrowed.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    paper: ClassVar[str] = "arXiv:2302.04089"

    speedup: float | None = None  # of `phase`, over the model as it comes: 1.3
    size: str | None = None  # of the model's files together: "90MB" is 90,000,000 bytes
    kl: float | None = None  # KL divergence (nats per token) that may be lost, by the sum of what each part costs alone
    phase: Literal["decode", "prefill"] = "decode"  # what is to be fast, and is as fast as can be with kl
    then: str = ""  # passes that will follow, or quick ones that store as they do: times and sizes are those after them
    take: tuple[str, ...] = _KINDS  # what may be taken: whole sublayers of attention or feed_forward, and channels
    exclude: tuple[str, ...] = ()  # patterns of names that stay whole: "block0.*", "*.attention"
    multiple: int | None = None  # what widths are a multiple of; None: 64, or 8 in layers below 512
    compensate: bool = True  # fit the projections before what is gone
    tokens: int = 16384  # of calibration text
    length: int = 1024  # tokens of a window
    probe: int = 512  # tokens on which costs are measured
    rounds: int = 7  # of timing, for each smaller model

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [option for option in ("speedup", "size", "kl") if getattr(self, option) is not None]
        if len(given) != 1:
            raise OptionError(
                f"prune: expected one of speedup, size and kl, got {' and '.join(given) or 'none'}",
                hint="write prune(speedup=1.3)",
            )
        self.check(self.speedup is None or self.speedup > 1, "speedup", "above 1", "1.3 is 30 % more tokens a second")
        self.check(self.size is None or sizes.read(self.size) is not None, "size", "a size such as '90MB' or '1.2GiB'")
        self.check(self.kl is None or self.kl > 0, "kl", "positive", "0.1 is a mild loss")
        known = bool(self.take) and set(self.take) <= set(_KINDS)
        self.check(known, "take", f"some of {', '.join(_KINDS)}", "write take=('channels',)")
        self.check(self.multiple is None or self.multiple >= 1, "multiple", "at least 1")
        for option, least in (("tokens", 1), ("length", 1), ("probe", 16), ("rounds", 1)):
            self.check(getattr(self, option) >= least, option, f"at least {least}")
        if self.size is not None and (self.phase, self.rounds) != ("decode", Prune.rounds):
            raise OptionError("prune: phase and rounds have no effect with size", hint="a size is weighed, not timed")

    @classmethod
    def example(cls, model: ir.Model) -> Prune:
        return cls(size=f"{0.98 * weight_bytes(model):.0f}", tokens=64, length=32, probe=16)

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        if context.compose is None:
            raise PreconditionError("prune: it consists of other passes", hint="run it in a pipeline")
        parts = find_parts(model, sublayers=True)
        layers = self._layers(model, parts, report)
        free = self._free(model, parts, report)
        if not free and not layers:
            raise OptionError(
                "prune: found no sublayers or layers of a transformer that may go"
                + (f" ({report.skipped[0].site}: {report.skipped[0].reason})" if report.skipped else ""),
                hint="convolutional networks are narrowed by prune_channels",
            )
        phase = self.phase if self.size is None else None
        variants = Variants(model, context, self.then, self.multiple, phase, self.rounds)
        needed = self._needed(variants)
        attention = [index for index in free if parts[index].has_attention]
        others = [index for index in free if not parts[index].has_attention]
        key = f"{digest_of(model)} {identity(type(self), _network, _parts, _savings)}"
        section = context.journal.section(self.name(), str(self), context.target.name)
        # A run that goes on after it was stopped goes on with the same choice.
        record = section.read("savings", key)
        if record is None:
            record = measure(variants, attention, others, list(layers.values())).record()
            section.write("savings", key, record)
        savings = Savings.of(record)
        # Before text is read: what cannot be is refused at once.
        self._check_reach(self._choices(parts, free, layers, savings, {}), needed, variants, savings)
        variants.rest()
        costs = self._part_costs(model, free, key, context, report) if free else {}
        layers = self._priced(model, layers, savings, needed, context, report) if layers else {}
        choices = self._choices(parts, free, layers, savings, costs)
        plan, share = self._chosen(choices, needed, variants, report)
        variants.rest()
        self._apply(model, plan, parts, context, report)
        self._sum_up(report, variants, savings, share)
        return report

    # ---- what there is to take

    def _excluded(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)

    def _layers(self, model: ir.Model, parts: Sequence[Part], report: Report) -> dict[int, Structure]:
        """Layers that may be narrowed, by the number of their part; -1, -2, ... for those outside of any."""
        linears = find_linears(model)
        told = Report()
        found = ffn_layers(linears, lambda _: self._excluded, self.multiple, told)
        names = [part.name for part in parts] + [one.name for one in found] + [skip.site for skip in told.skipped]
        for pattern in self.exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                hint = f"they are called {', '.join(names[:3])}" if names else "this model has none"
                raise OptionError(f"prune: exclude={pattern!r} matches no layer or sublayer", hint=hint)
        if "channels" not in self.take:
            return {}
        report.skipped += told.skipped
        of_output = {
            str(value.name): index for index, part in enumerate(parts) for node in part.nodes for value in node.outputs
        }
        return {of_output.get(str(one.reader.output.name), -1 - n): one for n, one in enumerate(found)}

    def _free(self, model: ir.Model, parts: Sequence[Part], report: Report) -> list[int]:
        """Numbers of the sublayers that may go."""
        free, reasons = may_go(parts, len(find_blocks(model)))
        found = []
        for index, part in enumerate(parts):
            if ("attention" if part.has_attention else "feed_forward") not in self.take:
                continue
            if index in free and not self._excluded(part.name):
                found.append(index)
            else:
                report.skip(part.name, f"stays: {reasons.get(part.name, 'excluded')}")
        return found

    def _part_costs(
        self, model: ir.Model, free: Sequence[int], key: str, context: Context, report: Report
    ) -> dict[int, float]:
        """What the model's predictions lose without each sublayer."""
        network = Network(model, sublayers=True)
        if context.arrays:
            (window, *_), report.calibration = context.arrays.windows(network.model.graph, 1)
        else:
            ids_WS, report.calibration = context.calibration.windows(self.probe, self.probe)
            window = feeds(network.model.graph, ids_WS[:1])[0]
        sensitivity = Sensitivity(network.model, window, [], ends=network.ends)
        digest = f"{key} {report.calibration['sha256']}"
        section = context.journal.section(self.name(), "sublayers", str(self.probe), context.target.name)
        costs = {}
        for index in context.track(free, "prune: what each sublayer costs"):
            record = section.read(str(index), digest)
            if record is None:
                found = sensitivity.distance({}, network.bypasses([index]))
                record = {"cost": np.array(found if math.isfinite(found) else _RUINED)}
                section.write(str(index), digest, record)
            costs[index] = float(record["cost"])
        return costs

    def _priced(
        self,
        model: ir.Model,
        layers: dict[int, Structure],
        savings: Savings,
        needed: float,
        context: Context,
        report: Report,
    ) -> dict[int, Structure]:
        """The layers of a copy, with what their sizes cost; those that cannot be fitted are left out."""
        copy = model.clone()
        names = {one.name: index for index, one in layers.items()}
        found = ffn_layers(find_linears(copy), lambda _: lambda name: name not in names, self.multiple, Report())
        windows = prepared(copy, found, context, report, self.tokens, self.length)
        # A cost is probed near the share that layers will lose, if channels alone are taken.
        most = len(found) * float(savings.narrowed(np.ones(1))[0])
        cut = min(0.5, max(0.1, needed / most)) if needed and most > 0 else PROBED
        found = price(self, copy, found, windows, context, report, cut=cut, probe=self.probe)
        return {names[one.name]: one for one in found}

    # ---- what to take

    def _choices(
        self,
        parts: Sequence[Part],
        free: Sequence[int],
        layers: dict[int, Structure],
        savings: Savings,
        costs: dict[int, float],
    ) -> list[_Choice]:
        usual = np.mean([one.total * one.nbytes for one in layers.values()]) if layers else 1.0
        choices = []
        for index in sorted({*free, *layers}):
            layer = layers.get(index)
            options: list[tuple[float, float, int | None]] = [(0.0, 0.0, None)]
            if layer is not None:
                shares = np.array([1 - count / layer.total for count in layer.counts])
                saved = savings.narrowed(shares) * (layer.total * layer.nbytes / usual)
                losses = layer.losses if layer.losses.size else np.zeros(len(shares))
                rows = zip(layer.cost * losses, saved, layer.counts, strict=True)
                options += [(float(cost), float(gain), count) for cost, gain, count in rows if count < layer.total]
            if index in free:
                gain = savings.attention if parts[index].has_attention else savings.feed_forward
                options.append((costs.get(index, 0.0), gain, 0))
            choices.append(_Choice(index if index in free else None, layer, options))
        return choices

    def _needed(self, variants: Variants) -> float:
        """The share of the whole that must be saved; 0 where the loss is given."""
        if self.speedup is not None:
            return 1 - 1 / self.speedup
        if self.size is None:
            return 0.0
        asked, present = sizes.read(self.size) or 0, variants.nbytes()
        if present <= asked:
            raise OptionError(
                f"prune: size={self.size} is met as it is: the model takes {sizes.written(present)}",
                hint="ask for less than that, or leave the pass out",
            )
        return 1 - asked / present

    def _check_reach(self, choices: Sequence[_Choice], needed: float, variants: Variants, savings: Savings) -> None:
        most = sum(choice.most for choice in choices)
        if savings.best <= _SURE * savings.error or most <= 0:
            raise OptionError(
                f"prune: nothing that may be taken is seen to save time: at most {savings.best:.1%} of the time to "
                f"{self.phase} in a smaller model, and timing is wrong by {savings.error:.1%}",
                hint="try a quieter machine, more rounds, or give size=",
            )
        if most < needed:
            self._refuse(variants, 1 - most, "with all that may be taken the model comes to")

    def _refuse(self, variants: Variants, share: float, what: str) -> NoReturn:
        """Raises that the aim is missed, with the nearest to it; `share` is left of the whole."""
        if self.size is not None:
            asked, nearest = f"size={self.size}", f"size='{sizes.written(variants.nbytes() * share)}'"
        else:
            asked, nearest = f"speedup={self.speedup}", f"speedup={max(math.floor(100 / share), 101) / 100}"
        raise OptionError(
            f"prune: {asked} cannot be met: {what} {nearest}",
            hint=f"the nearest is {nearest}; a quantizer goes further (then='rtn(bits=4)' counts it in)",
        )

    def _solve(self, choices: Sequence[_Choice], needed: float) -> list[int]:
        sized = [choice.sized() for choice in choices]
        if self.kl is not None:
            return choose_within(sized, self.kl, self.name())
        budget = _FINE * (sum(choice.most for choice in choices) - needed)
        # A share that all together just save is out of reach by less than rounding.
        found = allocate(sized, max(budget, sum(min(one.nbytes for one in options) for options in sized)))
        assert found is not None
        return found

    def _chosen(
        self, choices: Sequence[_Choice], needed: float, variants: Variants, report: Report
    ) -> tuple[Plan, float]:
        """What to take out, and the share of time or bytes that is left; made again where the sum misjudges it."""
        most = sum(choice.most for choice in choices)
        target, found = needed, []
        for _ in variants.context.track(range(_TRIES if self.kl is None else 1), "prune: what the choice saves"):
            chosen = self._solve(choices, min(target, most))
            plan = _plan(choices, chosen)
            share, _ = variants.share(plan)
            cost = sum(choice.options[index][0] for choice, index in zip(choices, chosen, strict=True))
            # Where the aim is met, what costs least is best; where not, what comes nearest.
            reached = (1 - needed) / share
            met = reached >= (1.0 if self.size is not None else _BELOW)
            found.append(((not met, cost if met else share), plan, share, cost))
            saved = 1 - share
            if self.kl is not None or (met and reached <= _ABOVE) or (not met and target >= most) or saved <= 0:
                break
            sum_of_parts = sum(choice.options[index][1] for choice, index in zip(choices, chosen, strict=True))
            target = sum_of_parts * max(min(needed / saved, 1.5), 0.67) + 1e-6
        (missed, _), plan, share, cost = min(found, key=lambda one: one[0])
        if missed and self.kl is None:
            self._refuse(variants, share, "the nearest that was found comes to")
        report.metrics["expected_kl"] = cost
        return plan, share

    # ---- taking it

    def _apply(self, model: ir.Model, plan: Plan, parts: Sequence[Part], context: Context, report: Report) -> None:
        before = _block_parameters(model)
        removed = {value.name for index in plan.gone for node in parts[index].nodes for value in node.outputs}
        names = [one.name for one in _all_layers(model, self.multiple) if one.reader.output.name not in removed]
        text, asked = f"tokens={self.tokens}, length={self.length}", []
        if plan.gone:
            asked.append(f"drop_blocks(indices={plan.gone!r}, parts='sublayers', compensate={self.compensate}, {text})")
            self._run(model, asked[-1], context, report)
        if plan.counts:
            # Blocks have new numbers now; layers are still in the same order.
            left = zip(names, _all_layers(model, self.multiple), strict=True)
            counts = tuple(plan.counts.get(name, one.total) for name, one in left)
            option = "" if self.multiple is None else f"multiple={self.multiple}, "
            asked.append(f"prune_ffn(counts={counts!r}, {option}{text})")
            self._run(model, asked[-1], context, report)
        report.notes.insert(0, f"the same as {', '.join(asked)}")
        after = _block_parameters(model)
        report.metrics |= {
            "parameters_before": before,
            "parameters_after": after,
            "parameters_removed": 1 - after / before if before else 0.0,
        }

    def _run(self, model: ir.Model, text: str, context: Context, report: Report) -> None:
        """Runs another pass as a part of this one."""
        assert context.compose is not None
        for done in context.compose(model, text, context):
            known = {skip.site for skip in report.skipped}
            report.changed += [site for site in done.changed if site not in report.changed]
            report.skipped += [skip for skip in done.skipped if skip.site not in known]
            report.ledger += done.ledger
            report.notes += done.notes
            report.calibration |= done.calibration
            report.metrics |= {key: value for key, value in done.metrics.items() if key not in report.metrics}

    def _sum_up(self, report: Report, variants: Variants, savings: Savings, share: float) -> None:
        if self.size is not None:
            report.metrics["files_bytes"] = variants.nbytes() * share
        else:
            report.metrics[f"{self.phase}_speedup"] = 1 / share
        of = "the files" if self.size is not None else f"the time to {self.phase}"
        after = f" after {self.then}" if self.then else ""
        said = [
            f"{name} {value:.2%}"
            for name, value in (("an attention", savings.attention), ("a feed-forward sublayer", savings.feed_forward))
            if not math.isnan(value)
        ]
        rows = zip(savings.shares, savings.channels, strict=True)
        said += [f"{gone:.0%} of a layer's channels {value:.2%}" for gone, value in rows]
        if self.size is None:
            of += f", which is known to {savings.error:.1%}"
        report.notes.insert(1, f"saves of {of}{after}: {', '.join(said)}; together it came to {1 - share:.1%}")


def _all_layers(model: ir.Model, multiple: int | None) -> list[Structure]:
    return ffn_layers(find_linears(model), lambda _: lambda _: False, multiple, Report())


def _plan(choices: Sequence[_Choice], chosen: Sequence[int]) -> Plan:
    gone, counts = [], {}
    for choice, index in zip(choices, chosen, strict=True):
        count = choice.options[index][2]
        if count == 0 and choice.part is not None:
            gone.append(choice.part)
        elif count is not None and choice.layer is not None:
            counts[choice.layer.name] = count
    return Plan(tuple(sorted(gone)), counts)


def _block_parameters(model: ir.Model) -> int:
    """Of all matrices in blocks."""
    return sum(one.num_in * one.num_out for one in find_linears(model) if one.block is not None)
