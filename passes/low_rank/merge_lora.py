"""Adds a LoRA adapter (a PEFT directory) to the weights, for good.

Float matrices get the sum. Matrices of MatMulNBits and GatherBlockQuantized are read back, added to and rounded to the
nearest in the format they had; how much of the update the rounding swallows is measured, and too much is an error, for
half an adapter is worse than none. A low-rank pair gets wider by the adapter's rank, exactly.

Paper:   Hu et al., arXiv:2106.09685; DoRA, Liu et al., arXiv:2402.09353
Axes:    N out features, K in features, R rank
"""

from __future__ import annotations

import atexit
import dataclasses
import math
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.compiler.linears import (
    Embedding,
    Linear,
    derived,
    drop_unused,
    find_embeddings,
    find_linears,
    unique_name,
)
from onnxpress.compiler.lora_graph import find_sites, refuse_transformed
from onnxpress.compiler.lora_targets import place
from onnxpress.compiler.nbits import replace_embedding, replace_linear, store
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.peft import Adapter, Update, read_peft, write_peft
from onnxpress.compiler.requantize import coded, nearest

Floats = npt.NDArray[np.float32]

MERGED = "onnxpress.lora"  # digests of adapters that are in the weights
_FLOATS = ("MatMul", "Gemm", "Transpose+MatMul")
_ROUNDING = 1e-3  # of the loss: an update that is lost altogether has about 1


def add_update(w_NK: Floats, delta_NK: Floats, magnitude_N: Floats | None = None) -> Floats:
    """W + BA, of DoRA with each row brought to the length that was trained; a fresh array.

    Args:
        w_NK: weight, float32. Not changed.
        delta_NK: B A, scaled.
        magnitude_N: length of each row of the result; None leaves it as it is.
    Laws:   a zero update changes nothing; rows of a DoRA result have the lengths given.
    """
    total = w_NK + delta_NK
    if magnitude_N is not None:
        length = np.linalg.norm(total.astype(np.float64), axis=1)
        total *= (magnitude_N / np.where(length == 0, 1, length)).astype(np.float32)[:, None]
    return np.asarray(total, np.float32)


def update_norm(a_RK: Floats, b_NR: Floats) -> float:
    """||B A||_F from the factors' Gram matrices, without the product."""
    a, b = a_RK.astype(np.float64), b_NR.astype(np.float64)
    return math.sqrt(max(float(((a @ a.T) * (b.T @ b)).sum()), 0.0))


@dataclass(frozen=True)
class _Piece:
    """Rows `start` to `start + len(rows)` of a stored matrix get rows `rows` of an update."""

    update: Update
    start: int
    rows: npt.NDArray[np.int64]

    @property
    def b_NR(self) -> Floats:  # noqa: N802
        return self.update.b_NR[self.rows]

    def add_to(self, w_NK: Floats) -> None:
        part = w_NK[self.start : self.start + len(self.rows), : self.update.shape[1]]
        magnitude = self.update.magnitude_N
        part[:] = add_update(part, self.update.delta(self.rows), None if magnitude is None else magnitude[self.rows])


@dataclass
class _Job:
    holder: Linear | Embedding
    name: str
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def norm(self) -> float:
        """||B A|| of all pieces."""
        return math.sqrt(sum(update_norm(one.update.a_RK, one.b_NR) ** 2 for one in self.pieces))

    def merged(self, w_NK: Floats) -> Floats:
        total = np.array(w_NK, np.float32)
        for piece in self.pieces:
            piece.add_to(total)
        return total


