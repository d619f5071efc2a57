"""Stores weights as int8 per column and rounds activations to uint8 as they come.

A linear becomes one DynamicQuantizeMatMul. It finds one scale and zero point for the whole activation, all tokens of
all sequences, so a single large feature costs all the others their precision: with calibration text the relative error
of every output is measured, and a linear that loses more than `max_error` stays in float. `rtn(bits=8)` behind this
pass stores those, and a tied embedding, in blocks.

ONNX Runtime multiplies uint8 by int8: processors with AVX2 or AVX-512 but without VNNI add pairs of products in 16
bits, which can saturate; the session option `session.x64quantprecision` avoids that there.

Paper:   none; one step of activations for all tokens, as in arXiv:2206.01861 (ZeroQuant, there per token)
Axes:    T tokens, N out features, K in features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import CalibrationError
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.quantization._activations import RoundedActivations, Rounding
from onnxpress.passes.quantization._columns import Floats, fake_quantize, spread


@dataclass(frozen=True, kw_only=True)
class DynamicInt8(RoundedActivations):
    """Products of int8 weights (a scale per column) and uint8 activations (a scale per call). CPU only.

    `tokens=0` measures no errors, and stores all linears. Tokens of a window share a scale, as those of a prompt do.
    """

    paper: ClassVar[str] = ""
    operator: ClassVar[str] = "DynamicQuantizeMatMul"
    float_types: ClassVar[tuple[ir.DataType, ...]] = (ir.DataType.FLOAT,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.tokens >= 0, "tokens", "0 or more", "1024 suits most models")

    def prepare(
        self, model: ir.Model, linears: list[Linear], context: Context, report: Report
    ) -> dict[int, dict[str, Any]]:
        if not self.tokens or not linears:
            return super().prepare(model, linears, context, report)
        ids_WS, facts = context.calibration.windows(self.tokens, self.length)
        try:
            windows = feeds(model.graph, ids_WS)
        except CalibrationError as unsuited:
            report.notes.append(f"{self.name()}: no linear was kept in float for its error: {unsuited.message}")
            return super().prepare(model, linears, context, report)
        report.calibration = facts
        return self.measure(model, linears, windows, context, report)

    def rounding(self, windows: Sequence[Floats]) -> Rounding:
        return Rounding(lambda x_TK: fake_quantize(x_TK, spread(float(x_TK.min()), float(x_TK.max()))))
