"""Splits weights into two thin factors that keep what matters for the text that runs through a model.

Text is streamed twice. The first time nothing is changed: every matrix tells how much of its outputs each rank would
lose, and the divergence of the model's predictions is measured with this matrix alone cut down. A knapsack solver then
gives every matrix a rank, or leaves it whole, within one budget. The second time each matrix is fitted, in order, to
what is left of the activation once those before it are cut down.

Axes:    N out features, K in features, R rank
"""

from __future__ import annotations

import abc
import functools
import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from onnxpress.compiler import allocation, calibration, sizes, stats, whitening
from onnxpress.compiler import sensitivity as sensitivities
from onnxpress.compiler.allocation import Option, allocate, choose_within
from onnxpress.compiler.calibration import Calibration
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import OptionError, UnsupportedModelError
from onnxpress.compiler.linears import Linear, drop_unused, find_linears
from onnxpress.compiler.mapped import on_disk
from onnxpress.compiler.nbits import add_initializer
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.roles import KINDS
from onnxpress.compiler.sensitivity import Sensitivity, digest_of
from onnxpress.compiler.stats import Stats
from onnxpress.compiler.threads import workers
from onnxpress.compiler.whitening import Activation, Floats, output_directions
from onnxpress.passes.low_rank import _pairs, _pivots
from onnxpress.passes.low_rank._pairs import Form, break_even, matrices, put_pair, rank_step
from onnxpress.passes.low_rank._pivots import Layer, Place, find_layers, reorder

_RUINED = 1e6  # cost of a matrix without which the outputs are not finite
_PROBED = 0.25  # share of the parameters that are gone while the cost of a matrix is measured, unless a ratio says
_LEAST = 1e-6  # of the energy of a matrix
_PRICED_TOKENS = 4096  # of text that tell what ranks lose; fitting reads all that was asked for
_PER_PAIR = 400  # bytes that another node, two more weights and their names take in the graph at most
_PER_PIVOTED = 1000  # with the nodes that put pivots and what they make together


@dataclass
class _Site:
    """One matrix, what is known of it, and what became of it."""

    linears: list[Linear]
    energy: Floats = field(default_factory=lambda: np.zeros(0))
    cost: float = 0.0  # of the model, per unit of energy that is dropped
    rank: int | None = None  # None: stays whole
    expected: float = 0.0  # cost of that
    result: tuple[Floats, ...] = ()  # the factors, or the refitted matrix
    output_error: float = 0.0
    place: Place | None = None  # where it may have pivots, which its factors then need not store
    pivots: Form = ""  # where `result` has them

    @property
    def name(self) -> str:
        return self.linears[0].name

    @property
    def parameters(self) -> int:
        rows, columns = self.linears[0].shape
        return rows * columns

    @property
    def itemsize(self) -> int:
        tensor = self.linears[0].weight.const_value
        assert tensor is not None
        return tensor.nbytes // self.parameters

    def size(self, rank: int) -> int:
        """Parameters of two factors."""
        rows, columns = self.linears[0].shape
        return rank * (rows + columns - (rank if self.place else 0))

    def ranks(self) -> list[int]:
        """Ranks at which two factors are smaller than the matrix, from small to large."""
        rows, columns = self.linears[0].shape
        limit = min(rows, columns, self.place.limit) if self.place else break_even(rows, columns)
        steps = rank_step(limit)
        return [rank for rank in range(steps, math.ceil(limit), steps) if rank <= min(rows, columns)]

    def nearest(self, ratio: float) -> int | None:
        """The largest rank that removes this share of the parameters, None where there is none."""
        limit = (1 - ratio) * self.parameters * (1 + 1e-12)
        return max((rank for rank in self.ranks() if self.size(rank) <= limit), default=None)


