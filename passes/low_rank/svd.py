"""Replaces a matrix by the product of two thin ones, its truncated singular value decomposition.

Paper:   Eckart and Young, Psychometrika 1936: no matrix of rank r is nearer in the Frobenius norm.
Pays:    r (N + K) < N K; a matrix whose rank does not get below that stays whole, and the report says so. Plain SVD
         knows nothing of the activations: on a language model the loss is large from a few per cent on. It is here
         for models that are low-rank already, and as the mechanism that better targets share.
Axes:    N out features, K in features, r rank
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import Linear, find_embeddings, find_linears, unique_name
from onnxpress.compiler.nbits import replace
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report

Floats = npt.NDArray[Any]


@dataclass(frozen=True)
class Spectrum:
    """Left singular vectors and singular values of a matrix, largest first.

    Attributes:
        u_Nk: orthonormal columns; of the transposed matrix when `is_flipped`.
        sigma_k: singular values, float64.
        is_flipped: whether N > K, so that the smaller Gram matrix was that of the columns.
    """

    u_Nk: Floats
    sigma_k: Floats
    is_flipped: bool


def spectrum(w_NK: Floats) -> Spectrum:
    """Singular values and vectors from the smaller Gram matrix, in float64.

    Args:
        w_NK: any matrix. Not changed.
    Cost:   O(N K m + m^3) with m = min(N, K); 2 m^2 + N K doubles.
    """
    is_flipped = w_NK.shape[0] > w_NK.shape[1]
    wide = np.asarray(w_NK.T if is_flipped else w_NK, dtype=np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T)
    return Spectrum(vectors[:, ::-1], np.sqrt(np.maximum(values[::-1], 0.0)), is_flipped)


def factors(w_NK: Floats, found: Spectrum, rank: int) -> tuple[Floats, Floats]:
    """The best product of rank r: w is about b_Nr @ a_rK, both with the square root of the singular values.

    Laws:   ||w - b a||_F^2 equals the sum of the squared singular values dropped; full rank reproduces w.
    """
    u_Nr, sigma_r = found.u_Nk[:, :rank], found.sigma_k[:rank]
    root = np.sqrt(sigma_r)
    safe = np.where(root > 0, root, 1.0)
    thick = u_Nr * root
    thin = (u_Nr.T @ (w_NK.T if found.is_flipped else w_NK)) / safe[:, None]
    return (thin.T, thick.T) if found.is_flipped else (thick, thin)


def rank_of_energy(sigma_k: Floats, energy: float) -> int:
    """The smallest rank whose singular values hold `energy` of the sum of squares."""
    cumulative = np.cumsum(sigma_k**2)
    return int(np.searchsorted(cumulative, energy * cumulative[-1])) + 1


def aligned(rank: int) -> int:
    """The rank rounded down to a size that kernels and quantization blocks like: 32, or 8 when small."""
    step = 32 if rank >= 64 else 8
    return max(rank // step * step, 1) if rank >= step else max(rank, 1)


@dataclass(frozen=True, kw_only=True)
class Svd(Pass):
    """Factorizes linears; give exactly one of rank, energy and ratio."""

    promise: ClassVar[Promise] = Promise.LOSSY
    paper: ClassVar[str] = "Eckart and Young, 1936"

    rank: int | None = None  # the same rank for all
    energy: float | None = None  # share of the sum of squared singular values to keep, in (0, 1)
    ratio: float | None = None  # share of each matrix's parameters to remove, in (0, 1)
    exclude: tuple[str, ...] = ()  # patterns of names that stay whole: "block0.*", "*.down", "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("rank", "energy", "ratio") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise OptionError(f"svd: expected exactly one of rank, energy, ratio, got {found}", hint="svd(ratio=0.3)")
        self.check(self.rank is None or self.rank >= 1, "rank", "at least 1")
        self.check(self.energy is None or 0 < self.energy < 1, "energy", "between 0 and 1", "try 0.99")
        self.check(self.ratio is None or 0 < self.ratio < 1, "ratio", "between 0 and 1", "0.3 removes 30 %")

    @classmethod
    def example(cls, model: ir.Model) -> Svd:
        return cls(ratio=0.4)

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        linears = find_linears(model)
        self._check_effect(linears)
        sites = list(self._sites(model, linears, report))
        lost = total = 0.0
        before = after = 0
        with ThreadPoolExecutor(max_workers=2) as pool:
            # LAPACK works outside the interpreter's lock, so two matrices at a time keep two cores busy.
            jobs = [pool.submit(self._factorize, site, context.work_dir) for site in sites]
            for site, job in zip(context.track(sites, "svd"), jobs, strict=True):
                found = job.result()
                if found.rank is None:
                    report.skip(site.name, found.reason)
                    continue
                _install(model.graph, site, found)
                lost, total = lost + found.lost, total + found.total
                before += site.num_out * site.num_in
                after += found.rank * (site.num_out + site.num_in)
                error = math.sqrt(found.lost / found.total) if found.total else 0.0
                report.change(site.name, kind=site.kind, shape=list(site.shape), rank=found.rank, weight_error=error)
        if sites and not report.changed:
            option = next(name for name in ("rank", "energy", "ratio") if getattr(self, name) is not None)
            raise OptionError(
                f"svd: {option}={getattr(self, option)!r} makes no matrix smaller", hint="lower the rank or the energy"
            )
        if total:
            report.metrics["weight_error"] = math.sqrt(lost / total)
            report.metrics["kept_energy"] = 1 - lost / total
            report.metrics["parameters_before"], report.metrics["parameters_after"] = before, after
        return report

    def _check_effect(self, linears: list[Linear]) -> None:
        for pattern in self.exclude:
            if not any(fnmatch.fnmatch(one.name, pattern) for one in linears):
                raise OptionError(f"svd: exclude={pattern!r} matches no linear", hint="onnxpress inspect lists them")

    def _sites(self, model: ir.Model, linears: list[Linear], report: Report) -> Iterator[Linear]:
        """Linears that can be factorized; the others are skipped with their reason."""
        tied = {id(one.head.node) for one in find_embeddings(model, linears) if one.head is not None}
        for linear in linears:
            if any(fnmatch.fnmatch(linear.name, pattern) for pattern in self.exclude):
                report.skip(linear.name, "excluded")
            elif linear.holder == "pair":
                report.skip(linear.name, "is a product of two matrices already")
            elif linear.is_quantized:
                report.skip(linear.name, "is quantized already")
            elif id(linear.node) in tied:
                report.skip(linear.name, "shares its bytes with the embedding: factors would come on top of the table")
            elif min(linear.shape) < 8:
                report.skip(linear.name, "is too thin")
            else:
                yield linear

    def _factorize(self, site: Linear, work_dir: Path | None) -> _Factors:
        w_NK = site.w_NK()
        rows, columns = w_NK.shape
        break_even = rows * columns / (rows + columns)
        if self.rank is not None and self.rank >= break_even:
            return _Factors(reason=_above(self.rank, break_even))
        found = spectrum(w_NK)
        if self.energy is not None:
            rank = rank_of_energy(found.sigma_k, self.energy)
        else:
            rank = self.rank if self.rank is not None else int((1 - (self.ratio or 0.0)) * break_even)
        rank = aligned(rank) if self.rank is None else rank
        if rank >= break_even:
            return _Factors(reason=_above(rank, break_even))
        b_Nr, a_rK = factors(w_NK, found, rank)
        energies = found.sigma_k**2
        dtype = site.weight.dtype or ir.DataType.FLOAT
        stored = (
            _stored(array, dtype, work_dir, f"{site.name}.{end}") for array, end in ((a_rK.T, "A"), (b_Nr.T, "B"))
        )
        first, second = stored
        return _Factors(rank, first, second, float(energies[rank:].sum()), float(energies.sum()))


@dataclass
class _Factors:
    rank: int | None = None
    first_Kr: Floats | None = None
    second_rN: Floats | None = None
    lost: float = 0.0
    total: float = 0.0
    reason: str = ""


def _above(rank: int, break_even: float) -> str:
    return f"rank {rank} does not pay: below {math.ceil(break_even)} it would"


def _stored(array: Floats, dtype: ir.DataType, work_dir: Path | None, name: str) -> Floats:
    """The factor in its storage type; in a memory-mapped file where there is a work directory."""
    final = np.ascontiguousarray(array, dtype=dtype.numpy())
    if work_dir is None:
        return final
    path = work_dir / f"svd-{name.replace('/', '_')}.npy"
    np.save(path, final)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _install(graph: ir.Graph, site: Linear, found: _Factors) -> None:
    """x W^T becomes (x A) B; the bias of a Gemm becomes an Add."""
    first = _initializer(graph, found.first_Kr, f"{site.name}.A")
    second = _initializer(graph, found.second_rN, f"{site.name}.B")
    node = site.node
    low = ir.Node("", "MatMul", [site.activation, first], name=f"{site.name}.A")
    back = ir.Node("", "MatMul", [low.outputs[0], second], name=f"{site.name}.B")
    nodes = [low, back]
    if site.holder == "Gemm" and site.bias is not None:
        nodes.append(ir.Node("", "Add", [back.outputs[0], site.bias], name=f"{site.name}.bias"))
    for one, width in zip(nodes, (found.rank, site.num_out, site.num_out), strict=False):
        output = one.outputs[0]
        output.name = f"{one.name}.out"
        lead = list(node.outputs[0].shape)[:-1] if node.outputs[0].shape is not None else None
        output.shape = None if lead is None else ir.Shape([*lead, width])
        output.type = node.outputs[0].type
    operands = [value for value in node.inputs if value is not None]
    replace(graph, node, [node], nodes, [node.outputs[0]], [nodes[-1].outputs[0]])
    for value in operands:
        source = value.producer()
        if source is not None and source.op_type == "Transpose" and not value.uses():
            operands += [one for one in source.inputs if one is not None]
            graph.remove(source, safe=True)
        elif value.is_initializer() and not value.uses() and value.name is not None:
            del graph.initializers[value.name]


def _initializer(graph: ir.Graph, array: Floats | None, base: str) -> ir.Value:
    assert array is not None
    name = unique_name(graph, base)
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
