"""Replaces a weight by the product of two thin ones, its best approximation of that rank.

Plain, data-free SVD: it needs no text and is by far the weakest way to save a byte (a square matrix breaks even at half
its rank). It pays in prefill, where a MatMul costs what its parameters cost, and as a base for later passes: both
factors are ordinary linears that can be quantized.

Paper:   Eckart and Young, 1936.
Axes:    N out features, K in features, R rank
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.roles import KINDS
from onnxpress.compiler.threads import workers
from onnxpress.passes.low_rank._pairs import break_even, matrices, put_pair, rank_step

Floats = npt.NDArray[Any]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvectors of the smaller Gram matrix of a weight, strongest first.

    Attributes:
        vectors: float64 [min(N, K), min(N, K)], one eigenvector a column.
        energy: squared singular values, descending.
        right: whether the vectors span the inputs (K <= N) or the outputs.
    """

    vectors: Floats
    energy: Floats
    right: bool


def spectrum(w_NK: Floats) -> Spectrum:
    """Squared singular values and the vectors of the smaller side, in float64.

    Cost: O(N K min(N, K)); a tenth of a full SVD, at the price of singular values below 1e-8 of the largest.
    """
    w = w_NK.astype(np.float64)
    right = w.shape[1] <= w.shape[0]
    energy, vectors = np.linalg.eigh(w.T @ w if right else w @ w.T)
    return Spectrum(vectors[:, ::-1], np.maximum(energy[::-1], 0), right)


def factors(w_NK: Floats, found: Spectrum, rank: int) -> tuple[Floats, Floats]:
    """A [K, R] and B [R, N] with x @ A @ B nearest to x @ w^T, of equal norms.

    Laws: ||A B - w^T||_F^2 is the sum of the dropped `energy`; at full rank A B = w^T; A^T A = B B^T = diag(s).
    """
    w = w_NK.astype(np.float64)
    vectors = found.vectors[:, :rank]
    root = np.sqrt(np.sqrt(np.maximum(found.energy[:rank], np.finfo(np.float64).tiny)))
    if found.right:
        return vectors * root, (w @ vectors / root).T
    return w.T @ vectors / root, (vectors * root).T


