"""Pruning column by column as the textbook has it: an inverse for every step, a loop over every weight (slow)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def reference(
    w_NK: Array,
    hessian_KK: Array,
    order: list[int],
    spans: list[tuple[int, int, int]],
    quantize: Callable[[float, int, int], float] = lambda value, row, column: value,
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Optimal brain surgeon with a fixed order (SparseGPT): the matrix, and what stays.

    Args:
        w_NK: weights.
        hessian_KK: damped.
        order: of the columns.
        spans: (first, last + 1, zeros) in this order: each row chooses so many zeros among these columns at once.
        quantize: a value, its row and its column to what is stored.
    """
    h = hessian_KK[np.ix_(order, order)]
    inverses = [np.linalg.inv(h[step:, step:]) for step in range(len(order))]
    result, keep = np.zeros_like(w_NK), np.ones(w_NK.shape, np.bool_)
    for row in range(len(w_NK)):
        w = [float(w_NK[row, column]) for column in order]
        for first, last, count in spans:
            costs = {step: w[step] ** 2 / inverses[step][0, 0] for step in range(first, last)}
            gone = sorted(costs, key=lambda step, costs=costs: costs[step])[:count]
            for step in range(first, last):
                column = order[step]
                keep[row, column] = step not in gone
                stored = 0.0 if step in gone else quantize(w[step], row, column)
                inverse, error = inverses[step], w[step] - stored
                for later in range(step, len(order)):
                    w[later] -= error * inverse[later - step, 0] / inverse[0, 0]
                result[row, column] = stored
    return result, keep
