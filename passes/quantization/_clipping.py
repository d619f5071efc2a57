"""Where to cut an activation before it is rounded: four ways to choose a range from a histogram of its values.

    minmax       nothing is cut
    percentile   a share of the values is cut, half of it at each end
    mse          the least mean squared error of the rounded values
    entropy      the least divergence between the values' distribution and that of their codes

All but the percentile try cuts at the same magnitude on both sides, [max(low, -t), min(high, t)], the widest first.

Paper:   entropy: TensorRT's calibration (Migacz, "8-bit Inference with TensorRT", GTC 2017); all four: arXiv:2004.09602
Differs: codes of the whole range, 256 of them, not of its magnitudes alone; so one step may be cut at one side only.
Axes:    B bins
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxpress.passes.quantization._columns import Floats, fake_quantize, spread

Ends = tuple[float, float]

BINS = 2**16  # a power of two; a thousandth of the range, where most values of a decoder lie, still has 65
_MSE_CUTS = 128  # each narrower by 2^(1/16); the narrowest is 1/245 of the widest
_ENTROPY_BINS = 2**12  # TensorRT's: 2048 of magnitudes
_ENTROPY_CUTS = 128  # from the whole range down in equal steps of 16 bins a side
_NARROWEST = 8  # of them: 128 bins a side; with a bin per code any distribution is met, so that less gains nothing
_EMPTY = 1e-4  # count of a bin that the codes' distribution leaves empty, so that the divergence is finite


@dataclass
class Histogram:
    """How often which values occur.

    Attributes:
        low, high: the smallest and the largest value; 0 and 0 without any.
        counts_B: of equal bins over [-a, a], a = max(-low, high), int64.
        sums_B: of the values in a bin, so that its mean is known; float64.
    """

    low: float
    high: float
    counts_B: npt.NDArray[np.int64]
    sums_B: npt.NDArray[np.float64]

    @property
    def size(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high)

    @property
    def means_B(self) -> npt.NDArray[np.float64]:  # noqa: N802
        """Mean of the values in a bin; 0 where there are none."""
        return self.sums_B / np.maximum(self.counts_B, 1)

    def cut(self, at: float) -> Ends:
        """The range without magnitudes above `at`."""
        return max(self.low, -at), min(self.high, at)


def count(windows: Sequence[Floats], bins: int = BINS) -> Histogram:
    """The histogram of all values of all windows, in two passes: one finds the ends, one counts.

    Args:
        windows: float arrays of any shape; one at a time is read.
        bins: how many, an even number.
    """
    filled = [x for x in windows if x.size]
    low = min((float(x.min()) for x in filled), default=0.0)
    high = max((float(x.max()) for x in filled), default=0.0)
    found = Histogram(low, high, np.zeros(bins, np.int64), np.zeros(bins))
    if not np.isfinite([low, high]).all() or not found.size:
        return found
    for x in filled:
        flat = x.astype(np.float64).ravel()
        # The largest value is the right end of the last bin.
        places = np.minimum(((flat / found.size + 1) * (bins // 2)).astype(np.int64), bins - 1)
        found.counts_B += np.bincount(places, minlength=bins)
        found.sums_B += np.bincount(places, flat, bins)
    return found


def percentile(values: Histogram, share: float) -> Ends:
    """The range that holds `share` percent of the values, as many being cut below as above.

    Args:
        values: what occurs.
        share: percent, more than 0, at most 100; 100 cuts nothing.
    """
    bins = len(values.counts_B)
    edges = np.linspace(-values.size, values.size, bins + 1)
    below = np.concatenate([[0], np.cumsum(values.counts_B)])
    # Where the share is reached from below, not where the next value lies: empty bins hold nothing.
    cut = (100 - share) / 200 * below[-1]
    left = edges[np.searchsorted(below, cut, "right") - 1]
    right = edges[np.searchsorted(below, below[-1] - cut, "left")]
    return max(values.low, float(left)), min(values.high, float(right))


def mse(values: Histogram) -> Ends:
    """The cut whose codes are nearest to the values in the mean of squares.

    Laws:   the error is no larger than without a cut, up to the width of a bin.
    """
    is_used = values.counts_B > 0
    means, counts = values.means_B[is_used], values.counts_B[is_used]

    def error(ends: Ends) -> float:
        return float(counts @ np.square(fake_quantize(means, spread(*ends)) - means))

    return min((values.cut(values.size * 2 ** (-step / 16)) for step in range(_MSE_CUTS)), key=error)


def entropy(values: Histogram) -> Ends:
    """The cut that keeps most of the distribution, by the Kullback-Leibler divergence.

    The reference has what is cut in its outermost bins; what codes stand for is spread over their bins that occur.

    Args:
        values: what occurs; the number of bins is a multiple of 4096.
    """
    counts_B, means_B = _coarse(values)

    def divergence(cut: tuple[float, slice]) -> float:
        at, inside = cut
        kept = counts_B[inside].astype(np.float64)
        reference = kept.copy()
        reference[0] += counts_B[: inside.start].sum()
        reference[-1] += counts_B[inside.stop :].sum()
        chosen = spread(*values.cut(at))
        codes = np.clip(np.rint(means_B[inside] / chosen.scale) + chosen.zero, 0, 255).astype(np.int64)
        occurs = kept > 0
        total = np.bincount(codes, kept, 256)
        bins_of_code = np.bincount(codes, occurs, 256)
        known = np.where(occurs, total[codes] / np.maximum(bins_of_code[codes], 1), _EMPTY)
        weight = reference > 0
        share, model = reference[weight] / reference.sum(), known[weight] / known.sum()
        return float(share @ np.log(share / model))

    return values.cut(min(_cuts(values.size), key=divergence)[0])


def _cuts(size: float) -> Iterator[tuple[float, slice]]:
    """(magnitude, the bins within it), the widest first."""
    half, width = _ENTROPY_BINS // 2, _ENTROPY_BINS // 2 // _ENTROPY_CUTS
    for number in range(_ENTROPY_CUTS, _NARROWEST - 1, -1):
        yield size * number / _ENTROPY_CUTS, slice(half - number * width, half + number * width)


def _coarse(values: Histogram) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Counts and means of `_ENTROPY_BINS` bins."""
    counts_B = values.counts_B.reshape(_ENTROPY_BINS, -1).sum(axis=1)
    means_B = values.sums_B.reshape(_ENTROPY_BINS, -1).sum(axis=1) / np.maximum(counts_B, 1)
    return counts_B, means_B
