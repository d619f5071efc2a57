"""What tests of whatever rounds blocks share: weights with what hurts, weights on a grid, codes read back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from onnxpress.passes.quantization._rounding import Rounded

Array = npt.NDArray[Any]
Form = tuple[int, bool, str]  # bits, symmetric, type of the scales

forms = st.tuples(st.sampled_from([2, 4, 8]), st.booleans(), st.sampled_from(["float16", "float32", "float64"]))


@st.composite
def weight_blocks(
    draw: st.DrawFn, groups: int = 2, outlier: float = 30, decades: tuple[int, int] = (-3, 3), digits: int | None = 6
) -> Array:
    """float64 [G, b, N]: normal weights with outliers, a zero block, a constant one, a scaled one, a one-sided one."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    w = rng.standard_normal((groups, draw(st.sampled_from([16, 32, 64])), 7))
    constant = draw(st.floats(-2, 2))
    w[:, 3, 0] *= outlier
    w[0, :, 1] = 0
    w[1, :, 2] = constant if digits is None else round(constant, digits)
    w[:, :, 3] *= 10.0 ** draw(st.integers(*decades))
    w[:, :, 4] = np.abs(w[:, :, 4])
    return w


def on_grids(rng: np.random.Generator, bits: int) -> tuple[Array, Array]:
    """float64 [3, 32, 5] twice: all levels with a zero point in the middle, and with any zero point."""
    levels = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 32, 5)).astype(float)
    levels[:, 0] = -(2 ** (bits - 1))
    middle = levels * rng.choice([-1, 1], (3, 1, 5)) * rng.uniform(0.01, 2, (3, 1, 5))
    span = levels - levels.min(axis=1, keepdims=True)
    span[:, 1] = 2**bits - 1
    return middle, (span - rng.integers(0, 2**bits, (3, 1, 5))) * rng.uniform(0.01, 2, (3, 1, 5))


def restored(found: Rounded, bits: int) -> Array:
    """The weights that codes and scales stand for."""
    return found.steps_GbN(bits, np.dtype(float)) * found.scale_GN.astype(float)[:, None]


def check_stored(found: Rounded, w: Array, form: Form) -> None:
    """Codes, scales and zero points are of the form asked for, and the losses are those of what is stored."""
    bits, symmetric, dtype = form
    assert found.codes_GbN.dtype == np.uint8
    assert found.scale_GN.dtype == dtype
    assert (found.scale_GN != 0).all()
    assert found.codes_GbN.max() < 2**bits
    assert (found.zero_GN is None) == symmetric
    if found.zero_GN is not None:
        assert found.zero_GN.max() < 2**bits
        assert (found.scale_GN > 0).all()
    np.testing.assert_allclose(found.loss_GN, ((w - restored(found, bits)) ** 2).sum(axis=1), rtol=1e-6)
