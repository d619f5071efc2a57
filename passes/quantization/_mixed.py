"""The two ways in which `mixed` carries out what it decided: with calibration text, and without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.quantization._calibrated import Calibrated
from onnxpress.passes.quantization._weight_only import OVERRIDABLE, Coded, Site, WeightOnly, rounded


@dataclass(frozen=True, kw_only=True)
class Fitted(Calibrated):
    """As `gptq` does."""


@dataclass(frozen=True, kw_only=True)
class Rounded(WeightOnly):
    """As `rtn` does."""

    overridable: ClassVar[dict[str, tuple[Any, ...]]] = {**OVERRIDABLE, "scales": ("max", "mse")}

    def code(
        self, model: ir.Model, sites: list[Site], linears: list[Linear], context: Context, report: Report
    ) -> Iterator[tuple[Site, Coded]]:
        return rounded(sites, context, self.name())
