"""The best approximation of a matrix by a product of low rank, without its whole decomposition.

Paper:   Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4 (subspace iteration)
Axes:    N out features, K in features, R rank
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]

_EXTRA = 8  # directions beside those asked for, which make the last of them right
_ROUNDS = 6  # of subspace iteration; each brings neighbours of the last direction apart
_SMALL = 256  # a matrix with a side up to this is decomposed whole


def truncated_svd(w_NK: Floats, rank: int, *, seed: int = 0) -> tuple[Floats, Floats, float]:
    """B [N, R] and A [R, K] of equal norms with B A nearest to w.

    Args:
        w_NK: a matrix. Not changed.
        rank: R, at most min(N, K).
        seed: of the first directions.

    Returns:
        B and A, float32, and ||w - B A||_F / ||w||_F, 0 for a matrix of zeros.
    Laws:   a matrix of rank R comes back; the error is that of the singular values left out.
    Cost:   O(N K (R + 8)), 14 products; a small matrix O(N K min(N, K)).
    """
    w = w_NK.astype(np.float64)
    norm = float(np.linalg.norm(w))
    rank = min(rank, *w.shape)
    if min(w.shape) <= max(_SMALL, 2 * (rank + _EXTRA)):
        left, sizes, right = np.linalg.svd(w, full_matrices=False)
    else:
        start = np.random.default_rng(seed).standard_normal((w.shape[1], rank + _EXTRA))
        basis = np.linalg.qr(w @ start)[0]
        for _ in range(_ROUNDS):
            basis = np.linalg.qr(w @ np.linalg.qr(w.T @ basis)[0])[0]
        left, sizes, right = np.linalg.svd(basis.T @ w, full_matrices=False)
        left = basis @ left
    root = np.sqrt(sizes[:rank])
    b_NR = (left[:, :rank] * root).astype(np.float32)
    a_RK = (root[:, None] * right[:rank]).astype(np.float32)
    error = float(np.linalg.norm(w - b_NR.astype(np.float64) @ a_RK.astype(np.float64)))
    return b_NR, a_RK, error / norm if norm else 0.0
