"""Rounds weights as gptq does, and adds a product of two thin matrices that makes up for the largest part of the error.

The two are fitted in turn: the product to what rounding has left, weighed by the second moments of the activation, then
the codes to what the product leaves of the weights. The thin matrices are stored in 8 bits. They cost bytes and three
more operators for each linear, so `size` gives them only to those of which the model gains most per byte. A matrix that
gains nothing over codes alone stays without.

As an adapter (`form`) the product is no part of the graph: the codes are those of gptq, the thin matrices are floats in
a file of their own, and inputs of the graph take them, which are empty by default.

Paper:   arXiv:2410.06040 (QERA, theorem 1), arXiv:2402.02446 (LQER), arXiv:2405.18886 (CALDERA: taking turns)
Differs: codes come from gptq with teacher's targets; the product is the best one for the outputs (see `whitening`);
         its second matrix is fitted once more to the first as it was rounded.
Axes:    N out features, K in features, R rank
"""

from __future__ import annotations

import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from onnxpress.compiler import sizes, whitening
from onnxpress.compiler.allocation import Option, allocate
from onnxpress.compiler.calibration import Calibration, Group
from onnxpress.compiler.errors import OptionError, StreamingError, UnsupportedModelError
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.lora_graph import add_slots, find_slots, note_slots, whole
from onnxpress.compiler.lora_slots import write_adapter
from onnxpress.compiler.nbits import CodedMatrix
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.sensitivity import Sensitivity
from onnxpress.compiler.stats import Stats
from onnxpress.compiler.whitening import Activation, output_directions
from onnxpress.passes.quantization import _least_squares as least_squares
from onnxpress.passes.quantization._calibrated import Calibrated, coded_steps, identity, is_finite, solve
from onnxpress.passes.quantization._rounding import Floats, round_matrix
from onnxpress.passes.quantization._weight_only import (
    FLOATS,
    Coded,
    Site,
    calibration_windows,
)

_PRICED_TOKENS = 4096  # of text that tell which matrices gain
_STEP = 16  # between ranks that are chosen from
_ROWS = 96  # of a matrix that tell whether codes alone would do as well
_PER_SIDE = 1100  # bytes that three more nodes and four more weights take in the graph at most, besides names
_RUINED = 1e6  # cost of a matrix without which the outputs are not finite
FILE = "repair.onnx_adapter"


class _Product(NamedTuple):
    """A [K, R] and B [R, N] of an adapter, in the type of the activation, and ||(Q + A B - W) X|| / ||W X||."""

    first_KR: Floats
    second_RN: Floats
    error: float


