"""What channels are worth on data, and how the products that read them make up for those that are gone.

The model's inputs are streamed twice. The first time second moments of what every reader sees tell, by the optimal
brain surgeon, what each channel costs at the outputs of all its readers together; the second time each reader of fewer
channels is fitted, in the order of the graph, to what it gave in the whole model, given what it sees in the pruned one.

Paper:   arXiv:1707.06342 (ThiNet): channels by what the next layer loses, and least squares for the ones that are kept
Differs: kernels as a whole are fitted, with a bias; readers of the same channels decide together; the fit is to the
         whole model's outputs, and a share of the samples that it has not seen says how far it may go
Axes:    P parts, N out features, K in features, T samples, G channels of a group, U columns of one channel
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy.linalg import cho_factor, cho_solve

from onnxpress.compiler.calibration import Calibration, Feeds, Stage, call, open_session
from onnxpress.compiler.mapped import on_disk
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.region import build_model
from onnxpress.compiler.stats import shrunk
from onnxpress.passes.pruning._channel_groups import Group, Key, alive_without
from onnxpress.passes.pruning._channel_readers import Reader, find_readers, is_shared
from onnxpress.passes.pruning._channel_walk import Labels, Walk, constant_of

Floats = npt.NDArray[np.float64]
Index = npt.NDArray[np.integer]

_WIDEST = 6144  # columns of which second moments are taken together (300 MB); of more only each column's own
_RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # tried in turn, as long as the next one helps
_HELD_OUT = 4  # every fourth window, or sample where there is but one window, says how far a fit may go


@dataclass
class Moments:
    """Sums over samples of what a part of a reader sees: x of K features, around its mean where a bias can hold it."""

    count: int
    mean_K: Floats
    second: Floats  # [K, K], or [K] where there are too many

    def covariance(self, *, centered: bool) -> Floats:
        """E[(x - m)(x - m)^T], made fit to be inverted; its diagonal alone where that is all there is."""
        mean_K = self.mean_K / max(self.count, 1) if centered else np.zeros_like(self.mean_K)
        second = self.second / max(self.count, 1)
        if second.ndim == 1:
            return np.maximum(second - np.square(mean_K), 0.0)
        return shrunk(second - np.outer(mean_K, mean_K), self.count)


@dataclass
class _Part:
    """A matrix of a reader while columns are taken out of it.

    Attributes:
        w_NK: of the columns that are left, moved to make up for the others.
        inverse: of the covariance, or the covariance's diagonal [K] where that is all there is.
        places: [G, U], columns of each channel of the group.
        left: which columns of the whole matrix are left.
    """

    w_NK: Floats
    inverse: Floats
    places: Index
    energy: float
    left: Index = field(init=False)

    def __post_init__(self) -> None:
        self.left = np.arange(self.w_NK.shape[1])

    def costs(self, kept: Index) -> Floats:
        """What each of the channels that are left costs alone, relative to the energy of the outputs."""
        at = np.searchsorted(self.left, self.places[kept])  # [G, U]
        if self.inverse.ndim == 1:
            each = np.square(self.w_NK).sum(axis=0) * self.inverse
            return np.asarray(each[at].sum(axis=1)) / self.energy
        blocks = self.inverse[at[:, :, None], at[:, None, :]]
        held = self.w_NK[:, at].transpose(1, 2, 0)
        return np.asarray((held * np.linalg.solve(blocks, held)).sum(axis=(1, 2))) / self.energy

    def remove(self, channels: Index) -> float:
        """Takes channels out, and says what that costs once the others have made up for them."""
        at = np.searchsorted(self.left, np.sort(self.places[channels].reshape(-1)))
        rest = np.setdiff1d(np.arange(len(self.left)), at)
        w_out = self.w_NK[:, at]
        if self.inverse.ndim == 1:
            loss = float((np.square(w_out).sum(axis=0) * self.inverse[at]).sum())
            self.w_NK, self.inverse = self.w_NK[:, rest], self.inverse[rest]
        else:
            pivot, cross = self.inverse[np.ix_(at, at)], self.inverse[np.ix_(at, rest)]
            pull = np.linalg.solve(pivot, w_out.T)
            loss = float(np.einsum("np,pn->", w_out, pull))
            self.w_NK = self.w_NK[:, rest] - pull.T @ cross
            self.inverse = self.inverse[np.ix_(rest, rest)] - cross.T @ np.linalg.solve(pivot, cross)
        self.left = self.left[rest]
        return loss / self.energy


def part(w_NK: npt.NDArray[np.floating], covariance: Floats, places: Index) -> _Part:
    """A reader's matrix [N, K], what it sees, and the columns [G, U] of the channels that may go."""
    w = np.array(w_NK, np.float64)
    energy = float(
        (np.square(w) * covariance).sum() if covariance.ndim == 1 else np.einsum("nk,nk->", w @ covariance, w)
    )
    if covariance.ndim == 1:
        return _Part(w, covariance, places, energy or 1.0)
    inverse = np.asarray(np.linalg.inv(covariance), np.float64)
    return _Part(w, (inverse + inverse.T) / 2, places, energy or 1.0)