@dataclass(frozen=True, kw_only=True)
class Whitened(Pass):
    """Base of passes that split matrices by what text shows of their activations."""

    promise: ClassVar[Promise] = Promise.LOSSY

    # Share of the parameters to remove, in (0, 1), of all matrices looked at; pairs that are there count as removed
    ratio: float | None = None
    size: str | None = None  # of the model's files together: "90MB" is 90,000,000 bytes
    # KL divergence (nats per token) that may be lost: an estimate, the sum of what each matrix costs alone
    kl: float | None = None
    allocation: Literal["kl", "energy", "uniform"] = "kl"  # ranks by loss of the model, of outputs, or one ratio
    kinds: tuple[str, ...] = ()  # roles to split: "q", "gate", "down", ...; () for all
    exclude: tuple[str, ...] = ()  # patterns of names that stay whole: "block0.*", "*.down"
    tokens: int = 16384  # of calibration text
    length: int = 1024  # tokens of a window
    probe: int = 512  # tokens on which costs are measured

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [option for option in ("ratio", "size", "kl") if getattr(self, option) is not None]
        if len(given) != 1:
            raise OptionError(
                f"{self.name()}: expected one of ratio, size and kl, got {' and '.join(given) or 'none'}",
                hint=f"write {self.name()}(ratio=0.2)",
            )
        self.check(self.ratio is None or 0 < self.ratio < 1, "ratio", "between 0 and 1", "0.2 removes 20 %")
        self.check(self.size is None or sizes.read(self.size) is not None, "size", "a size such as '90MB' or '1.2GiB'")
        self.check(self.kl is None or self.kl > 0, "kl", "positive", "0.1 is a mild loss")
        self.check(
            self.allocation != "uniform" or self.ratio is not None, "allocation", "'kl' or 'energy' without a ratio"
        )
        self.check(self.kl is None or self.allocation == "kl", "allocation", "'kl' where kl is given")
        self.check(set(self.kinds) <= set(KINDS), "kinds", f"among {', '.join(KINDS)}")
        for option, least in (("tokens", 1), ("length", 1), ("probe", 16)):
            self.check(getattr(self, option) >= least, option, f"at least {least}")

    @abc.abstractmethod
    def moments(self, stats: Stats) -> Floats:
        """H by which errors at the inputs of a matrix are weighed, float64 [K, K]."""

    def target(self, w_NK: Floats, stats: Stats) -> Floats:
        """What the matrix is to be like given the activation that the compressed model sees, [N, K]."""
        return w_NK

    @property
    def refits(self) -> bool:
        """Whether matrices that stay whole become their target too."""
        return False

    @property
    def pivoted(self) -> bool:
        """Whether factors leave out what their pivots make unnecessary, where the graph allows it."""
        return False

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        found, pairs = matrices(model, report, self.name(), kinds=self.kinds, exclude=self.exclude)
        sites = [_Site(linears) for linears in found]
        layers = find_layers(find_linears(model), model.opset_imports.get("", 0)) if self.pivoted else []
        places = {key: place for layer in layers for key, place in layer.places().items()}
        for site in sites:
            site.place = places.get(id(site.linears[0].output)) if len(site.linears) == 1 else None
        for site in [one for one in sites if not one.ranks()]:
            report.skip(site.name, "the matrix is too small")
            sites.remove(site)
        self._check_need(model, sites, pairs)
        if sites and self._is_met(sites, pairs):
            for site in sites:
                report.skip(site.name, f"stays whole: pairs that are there remove {self.ratio:.0%} of all parameters")
            sites = []
        if not sites:
            return report
        if any(site.linears[0].weight.dtype == ir.DataType.BFLOAT16 for site in sites):
            raise UnsupportedModelError(
                f"{self.name()}: text is streamed on the CPU, which has no kernels for bfloat16",
                hint="use --target cuda (float16)",
            )
        ids_WS, report.calibration = context.calibration.windows(self.tokens, self.length)
        windows = feeds(model.graph, ids_WS)
        if self.allocation == "uniform":
            for site in sites:
                site.rank = site.nearest(self.ratio or 0.0)
        else:
            sites = self._price(model, sites, windows, context, report)
            self._allocate(model, sites, pairs)
        if not pairs and sites and all(site.rank is None for site in sites):
            raise OptionError(
                f"{self.name()}: no matrix gets smaller with {str(self).partition('(')[2][:-1]}",
                hint="ask for less to remain; ranks are multiples of 8, of 32 in matrices that break even at 128",
            )
        sites = self._fit(model, sites, windows, context, report)
        is_kl = "KL divergence" in report.calibration.get("costs", "")
        moved = _pivot(layers, sites, context.work_dir)
        for site in sites:
            self._put(model.graph, site, report, is_kl=is_kl)
        self._sum_up(sites, report)
        if moved:
            report.notes.append(f"{moved} feed-forward layers have their features, in all matrices, in another order")
        if is_kl:
            report.metrics["expected_kl"] = sum(site.expected for site in sites)
        return report

    def _check_need(self, model: ir.Model, sites: list[_Site], pairs: list[Linear]) -> None:
        """Raises OptionError for a size that the model has without this pass, or cannot have, before text is read."""
        present = sizes.bytes_besides(model, [])
        asked = None if self.size is None else sizes.read(self.size)
        if asked is None or not sites:
            return
        least = present - sum((site.parameters - site.size(site.ranks()[0])) * site.itemsize for site in sites)
        if least > asked:
            nearest = f"size='{sizes.written(least + _names(sites))}'"
            raise OptionError(
                f"{self.name()}: size={self.size} cannot be met, all matrices at the smallest rank take {nearest}",
                hint=f"the nearest is {nearest}; less needs a quantizer, or drop_blocks",
            )
        if not pairs and present <= asked:
            raise OptionError(
                f"{self.name()}: size={self.size} is met as it is: the model takes {sizes.written(present)}",
                hint="ask for less than that, or leave the pass out",
            )

    def _removed(self, pairs: list[Linear]) -> int:
        """Parameters that are gone already."""
        return sum(
            one.num_out * one.num_in - sum(half.num_out * half.num_in for half in one.factors or ()) for one in pairs
        )

    def _is_met(self, sites: list[_Site], pairs: list[Linear]) -> bool:
        """Whether matrices that were split before make up for the ratio."""
        whole = sum(site.parameters for site in sites) + sum(one.num_out * one.num_in for one in pairs)
        return self.ratio is not None and bool(pairs) and self._removed(pairs) >= self.ratio * whole * (1 - 1e-3)

    def _price(
        self, model: ir.Model, sites: list[_Site], windows: list[dict[str, Any]], context: Context, report: Report
    ) -> list[_Site]:
        """Fills in energies and costs; sites of which the activation is not finite are left out, and said to be."""
        label = f"{self.name()}: what each matrix costs"
        wanted = [linear for site in sites for linear in site.linears]
        site_of = {id(linear): site for site in sites for linear in site.linears}
        sensitivity: Sensitivity | None = None
        probed = ""
        if self.allocation == "kl":
            sensitivity, _, facts = Sensitivity.on_text(model, context.calibration, self.probe, wanted)
            report.calibration.setdefault("costs", f"{sensitivity.measure} on {facts['text']}")
            probed = str(facts["sha256"])
            if self.kl is not None and sensitivity.measure != "KL divergence":
                raise OptionError(
                    f"{self.name()}: kl has no meaning for a model without logits", hint="give ratio= or size="
                )
        # A cost is told by the whole model, of which a stage's digest has what comes before it.
        state = digest_of(model) if sensitivity is not None else ""
        section = context.journal.section(
            self.name(), "costs", str(self), context.target.name, identity(type(self)), state, probed
        )
        seen: set[int] = set()
        few = windows[: max(1, _PRICED_TOKENS // windows[0]["input_ids"].size)]
        with Calibration(model, few, wanted, context.work_dir) as run:
            for number, stage in enumerate(context.track(run.stages, label)):
                digest = run.digest(stage)
                record = section.read(str(number), digest)
                group = run.observe(stage, with_stats=record is None)
                first = [one for one in group.linears if id(site_of[id(one)]) not in seen]
                seen |= {id(site_of[id(one)]) for one in first}
                if record is None:
                    record = self._costs([site_of[id(one)] for one in first], group.stats, sensitivity)
                    section.write(str(number), digest, record)
                for index, one in enumerate(first):
                    site = site_of[id(one)]
                    site.energy, site.cost = record[f"{index}.energy"], float(record[f"{index}.cost"])
        for site in sites:
            if not site.energy.size:
                report.skip(site.name, "its weights or its activation are not finite on the calibration text")
        return [site for site in sites if site.energy.size]

    def _costs(self, sites: list[_Site], stats: Stats, sensitivity: Sensitivity | None) -> dict[str, Floats]:
        record: dict[str, Floats] = {}
        hessian_KK = self.moments(stats)
        activation = Activation(hessian_KK)
        for index, site in enumerate(sites):
            w_NK = site.linears[0].w_NK()
            record[f"{index}.energy"], record[f"{index}.cost"] = np.zeros(0), np.zeros(())
            if not (np.isfinite(hessian_KK).all() and np.isfinite(w_NK).all()):
                continue
            found = output_directions(w_NK, activation)
            whole = float(found.energy.sum())
            cost = 1 / whole if whole > 0 else 0.0
            if sensitivity is not None and whole > 0:
                rank = site.nearest(self.ratio or _PROBED) or site.ranks()[0]
                first, second = found.factors(w_NK, rank)
                cut = site.linears[0].stored_form((first @ second).T.astype(np.float32))
                lost = sensitivity.distance({id(site.linears[0].weight): cut})
                dropped = found.dropped(rank)
                # Below this what is dropped is rounding, and so would be its price.
                cost = (lost if np.isfinite(lost) else _RUINED) / max(dropped, _LEAST * whole)
            record[f"{index}.energy"], record[f"{index}.cost"] = found.energy, np.array(cost)
        return record

    def _allocate(self, model: ir.Model, sites: list[_Site], pairs: list[Linear]) -> None:
        """Gives every site its rank."""
        ranks: list[list[int | None]] = [[*site.ranks(), None] for site in sites]
        options = [[_option(site, rank) for rank in choices] for site, choices in zip(sites, ranks, strict=True)]
        whole = sum(site.parameters * site.itemsize for site in sites)
        least = sum(some[0].nbytes for some in options)
        besides, budget = 0, float(whole)
        if self.size is not None:
            besides = sizes.bytes_besides(model, [site.linears[0].weight for site in sites])
            besides += _names(sites)
            budget = (sizes.read(self.size) or 0) - besides
        elif self.kl is None:
            itemsize = sites[0].itemsize if sites else 0
            asked = (self.ratio or 0.0) * (whole + sum(one.num_out * one.num_in for one in pairs) * itemsize)
            budget = whole - asked + self._removed(pairs) * itemsize
        chosen = allocate(options, budget) if self.kl is None else choose_within(options, self.kl, self.name())
        if chosen is None:
            split = sum(one.num_out * one.num_in for one in pairs) * (sites[0].itemsize if sites else 0)
            gone = whole - least + self._removed(pairs) * (sites[0].itemsize if sites else 0)
            nearest = f"ratio={math.floor(1e4 * gone / (whole + split)) / 1e4}"
            if self.size is not None:
                nearest = f"size='{sizes.written(least + besides)}'"
            raise OptionError(
                f"{self.name()}: {'size' if self.size else 'ratio'}={self.size or self.ratio} cannot be met, all "
                f"matrices at the smallest rank take {nearest}",
                hint=f"the nearest is {nearest}; less needs a quantizer, or drop_blocks",
            )
        for site, choices, some, index in zip(sites, ranks, options, chosen, strict=True):
            site.rank, site.expected = choices[index], some[index].cost

    def _fit(
        self, model: ir.Model, sites: list[_Site], windows: list[dict[str, Any]], context: Context, report: Report
    ) -> list[_Site]:
        """Fills in the results; sites of which the activation is not finite are left out, and said to be."""
        site_of = {id(linear): site for site in sites for linear in site.linears}
        wanted = [linear for site in sites for linear in site.linears]
        plan = repr([(site.name, site.rank) for site in sites])
        section = context.journal.section(self.name(), str(self), plan, context.target.name, identity(type(self)))
        resumed = 0
        with Calibration(model, windows, wanted, context.work_dir) as run:
            for number, stage in enumerate(context.track(run.stages, self.name())):
                digest = run.digest(stage)
                record = section.read(str(number), digest)
                resumed += record is not None
                # Where layers share a weight, the first of them decides.
                open_sites = [(one, site_of[id(one)]) for one in stage.linears if not site_of[id(one)].result]
                decided = [(one, site_of[id(one)]) for one in stage.linears if site_of[id(one)].result]
                is_needed = any(site.rank is not None or self.refits for _, site in open_sites)
                group = run.observe(stage, with_stats=record is None and is_needed)
                if record is None:
                    record = self._fitted(open_sites, group.stats) if is_needed else {}
                    section.write(str(number), digest, record)
                for linear, site in decided:
                    group.replace(linear, _dense(site.result))
                for index, (linear, site) in enumerate(open_sites):
                    result = [record[key] for key in (f"{index}.0", f"{index}.1") if key in record]
                    if result:
                        site.output_error = float(record[f"{index}.error"])
                        group.replace(linear, _dense(result))
                        site.result = tuple(on_disk(one, context.work_dir) for one in result)
        if resumed:
            report.notes.append(f"an earlier run was stopped: {resumed} of {len(run.stages)} groups are its results")
        for site in sites:
            if site.rank is not None and not site.result:
                report.skip(site.name, "its weights or its activation are not finite on the calibration text")
        return [site for site in sites if site.rank is None or site.result]

    def _fitted(self, open_sites: Sequence[tuple[Linear, _Site]], stats: Stats) -> dict[str, Floats]:
        """Factors, or a refitted matrix, of each site, and its error; nothing of what is not finite or stays."""
        record: dict[str, Floats] = {}
        hessian_KK = self.moments(stats)
        activation = Activation(hessian_KK)
        for index, (linear, site) in enumerate(open_sites):
            if site.rank is None and not (self.refits and stats.drift_KK is not None):
                continue
            w_NK = linear.w_NK()
            target_NK = self.target(w_NK, stats)
            if not (np.isfinite(hessian_KK).all() and np.isfinite(target_NK).all()):
                continue
            dtype = linear.weight.dtype
            assert dtype is not None
            if site.rank is None:
                record[f"{index}.0"] = np.ascontiguousarray(target_NK.T, dtype.numpy())
                record[f"{index}.error"] = np.zeros(())
                continue
            found = output_directions(target_NK, activation)
            pair = found.factors(target_NK, site.rank)
            record[f"{index}.0"], record[f"{index}.1"] = (np.ascontiguousarray(one, dtype.numpy()) for one in pair)
            whole = float(found.energy.sum())
            record[f"{index}.error"] = np.array(math.sqrt(found.dropped(site.rank) / whole) if whole > 0 else 0.0)
        return record

    def _put(self, graph: ir.Graph, site: _Site, report: Report, *, is_kl: bool) -> None:
        linear, result = site.linears[0], site.result
        rows, columns = linear.shape
        facts: dict[str, Any] = {"kind": linear.kind, "shape": [rows, columns], "parameters_before": rows * columns}
        if len(result) == 2:
            report.change(
                site.name,
                **facts,
                rank=site.rank,
                parameters_after=sum(one.size for one in result),
                output_error=site.output_error,
                **({"pivots": site.pivots} if site.pivots else {}),
                **({"expected_kl": site.expected} if is_kl else {}),
            )
            put_pair(graph, site.linears, *result, site.pivots)
        elif result:
            report.change(site.name, **facts, parameters_after=rows * columns)
            new = add_initializer(graph, f"{site.name}.refitted", result[0].T if not linear.is_turned() else result[0])
            for one in site.linears:
                old, node = one.weight, one.node
                if one.holder == "Transpose+MatMul":
                    turned = node.inputs[1].producer()  # type: ignore[union-attr]
                    assert turned is not None
                    node = turned
                for index, value in enumerate(node.inputs):
                    if value is old:
                        node.replace_input_with(index, new)
                one.weight = new
                drop_unused(graph, old)
        else:
            report.skip(site.name, "stays whole: no rank below its break-even is worth what it costs")

    def _sum_up(self, sites: list[_Site], report: Report) -> None:
        split = [row for row in report.ledger if "rank" in row]
        before = sum(site.parameters for site in sites)
        after = before + sum(row["parameters_after"] - row["parameters_before"] for row in split)
        report.metrics |= {"parameters_before": before, "parameters_after": after}
        if split:
            squares = [row["output_error"] ** 2 for row in split]
            report.metrics["output_error"] = math.sqrt(sum(squares) / len(squares))
        kinds: dict[str, list[str]] = {}
        for site in sites:
            kinds.setdefault(site.linears[0].kind, []).append("whole" if site.rank is None else str(site.rank))
        removed = f"{1 - after / before:.1%} of their parameters removed"
        refitted = len(report.ledger) - len(split)
        more = f" ({refitted} that stay whole make up for them)" if refitted else ""
        report.notes += [
            f"{len(split)} of {len(sites)} matrices split, {removed}{more}; ranks:",
            *(f"  {kind}: {' '.join(ranks)}" for kind, ranks in kinds.items()),
        ]


def identity(kind: type[Pass]) -> str:
    """Of everything that may change a last bit: results of another state are not resumed."""
    modules = (allocation, calibration, sensitivities, stats, whitening, _pairs, _pivots, sys.modules[kind.__module__])
    sources = [__file__, *(one.__file__ for one in modules)]
    digest = hashlib.sha256(b"".join(Path(one).read_bytes() for one in sources if one is not None))
    return f"{digest.hexdigest()} onnxruntime {ort.__version__} numpy {np.__version__} {workers()} threads"


def _pivot(layers: Sequence[Layer], sites: Sequence[_Site], folder: Path | None) -> int:
    """Lets the factors of these layers leave out what their pivots make unnecessary; tells how many layers have any."""
    site_of = {id(site.linears[0].output): site for site in sites}
    moved = 0
    for layer in layers:
        results = {key: site_of[key].result for key in layer.keys if key in site_of}
        reordered = reorder(layer, results, lambda array: on_disk(array, folder))
        moved += bool(reordered)
        for key, (result, form) in reordered.items():
            site = site_of[key]
            site.result, site.pivots = result, form
    return moved


def _names(sites: Sequence[_Site]) -> int:
    """Bytes that nodes and names of pairs take in the graph at most."""
    return sum(len(site.linears) * (_PER_PIVOTED if site.place else _PER_PAIR) for site in sites)


def _option(site: _Site, rank: int | None) -> Option:
    if rank is None:
        return Option(0.0, site.parameters * site.itemsize)
    return Option(site.cost * float(site.energy[rank:].sum()), site.size(rank) * site.itemsize)


def _dense(result: Sequence[Floats]) -> Floats:
    """The matrix that a result stands for, float32 [N, K]; numpy has no quick product of float16."""
    whole: Floats = functools.reduce(np.matmul, [np.asarray(one, np.float32) for one in result])
    return whole.T
