"""Stores weights as int8 per column and rounds activations to 8 bits in a range found on calibration text.

A linear becomes QuantizeLinear, DequantizeLinear, MatMul: the QDQ form, which ONNX Runtime's CPU provider fuses to
MatMulIntegerToFloat at load, or to QLinearMatMul where nothing but another such linear reads the product. Linears that
read one activation share its QuantizeLinear. One scale and zero point serve all tokens of all prompts, so a value
beyond the range is cut. A linear whose output loses more than `max_error` on the same text stays in float.
`rtn(bits=8)` behind this pass stores those, and a tied embedding, in blocks.

Activations are uint8: of int8 ones, ONNX Runtime leaves products that share an activation in float on x86 (1.31).
TensorRT reads int8 without zero points only, so this is not its form. Processors with AVX2 or AVX-512 but without VNNI
add pairs of products in 16 bits, which can saturate; the session option `session.x64quantprecision` avoids that there.

Paper:   arXiv:1712.05877 (integer-only inference); ranges: arXiv:2004.09602
Differs: the sum of a product stays in float, and so does its bias.
Axes:    T tokens, N out features, K in features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxpress.compiler import formats
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import StreamingError, UnsupportedModelError
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.quantization._activations import RoundedActivations, Rounding
from onnxpress.passes.quantization._clipping import Ends, Histogram, count, entropy, mse, percentile
from onnxpress.passes.quantization._columns import Floats, fake_quantize, spread
from onnxpress.passes.quantization._stored_linears import add, become
from onnxpress.passes.quantization._weight_only import require_text

_AXIS_OPSET = 13  # from which on DequantizeLinear has scales per column


@dataclass(frozen=True, kw_only=True)
class StaticInt8(RoundedActivations):
    """Products of int8 weights (a scale per column) and 8-bit activations (a scale fixed beforehand). CPU only."""

    paper: ClassVar[str] = "arXiv:2004.09602"
    operator: ClassVar[str] = formats.QDQ
    float_types: ClassVar[tuple[ir.DataType, ...]] = (ir.DataType.FLOAT,)

    calibrator: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"  # what is cut
    percentile: float = 99.99  # percent of the values that calibrator="percentile" leaves whole
    fallback: bool = False  # leave a model as it is, and say so, that no text can be streamed through

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.tokens >= 1, "tokens", "positive", "1024 suits most models")
        self.check(0 < self.percentile <= 100, "percentile", "more than 0, at most 100", "99.99 cuts little")
        is_used = self.calibrator == "percentile" or self.percentile == 99.99
        self.check(is_used, "percentile", f"left out with calibrator={self.calibrator!r}")

    @classmethod
    def example(cls, model: ir.Model) -> StaticInt8:
        return cls(tokens=32, length=16)

    def prepare(
        self, model: ir.Model, linears: list[Linear], context: Context, report: Report
    ) -> dict[int, dict[str, Any]]:
        if not linears:
            return {}
        try:
            if self.fallback:
                require_text(model, context)
            ids_WS, report.calibration = context.calibration.windows(self.tokens, self.length)
            return self.measure(model, linears, feeds(model.graph, ids_WS), context, report)
        except (StreamingError, UnsupportedModelError) as error:
            if not self.fallback:
                raise
            report.skip("all of it", error.message)
            report.notes.append(f"{self.name()}: activations are not rounded: {error.message}")
            return {}

    def rounding(self, windows: Sequence[Floats]) -> Rounding | str:
        values = count(windows)
        if not values.counts_B.any():
            return _no_range(values)
        chosen = spread(*self._ends(values))
        facts = {"activation_scale": chosen.scale, "activation_zero": chosen.zero}
        return Rounding(lambda x_TK: fake_quantize(x_TK, chosen), facts)

    def _ends(self, values: Histogram) -> Ends:
        if self.calibrator == "percentile":
            return percentile(values, self.percentile)
        if self.calibrator == "minmax":
            return values.low, values.high
        return (mse if self.calibrator == "mse" else entropy)(values)

    def put(self, linear: Linear, values: dict[str, ir.Value], facts: dict[str, Any]) -> None:
        activation, bias, name = linear.node.inputs[0], linear.bias, linear.node.name
        assert activation is not None
        scale = ir.Tensor(np.array(facts["activation_scale"], np.float32))
        zero = ir.Tensor(np.array(facts["activation_zero"], np.uint8))
        rounded = _rounded(linear, activation, scale, zero)
        turned = ir.node("DequantizeLinear", [*values.values()], {"axis": 1}, name=f"{name}/weight")
        product = ir.node("MatMul", [rounded, turned.outputs[0]], name=name)
        nodes = [turned, product]
        if bias is not None:
            nodes.append(ir.Node("", "Add", [product.outputs[0], bias], name=f"{name}/bias"))
        become(linear, product, nodes, formats.QDQ)

    def _refuse(self, linear: Linear, *, is_tied: bool) -> str | None:
        graph = linear.node.graph
        assert graph is not None
        opset = graph.opset_imports.get("", _AXIS_OPSET)
        if opset < _AXIS_OPSET:
            return f"DequantizeLinear has scales per column from opset {_AXIS_OPSET} on, and the graph has {opset}"
        return super()._refuse(linear, is_tied=is_tied)


def _no_range(values: Histogram) -> str:
    if not np.isfinite([values.low, values.high]).all():
        return "its activation is not finite on the calibration text"
    return "its activation is 0 throughout the calibration text, or no token reaches it"


def _rounded(linear: Linear, activation: ir.Value, scale: ir.Tensor[Any], zero: ir.Tensor[Any]) -> ir.Value:
    """The activation behind its codes; linears that read the same activation share one pair of nodes."""
    for node in activation.consumers():
        grid = [value.const_value for value in node.inputs[1:] if value is not None]
        if node.op_type == "QuantizeLinear" and len(grid) == 2 and _equal(grid, [scale, zero]):
            for reader in node.outputs[0].consumers():
                if reader.op_type == "DequantizeLinear":
                    return reader.outputs[0]
    graph, base, name = linear.node.graph, f"{linear.name}.activation", linear.node.name
    assert isinstance(graph, ir.Graph)
    values = [add(graph, f"{base}.scale", scale), add(graph, f"{base}.zero", zero)]
    codes = ir.node("QuantizeLinear", [activation, *values], name=f"{name}/quantize")
    rounded = ir.node("DequantizeLinear", [codes.outputs[0], *values], name=f"{name}/dequantize")
    # Where the activation comes from, so that a reader of any place in the graph can share them later on.
    if (producer := activation.producer()) is None:
        graph.insert_before(graph[0], [codes, rounded])
    else:
        graph.insert_after(producer, [codes, rounded])
    return rounded.outputs[0]


def _equal(found: Sequence[ir.TensorProtocol | None], wanted: Sequence[ir.TensorProtocol]) -> bool:
    return all(
        one is not None and one.dtype == other.dtype and np.array_equal(one.numpy(), other.numpy())
        for one, other in zip(found, wanted, strict=True)
    )
