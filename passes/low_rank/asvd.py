"""Splits weights into two thin factors after scaling their columns by how large their inputs are.

The weaker relative of svd_llm, for comparison: it sees the size of each feature, but not how features go together.

Paper:   arXiv:2312.05821 (ASVD, equation 6: S = diag(mean |x|^alpha))
Axes:    N out features, K in features, R rank
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.stats import Stats
from onnxpress.compiler.whitening import Floats
from onnxpress.passes.low_rank._whitened import Whitened


@dataclass(frozen=True, kw_only=True)
class Asvd(Whitened):
    """Splits linears into two factors by the magnitudes of activations; give one of ratio, size and kl."""

    paper: ClassVar[str] = "arXiv:2312.05821"

    alpha: float = 0.5  # power of the mean magnitude; 0 is a plain singular value decomposition

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 <= self.alpha <= 2, "alpha", "from 0 to 2", "0.5 is that of the paper")

    @classmethod
    def example(cls, model: ir.Model) -> Asvd:
        return cls(ratio=0.3, tokens=64, length=32, probe=16)

    def moments(self, stats: Stats) -> Floats:
        mean_K = stats.abs_K / max(stats.count, 1)
        return np.diag(mean_K ** (2 * self.alpha))
