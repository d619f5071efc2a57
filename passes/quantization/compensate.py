"""Rounds weights as gptq does, and adds a product of two thin matrices that makes up for the largest part of the error.

The two are fitted in turn: the product to what rounding has left, weighed by the second moments of the activation, then
the codes to what the product leaves of the weights. The thin matrices are stored in 8 bits. They cost bytes and three
more operators for each linear, so `size` gives them only to those of which the model gains most per byte.

Paper:   arXiv:2410.06040 (QERA, theorem 1), arXiv:2402.02446 (LQER), arXiv:2405.18886 (CALDERA: taking turns)
Differs: codes come from gptq with teacher's targets; the product is the best one for the outputs (see `whitening`);
         its second matrix is fitted once more to the first as it was rounded.
Axes:    N out features, K in features, R rank
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxpress.compiler import sizes
from onnxpress.compiler.allocation import Option, allocate
from onnxpress.compiler.calibration import Calibration, Group
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.nbits import CodedMatrix
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.sensitivity import Sensitivity
from onnxpress.compiler.stats import Stats
from onnxpress.compiler.whitening import Activation, output_directions
from onnxpress.passes.quantization import _least_squares as least_squares
from onnxpress.passes.quantization._calibrated import Calibrated, coded_steps, is_finite, solve
from onnxpress.passes.quantization._rounding import Floats, round_matrix
from onnxpress.passes.quantization._weight_only import (
    FLOATS,
    Coded,
    Site,
    calibration_windows,
    fitting_block,
    plain,
)

_PRICED_TOKENS = 4096  # of text that tell which matrices gain
_PER_SIDE = 1500  # bytes that three more nodes, four more weights and their names take in the graph at most
_RUINED = 1e6  # cost of a matrix without which the outputs are not finite


@dataclass(frozen=True, kw_only=True)
class Compensate(Calibrated):
    """Rounds weights with the help of calibration text, and repairs them by products of low rank.

    Embedding and head, and matrices of less than twice the rank, get codes alone. Options as in every weight-only pass.
    """

    paper: ClassVar[str] = "arXiv:2410.06040"

    rank: int = 32  # of the product, a multiple of 16
    turns: int = 2  # how often product and codes are fitted to each other
    weigh: Literal["exact", "diagonal", "none"] = "exact"  # error by all moments (QERA), by sizes (LQER), by none (SVD)
    size: str | None = None  # bytes of all products together, "2MB"; those of which the model gains most get one
    probe: int = 512  # tokens on which it is measured what a matrix costs the model

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rank >= 16 and self.rank % 16 == 0, "rank", "a multiple of 16", "32 suits most models")
        self.check(self.turns >= 1, "turns", "at least 1", "2 suits most models")
        self.check(self.size is None or sizes.read(self.size) is not None, "size", "a size such as '2MB'")
        self.check(self.probe >= 16, "probe", "at least 16", "512 suits most models")

    @classmethod
    def example(cls, model: ir.Model) -> Compensate:
        return cls(block_size=16, rank=16, tokens=32, length=16)

    def code(
        self, model: ir.Model, sites: list[Site], linears: list[Linear], context: Context, report: Report
    ) -> Iterator[tuple[Site, Coded]]:
        able = [site for site in sites if self._can_be_repaired(site)]
        for site in able:
            site.rank = self.rank
        if self.size is not None and able:
            self._choose(model, able, context, report)
        yield from super().code(model, sites, linears, context, report)

    def _can_be_repaired(self, site: Site) -> bool:
        is_float = bool(site.linears) and all(one.holder in FLOATS and one.kind != "head" for one in site.linears)
        return is_float and not site.embeddings and min(site.shape) > 2 * self.rank

    def _nbytes(self, site: Site) -> int:
        """Bytes of both thin matrices: a byte and the share of a block's scale for each weight, and their nodes."""
        rows, columns = site.shape
        scale = 1 if self.scale_bits == 8 else 4
        weights = self.rank * (rows + columns)
        return weights + weights * scale // self._block(columns) + _PER_SIDE * len(site.linears)

    def _block(self, width: int) -> int:
        return fitting_block(width, 32 if self.rank % 32 == 0 else 16, 8, exact=False) or 16

    def _choose(self, model: ir.Model, sites: list[Site], context: Context, report: Report) -> None:
        """Leaves a rank to those sites of which the model gains most per byte."""
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
                activation = Activation(self._weights(group.stats))
                for linear in group.linears:
                    site = site_of[id(linear)]
                    if id(site) not in options:
                        options[id(site)] = self._priced(linear, site, activation, sensitivity)
        priced = [site for site in sites if id(site) in options]
        chosen = allocate([options[id(site)] for site in priced], sizes.read(self.size or "0") or 0)
        for site, index in zip(priced, chosen or [], strict=True):
            site.rank = self.rank * index
        count = sum(bool(site.rank) for site in sites)
        report.notes.append(f"{count} of {len(sites)} matrices that can be repaired are, within {self.size}")

    def _priced(self, linear: Linear, site: Site, activation: Activation, sensitivity: Sensitivity) -> list[Option]:
        """What the model loses by a matrix rounded to the nearest, and by one repaired, if losses go with errors."""
        rounded_NK = plain(site).matrix.w_NK()
        lost = sensitivity.distance({id(linear.weight): linear.stored_form(rounded_NK)})
        lost = lost if math.isfinite(lost) else _RUINED
        found = output_directions(linear.w_NK() - rounded_NK, activation)
        whole = float(found.energy.sum())
        left = found.dropped(self.rank) / whole if whole > 0 else 1.0
        return [Option(lost, 0), Option(lost * left, self._nbytes(site))]

    def _weights(self, stats: Stats) -> Floats:
        """H by which the error at the inputs is weighed."""
        choices: dict[str, Callable[[], Floats]] = {
            "exact": lambda: stats.hessian_KK,
            "diagonal": lambda: np.diag(stats.importance_K),
            "none": lambda: np.eye(stats.num_in),
        }
        return choices[self.weigh]()

    def _fit(self, group: Group, site_of: dict[int, Site]) -> list[Coded]:
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
        side: tuple[CodedMatrix, CodedMatrix] | None = None
        side_KN: Floats = np.zeros((), np.float32)
        best: tuple[float, Coded] | None = None
        for turn in range(self.turns + 1):
            is_last = turn == self.turns
            steps_KN, grid = solve(target_KN - side_KN, chosen, dtype, moments, rounds=self.rounds if is_last else 0)
            left_KN = target_KN - steps_KN * grid.spread(grid.scale_GN, len(steps_KN))
            fitted = self._side(left_KN, site.rank, moments, activation, dtype)
            for one in (side, fitted):
                if one is None:
                    continue
                product_KN = (one[1].w_NK() @ one[0].w_NK()).T
                loss = least_squares.quadratic(left_KN - product_KN, moments.plain_KK)
                if best is None or loss < best[0]:
                    best = loss, coded_steps(w_NK, steps_KN, grid, chosen, dtype, moments, one)
                if one is fitted:
                    side_KN = product_KN
            side = fitted
        assert best is not None
        coded = best[1]
        error, energy = coded.facts["error"], coded.facts["energy"]
        output_error = math.sqrt(error / energy) if energy else 0.0
        return coded._replace(facts={"output_error": output_error, "rank": site.rank})

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
            block_size=self._block(w_NK.shape[1]),
            symmetric=True,
            scales="max",
            scale_bits=self.scale_bits,
            scale_dtype=dtype,
        )
        return matrix
