"""The optimal brain surgeon: its sums are losses of least-squares fits, and its choice is better than size alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.compiler.obs import eliminate

Array = np.ndarray
few = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Array, Array, int]:
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    unit, groups = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(2, 10))
    columns = unit * groups
    mixed = rng.standard_normal((columns, columns)) * 3.0 ** rng.integers(-1, 2, columns)
    x_TK = rng.standard_normal((4 * columns, columns)) @ mixed
    hessian_KK = x_TK.T @ x_TK / len(x_TK)
    hessian_KK += 1e-3 * np.trace(hessian_KK) / columns * np.eye(columns)
    return rng.standard_normal((draw(st.integers(1, 12)), columns)), hessian_KK, unit


def lost(w_NK: Array, v_NK: Array, hessian_KK: Array) -> float:
    off = w_NK - v_NK
    return float(np.einsum("nk,kl,nl->", off, hessian_KK, off))


@few
@given(problems(), st.integers(1, 3))
def test_law_the_running_sum_is_the_loss_of_the_least_squares_fit(problem: tuple[Array, Array, int], step: int) -> None:
    w_NK, hessian_KK, unit = problem
    total = w_NK.shape[1] // unit
    whole, last = lost(w_NK, 0 * w_NK, hessian_KK), 0.0
    kept = np.arange(total)
    for found in eliminate(w_NK, hessian_KK, unit, list(range(total, 0, -step))):
        assert set(found.kept) <= set(kept)
        kept = found.kept
        columns = (kept[:, None] * unit + np.arange(unit)).reshape(-1)
        fitted = np.zeros_like(w_NK)
        fitted[:, columns] = np.linalg.solve(hessian_KK[np.ix_(columns, columns)], hessian_KK[columns] @ w_NK.T).T
        np.testing.assert_allclose(found.w_NK, fitted, atol=1e-6 * np.abs(w_NK).max())
        assert abs(found.loss - lost(w_NK, fitted, hessian_KK)) <= 1e-8 * whole
        assert found.loss >= last - 1e-12 * whole
        last = found.loss


@few
@given(problems())
def test_law_one_at_a_time_the_cheapest_goes_first(problem: tuple[Array, Array, int]) -> None:
    w_NK, hessian_KK, unit = problem
    total = w_NK.shape[1] // unit
    (first,) = eliminate(w_NK, hessian_KK, unit, [total - 1])
    losses = []
    for out in range(total):
        columns = np.delete(np.arange(total * unit), np.arange(out * unit, (out + 1) * unit))
        fitted = np.zeros_like(w_NK)
        fitted[:, columns] = np.linalg.solve(hessian_KK[np.ix_(columns, columns)], hessian_KK[columns] @ w_NK.T).T
        losses.append(lost(w_NK, fitted, hessian_KK))
    assert first.loss == pytest.approx(min(losses), rel=1e-6, abs=1e-12 * lost(w_NK, 0 * w_NK, hessian_KK))


def test_features_that_others_tell_cost_nothing() -> None:
    """A sum of two others is free, however large its weights are; magnitude would take another."""
    rng = np.random.default_rng(0)
    x_TK = rng.standard_normal((500, 8))
    x_TK[:, 3] = x_TK[:, 0] + x_TK[:, 5]
    w_NK = rng.standard_normal((6, 8))
    w_NK[:, 3] *= 10
    hessian_KK = x_TK.T @ x_TK / 500 + 1e-9 * np.eye(8)
    (found,) = eliminate(w_NK, hessian_KK, 1, [7])
    assert len({0, 3, 5} - set(found.kept)) == 1
    assert found.loss < 1e-6 * lost(w_NK, 0 * w_NK, hessian_KK)
