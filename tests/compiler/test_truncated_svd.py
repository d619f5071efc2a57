"""The truncated decomposition against the whole one."""

from __future__ import annotations

import numpy as np
import pytest

from onnxpress.compiler.truncated_svd import truncated_svd


def decaying(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    width = min(rows, columns)
    left = np.linalg.qr(rng.standard_normal((rows, width)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, width)))[0]
    return ((left * 0.9 ** np.arange(width)) @ right.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (300, 400), (400, 300)])
@pytest.mark.parametrize("rank", [1, 5])
def test_law_the_error_is_that_of_the_singular_values_left_out(shape: tuple[int, int], rank: int) -> None:
    w = decaying(*shape)
    b, a, error = truncated_svd(w, rank)
    assert b.shape == (shape[0], rank)
    assert a.shape == (rank, shape[1])
    sizes = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    wanted = float(np.sqrt((sizes[rank:] ** 2).sum() / (sizes**2).sum()))
    assert error == pytest.approx(wanted, rel=1e-4)
    assert np.linalg.norm(b @ a - w) / np.linalg.norm(w) == pytest.approx(error, rel=1e-3)
    assert np.allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1), rtol=1e-4)


@pytest.mark.parametrize("shape", [(20, 30), (400, 300)])
def test_law_a_matrix_of_that_rank_comes_back(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    w = (rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))).astype(np.float32)
    b, a, error = truncated_svd(w, 3)
    assert error < 1e-6
    assert np.allclose(b @ a, w, atol=1e-5)


def test_a_rank_beyond_the_sides_and_zeros() -> None:
    b, a, error = truncated_svd(decaying(4, 6), 10)
    assert a.shape == (4, 6)
    assert error < 1e-6
    assert truncated_svd(np.zeros((4, 6), np.float32), 2)[2] == 0
    assert b.dtype == a.dtype == np.float32
