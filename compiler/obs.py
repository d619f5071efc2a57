"""Which features a linear can do without, what that costs, and how the others make up for them.

The optimal brain surgeon: with H = E[x x^T], leaving the features P out and moving the weights of the others to where
they make up for it best raises E||W x - W' x||^2 by tr(W_P ([H^-1]_PP)^-1 W_P^T). Groups of features (the channel of a
layer, the columns of an attention head) are taken out one after the other, the cheapest first, so that one pass gives
the loss of every number of groups.

Paper:   Hassibi and Stork, "Second order derivatives for network pruning" (1993); groups: arXiv:2302.04089 (ZipLM)
Differs: several groups go at once, chosen by their costs alone; what they cost together is exact.
Axes:    N out features, K in features, G groups of U features each
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Index = npt.NDArray[np.integer]


@dataclass
class Elimination:
    """A linear whose groups are taken out one after the other.

    Attributes:
        kept: numbers of the groups that are left, ascending.
        w_NK: the weights of what is left, fitted; columns of other groups are zeros. float64.
        loss: E||W x - W' x||^2 so far, with the H that was given.
    """

    kept: Index
    w_NK: Floats
    loss: float


def eliminate(
    w_NK: npt.NDArray[np.floating], hessian_KK: Floats, unit: int, counts: Sequence[int]
) -> Iterator[Elimination]:
    """Takes groups out until `counts` are left; yields what is there at each of them.

    Args:
        w_NK: the weights that are to be matched. Not changed.
        hessian_KK: H, positive definite (`damped`).
        unit: U; group g is the columns g U to (g + 1) U.
        counts: of groups to keep, descending, each at most G. Between two of them groups go at once: small steps choose
            better and cost more.
    Laws:   the loss is that of the least-squares fit of what is kept to W x; it never falls.
    Cost:   O(K^2 (N + K)) for all groups.
    """
    rows, columns = w_NK.shape
    w = np.array(w_NK, np.float64)
    inverse = np.linalg.inv(hessian_KK)
    inverse = (inverse + inverse.T) / 2
    kept = np.arange(columns // unit)
    loss = 0.0
    for count in counts:
        if count < len(kept):
            costs = _costs(w, inverse, unit)
            is_out = np.zeros(len(kept), bool)
            is_out[np.argpartition(costs, len(kept) - count - 1)[: len(kept) - count]] = True
            out, rest = (np.flatnonzero(np.repeat(one, unit)) for one in (is_out, ~is_out))
            pivot, cross = inverse[np.ix_(out, out)], inverse[np.ix_(out, rest)]
            pull = np.linalg.solve(pivot, w[:, out].T)  # ([H^-1]_PP)^-1 W_P^T
            loss += float(np.einsum("np,pn->", w[:, out], pull))
            w = w[:, rest] - pull.T @ cross
            inverse = inverse[np.ix_(rest, rest)]
            inverse -= cross.T @ np.linalg.solve(pivot, cross)
            kept = kept[~is_out]
        whole = np.zeros((rows, columns))
        whole[:, (kept[:, None] * unit + np.arange(unit)).reshape(-1)] = w
        yield Elimination(kept, whole, loss)


def _costs(w_NK: Floats, inverse_KK: Floats, unit: int) -> Floats:
    """What each of the groups that are left costs alone."""
    if unit == 1:
        costs: Floats = np.square(w_NK).sum(axis=0) / inverse_KK.diagonal()
        return costs
    places = np.arange(w_NK.shape[1]).reshape(-1, unit)
    blocks = inverse_KK[places[:, :, None], places[:, None, :]]
    held = w_NK[:, places].transpose(1, 2, 0)  # [G, U, N]
    summed: Floats = (held * np.linalg.solve(blocks, held)).sum(axis=(1, 2))
    return summed
