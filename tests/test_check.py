"""The comparators are tested: what must be rejected is rejected."""

from __future__ import annotations

import check
import numpy as np
import pytest

from onnxpress.compiler.pass_ import Promise

WANT = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)


@pytest.mark.parametrize(
    "got",
    [WANT * 1.01, WANT * 2, WANT * 0, WANT.T.copy(), np.full_like(WANT, np.nan), WANT[:4]],
    ids=["one percent", "doubled", "zeroed", "transposed", "nan", "cut"],
)
@pytest.mark.parametrize("promise", [Promise.EXACT, Promise.CLOSE])
def test_rejects(got: np.ndarray, promise: Promise) -> None:
    with pytest.raises(AssertionError):
        check.promised(promise, {"y": WANT}, {"y": got})


def test_nan_on_both_sides_is_rejected() -> None:
    bad = np.full_like(WANT, np.nan)
    with pytest.raises(AssertionError):
        check.close(bad, bad)


def test_renamed_output_is_rejected() -> None:
    with pytest.raises(AssertionError):
        check.promised(Promise.LOSSY, {"y": WANT}, {"z": WANT})


def test_accepts_rounding() -> None:
    check.close(WANT, WANT * np.float32(1 + 1e-6))
