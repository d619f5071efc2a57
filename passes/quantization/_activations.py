"""What passes share that round activations too: errors of outputs on calibration text, and who stays in float.

Axes: T tokens, N out features, K in features
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.calibration import Calibration, Feeds
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.formats import columns_matrix
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.quantization._columns import Floats, round_columns
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


@dataclass(frozen=True)
class Rounding:
    """How the activation of some linears is rounded.

    Attributes:
        apply: what the codes of a window [T, K] stand for, float32.
        facts: for the ledger, and for whoever builds the nodes.
    """

    apply: Callable[[Floats], Floats]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RoundedActivations(StoredLinears):
    """Base of passes that store int8 weights per column and round activations; a subclass says how the latter."""

    max_error: float = 0.1  # relative, of the output on calibration text, beyond which a linear stays in float
    tokens: int = 1024  # of calibration text
    length: int = 256  # tokens of a window

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.max_error > 0, "max_error", "positive", "0.1 suits most models")
        self.check(self.length >= 1, "length", "positive", "256 suits most models")

    def check_target(self, context: Context) -> None:
        if context.target.provider != "cpu":
            raise OptionError(
                f"{self.name()}: ONNX Runtime multiplies 8-bit activations on the CPU only, "
                f"got target {context.target.name!r}",
                hint="use rtn(bits=8), which stores weights alone in 8 bits",
            )

    @abc.abstractmethod
    def rounding(self, windows: Sequence[Floats]) -> Rounding | str:
        """How to round an activation, or why not.

        Args:
            windows: the activation on each window of text, float [..., K]; they lie in a file: read one at a time.
        """

    def encode(self, w_NK: Floats, dtype: ir.DataType) -> Tensors:
        codes_KN, scale_N = round_columns(w_NK)
        return {"codes": ir.Tensor(codes_KN), "scale": ir.Tensor(scale_N)}

    def measure(
        self, model: ir.Model, linears: list[Linear], windows: Sequence[Feeds], context: Context, report: Report
    ) -> dict[int, dict[str, Any]]:
        """Facts of each linear to store, by id; those that would lose more than `max_error` go to `report.skip`."""
        ready: dict[int, dict[str, Any]] = {}
        squares: list[float] = []
        with Calibration(model, windows, linears, context.work_dir) as run:
            for stage in context.track(run.stages, f"{self.name()}: errors"):
                values = run.values(stage)
                rounding = self.rounding(values)
                if isinstance(rounding, str):
                    for linear in stage.linears:
                        report.skip(linear.name, rounding)
                    continue
                for linear, errors in zip(stage.linears, _errors(stage.linears, values, rounding), strict=True):
                    error = errors["output_error"]
                    is_finite = math.isfinite(error)
                    if is_finite and error > self.max_error:
                        # The reason is the same for all, so that a card counts them; the numbers are for people.
                        report.skip(linear.name, f"its output would lose more than max_error={self.max_error}")
                        report.notes.append(f"{linear.name} stays in float: its output would lose {error:.3f}")
                    else:
                        ready[id(linear)] = {**rounding.facts, **(errors if is_finite else {})}
                        squares.append(error * error if is_finite else 0.0)
        if ready:
            report.metrics["output_error"] = math.sqrt(sum(squares) / len(squares))
        return ready


def _errors(linears: Sequence[Linear], values: Sequence[Floats], rounding: Rounding) -> list[dict[str, float]]:
    errors = []
    for linear in linears:
        w_NK = linear.w_NK()
        codes_KN, scale_N = round_columns(w_NK)
        errors.append(OutputErrors(w_NK, columns_matrix(codes_KN, scale_N, None)))
    for x in values:
        x_TK = np.ascontiguousarray(x.reshape(-1, x.shape[-1]), np.float32)
        rounded_TK = rounding.apply(x_TK) if x.size else x_TK
        for one in errors:
            one.add(x_TK, rounded_TK)
    return [one.facts for one in errors]
