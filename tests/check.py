"""How tests compare outputs; tolerances stand here and nowhere else, named by promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.compiler.pass_ import Promise

Array = npt.NDArray[Any]
CLOSE = 2e-5  # of the largest output; float32 sums of some hundred terms in another order


def promised(promise: Promise, before: dict[str, Array], after: dict[str, Array]) -> None:
    """Asserts that `after` is as near to `before` as a pass with this promise must be."""
    assert list(before) == list(after), f"outputs {list(before)} became {list(after)}"
    for name, want in before.items():
        got = after[name]
        assert want.shape == got.shape, f"{name}: shape {want.shape} became {got.shape}"
        if promise is Promise.EXACT:
            assert np.array_equal(want, got), f"{name}: not bit-equal"
        elif promise is Promise.CLOSE:
            close(want, got, name)
        else:
            assert np.isfinite(got).all(), f"{name}: not finite"


def close(want: Array, got: Array, name: str = "output", tolerance: float = CLOSE) -> None:
    """Asserts that two arrays differ by at most `tolerance` of the largest entry; NaN equals nothing."""
    assert want.shape == got.shape, f"{name}: shape {want.shape} became {got.shape}"
    scale = max(float(np.abs(want).max(initial=0.0)), 1e-30)
    worst = float(np.abs(want.astype(np.float64) - got).max(initial=0.0)) / scale
    assert worst <= tolerance, f"{name}: differs by {worst:.2e} of the largest value, allowed {tolerance:.0e}"
