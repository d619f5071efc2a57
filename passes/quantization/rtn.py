"""Rounds every weight to the nearest of 4, 16 or 256 levels, block by block, with the scale of least squared error.

Needs no data. A block of `block_size` weights of a row shares one scale; symmetric blocks use the full range with a
signed scale, so that the largest weight of either sign falls on a level. The numerics are in `_rounding`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.quantization._weight_only import OVERRIDABLE, Coded, Format, Site, WeightOnly, rounded

_SCALES = ("max", "mse")


@dataclass(frozen=True, kw_only=True)
class Rtn(WeightOnly):
    """Rounds weights to 2, 4 or 8 bits in blocks, without data; options as in every weight-only pass."""

    overridable: ClassVar[dict[str, tuple[Any, ...]]] = {**OVERRIDABLE, "scales": _SCALES}

    scales: Literal["max", "mse"] = "mse"  # "max": quicker, larger error

    @classmethod
    def example(cls, model: ir.Model) -> Rtn:
        return cls(block_size=16)

    def _format(self, names: list[str], kind: str, *, is_head: bool) -> Format:
        plain = Format(self.bits, self.block_size, self.symmetric, self.scales, self.scale_bits)
        return self._overridden(plain, names, kind, is_head=is_head)

    def code(
        self, model: ir.Model, sites: list[Site], linears: list[Linear], context: Context, report: Report
    ) -> Iterator[tuple[Site, Coded]]:
        return rounded(sites, context, self.name())