@dataclass(frozen=True, kw_only=True)
class Compensate(Calibrated):
    """Rounds weights with the help of calibration text, and repairs them by products of low rank.

    Embedding and head, and matrices of no more than twice the rank, get codes alone. Options as in every weight-only
    pass.
    """

    paper: ClassVar[str] = "arXiv:2410.06040"

    rank: int = 32  # of the product, a multiple of 16; with `size` the largest
    turns: int = 4  # how often codes are fitted to what the product leaves; only the last time costs what gptq does
    weigh: Literal["exact", "diagonal", "none"] = "exact"  # error by all moments (QERA), by sizes (LQER), by none (SVD)
    size: str | None = None  # bytes of all products together, "2MB": ranks go where the model gains most per byte
    probe: int = 512  # tokens on which it is measured what a matrix costs the model
    # Products in 8 bits as part of the graph; or codes of gptq, and an adapter file, repair.onnx_adapter, with products
    # in floats for inputs that the graph takes, so that the model runs with or without them.
    form: Literal["graph", "adapter"] = "graph"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rank >= 16 and self.rank % 16 == 0, "rank", "a multiple of 16", "32 suits most models")
        self.check(self.turns >= 1, "turns", "at least 1", "4 suits most models")
        self.check(self.size is None or sizes.read(self.size) is not None, "size", "a size such as '2MB'")
        self.check(self.probe >= 16, "probe", "at least 16", "512 suits most models")
        if self.form == "adapter" and self.turns != type(self).turns:
            raise OptionError(
                f"{self.name()}: turns={self.turns} has no effect with form='adapter', whose codes are those of gptq",
                hint="leave it out, or use form='graph'",
            )

    @classmethod
    def example(cls, model: ir.Model) -> Compensate:
        return cls(block_size=16, rank=16, tokens=32, length=16)

    def code(
        self, model: ir.Model, sites: list[Site], linears: list[Linear], context: Context, report: Report
    ) -> Iterator[tuple[Site, Coded]]:
        able = [site for site in sites if self._ranks(site)]
        if able and self.form == "adapter":
            _refuse_slots(model)
        for site in able:
            site.rank = self.rank
        if self.size is not None and able:
            try:
                self._choose(model, able, context, report)
            except (StreamingError, UnsupportedModelError):
                if not self.fallback:
                    raise
                for site in able:  # what is rounded to the nearest instead has none, and is noted below
                    site.rank = 0
        in_vain = []
        found = super().code(model, sites, linears, context, report)
        if able and self.form == "adapter":
            found = self._with_adapter(model, linears, [*found], context, report)
        for site, coded in found:
            if site.rank and "rank" not in coded.facts:
                in_vain.append(site.name)
            yield site, coded
        if not able:
            report.notes.append(f"no float matrix is large enough to be repaired by a product of rank {self.rank}")
        if in_vain:
            report.notes.append(f"{len(in_vain)} matrices gain nothing by a product and have none: {in_vain[:4]}")

    def _ranks(self, site: Site) -> list[int]:
        """Ranks that a product may have here, from small to large."""
        if site.embeddings or any(one.holder not in FLOATS or one.kind == "head" for one in site.linears):
            return []
        ranks = [self.rank] if self.size is None else range(_STEP, self.rank + 1, _STEP)
        return [rank for rank in ranks if min(site.shape) > 2 * rank]

    def _nbytes(self, site: Site, rank: int) -> int:
        """Bytes of both thin matrices and their nodes; in 8 bits a byte and the share of a scale for each weight."""
        rows, columns = site.shape
        if self.form == "adapter":  # every linear has inputs of its own
            names = sum(16 * len(one.name) for one in site.linears)
            return names + len(site.linears) * (_PER_SIDE + rank * (rows + columns) * site.dtype.numpy().itemsize)
        names = sum(9 * len(one.output.name or "") + 3 * len(one.node.name or "") for one in site.linears)
        total = _PER_SIDE * len(site.linears) + names
        for num_out, num_in in ((rank, columns), (rows, rank)):
            blocks = -(-num_in // _block(num_in))
            itemsize = site.dtype.numpy().itemsize
            short = self.scale_bits == 8 and itemsize == 4
            scales = min(blocks + 4, blocks * itemsize) if short else blocks * itemsize
            total += num_out * (blocks * _block(num_in) + scales)
        return total

    def _choose(self, model: ir.Model, sites: list[Site], context: Context, report: Report) -> None:
        """Gives every site the rank that the budget has for it, which may be 0."""
        site_of = {id(one): site for site in sites for one in site.linears}
        wanted = [one for site in sites for one in site.linears]
        windows = calibration_windows(model, wanted, site_of, context, Report(), _PRICED_TOKENS, self.length)
        sensitivity, _, facts = Sensitivity.on_text(model, context.calibration, self.probe, wanted)
        report.calibration.setdefault("costs", f"{sensitivity.measure} on {facts['text']}")
        options: dict[int, list[Option]] = {}
        with Calibration(model, windows, wanted, context.work_dir) as run:
            for stage in context.track(run.stages, f"{self.name()}: what each matrix costs"):
                group = run.observe(stage)
                if not is_finite(group):
                    continue
                moments, _ = self.prepared(group)
                activation = Activation(self._weights(group.stats))
                for linear in group.linears:
                    site = site_of[id(linear)]
                    if id(site) not in options:
                        options[id(site)] = self._priced(linear, site, moments, activation, sensitivity)
        priced = [site for site in sites if id(site) in options]
        chosen = allocate([options[id(site)] for site in priced], sizes.read(self.size or "0") or 0)
        for site in sites:
            site.rank = 0
        for site, index in zip(priced, chosen or [], strict=True):
            site.rank = ([0, *self._ranks(site)])[index]
        counts = Counter(site.rank for site in sites if site.rank)
        ranks = ", ".join(f"{count} with rank {rank}" for rank, count in sorted(counts.items()))
        report.notes.append(
            f"{counts.total()} of {len(sites)} matrices that can be repaired are, within {self.size}"
            + (f": {ranks}" if ranks else "; a larger size repairs some")
        )

    def _priced(
        self,
        linear: Linear,
        site: Site,
        moments: least_squares.Moments,
        activation: Activation,
        sensitivity: Sensitivity,
    ) -> list[Option]:
        """What the model loses by a matrix in codes alone, and by one that each rank repairs, if losses go with errors.

        The codes are those of one sweep, since the errors of rounding to the nearest have other directions.
        """
        w_NK = linear.w_NK()
        steps_KN, grid = solve(np.ascontiguousarray(w_NK.T), site.format, site.dtype.numpy(), moments, rounds=0)
        coded_NK: Floats = (steps_KN * grid.spread(grid.scale_GN, len(steps_KN))).T
        lost = sensitivity.distance({id(linear.weight): linear.stored_form(coded_NK)})
        lost = lost if math.isfinite(lost) else _RUINED
        found = output_directions(w_NK - coded_NK, activation)
        whole = float(found.energy.sum())
        options = [Option(lost, 0)]
        for rank in self._ranks(site):
            left = found.dropped(rank) / whole if whole > 0 else 1.0
            options.append(Option(lost * left, self._nbytes(site, rank)))
        return options

    def _weights(self, stats: Stats) -> Floats:
        """H by which the error at the inputs is weighed."""
        choices: dict[str, Callable[[], Floats]] = {
            "exact": lambda: stats.hessian_KK,
            "diagonal": lambda: np.diag(stats.importance_K),
            "none": lambda: np.eye(stats.num_in),
        }
        return choices[self.weigh]()

    def _with_adapter(
        self,
        model: ir.Model,
        linears: list[Linear],
        done: list[tuple[Site, Coded]],
        context: Context,
        report: Report,
    ) -> Iterator[tuple[Site, Coded]]:
        """What `code` gave; slots go into the graph, and what fills them into a file of the report."""
        products = self._products(model, linears, done, context, report)
        arrays: dict[str, Floats] = {}
        added = [whole(linear) for site, _ in done if id(site) in products for linear in site.linears]
        for one in added:
            add_slots(model.graph, [one])
        note_slots(model, added)
        for site, coded in done:
            if (product := products.get(id(site))) is None:
                yield site, coded
                continue
            nbytes = 0
            for linear in site.linears:
                arrays |= {f"{linear.name}.lora_A": product.first_KR, f"{linear.name}.lora_B": product.second_RN}
                nbytes += product.first_KR.nbytes + product.second_RN.nbytes
            facts = {"rank": site.rank, "repaired_error": product.error, "repair_bytes": nbytes}
            yield site, coded._replace(facts=coded.facts | facts)
        if products:
            report.files[FILE] = functools.partial(write_adapter, arrays=arrays)
            report.notes.append(
                f"{FILE} repairs {len(products)} matrices; what is measured here is the model without it; "
                f"with it: onnxpress eval DIR --adapter DIR/{FILE}"
            )

    def _products(
        self,
        model: ir.Model,
        linears: list[Linear],
        done: list[tuple[Site, Coded]],
        context: Context,
        report: Report,
    ) -> dict[int, _Product]:
        """A and B by the id of their site, fitted to what codes leave in a model whose matrices before are repaired.

        Text runs through the model once more: the codes were fitted to what the model is without the products.
        """
        coded_of = {id(site): coded for site, coded in done}
        site_of: dict[int, Site] = {}
        for site, coded in done:
            if "output_error" in coded.facts:  # fitted to text
                site_of |= {id(linear): site for linear in site.linears if linear.holder in FLOATS}
            else:
                site.rank = 0
        wanted = [linear for linear in linears if id(linear) in site_of]
        found: dict[int, _Product | None] = {}
        if not any(site.rank for site in site_of.values()):
            return {}
        windows = calibration_windows(model, wanted, site_of, context, Report(), self.tokens, self.length)
        ranks = repr(sorted((site.name, site.rank) for site in site_of.values() if site.rank))
        state = identity(sys.modules[type(self).__module__], whitening)
        section = context.journal.section(str(self), context.target.name, state, ranks, FILE)
        with Calibration(model, windows, wanted, context.work_dir) as run:
            has_rank = [any(site_of[id(one)].rank for one in stage.linears) for stage in run.stages]
            last = max(number for number, one in enumerate(has_rank) if one)
            for number, stage in enumerate(context.track(run.stages[: last + 1], f"{self.name()}: repairs")):
                digest = run.digest(stage)
                record = section.read(str(number), digest) if has_rank[number] else {}
                group = run.observe(stage, with_stats=record is None)
                if record is None:
                    record = self._fitted(group, site_of, coded_of) if is_finite(group) else {}
                    section.write(str(number), digest, record)
                for index, linear in enumerate(group.linears):
                    key = id(site_of[id(linear)])
                    product = None
                    if f"{index}.A" in record:
                        product = _Product(record[f"{index}.A"], record[f"{index}.B"], float(record[f"{index}.error"]))
                    # Where layers share a weight, the first of them decides.
                    product = found.setdefault(key, product)
                    w_NK = coded_of[key].w_NK()
                    group.replace(linear, w_NK if product is None else w_NK + _multiplied(product).T)
        return {key: product for key, product in found.items() if product is not None}

    def _fitted(self, group: Group, site_of: dict[int, Site], coded_of: dict[int, Coded]) -> dict[str, Any]:
        """A, B and what they leave of the error, of those linears of a group that gain by them; for the journal."""
        moments, correction_KK = self.prepared(group)
        activation = Activation(self._weights(group.stats))
        record: dict[str, Any] = {}
        for index, linear in enumerate(group.linears):
            site = site_of[id(linear)]
            if not site.rank:
                continue
            w_KN: Floats = np.ascontiguousarray(linear.w_NK().T)
            coded_KN = coded_of[id(site)].w_NK().T
            left_KN = w_KN - coded_KN
            if correction_KK is not None:
                left_KN += correction_KK @ w_KN
            pair = output_directions(left_KN.T, activation).factors(left_KN.T, site.rank)
            first_KR, second_RN = (np.ascontiguousarray(one).astype(site.dtype.numpy()) for one in pair)
            product_KN = _multiplied(_Product(first_KR, second_RN, 0.0))
            before = least_squares.quadratic(left_KN, moments.plain_KK)
            if not least_squares.quadratic(left_KN - product_KN, moments.plain_KK) < before:
                continue
            error = least_squares.quadratic(coded_KN + product_KN - w_KN, moments.plain_KK)
            energy = least_squares.quadratic(w_KN, moments.plain_KK)
            record |= {f"{index}.A": first_KR, f"{index}.B": second_RN}
            record[f"{index}.error"] = np.array(math.sqrt(error / energy) if energy else 0.0)
        return record

    def _fit(self, group: Group, site_of: dict[int, Site]) -> list[Coded]:
        if self.form == "adapter":
            return super()._fit(group, site_of)
        repaired = [one for one in group.linears if site_of[id(one)].rank]
        others = [one for one in group.linears if not site_of[id(one)].rank]
        found: dict[int, Coded] = {}
        if others:
            done = super()._fit(Group(others, group.stats), site_of)
            found |= {id(one): coded for one, coded in zip(others, done, strict=True)}
        if repaired:
            moments, correction_KK = self.prepared(group)
            activation = Activation(self._weights(group.stats))
            for one in repaired:
                w_NK = one.w_NK()
                target_KN: Floats = np.ascontiguousarray(w_NK.T)
                if correction_KK is not None:
                    target_KN = target_KN + correction_KK @ target_KN
                found[id(one)] = self._repaired(w_NK, target_KN, site_of[id(one)], moments, activation)
        return [found[id(one)] for one in group.linears]

    def _repaired(
        self,
        w_NK: Floats,
        target_KN: Floats,
        site: Site,
        moments: least_squares.Moments,
        activation: Activation,
    ) -> Coded:
        """Codes and thin matrices that together are nearest to the target, of all that taking turns came by."""
        chosen, dtype = site.format, site.dtype.numpy()
        best_loss = math.inf
        best: tuple[Floats, least_squares.Grid, tuple[CodedMatrix, CodedMatrix] | None] | None = None
        best_KN = side_KN = np.zeros_like(target_KN)  # what is still off, and the product
        side: tuple[CodedMatrix, CodedMatrix] | None = None
        for turn in range(self.turns + 1):
            is_last = turn == self.turns
            steps_KN, grid = solve(target_KN - side_KN, chosen, dtype, moments, rounds=self.rounds if is_last else 0)
            left_KN = target_KN - steps_KN * grid.spread(grid.scale_GN, len(steps_KN))
            # Rounded to 8 bits, a new product may be worse than the one the codes were fitted to.
            for one in (side, self._side(left_KN, site.rank, moments, activation, dtype)):
                if one is None:
                    continue
                side, side_KN = one, (one[1].w_NK() @ one[0].w_NK()).T
                off_KN = left_KN - side_KN
                loss = least_squares.quadratic(off_KN, moments.plain_KK)
                if loss < best_loss:
                    best_loss, best, best_KN = loss, (steps_KN, grid, one), off_KN
        # Codes alone need not settle for less in the last turn; rows are fitted one by one, so a few of them tell.
        rows = slice(None, None, -(-len(w_NK) // _ROWS))
        target_KR = np.ascontiguousarray(target_KN[:, rows])
        alone_KR, alone = solve(target_KR, chosen, dtype, moments, rounds=self.rounds)
        alone_KR = target_KR - alone_KR * alone.spread(alone.scale_GN, len(alone_KR))
        before = least_squares.quadratic(alone_KR, moments.plain_KK)
        after = least_squares.quadratic(np.ascontiguousarray(best_KN[:, rows]), moments.plain_KK)
        if best is None or not after < before:
            steps_KN, grid = solve(target_KN, chosen, dtype, moments, rounds=self.rounds)
            best = steps_KN, grid, None
        coded = coded_steps(w_NK, *best[:2], chosen, dtype, moments, best[2])
        error, energy = coded.facts["error"], coded.facts["energy"]
        facts = {"output_error": math.sqrt(error / energy) if energy else 0.0}
        return coded._replace(facts=facts | ({} if best[2] is None else {"rank": site.rank}))

    def _side(
        self,
        left_KN: Floats,
        rank: int,
        moments: least_squares.Moments,
        activation: Activation,
        dtype: np.dtype[Any],
    ) -> tuple[CodedMatrix, CodedMatrix]:
        """The product of rank R nearest to what rounding has left, its matrices in 8 bits: [R, K] and [N, R]."""
        first_KR, second_RN = output_directions(left_KN.T, activation).factors(left_KN.T, rank)
        first = self._coded_factor(first_KR.T, dtype)
        # The second one for the first as it is stored: the least-squares solution in its R directions.
        rounded_KR = first.w_NK().T.astype(np.float64)
        weighed_KR = activation.hessian_KK @ rounded_KR
        gram_RR = rounded_KR.T @ weighed_KR
        gram_RR[np.diag_indices(rank)] += 1e-9 * max(float(gram_RR.diagonal().mean()), np.finfo(np.float64).tiny)
        second_RN = np.linalg.solve(gram_RR, weighed_KR.T @ left_KN)
        return first, self._coded_factor(second_RN.T, dtype)

    def _coded_factor(self, w_NK: Floats, dtype: np.dtype[Any]) -> CodedMatrix:
        matrix, _, _ = round_matrix(
            np.ascontiguousarray(w_NK, np.float32),
            bits=8,
            block_size=_block(w_NK.shape[1]),
            symmetric=True,
            scales="max",
            scale_bits=self.scale_bits,
            scale_dtype=dtype,
        )
        return matrix


def _multiplied(product: _Product) -> Floats:
    """A B as float32 [K, N]."""
    found: Floats = product.first_KR.astype(np.float32) @ product.second_RN.astype(np.float32)
    return found


def _refuse_slots(model: ir.Model) -> None:
    """Raises UnsupportedModelError for a graph that takes adapters already: of two, a request could have one only."""
    if slots := find_slots(model):
        raise UnsupportedModelError(
            f"form='adapter': expected a graph without slots for adapters, found those of {len(slots)} matrices "
            f"({next(iter(slots))}, ...)",
            hint="form='graph' puts the repair into the graph, and leaves the slots to adapters",
        )


def _block(width: int) -> int:
    """Weights of a row of a thin matrix that share a scale."""
    return 32 if width % 32 == 0 else 16
