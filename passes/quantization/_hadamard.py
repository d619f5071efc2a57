"""Hadamard matrices: entries 1 and -1, rows orthogonal; they spread an outlier evenly over all features.

Source:  Paley, "On orthogonal matrices" (1933); doubling by Sylvester
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@functools.cache
def hadamard(order: int) -> Floats | None:
    """H [order, order] with H H^T = order I, entries 1 and -1; None where no construction known here gives one.

    A power of two times a matrix of Paley: order q + 1 for a prime q = 3 mod 4, 2 (q + 1) for a prime q = 1 mod 4.
    Do not write into it.
    """
    doublings = 0
    while True:
        size = order >> doublings
        base = np.ones((1, 1)) if size == 1 else _paley(size)
        if base is not None:
            for _ in range(doublings):
                base = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), base)
            return base
        if size % 2 or size < 2:
            return None
        doublings += 1


def rotation(order: int, rng: np.random.Generator) -> Floats | None:
    """Orthogonal, float64 [order, order]: a Hadamard matrix with random signs of its columns' features, normalised.

    Paper: arXiv:2404.00456 (QuaRot)
    """
    base = hadamard(order)
    if base is None:
        return None
    signs = rng.choice([-1.0, 1.0], order)
    found: Floats = signs[:, None] * base / np.sqrt(order)
    return found


def _paley(size: int) -> Floats | None:
    if size % 4:
        return None
    if _is_prime(q := size - 1) and q % 4 == 3:
        core = _bordered(q, -1)
        found: Floats = np.eye(size) + core
        return found
    if size % 2 == 0 and _is_prime(q := size // 2 - 1) and q % 4 == 1:
        core = _bordered(q, 1)
        plus, minus = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
        return np.kron(core, plus) + np.kron(np.eye(q + 1), minus)
    return None


def _bordered(q: int, sign: int) -> Floats:
    """Quadratic characters of i - j with a row of ones and a column of `sign` around them, 0 in the corner."""
    squares = {number * number % q for number in range(1, q)}
    character = np.array([0.0, *(1.0 if number in squares else -1.0 for number in range(1, q))])
    index = np.arange(q)
    core = np.zeros((q + 1, q + 1))
    core[0, 1:], core[1:, 0] = 1, sign
    core[1:, 1:] = character[(index[:, None] - index) % q]
    return core


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