def eliminate_together(
    parts: Sequence[_Part], total: int, counts: Sequence[int]
) -> Iterator[tuple[npt.NDArray[np.integer], float]]:
    """Takes channels out of all their readers, those first that cost all of them together the least.

    Args:
        parts: all have the same G channels; changed.
        total: G.
        counts: numbers of channels to keep, descending.

    Yields:
        For each count, the channels that are left, ascending, and the sum of what the parts lose, each relative.

    Laws: a single part gives what `obs.eliminate` gives; a channel that never varies costs nothing and goes first.
    """
    kept, loss = np.arange(total), 0.0
    for count in counts:
        if count < len(kept):
            costs = np.sum([one.costs(kept) for one in parts], axis=0)
            out = kept[np.sort(np.argpartition(costs, len(kept) - count - 1)[: len(kept) - count])]
            loss += sum(one.remove(out) for one in parts)
            kept = np.setdiff1d(kept, out)
        yield kept, loss


@dataclass
class _Sums:
    """Second moments of z = [x, 1] and of what is missing at the outputs, r = y0 - y."""

    size: int
    rows: int

    def __post_init__(self) -> None:
        self.gram = np.zeros((self.size, self.size))
        self.cross = np.zeros((self.rows, self.size))
        self.energy, self.count = 0.0, 0

    def add(self, z_TK: npt.NDArray[np.float32], r_TN: npt.NDArray[np.float32]) -> None:
        self.gram += z_TK.T @ z_TK
        self.cross += r_TN.T @ z_TK
        self.energy += float(np.vdot(r_TN, r_TN))
        self.count += len(z_TK)

    def __add__(self, other: _Sums) -> _Sums:
        both = _Sums(self.size, self.rows)
        both.gram, both.cross = self.gram + other.gram, self.cross + other.cross
        both.energy, both.count = self.energy + other.energy, self.count + other.count
        return both

    def solve(self, ridge: float, *, with_bias: bool) -> Floats:
        """D such that y + D z is best like y0, held near zero; [N, K], the last column of it the bias."""
        scale = max(self.count, 1)
        h = self.gram / scale
        features = self.size - with_bias
        mean = float(h.diagonal()[:features].mean()) if features else 0.0
        h[np.arange(self.size), np.arange(self.size)] += np.where(
            np.arange(self.size) < features, ridge * mean + 1e-12 * (mean or 1.0), 1e-12
        )
        return np.asarray(cho_solve(cho_factor(h, overwrite_a=True), self.cross.T / scale).T)

    def error(self, d_NK: Floats) -> float:
        """Sum of squares of what is missing when D is added."""
        return self.energy - 2 * float(np.vdot(d_NK, self.cross)) + float(np.vdot(d_NK @ self.gram, d_NK))


