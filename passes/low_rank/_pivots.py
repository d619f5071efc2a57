"""Pairs of factors of which a part is the identity, and so is not stored: R (N + K - R) parameters, not R (N + K).

Of a matrix of rank R, some R rows make all the others, W = [C W_p; W_p], and some R columns do, W = [W_p, W_p D]. The
pivots must lie side by side, or the activation would have to be put in another order at run time. Inside a feed-forward
layer an order costs nothing: its features are put in one that has the pivots of `down` first, and those of `up` last.
Queries and keys (turned by position) and what adds to the residual stream have no such freedom, and stay plain pairs.

Paper:   arXiv:2501.19090 (PIFA): pivot rows, lossless
Differs: columns as pivots too; pivots by QR of the factor that the others are made from, in an order shared by both
         ends of a layer
Axes:    N out features, K in features, R rank, I inner features of a feed-forward layer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.linalg

from onnxpress.compiler.inner_features import InnerFeatures, all_inner_features, choose_constant, inner_biases
from onnxpress.compiler.linears import Linear, unique_name
from onnxpress.passes.low_rank._pairs import Floats, Form

Index = npt.NDArray[np.integer]
_FLOATS = ("MatMul", "Gemm", "Transpose+MatMul")
_OPSET = 13  # from which Split takes sizes as an input


class Place(NamedTuple):
    """Where a matrix may have pivots.

    Attributes:
        form: which of its sides.
        limit: pivots there can be at most.
    """

    form: Literal["outputs", "inputs"]
    limit: int


@dataclass
class Layer:
    """A feed-forward layer whose features may be put in another order.

    Attributes:
        features: its ends.
        maker: the linear whose last rows are pivots: up, or gate and up in one.
    """

    features: InnerFeatures
    maker: Linear

    @property
    def keys(self) -> list[int]:
        """Ids of what its linears give."""
        return [id(one.output) for one in (*self.features.makers, self.features.reader)]

    def places(self) -> dict[int, Place]:
        """By id of what the linear gives."""
        width = self.features.width
        return {
            id(self.maker.output): Place("outputs", width),
            id(self.features.reader.output): Place("inputs", width),
        }


def find_layers(linears: Sequence[Linear], opset: int) -> list[Layer]:
    """The layers of which both ends are float matrices of their own, and can be put in another order."""
    layers = []
    for features in all_inner_features(linears)[0] if opset >= _OPSET else []:
        ends = [features.reader, *features.makers]
        if any(one.holder not in _FLOATS for one in ends):
            continue
        last = [part.linear for part in features.parts if part.linear.kind in ("up", "gate_up")]
        if last:
            layers.append(Layer(features, last[0]))
    return layers


def choose_pivots(matrix_RM: Floats, pool: Index, count: int) -> Index:
    """`count` columns of a matrix, among `pool`, that span what its columns span; by QR with column pivoting.

    Returns:
        Indices, the strongest first.
    """
    _, order = scipy.linalg.qr(matrix_RM[:, pool], mode="r", pivoting=True, check_finite=False)
    chosen: Index = pool[order[:count]]
    return chosen


def coefficients(pivots_RP: Floats, others_RM: Floats) -> Floats:
    """X with pivots X = others, float64 [P, M]; where pivots depend on each other, with zeros for the weaker."""
    q, r, order = scipy.linalg.qr(pivots_RP, mode="economic", pivoting=True, check_finite=False)
    size = np.abs(r.diagonal())
    rank = int((size > np.finfo(np.float64).eps * max(pivots_RP.shape) * size[:1]).sum()) if len(size) else 0
    solved = np.zeros((pivots_RP.shape[1], others_RM.shape[1]))
    projected = q[:, :rank].T @ others_RM
    solved[order[:rank]] = scipy.linalg.solve_triangular(r[:rank, :rank], projected, check_finite=False)
    return solved


def pivoted_outputs(first_KR: Floats, second_RN: Floats) -> tuple[Floats, Floats]:
    """A [K, R] and B [R, N - R] with x [A B, A] = x first second, of which the last R outputs are pivots.

    Law:    the same product up to rounding, if the last R columns of `second` span the others.
    """
    first, second = (np.asarray(one, np.float64) for one in (first_KR, second_RN))
    rank = first.shape[1]
    pivots, others = second[:, -rank:], second[:, :-rank]
    return first @ pivots, coefficients(pivots, others)


def pivoted_inputs(first_KR: Floats, second_RN: Floats) -> tuple[Floats, Floats]:
    """A [K - R, R] and B [R, N] with (x1 + x2 A) B = x first second, of which the first R inputs are pivots."""
    first, second = (np.asarray(one, np.float64) for one in (first_KR, second_RN))
    rank = first.shape[1]
    pivots, others = first[:rank], first[rank:]
    return coefficients(pivots.T, others.T).T, pivots @ second


def choose_order(width: int, up_RI: Floats | None, down_RI: Floats | None) -> Index:
    """An order of the features with pivots of `down` first and those of `up` last, [I].

    Args:
        width: I.
        up_RI: the columns of up's second factor, [R, I]; None where it has no pivots.
        down_RI: the rows of down's first factor, turned.
    """
    every = np.arange(width)
    last: Index = every[:0] if up_RI is None else choose_pivots(up_RI, every, len(up_RI))
    first: Index = every[:0]
    if down_RI is not None:
        free = np.setdiff1d(every, last)
        rank = len(down_RI)
        if rank <= len(free):
            first = choose_pivots(down_RI, free, rank)
        else:
            # More pivots than there is room for: both ends share those that tell most beside all that are free.
            basis = scipy.linalg.qr(down_RI[:, free], mode="economic", check_finite=False)[0]
            left = down_RI[:, last] - basis @ (basis.T @ down_RI[:, last])
            first = np.concatenate([free, last[choose_pivots(left, np.arange(len(last)), rank - len(free))]])
    shared = np.intersect1d(first, last)
    middle = np.setdiff1d(every, np.concatenate([first, last]))
    order: Index = np.concatenate([np.setdiff1d(first, shared), middle, shared, np.setdiff1d(last, shared)])
    return order


def reorder(
    layer: Layer, results: dict[int, tuple[Floats, ...]], keep: Callable[[Floats], Floats]
) -> dict[int, tuple[tuple[Floats, ...], Form]]:
    """Puts the features of a layer in an order that pairs can have pivots in, and gives these pairs.

    Args:
        layer: its constants, and weights without a result, are changed in the graph.
        results: by id of what a linear gives: the factors [K, R] and [R, N], or a new matrix [K, N].
        keep: gets each array of the new results, and gives what is to be kept of it.

    Returns:
        The results of all linears of the layer that have one, and their form: pivoted factors, or what they had in the
        new order, also where pivots would lose what factors have. None where no end has factors: nothing changes.
    """
    features, maker, reader = layer.features, layer.maker, layer.features.reader
    up, down = (results.get(id(one.output), ()) for one in (maker, reader))
    if len(up) != 2 and len(down) != 2:
        return {}
    order = choose_order(
        features.width,
        np.asarray(up[1], np.float64)[:, -features.width :] if len(up) == 2 else None,
        np.asarray(down[0], np.float64).T if len(down) == 2 else None,
    )
    found: dict[int, tuple[tuple[Floats, ...], Form]] = {}
    for linear in (*features.makers, reader):
        result = results.get(id(linear.output), ())
        is_reader = linear is reader
        index = order if is_reader else features.rows(linear, order)
        for slot in () if is_reader else inner_biases(linear):
            linear.bias = choose_constant(linear.node, slot, index)
        if not result:
            _reorder_weight(linear, index, axis=1 if is_reader else 0)
            continue
        if is_reader:
            ordered = (np.asarray(result[0])[index], *result[1:])
        else:
            ordered = (*result[:-1], np.asarray(result[-1])[:, index])
        form: Form = ""
        if len(ordered) == 2 and (is_reader or linear is maker):
            pivoted = pivoted_inputs(*ordered) if is_reader else pivoted_outputs(*ordered)
            pivoted = tuple(np.asarray(one, result[0].dtype) for one in pivoted)  # type: ignore[assignment]
            if _is_same(*ordered, *pivoted, is_reader=is_reader):
                ordered, form = pivoted, "inputs" if is_reader else "outputs"
        found[id(linear.output)] = tuple(keep(np.ascontiguousarray(one, result[0].dtype)) for one in ordered), form
    features.choose_vectors(order)
    return found


def _is_same(first_KR: Floats, second_RN: Floats, a: Floats, b: Floats, *, is_reader: bool) -> bool:
    """Whether pivoted factors, as they are stored, give the product of plain ones up to what the type rounds.

    They do not where pivots must come from a part of the features that does not tell the others.
    """
    want = np.asarray(first_KR, np.float32) @ np.asarray(second_RN, np.float32)
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    found = np.concatenate([b, a @ b]) if is_reader else np.concatenate([a @ b, a], axis=1)
    rounding = max(np.finfo(one).eps for one in (first_KR.dtype, np.float32))
    allowed = 0.1 * math.sqrt(rounding) * float(np.linalg.norm(want))
    return bool(np.linalg.norm(found - want) <= allowed)


def _reorder_weight(linear: Linear, index: Index, axis: int) -> None:
    """Rows (axis 0) or columns of a float matrix in another order, when it is saved."""
    before, graph, is_turned = linear.weight.const_value, linear.node.graph, linear.is_turned()
    assert before is not None
    assert isinstance(graph, ir.Graph)

    def reordered() -> npt.NDArray[np.float32]:
        stored = before.numpy()
        return np.take(np.asarray(stored.T if is_turned else stored, np.float32), index, axis)

    linear.set_weight(reordered, unique_name(graph, f"{linear.name}.reordered"))
