"""Stores the key-value cache of a decoder in 8 or 4 bits, with fixed scales from calibration text.

GroupQueryAttention rounds keys (turned by their positions already) and values as it appends them, and attends to what
it has stored; an int8 cache is a quarter of a float32 one, an int4 cache an eighth. The scales are constants of the
graph: the operator has no others. Text is streamed through the model as for gptq; there is nothing to resume, because
all that is kept of the text is gathered while it runs.

Paper:   arXiv:2402.02750 (KIVI: why keys want a scale per channel)
Differs: scales are static and symmetric, values have theirs per channel too; the operator knows no other form.
Axes:    B batch, G key/value heads, T tokens, D width of a head
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.calibration import Calibration
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import CalibrationError, OptionError, UnsupportedModelError
from onnxpress.compiler.linears import unique_name
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report, located

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

# Of the scale that just covers what was seen. Eight bits have steps to spare for the larger values of other texts: to
# cut those off costs more than finer steps gain. Of four, a largest value cut off costs less than coarse steps.
_FACTORS = {8: (1.25,), 4: tuple(np.linspace(1.0, 0.6, 9).tolist())}
_KEY, _VALUE, _BIAS, _KEY_SCALE = 3, 4, 10, 12  # inputs of GroupQueryAttention
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def codes(x_BGTD: Array, scale: Floats, bits: int) -> Array:
    """What the operator stores: round half to even, cut off at the ends of the range.

    Args:
        x_BGTD: keys or values. Not changed.
        scale: [1, G, 1, D] or [1], unit of x per step.
        bits: width of a code.
    Returns:
        float32 [B, G, T, D], whole numbers in [-2^(bits-1), 2^(bits-1) - 1].
    Laws:   times scale, within scale / 2 of every x that is at most (2^(bits-1) - 1) scale.
    """
    half = 1 << (bits - 1)
    steps: Array = np.rint(x_BGTD / scale)
    return np.clip(steps, -half, half - 1, out=steps)


class Fit(NamedTuple):
    """What `fit_scale` found.

    Attributes:
        scale: float32 [1, G, 1, D], or [1]; positive.
        error: ||rounded - x|| / ||x|| over all tokens.
        width: D.
    """

    scale: Floats
    error: float
    width: int


def fit_scale(windows: Sequence[Array], bits: int, *, per_channel: bool) -> Fit:
    """The scale of least squared error among a few multiples of the one that just covers the largest value.

    Args:
        windows: [B, G, T, D] each, keys or values of one layer. Not changed.
        bits: width of a code; at 8 the largest value is covered, and a quarter more.
        per_channel: a scale for each head and channel, else one for all.
    Raises:
        CalibrationError: a value is not finite.
    Laws:   at 8 bits no value is cut off; more bits never add to the error.
    """
    axes = (0, 2) if per_channel else None
    largest = np.max([np.abs(one).max(axis=axes, keepdims=per_channel) for one in windows], axis=0)
    if not np.isfinite(largest).all():
        raise CalibrationError("keys or values are not finite on the calibration text", hint="try other text")
    # A channel that was zero throughout may not stay so: it gets the coarsest step of the layer.
    top = np.where(largest > 0, largest, largest.max() or 1.0).astype(np.float32)
    full: Floats = top.reshape(top.shape if per_channel else 1) / np.float32((1 << (bits - 1)) - 1)
    candidates = [full * np.float32(factor) for factor in _FACTORS[bits]]
    errors = [np.zeros(full.shape) for _ in candidates]
    energy = 0.0
    for x_BGTD in (one.astype(np.float32, copy=False) for one in windows):
        energy += float(np.vdot(x_BGTD, x_BGTD))
        for scale, error in zip(candidates, errors, strict=True):
            off = codes(x_BGTD, scale, bits) * scale - x_BGTD
            error += np.square(off, out=off).sum(axis=axes, keepdims=per_channel, dtype=np.float64)
    best = np.argmin(errors, axis=0)
    chosen: Floats = np.choose(best, candidates).astype(np.float32)
    loss = float(np.choose(best, errors).sum())
    return Fit(chosen, math.sqrt(loss / energy) if energy else 0.0, windows[0].shape[3])


@dataclass(frozen=True, kw_only=True)
class QuantizeKv(Pass):
    """Turns the caches of all GroupQueryAttention into int8, or into int4 packed two to a byte of uint8.

    Inputs `past_*` and outputs `present_*` change their type, at 4 bits also their last size. Calibrate on windows as
    long as the texts that will be run: keys turn on with their position.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    paper: ClassVar[str] = "arXiv:2402.02750"

    bits: int = 8  # 8 loses next to nothing; 4 costs accuracy that is seen
    granularity: Literal["channel", "tensor"] = "channel"  # one scale per head and channel, or one per layer
    tokens: int = 16384  # of calibration text
    length: int = 1024  # tokens of a window

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.bits in (4, 8), "bits", "4 or 8", "the operator stores no other widths")
        self.check(self.tokens >= 1, "tokens", "positive", "16384 suits small models")
        self.check(self.length >= 1, "length", "positive", "1024 suits most models")

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        pasts = [value for value in model.graph.inputs if _is_cache(value)]
        if not pasts:
            raise OptionError(
                "quantize_kv: has no effect, the model has no key-value cache [batch, heads, tokens, width]",
                hint="leave it out; a decoder gets a cache when it is exported with one",
            )
        nodes: list[ir.Node] = []
        readers = {id(node): node for past in pasts for node in past.consumers() if node.op_type != "Shape"}
        for node in readers.values():
            reason = self._obstacle(node, context)
            if reason is None:
                nodes.append(node)
            else:
                report.skip(node.name or node.op_type, reason)
        if nodes:
            self._quantize(model, nodes, context, report)
        elif {_bits(node) for node in readers.values()} != {self.bits}:
            raise UnsupportedModelError(
                "quantize_kv: expected GroupQueryAttention with a cache of floats, found none: "
                + "; ".join(report.reasons()),
                hint="start from a model whose cache is of floats, with `fuse` in front",
            )
        return report

    def _obstacle(self, node: ir.Node, context: Context) -> str | None:
        """Why the cache of `node` cannot be quantized, None when it can."""
        if node.op_type != "GroupQueryAttention":
            return f"{node.op_type} reads the cache, and only GroupQueryAttention takes a quantized one"
        if bits := _bits(node):
            return f"its cache has {bits} bits already"
        pasts = [past for past in node.inputs[_KEY : _VALUE + 1] if past is not None and past.is_graph_input()]
        presents = [present for present in node.outputs[1:3] if present.is_graph_output()]
        if len(pasts) < 2 or len(presents) < 2:
            return "its cache is no input and output of the graph"
        others = {reader.op_type for value in (*pasts, *presents) for reader in value.consumers() if reader is not node}
        if others - {"Shape"} or (others and self.bits == 4) or pasts[0] is pasts[1]:
            return "something else in the graph reads its cache, and would take codes for numbers"
        if any(past.dtype not in _FLOATS for past in pasts):
            return "its cache is not of floats"
        width = _width(pasts[0])
        if self.bits == 4 and width is not None and width % 2:
            return f"heads of odd width {width} cannot be packed two numbers to a byte"
        if context.target.provider == "cuda" and len(node.inputs) > _BIAS and node.inputs[_BIAS] is not None:
            return (
                "ONNX Runtime on CUDA has no attention bias with a quantized cache "
                "(for padding none is needed after fuse_attention(padding='right'))"
            )
        return None

    def _quantize(self, model: ir.Model, nodes: list[ir.Node], context: Context, report: Report) -> None:
        ends = [present for node in nodes for present in node.outputs[1:3]]
        if any(present.dtype == ir.DataType.BFLOAT16 for present in ends):
            raise UnsupportedModelError(
                "quantize_kv: text is streamed on the CPU, which has no kernels for bfloat16",
                hint="put quantize_kv in front of cast_float16",
            )
        ids_WS, report.calibration = context.calibration.windows(self.tokens, self.length)
        found: dict[int, Fit] = {}
        with Calibration(model, feeds(model.graph, ids_WS), [], context.work_dir, ends=ends) as run:
            for stage in context.track(run.stages, self.name()):
                with located(f"{self.name()}: {stage.end.name}"):
                    windows = run.values(stage)
                    found[id(stage.end)] = fit_scale(windows, self.bits, per_channel=self.granularity == "channel")
        squares = {"key": 0.0, "value": 0.0}
        how = f"PER_{self.granularity.upper()}"
        for node in nodes:
            facts: dict[str, Any] = {"bits": self.bits, "scales": self.granularity}
            for offset, kind in enumerate(squares):
                fit = found[id(node.outputs[1 + offset])]
                self._store(model.graph, node, offset, fit)
                facts[f"{kind}_error"] = fit.error
                squares[kind] += fit.error**2
            for attribute in (
                ir.AttrString("k_quant_type", how),
                ir.AttrString("v_quant_type", how),
                ir.AttrInt64("kv_cache_bit_width", self.bits),
            ):
                node.attributes[attribute.name] = attribute
            report.change(node.name or str(node.outputs[1].name), **facts)
        report.metrics |= {f"{kind}_error": math.sqrt(square / len(nodes)) for kind, square in squares.items()}

    def _store(self, graph: ir.Graph, node: ir.Node, offset: int, fit: Fit) -> None:
        """Gives `node` the scale of its keys (offset 0) or values (1), and their cache its type and size."""
        past, present = node.inputs[_KEY + offset], node.outputs[1 + offset]
        assert past is not None
        name = unique_name(graph, f"{past.name}.scale")
        tensor = ir.Tensor(fit.scale, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        if len(node.inputs) <= _KEY_SCALE + offset:
            node.resize_inputs(_KEY_SCALE + offset + 1)
        node.replace_input_with(_KEY_SCALE + offset, value)
        for one in (past, present):
            one.dtype = ir.DataType.INT8 if self.bits == 8 else ir.DataType.UINT8
            if one.shape is not None and len(one.shape) == 4:
                one.shape = ir.Shape([*one.shape[:3], fit.width * self.bits // 8])


def _is_cache(value: ir.Value) -> bool:
    return "past" in (value.name or "") and value.shape is not None and len(value.shape) == 4


def _width(past: ir.Value) -> int | None:
    """D as the graph declares it, None where it is symbolic."""
    width = past.shape[3] if past.shape is not None and len(past.shape) == 4 else None
    return width if isinstance(width, int) else None


def _bits(node: ir.Node) -> int:
    """Bits of a quantized cache, 0 of a float one."""
    how, bits = node.attributes.get("k_quant_type"), node.attributes.get("kv_cache_bit_width")
    is_float = how is None or how.as_string() == "NONE"
    return 0 if is_float else 8 if bits is None else bits.as_int()