def best_change(fitting: _Sums, judging: _Sums, *, with_bias: bool) -> tuple[Floats, float, float]:
    """The change of weights that helps most on samples that it was not fitted to; zeros where none helps.

    Returns:
        D [N, K], and the sums of squares on those samples without it and with it.
    """
    none = np.zeros((fitting.rows, fitting.size))
    is_finite = np.isfinite(fitting.gram).all() and np.isfinite(fitting.cross).all()
    if not fitting.size or not fitting.count or not is_finite:
        return none, judging.energy, judging.energy
    error, ridge = math.inf, 0.0
    for one in _RIDGES:
        tried = judging.error(fitting.solve(one, with_bias=with_bias))
        if not tried < error:
            break
        error, ridge = tried, one
    if not error < judging.energy:
        return none, judging.energy, judging.energy
    return (fitting + judging).solve(ridge, with_bias=with_bias), judging.energy, error


@dataclass
class Data:
    """Inputs of a model, and how much of what readers see is looked at.

    Attributes:
        windows: inputs by name, one run each.
        positions: samples of each reader, over all windows.
    """

    windows: Sequence[Feeds]
    positions: int

    @property
    def each(self) -> int:
        """Samples of one window."""
        return max(1, -(-self.positions // len(self.windows)))

    @property
    def batch(self) -> int:
        """Inputs of one window, along the first axis."""
        return next((len(one) for one in self.windows[0].values() if one.ndim), 1)

    @property
    def has_judges(self) -> bool:
        """Whether there is anything to judge a fit by that it has not seen."""
        return len(self.windows) > 1 or self.batch > 1

    def judges(self, window: int, places: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.bool_]:
        """Which places of a window, of `total` in order of its inputs, judge a fit and are not fitted to."""
        if len(self.windows) > 1:
            turn = min(_HELD_OUT, len(self.windows))
            return np.full(len(places), window % turn == turn - 1)
        turn = min(_HELD_OUT, self.batch)
        judges: npt.NDArray[np.bool_] = places * self.batch // total % turn == turn - 1
        return judges


def measure(
    model: ir.Model, walk: Walk, groups: list[Group], data: Data, context: Context, report: Report
) -> list[Group]:
    """Fills in losses of groups by what their readers lose; those of which a reader sees no numbers are left out."""
    readers = [one for one in find_readers(walk) if _reads(one, walk, groups)]
    seen: dict[int, list[Moments]] = {}
    by_end: dict[int, list[Reader]] = {}
    for one in readers:
        by_end.setdefault(id(one.source), []).append(one)
    ends = [one.source for one in readers]
    with Calibration(model, data.windows, [], context.work_dir, ends=ends) as run:
        for stage in context.track(run.stages, "prune_channels: what readers see"):
            arrays = run.teacher(stage)
            for one in by_end[id(stage.end)]:
                seen[id(one.node)] = _moments(one, arrays, data, context)
    found = []
    for group in context.track(groups, "prune_channels: what channels cost"):
        of_group = [one for one in readers if _reads(one, walk, [group])]
        if not all(np.isfinite(moments.second).all() for one in of_group for moments in seen[id(one.node)]):
            report.skip(group.name, "what its channels are is not finite on the calibration data")
            continue
        parts = [made for one in of_group for made in _parts(one, walk, group, seen[id(one.node)])]
        gone = list(eliminate_together(parts, group.total, group.counts))
        group.kept, group.losses = [kept for kept, _ in gone], [loss for _, loss in gone]
        found.append(group)
    return found


def _reads(reader: Reader, walk: Walk, groups: Sequence[Group]) -> bool:
    return any(walk.cuts[number] is reader.cut for group in groups for number in group.cuts)


def _moments(reader: Reader, arrays: Sequence[npt.NDArray[Any]], data: Data, context: Context) -> list[Moments]:
    rng = np.random.default_rng(context.seed)
    size = len(reader.labels)
    shape = (size, size) if size <= _WIDEST else (size,)
    found = [Moments(0, np.zeros(size), np.zeros(shape)) for _ in range(reader.parts)]
    for x in arrays:
        for one, x_TK in zip(found, reader.patches(x, reader.samples(x, data.each, rng)), strict=True):
            one.count += len(x_TK)
            one.mean_K += x_TK.sum(axis=0, dtype=np.float64)
            one.second += x_TK.T @ x_TK if one.second.ndim == 2 else np.square(x_TK).sum(axis=0, dtype=np.float64)
    for one in found:
        one.second = on_disk(one.second, context.work_dir)
    return found


def _parts(reader: Reader, walk: Walk, group: Group, moments: Sequence[Moments]) -> Iterator[_Part]:
    """Matrices of a reader with the columns of a group's channels."""
    roots = walk.roots(reader.labels)
    order = np.argsort(roots, kind="stable")
    first = np.searchsorted(roots[order], group.roots)
    width = int(np.searchsorted(roots[order], group.roots[0], side="right") - first[0])
    places = np.sort(order[first[:, None] + np.arange(width)], axis=1)
    for w_NK, one in zip(reader.matrices(), moments, strict=True):
        yield part(w_NK, one.covariance(centered=reader.bias() is not None), places)


def refit(
    model: ir.Model, walk: Walk, gone: Labels, data: Data, context: Context, report: Report
) -> dict[Key, npt.NDArray[np.floating]]:
    """New matrices and biases of readers that lose channels, of the shape before, zeros in the columns that go.

    A matrix that several nodes read, or of too many columns, is left as it is: only biases are fitted.

    Args:
        model: not changed.
        walk: of it.
        gone: roots of the channels that go.
        data: as for `measure`.
        report: gets how far outputs are off on samples that were left out, without the fit and with it.
    """
    alive = alive_without(walk, gone)
    readers = [one for one in find_readers(walk) if not alive(one.cut.labels).all()]
    by_source: dict[int, list[Reader]] = {}
    for one in readers:
        by_source.setdefault(id(one.source), []).append(one)
    by_output = {id(one.node.outputs[0]): one for one in readers}
    found: dict[Key, npt.NDArray[np.floating]] = {}
    inputs: dict[int, list[npt.NDArray[Any]]] = {}
    errors: list[_Error] = []
    ends = [value for one in readers for value in (one.source, one.node.outputs[0])]
    with Calibration(model, data.windows, [], context.work_dir, ends=ends) as run:
        for stage in context.track(run.stages, "prune_channels: fitting"):
            reader = by_output.get(id(stage.end))
            if reader is None:
                teacher, pruned = run.both(stage)
            else:
                teacher = run.teacher(stage)
                pruned = run.assign(stage.end, _outputs(model, reader, found, inputs.pop(id(reader.node)), stage))
            for one in by_source.get(id(stage.end), []):
                errors.append(_fit(one, alive(one.labels), teacher, pruned, data, context, found))
                inputs[id(one.node)] = pruned
    for name, values in (
        ("output_error_unfitted", [one.unfitted for one in errors]),
        ("output_error", [one.fitted for one in errors]),
    ):
        if values:
            report.metrics[name] = float(np.sqrt(np.mean(np.square(values))))
    for one in readers:
        if not len(_columns(one, alive(one.labels))):
            del found[id(one.node), 1]
    return found


def _columns(reader: Reader, stays_K: npt.NDArray[np.bool_]) -> Index:
    """Numbers of the columns of a matrix that are fitted."""
    if is_shared(reader) or stays_K.sum() > _WIDEST:
        return np.zeros(0, np.int64)
    return np.flatnonzero(stays_K)


@dataclass(frozen=True)
class _Error:
    """Of a reader's outputs on samples that were left out, relative to the outputs, without the fit and with it."""

    unfitted: float
    fitted: float


def _fit(
    reader: Reader,
    stays_K: npt.NDArray[np.bool_],
    teacher: Sequence[npt.NDArray[Any]],
    pruned: Sequence[npt.NDArray[Any]],
    data: Data,
    context: Context,
    found: dict[Key, npt.NDArray[np.floating]],
) -> _Error:
    """Fits one reader; its new arrays go to `found`."""
    rng = np.random.default_rng(context.seed)
    w_PNK, bias = reader.matrices(), reader.bias()
    with_bias = bias is not None
    columns = _columns(reader, stays_K)
    sums = [[_Sums(len(columns) + with_bias, w_PNK.shape[1]) for _ in w_PNK] for _ in range(2)]
    energy = 0.0
    for number, (x0, x) in enumerate(zip(teacher, pruned, strict=True)):
        places = reader.samples(x0, data.each, rng)
        judges_T = data.judges(number, places, reader.total(x0))
        pairs = zip(reader.patches(x0, places), reader.patches(x, places), strict=True)
        for fitting, judging, w_NK, (x0_TK, x_TK) in zip(*sums, w_PNK, pairs, strict=True):
            whole_TN = x0_TK @ w_NK.T
            ones = np.ones((len(x_TK), int(with_bias)), np.float32)
            z_TK = np.concatenate([x_TK[:, columns], ones], axis=1)
            missing_TN = whole_TN - x_TK[:, stays_K] @ w_NK[:, stays_K].T
            for one, mask in ((fitting, ~judges_T), (judging, judges_T)):
                one.add(z_TK[mask], missing_TN[mask])
            energy += float(np.square(whole_TN[judges_T]).sum())
    new_PNK, moved, before, after = np.where(stays_K, w_PNK, 0), [], 0.0, 0.0
    for index, (fitting, judging) in enumerate(zip(*sums, strict=True)):
        d_NK, unfitted, fitted = best_change(fitting, judging, with_bias=with_bias)
        new_PNK[index][:, columns] += d_NK[:, : len(columns)].astype(np.float32)
        moved.append(d_NK[:, -1] if with_bias else np.zeros(0))
        before, after = before + unfitted, after + fitted
    found[id(reader.node), 1] = on_disk(reader.stored(new_PNK), context.work_dir)
    if bias is not None:
        alpha, beta = reader.scales
        found[id(reader.node), 2] = bias + np.concatenate(moved).astype(np.float32) * (alpha / beta)
    return _Error(*(float(np.sqrt(max(one, 0.0) / (energy or 1.0))) for one in (before, after)))


def _outputs(
    model: ir.Model,
    reader: Reader,
    found: dict[Key, npt.NDArray[np.floating]],
    inputs: Sequence[npt.NDArray[Any]],
    stage: Stage,
) -> Iterator[npt.NDArray[Any]]:
    """What a fitted reader gives in the pruned model, window by window."""
    node = reader.node
    held = [(slot, value) for slot, value in enumerate(node.inputs) if value is not None and slot < 3]
    dtype = inputs[0].dtype
    types = {id(reader.source): ir.DataType.from_numpy(dtype)}
    opset = model.graph.opset_imports.get("", 18)
    alone = build_model([node], [value for _, value in held], node.outputs, opset=opset, dtypes=types)
    session = open_session(ir.to_proto(alone).SerializeToString(), stage)
    weights = [
        np.asarray(found[id(node), slot], dtype) if (id(node), slot) in found else _array(value)
        for slot, value in held
        if slot
    ]
    added = found.get((id(node), 2)) if len(held) < 3 else None
    for x in inputs:
        (y,) = call(session, [x, *weights], stage)
        if added is not None:
            y = y + (reader.scales[1] * added).astype(dtype).reshape(-1, *(1,) * (y.ndim - 2))
        yield y


def _array(value: ir.Value) -> npt.NDArray[Any]:
    tensor = constant_of(value)
    assert tensor is not None
    return tensor.numpy()