@dataclass(frozen=True, kw_only=True)
class MergeLora(Pass):
    """Makes an adapter part of the weights. All of its modules find their matrix, or it is an error."""

    promise: ClassVar[Promise] = Promise.LOSSY
    paper: ClassVar[str] = "arXiv:2106.09685"

    path: str = ""  # directory of the adapter, as PEFT saved it
    max_loss: float = 0.5  # share of the update that rounding quantized matrices may swallow, over all of them

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(bool(self.path), "path", "the directory of a PEFT adapter", "write merge_lora(path='my-adapter')")
        self.check(self.max_loss > 0, "max_loss", "more than 0", "1 accepts an update that is lost altogether")

    @classmethod
    def example(cls, model: ir.Model) -> MergeLora:
        folder = Path(tempfile.mkdtemp(prefix="onnxpress-lora-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        rng = np.random.default_rng(0)
        updates = []
        for linear in find_linears(model):
            a, b = (0.1 * rng.standard_normal(shape) for shape in ((2, linear.num_in), (linear.num_out, 2)))
            updates.append(Update(linear.name, a.astype(np.float32), b.astype(np.float32)))
        write_peft(folder, updates, base="", rank=2)
        return cls(path=str(folder))

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        adapter = read_peft(self.path)
        merged = model.metadata_props.get(MERGED, "").split()
        if adapter.digest in merged:
            report.skip(self.path, "this adapter is in the weights already")
            return report
        refuse_transformed(model, context.history)
        jobs = _plan(model, adapter, context)
        for job in jobs:
            _check(job, adapter)
        lost = whole = 0.0
        for job in context.track(jobs, "merge_lora"):
            error, norm = self._merge(model.graph, job)
            lost, whole = lost + error**2, whole + norm**2
            share = error / norm if norm else 0.0
            modules = [piece.update.module for piece in job.pieces]
            rank = max(piece.update.rank for piece in job.pieces)
            report.change(job.name, modules=modules, rank=rank, update_norm=norm, update_error=share)
        total = math.sqrt(lost / whole) if whole else 0.0
        if total > self.max_loss + _ROUNDING:
            raise UnsupportedModelError(
                f"{adapter.path}: rounding to the bits that the weights have swallows {total:.0%} of the update, more "
                f"than max_loss={self.max_loss:g}",
                hint="merge before quantizing, or keep the adapter apart: onnxpress lora slots",
            )
        report.metrics["update_error"] = total
        small = [str(row["site"]) for row in report.ledger if row["update_error"] > self.max_loss]
        if small:
            report.notes.append(
                f"of {len(small)} matrices rounding swallows more than {self.max_loss:.0%} of a small update: "
                + ", ".join(small[:4])
            )
        model.metadata_props[MERGED] = " ".join([*merged, adapter.digest])
        return report

    def _merge(self, graph: ir.Graph, job: _Job) -> tuple[float, float]:
        """Changes the stored matrix; norms of what is stored less what should be (0 for float32), and of the change."""
        holder = job.holder
        if isinstance(holder, Embedding):
            return _merge_table(graph, job, holder)
        if holder.factors is not None:
            _widen(graph, job, *holder.factors)
            return 0.0, job.norm
        if holder.holder in _FLOATS:
            size = _rounding(job, holder.w_NK(), holder.weight.dtype)
        if _is_turned_for_others(holder):
            _untie(graph, job, holder)
            return size
        if holder.holder in _FLOATS:
            before = dataclasses.replace(holder)
            name = unique_name(graph, str(holder.weight.name))
            holder.set_weight(lambda: job.merged(before.w_NK()), name)
            return size
        old = coded(holder.node)
        assert old is not None
        before_NK = holder.w_NK()
        wanted = job.merged(before_NK)
        new = nearest(wanted, old)
        level = holder.node.attributes.get("accuracy_level")
        replace_linear(holder, store(graph, holder.name, new), 0 if level is None else level.as_int())
        return float(np.linalg.norm(new.w_NK() - wanted)), float(np.linalg.norm(wanted - before_NK))


def _rounding(job: _Job, w_NK: Floats, dtype: ir.DataType | None) -> tuple[float, float]:
    """(error, change) of a float matrix: what a type shorter than float32 swallows of an update.

    Raises:
        UnsupportedModelError: the type does not hold the sum.
    """
    if dtype is None or dtype.itemsize >= np.dtype(np.float32).itemsize:
        return 0.0, job.norm
    wanted = job.merged(w_NK)
    with np.errstate(over="ignore"):
        stored = wanted.astype(dtype.numpy()).astype(np.float32)
    if not np.isfinite(stored).all():
        raise UnsupportedModelError(
            f"{job.name}: expected a sum that {dtype.name.lower()} holds, found {np.abs(wanted).max():.3g}",
            hint="merge into a float32 model",
        )
    return float(np.linalg.norm(stored - wanted)), float(np.linalg.norm(wanted - w_NK))


def _plan(model: ir.Model, adapter: Adapter, context: Context) -> list[_Job]:
    """What is added to which stored matrix, in the order of the adapter."""
    linears = find_linears(model)
    sites = {site.target.name: site for site in find_sites(linears, find_embeddings(model, linears))}
    targets = [site.target for site in sites.values()]
    jobs: dict[int, _Job] = {}
    taken: dict[str, str] = {}
    for module, update in adapter.updates.items():
        try:
            places = place(module, update.shape, targets, context.config, is_table=update.is_table)
        except UnsupportedModelError as error:
            error.message = f"{adapter.path}: {error.message}"
            if any(node.op_type == "Attention" and node.domain == "com.microsoft" for node in model.graph):
                error.hint = "an Attention operator holds projections inside: run unpack_attention before"
            raise
        for one in places:
            site = sites[one.target.name]
            other = taken.setdefault(one.target.name, module)
            if other != module:
                raise UnsupportedModelError(
                    f"{adapter.path}: expected one module for {one.target.name}, found {other} and {module}",
                    hint="the adapter holds modules of another part of the model, which this graph lacks",
                )
            name = site.target.name if isinstance(site.holder, Embedding) else site.holder.name
            rows = np.arange(len(update.b_NR)) if one.rows is None else one.rows
            jobs.setdefault(id(site.holder), _Job(site.holder, name)).pieces.append(_Piece(update, site.start, rows))
    return list(jobs.values())


def _check(job: _Job, adapter: Adapter) -> None:
    """Raises UnsupportedModelError where the form of a stored matrix cannot take an update."""
    holder = job.holder
    is_dora = any(piece.update.magnitude_N is not None for piece in job.pieces)
    reason = None
    if isinstance(holder, Embedding):
        if holder.node.op_type == "GatherBlockQuantized" and coded(holder.node) is None:
            reason = "its zero points are floats"
    elif holder.factors is not None:
        if is_dora:
            reason = "it is a pair of low rank, whose rows DoRA cannot scale"
        elif any(one.holder not in _FLOATS for one in holder.factors):
            reason = "it is a pair of low rank with quantized factors"
        elif any(_is_turned_for_others(one) for one in holder.factors):
            reason = "it is a pair of low rank, one factor of which other nodes read turned"
    elif holder.holder == "MatMulNBits":
        if coded(holder.node) is None:
            reason = "its columns are reordered, or its zero points are floats"
    elif holder.holder not in _FLOATS:
        reason = f"it is stored by {holder.holder}, which has no rounding here"
    if reason is not None:
        raise UnsupportedModelError(
            f"{adapter.path}: {job.name}: expected a matrix that can be added to, {reason}",
            hint="merge before quantizing, or keep the adapter apart: onnxpress lora slots",
        )


def _merge_table(graph: ir.Graph, job: _Job, embedding: Embedding) -> tuple[float, float]:
    """Of a token table; one that the head shares is stored a second time, since only lookups get the update."""
    if embedding.node.op_type == "GatherBlockQuantized":
        old = coded(embedding.node)
        assert old is not None
        before_VH = embedding.table_VH()
        wanted = np.ascontiguousarray(job.merged(before_VH.T).T)
        new = nearest(wanted, old)
        stored = store(graph, f"{job.name}.merged", new)
        replace_embedding(embedding, stored, shared=False, explicit_zero=old.zero is not None)
        return float(np.linalg.norm(new.w_NK() - wanted)), float(np.linalg.norm(wanted - before_VH))
    table = embedding.table
    assert table.const_value is not None
    size = _rounding(job, embedding.table_VH().T, table.const_value.dtype)

    def make(w_VH: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return job.merged(np.asarray(w_VH, np.float32).T).T.astype(w_VH.dtype)

    new_table = derived(graph, table.const_value, str(table.name), [embedding.num_rows, embedding.width], make)
    embedding.node.replace_input_with(0, new_table)
    drop_unused(graph, table)
    embedding.table = new_table
    return size


def _is_turned_for_others(linear: Linear) -> bool:
    """Whether the Transpose in front of a product has other readers."""
    turned = linear.node.inputs[1] if linear.holder == "Transpose+MatMul" else None
    return turned is not None and len(turned.uses()) > 1


def _untie(graph: ir.Graph, job: _Job, linear: Linear) -> None:
    """Gives a product a matrix of its own, [K, N], where other nodes read the transposed one too."""
    tensor = linear.weight.const_value
    assert tensor is not None

    def make(w_NK: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return job.merged(np.asarray(w_NK, np.float32)).T.astype(w_NK.dtype)

    new = derived(graph, tensor, str(linear.weight.name), linear.shape[::-1], make)
    linear.node.replace_input_with(1, new)
    linear.holder, linear.weight = "MatMul", new


def _widen(graph: ir.Graph, job: _Job, first: Linear, second: Linear) -> None:
    """x A B + x a b = x [A a] [B; b]."""
    rank, rows, columns = first.num_out, second.num_out, first.num_in
    a_RK = np.concatenate([piece.update.a_RK for piece in job.pieces])
    b_NR = np.zeros((rows, len(a_RK)), np.float32)
    column = 0
    for piece in job.pieces:
        b_NR[piece.start : piece.start + len(piece.rows), column : column + piece.update.rank] = piece.b_NR
        column += piece.update.rank
    wide = rank + len(a_RK)
    old_first, old_second = dataclasses.replace(first), dataclasses.replace(second)
    first.set_weight(
        lambda: np.concatenate([old_first.w_NK(), a_RK]), unique_name(graph, str(first.weight.name)), (wide, columns)
    )
    second.set_weight(
        lambda: np.concatenate([old_second.w_NK(), b_NR], axis=1),
        unique_name(graph, str(second.weight.name)),
        (rows, wide),
    )
    for factor, shape in ((first, (columns, wide)), (second, (wide, rows))):
        if factor.holder == "Transpose+MatMul" and factor.node.inputs[1] is not None:
            factor.node.inputs[1].shape = ir.Shape(shape)
    middle = first.output
    if middle.shape is not None:
        middle.shape = ir.Shape([*list(middle.shape)[:-1], wide])