def choose_rank(
    found: Spectrum, shape: tuple[int, int], *, rank: int | None, energy: float | None, ratio: float | None
) -> int:
    """The rank that one of the three options asks for.

    `ratio` is rounded down, `energy` up, to a multiple of 32 (of 8 below 128): blocks of a later quantization then run
    without padding along the rank.
    """
    rows, columns = shape
    if rank is not None:
        return min(rank, rows, columns)
    if ratio is not None:
        wanted = math.floor((1 - ratio) * rows * columns / (rows + columns))
        step = rank_step(wanted)
        return wanted // step * step or wanted
    assert energy is not None
    kept = np.cumsum(found.energy)
    wanted = int(np.searchsorted(kept, energy * kept[-1] * (1 - 1e-12))) + 1
    step = rank_step(wanted)
    return min(-(-wanted // step) * step, rows, columns)


@dataclass
class _Site:
    """One weight with the linears that multiply with it, and what came of it."""

    linears: list[Linear]
    rank: int = 0
    pair: tuple[Floats, Floats] | None = None
    energy: Floats = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True, kw_only=True)
class Svd(Pass):
    """Splits linears into two factors of low rank; give one of rank, energy and ratio.

    `ratio=0.3` removes at least 30 % of the parameters of each matrix, `energy=0.95` keeps that share of its squared
    singular values, `rank=64` is the rank itself. A matrix whose factors would be no smaller than it is left alone, and
    so is a head that shares its bytes with the embedding.
    """

    promise: ClassVar[Promise] = Promise.LOSSY

    rank: int | None = None  # of every matrix
    energy: float | None = None  # share of squared singular values to keep, in (0, 1)
    ratio: float | None = None  # share of the parameters of each matrix to remove, in (0, 1)
    kinds: tuple[str, ...] = ()  # roles to split: "q", "gate", "down", ...; () for all
    exclude: tuple[str, ...] = ()  # patterns of names that stay whole: "block0.*", "*.down"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [option for option in ("rank", "energy", "ratio") if getattr(self, option) is not None]
        if len(given) != 1:
            raise OptionError(
                f"svd: expected one of rank, energy and ratio, got {', '.join(given) or 'none'}",
                hint="write svd(ratio=0.3)",
            )
        self.check(self.rank is None or self.rank >= 1, "rank", "at least 1")
        for option in ("energy", "ratio"):
            share = getattr(self, option)
            self.check(share is None or 0 < share < 1, option, "between 0 and 1", "0.3 means 30 %")
        self.check(set(self.kinds) <= set(KINDS), "kinds", f"among {', '.join(KINDS)}")

    @classmethod
    def example(cls, model: ir.Model) -> Svd:
        return cls(ratio=0.3)

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        found, _ = matrices(model, report, "svd", kinds=self.kinds, exclude=self.exclude)
        sites = [_Site(linears) for linears in found]
        error = total = 0.0
        before = after = 0
        for site in _decomposed(sites, self._decompose, context):
            linear, name = site.linears[0], site.linears[0].name
            rows, columns = linear.shape
            if site.pair is None:
                report.skip(name, self._why_not(site))
                continue
            kept, whole = float(site.energy[: site.rank].sum()), float(site.energy.sum())
            put_pair(model.graph, site.linears, *site.pair)
            site.pair = None
            error, total = error + whole - kept, total + whole
            before, after = before + rows * columns, after + site.rank * (rows + columns)
            report.change(
                name,
                kind=linear.kind,
                shape=[rows, columns],
                rank=site.rank,
                parameters_before=rows * columns,
                parameters_after=site.rank * (rows + columns),
                kept_energy=kept / whole if whole else 1.0,
                weight_error=math.sqrt(max(1 - kept / whole, 0.0)) if whole else 0.0,
            )
        if sites and not report.changed:
            smallest = min(rows * columns // (rows + columns) for rows, columns in (s.linears[0].shape for s in sites))
            raise OptionError(
                f"svd: no matrix gets smaller with {str(self)[4:-1]}",
                hint=f"the smallest matrix breaks even at rank {smallest}; ask for less",
            )
        if report.changed:
            report.metrics |= {
                "weight_error": math.sqrt(error / total) if total else 0.0,
                "kept_energy": 1 - error / total if total else 1.0,
                "parameters_before": before,
                "parameters_after": after,
            }
        return report

    def _decompose(self, site: _Site) -> None:
        """Fills in rank and factors; no factors where they would not be smaller than the matrix."""
        linear = site.linears[0]
        rows, columns = linear.shape
        limit = break_even(rows, columns)
        if self.rank is not None and self.rank >= limit:
            site.rank = self.rank
            return
        w_NK = linear.w_NK()
        if not np.isfinite(w_NK).all():
            return
        found = spectrum(w_NK)
        site.energy = found.energy
        site.rank = choose_rank(found, linear.shape, rank=self.rank, energy=self.energy, ratio=self.ratio)
        if 1 <= site.rank < limit:
            first, second = factors(w_NK, found, site.rank)
            assert linear.weight.const_value is not None
            dtype = linear.weight.const_value.dtype.numpy()
            site.pair = np.ascontiguousarray(first, dtype), np.ascontiguousarray(second, dtype)

    def _why_not(self, site: _Site) -> str:
        if site.rank == 0:
            return "weights are not finite" if not site.energy.size else "the matrix is too small"
        return "at this rank the factors would be no smaller than the matrix"


def _decomposed(sites: list[_Site], decompose: Callable[[_Site], None], context: Context) -> Iterator[_Site]:
    """The sites in order, decomposed by one thread a core.

    The linear algebra library gets one thread: its own wait in a loop for each other, which on a busy machine takes ten
    times as long as the work.
    """
    pool = ThreadPoolExecutor(workers(), thread_name_prefix="svd")
    with threadpool_limits(1, user_api="blas"):
        try:
            futures = [pool.submit(decompose, site) for site in sites]
            for site, future in zip(context.track(sites, "svd"), futures, strict=True):
                future.result()
                yield site
        finally:
            pool.shutdown(cancel_futures=True)
