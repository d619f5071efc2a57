"""GPTQ with teacher targets, coordinate descent and refitted scales: `_calibrated` says how.

Paper: arXiv:2210.17323
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxpress.passes.quantization._calibrated import Calibrated


@dataclass(frozen=True, kw_only=True)
class Gptq(Calibrated):
    """Rounds weights to 2, 4 or 8 bits with the help of calibration text; options as in every weight-only pass."""

    paper: ClassVar[str] = "arXiv:2210.17323"

    @classmethod
    def example(cls, model: ir.Model) -> Gptq:
        return cls(block_size=16, tokens=32, length=16)
