"""Lets the projection in front of a gap make up for what is gone, by least squares on text.

The stream behind the gap is to be what it was: x0, where the pruned model has x. The projection that was last added to
x has the weights W and reads a, and W + D gives x + D a. Errors count relative to the size of the stream, since what
reads it norms it. No node is added.

Paper:   ReplaceMe, arXiv:2505.02819, section 3: x + T m with m = W a, that is D = (T - I) W.
Differs: all of W is free as well (whichever form serves held-out text better is taken), errors are relative, the ridge
         is chosen on held-out text, and the pruned model's own stream is fitted, so that later gaps see earlier ones.
Axes:    T tokens, K features in, H width of the stream
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onnxpress.compiler.stats import damped

Floats = npt.NDArray[np.floating]

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean diagonal of the second moments
_HELD_OUT = 4  # every fourth window tells which form and ridge to take


@dataclass
class Moments:
    """Sums over tokens, each weighed by 1 / mean(x0^2).

    Attributes:
        num_in, width: K and H.
        gram_KK: sum of a a^T, float64 [K, K].
        cross_KH: sum of a e^T with e = x0 - x, float64 [K, H].
        energy: sum of e e.
        count: tokens.
    """

    num_in: int
    width: int
    energy: float = 0.0
    count: int = 0
    gram_KK: npt.NDArray[np.float64] = field(init=False, repr=False)
    cross_KH: npt.NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.gram_KK = np.zeros((self.num_in, self.num_in))
        self.cross_KH = np.zeros((self.num_in, self.width))

    def update(self, a_TK: Floats, teacher_TH: Floats, stream_TH: Floats) -> None:
        """Adds tokens; those of which something is not finite, or the stream is zero, do not count."""
        a_TK = a_TK.reshape(-1, self.num_in).astype(np.float32)
        x_TH = teacher_TH.reshape(-1, self.width).astype(np.float32)
        e_TH = x_TH - stream_TH.reshape(-1, self.width)
        size_T = np.sqrt(np.square(x_TH, dtype=np.float64).mean(axis=1))
        good_T = np.isfinite(a_TK).all(axis=1) & np.isfinite(e_TH).all(axis=1) & (size_T > 0) & np.isfinite(size_T)
        root_T1 = (1 / size_T[good_T, None]).astype(np.float32)
        a_TK, e_TH = a_TK[good_T] * root_T1, e_TH[good_T] * root_T1
        self.gram_KK += a_TK.T @ a_TK
        self.cross_KH += a_TK.T @ e_TH
        self.energy += float(np.vdot(e_TH, e_TH))
        self.count += len(a_TK)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self.num_in, self.width, self.energy + other.energy, self.count + other.count)
        total.gram_KK = self.gram_KK + other.gram_KK
        total.cross_KH = self.cross_KH + other.cross_KH
        return total

    def loss(self, delta_KH: Floats) -> float:
        """Sum of (e - D a)^2 over the weighed tokens."""
        return self.energy + float(np.vdot(delta_KH, self.gram_KK @ delta_KH) - 2 * np.vdot(delta_KH, self.cross_KH))


def free(moments: Moments, ridge: float) -> Floats:
    """D^T that minimizes E|e - D a|^2 + ridge |D|^2, float64 [K, H].

    Args:
        moments: of a, e.
        ridge: relative to the mean diagonal of E a a^T.
    Laws:   loss falls as the ridge does; an infinite ridge gives 0, which is plain removal.
    """
    result: Floats = np.linalg.solve(damped(moments.gram_KK, ridge), moments.cross_KH)
    return result


def turned(moments: Moments, w_HK: Floats, ridge: float) -> Floats:
    """D^T = W^T (T - I)^T for the T that minimizes E|e - (T - I) m|^2 + ridge |T - I|^2 with m = W a, float64 [K, H].

    Laws:   as for `free`; loss is never below that of `free` without a ridge.
    """
    w_HK = w_HK.astype(np.float64)
    gram_HH = w_HK @ moments.gram_KK @ w_HK.T
    move_HH = np.linalg.solve(damped(gram_HH, ridge), w_HK @ moments.cross_KH)
    result: Floats = w_HK.T @ move_HH
    return result


class Fit(NamedTuple):
    """A change of weights.

    Attributes:
        delta_HK: what is added to them.
        form: "free" or "turned".
        ridge: as chosen.
        before, after: mean squared error relative to the stream on held-out text, without and with it.
    """

    delta_HK: Floats
    form: str
    ridge: float
    before: float
    after: float


def fit(windows: Sequence[tuple[Floats, Floats, Floats]], w_HK: Floats) -> Fit | None:
    """The change of weights that serves held-out text best, fitted again to all text; None where none serves it.

    Args:
        windows: of each the activation [.., K], the stream as it was and as it is [.., H].
        w_HK: W, float32.
    """
    parts = [Moments(w_HK.shape[1], w_HK.shape[0]) for _ in range(2)]
    for number, window in enumerate(windows):
        if len(windows) < 2:  # one window tells by its last quarter
            rows = [one.reshape(-1, one.shape[-1]) for one in window]
            cut = -(-3 * len(rows[0]) // _HELD_OUT)
            parts[0].update(*(one[:cut] for one in rows))
            parts[1].update(*(one[cut:] for one in rows))
        else:
            parts[(number + 1) % min(_HELD_OUT, len(windows)) == 0].update(*window)
    train, held = parts
    if not train.count or not held.count or held.energy <= 0:
        return None
    best: tuple[float, str, float] | None = None
    for form in ("free", "turned"):
        for ridge in RIDGES:
            loss = held.loss(_solved(train, w_HK, form, ridge))
            if loss < (held.energy if best is None else best[0]):
                best = loss, form, ridge
    if best is None:
        return None
    loss, form, ridge = best
    delta_KH = _solved(train + held, w_HK, form, ridge)
    scale = held.count * w_HK.shape[0]
    return Fit(delta_KH.T, form, ridge, held.energy / scale, loss / scale)


def _solved(moments: Moments, w_HK: Floats, form: str, ridge: float) -> Floats:
    return free(moments, ridge) if form == "free" else turned(moments, w_HK, ridge)
