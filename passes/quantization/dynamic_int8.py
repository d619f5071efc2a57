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

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.calibration import Calibration
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import CalibrationError, OptionError
from onnxpress.compiler.formats import columns_matrix
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.quantization._columns import Floats, fake_quantize, round_columns, spread
from onnxpress.passes.quantization._stored_linears import StoredLinears, Tensors


@dataclass
class OutputErrors:
    """Squared errors of the product of one weight, summed over windows of activations.

    Attributes:
        w_NK, q_NK: the weight and its rounded form.
    """

    w_NK: Floats
    q_NK: Floats
    energy: float = 0.0
    total: float = 0.0
    rounded: float = 0.0

    def add(self, x_TK: Floats, rounded_TK: Floats) -> None:
        """A window: activations, and what their codes stand for."""
        product = x_TK @ self.w_NK.T
        moved = (rounded_TK - x_TK) @ self.q_NK.T
        self.energy += _square(product)
        self.rounded += _square(moved)
        moved += x_TK @ self.q_NK.T
        moved -= product
        self.total += _square(moved)

    @property
    def facts(self) -> dict[str, float]:
        """`output_error`, ||X' Q^T - X W^T|| / ||X W^T||, and `activation_error`, ||(X' - X) Q^T|| / ||X W^T||."""
        return {
            name: math.sqrt(loss / self.energy) if self.energy else 0.0
            for name, loss in (("output_error", self.total), ("activation_error", self.rounded))
        }


def _square(array: Floats) -> float:
    return float(np.vdot(array, array))


@dataclass(frozen=True, kw_only=True)
class DynamicInt8(StoredLinears):
    """Products of int8 weights (a scale per column) and uint8 activations (a scale per call). CPU only."""

    paper: ClassVar[str] = ""
    operator: ClassVar[str] = "DynamicQuantizeMatMul"
    float_types: ClassVar[tuple[ir.DataType, ...]] = (ir.DataType.FLOAT,)

    max_error: float = 0.1  # relative, of the output on calibration text, beyond which a linear stays in float
    tokens: int = 1024  # of calibration text; 0: errors are not measured, and all linears are stored
    length: int = 256  # tokens of a window, which share a scale as the tokens of a prompt do

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.max_error > 0, "max_error", "positive", "0.1 suits most models")
        self.check(self.tokens >= 0, "tokens", "0 or more", "1024 suits most models")
        self.check(self.length >= 1, "length", "positive", "256 suits most models")

    def check_target(self, context: Context) -> None:
        if context.target.provider != "cpu":
            raise OptionError(
                f"{self.name()}: ONNX Runtime multiplies 8-bit activations on the CPU only, "
                f"got target {context.target.name!r}",
                hint="use rtn(bits=8), which stores weights alone in 8 bits",
            )

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
        ready: dict[int, dict[str, Any]] = {}
        total = 0.0
        with Calibration(model, windows, linears, context.work_dir) as run:
            for stage in context.track(run.stages, f"{self.name()}: errors"):
                errors = [_errors(linear) for linear in stage.linears]
                for x in run.values(stage):
                    x_TK = np.ascontiguousarray(x.reshape(-1, x.shape[-1]), np.float32)
                    rounded_TK = fake_quantize(x_TK, spread(float(x_TK.min()), float(x_TK.max()))) if x.size else x_TK
                    for one in errors:
                        one.add(x_TK, rounded_TK)
                for linear, one in zip(stage.linears, errors, strict=True):
                    error = one.facts["output_error"]
                    if math.isfinite(error) and error > self.max_error:
                        # The reason is the same for all, so that a card counts them; the numbers are for people.
                        report.skip(linear.name, f"its output would lose more than max_error={self.max_error}")
                        report.notes.append(f"{linear.name} stays in float: its output would lose {error:.3f}")
                    else:
                        ready[id(linear)] = one.facts if math.isfinite(error) else {}
                        total += error * error if math.isfinite(error) else 0.0
        if ready:
            report.metrics["output_error"] = math.sqrt(total / len(ready))
        return ready

    def encode(self, w_NK: Floats, dtype: ir.DataType) -> Tensors:
        codes_KN, scale_N = round_columns(w_NK)
        return {"codes": ir.Tensor(codes_KN), "scale": ir.Tensor(scale_N)}


def _errors(linear: Linear) -> OutputErrors:
    w_NK = linear.w_NK()
    codes_KN, scale_N = round_columns(w_NK)
    return OutputErrors(w_NK, columns_matrix(codes_KN, scale_N, None))
