"""The best low-rank form of a matrix for the activation it reads.

Minimizes E||W x - V x||^2 over V of rank R. That is the singular value decomposition of W S for any S with S S^T = H:
what is lost are the squared singular values that are dropped. The left singular vectors U are all that is needed, for
V = U_R U_R^T W: no inverse of S, hence nothing that an activation of low rank could spoil.

Source:  arXiv:2403.07378 (SVD-LLM), arXiv:2503.12340 (SVD-LLM v2: eigenvectors instead of a Cholesky factor)
Axes:    N out features, K in features, R rank, H = E[x x^T]
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]


class Activation:
    """Second moments of an activation, and a root of them, made once for all matrices that read it.

    Attributes:
        hessian_KK: H, float64, symmetric, positive semidefinite up to rounding.
    """

    def __init__(self, hessian_KK: Floats) -> None:
        """Features that are not seen have rows of zeros."""
        self.hessian_KK = np.asarray(hessian_KK, np.float64)

    @functools.cached_property
    def root_KK(self) -> Floats:  # noqa: N802
        """S with S S^T = H, float64."""
        values_K, vectors_KK = np.linalg.eigh(self.hessian_KK)
        root: Floats = vectors_KK * np.sqrt(np.maximum(values_K, 0.0))
        return root


@dataclass(frozen=True)
class OutputDirections:
    """Directions of the outputs W x, the strongest first: left singular vectors of W S.

    Attributes:
        energy: squared singular values, what each direction has of E||W x||^2, float64 [min(N, K)].
        vectors: right singular vectors [K, K] where there are more outputs than inputs, else left ones [N, N].
        root_KK: S; None where `vectors` are left ones.
    """

    energy: Floats
    vectors: Floats
    root_KK: Floats | None

    def dropped(self, rank: int) -> float:
        """What is left of E||W x - V x||^2 by the best V of this rank."""
        return float(self.energy[rank:].sum())

    def factors(self, w_NK: Floats, rank: int) -> tuple[Floats, Floats]:
        """A [K, R] and B [R, N], float64, with x A B the best of this rank; directions without energy are zeros."""
        w = np.asarray(w_NK, np.float64)
        vectors = self.vectors[:, :rank]
        if self.root_KK is not None:
            found = self.energy[:rank] > np.finfo(np.float64).eps * max(float(self.energy[0]), 0.0)
            strength = np.sqrt(np.where(found, self.energy[:rank], 1.0))
            vectors = np.where(found, (w @ (self.root_KK @ vectors)) / strength, 0.0)
        return balanced(w.T @ vectors, vectors.T)


def output_directions(w_NK: Floats, activation: Activation) -> OutputDirections:
    """The directions of the outputs of a matrix; O(N K min(N, K)), in float64."""
    w = np.asarray(w_NK, np.float64)
    rows, columns = w.shape
    root_KK = None
    if rows <= columns:
        gram = w @ activation.hessian_KK @ w.T
    else:
        root_KK = activation.root_KK
        half = w @ root_KK
        gram = half.T @ half
    energy, vectors = np.linalg.eigh((gram + gram.T) / 2)
    return OutputDirections(np.maximum(energy[::-1], 0.0), vectors[:, ::-1], root_KK)


def balanced(first_KR: Floats, second_RN: Floats) -> tuple[Floats, Floats]:
    """The same product with factors of equal norms, direction by direction: neither overflows where types are short."""
    tiny = np.finfo(np.float64).tiny
    ratio_R = np.sqrt(np.maximum(np.square(second_RN).sum(axis=1), tiny))
    ratio_R = np.sqrt(ratio_R / np.sqrt(np.maximum(np.square(first_KR).sum(axis=0), tiny)))
    return first_KR * ratio_R, second_RN / ratio_R[:, None]
