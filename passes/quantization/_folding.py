"""Factors per feature of an activation, moved into the weights around it: no new nodes, the same function.

The features of x are divided where x is made, and the columns of every matrix that reads x multiplied. Two makers can
take the division: a norm, in its gain (and bias), and the linear that goes up in a gated layer, in its rows, since the
product with the gate passes a factor on. What else a value flows into would see it divided, so there must be nothing.

Axes: N out features, K in features
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.calibration import Calibration
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import StreamingError, UnsupportedModelError
from onnxpress.compiler.linears import Linear, derived, drop_unused, find_linears, unique_name
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.stats import Stats
from onnxpress.passes.quantization._weight_only import FLOATS, require_text

Floats = npt.NDArray[Any]

# Norms by operator: which inputs are gain and bias.
NORMS: dict[str, tuple[int, ...]] = {
    "SimplifiedLayerNormalization": (1,),
    "RMSNormalization": (1,),
    "LayerNormalization": (1, 2),
    "SkipSimplifiedLayerNormalization": (2,),
    "SkipLayerNormalization": (2, 3),
}
_ROWS = 256  # of a matrix that decide


@dataclass(frozen=True, kw_only=True)
class Folded(Pass):
    """Base of passes that choose a factor per feature by calibration text and fold it into weights."""

    promise: ClassVar[Promise] = Promise.CLOSE

    tokens: int = 4096  # of calibration text
    length: int = 512  # tokens of a window
    fallback: bool = False  # leave a model as it is, and say so, that no text can be streamed through

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.tokens >= 1, "tokens", "positive", "4096 suits most models")
        self.check(self.length >= 1, "length", "positive", "512 suits most models")

    @abc.abstractmethod
    def choose(self, rows: Sequence[Floats], stats: Stats) -> tuple[Floats, float, float] | None:
        """(factors [K] float64, error with them, error without); None where no factor helps.

        Args:
            rows: some rows of each matrix that reads the activation, float32 [n, K].
            stats: of the activation.
        """

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        linears = find_linears(model, expand_pairs=True)
        wanted = []
        for one in linears:
            if one.is_quantized:
                report.skip(one.name, "already quantized: comes before quantizers")
            elif one.holder in FLOATS:
                wanted.append(one)
        if not wanted:
            return report
        try:
            if self.fallback:
                require_text(model, context)
            self._fold(model, linears, wanted, context, report)
        except (StreamingError, UnsupportedModelError) as error:
            if not self.fallback:
                raise
            report.skip("all of it", error.message)
        return report

    def _fold(
        self, model: ir.Model, linears: list[Linear], wanted: list[Linear], context: Context, report: Report
    ) -> None:
        if any(one.weight.dtype == ir.DataType.BFLOAT16 for one in wanted):
            raise UnsupportedModelError(
                f"{self.name()}: text is streamed on the CPU, which has no kernels for bfloat16",
                hint="use --target cuda (float16)",
            )
        ids_WS, report.calibration = context.calibration.windows(self.tokens, self.length)
        makers = {id(one.output): one for one in linears}
        chosen: list[tuple[list[Linear], Callable[[Floats], None], Floats]] = []
        before = after = 0.0
        with Calibration(model, feeds(model.graph, ids_WS), wanted, context.work_dir) as run:
            for stage in context.track(run.stages, self.name()):
                place = stage.linears[0].name
                divide = _divider(stage.linears, makers)
                group = run.observe(stage, with_stats=not isinstance(divide, str))
                if isinstance(divide, str):
                    report.skip(place, divide)
                    continue
                if not np.isfinite(group.stats.gram_KK).all():
                    report.skip(place, "its activation is not finite on the calibration text")
                    continue
                rows = [one.w_NK() for one in group.linears]
                rows = [np.ascontiguousarray(w_NK[:: -(-len(w_NK) // _ROWS)]) for w_NK in rows]
                found = self.choose(rows, group.stats)
                if found is None:
                    report.skip(place, "no factor makes its error smaller")
                    continue
                factor_K, new, old = found
                before, after = before + old, after + new
                chosen.append((group.linears, divide, factor_K))
        # Weights were read until here, so nothing is changed before.
        for readers, divide, factor_K in chosen:
            report.change(readers[0].name)
            for one in readers:
                _scale(one, factor_K, axis=1)
            divide(1 / factor_K)
        if before:
            report.metrics["error_ratio"] = after / before


def _divider(readers: list[Linear], makers: dict[int, Linear]) -> Callable[[Floats], None] | str:
    """What multiplies the features of the activation that `readers` read where it is made; or why nothing can."""
    value = readers[0].activation
    nodes = {id(one.node) for one in readers}
    if value.is_graph_output() or any(id(node) not in nodes or index != 0 for node, index in value.uses()):
        return "something else reads its activation too"
    if any(one.is_shared for one in readers):
        return "its weight is shared"
    node = value.producer()
    if node is None:
        return "it reads an input of the model"
    if node.op_type in NORMS and value is node.outputs[0]:
        slots = [slot for slot in NORMS[node.op_type] if slot < len(node.inputs) and node.inputs[slot] is not None]
        if not all(_is_vector(node.inputs[slot], readers[0].num_in) for slot in slots):
            return f"gain or bias of {node.op_type} is no constant with a number for each feature"
        return lambda factor_K: _scale_inputs(node, slots, factor_K)
    if node.op_type == "Mul":
        for slot, operand in enumerate(node.inputs):
            # The gain of a norm that is several operators.
            if _is_vector(operand, readers[0].num_in):
                return lambda factor_K, slot=slot: _scale_inputs(node, [slot], factor_K)  # type: ignore[misc]
        for operand in node.inputs:
            maker = _alone(operand, makers) if operand is not None else None
            if maker is not None and maker.num_out == readers[0].num_in:
                return lambda factor_K, maker=maker: _scale_rows(maker, factor_K)  # type: ignore[misc]
        return "neither factor of its activation is a linear's output alone"
    return f"{node.op_type} makes its activation, and passes no factor on"


def _is_vector(value: ir.Value | None, size: int) -> bool:
    """Whether it is a constant of `size` numbers along its last axis that no caller may replace."""
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return False
    sizes = value.const_value.shape.numpy()
    return sizes[-1:] == (size,) and value.const_value.size == size


def _alone(value: ir.Value, makers: dict[int, Linear]) -> Linear | None:
    """The float linear of which `value` is the output, a bias added at most, and that nobody else reads."""
    if len(value.uses()) != 1 or value.is_graph_output():
        return None
    maker = makers.get(id(value))
    if maker is None and (node := value.producer()) is not None and node.op_type == "Add":
        inner = [one for one in map(makers.get, map(id, node.inputs)) if one is not None]
        if len(inner) == 1 and any(one is inner[0].bias for one in node.inputs) and len(inner[0].output.uses()) == 1:
            maker = inner[0]
    if maker is None or maker.holder not in FLOATS or maker.is_shared:
        return None
    if maker.bias is not None and not _is_vector(maker.bias, maker.num_out):
        return None
    return maker


def _scale(linear: Linear, factor: Floats, axis: int) -> None:
    """Multiplies rows (axis 0) or columns (axis 1) of a float matrix, when it is saved."""
    old = dataclasses.replace(linear)
    shaped = factor[:, None] if axis == 0 else factor

    def scaled() -> npt.NDArray[np.float32]:
        return (old.w_NK() * shaped).astype(np.float32)

    graph = linear.node.graph
    assert isinstance(graph, ir.Graph)
    linear.set_weight(scaled, unique_name(graph, f"{linear.name}.scaled"))


def _scale_rows(linear: Linear, factor_N: Floats) -> None:
    bias, node = linear.bias, linear.node
    _scale(linear, factor_N, axis=0)
    if bias is None:
        return
    if not any(value is bias for value in node.inputs):
        node = linear.output.consumers()[0]
    _scale_inputs(node, [index for index, value in enumerate(node.inputs) if value is bias], factor_N)


def _scale_inputs(node: ir.Node, slots: Sequence[int], factor: Floats) -> None:
    """Multiplies constants that a node reads; others that read them keep theirs."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    for slot in slots:
        old = node.inputs[slot]
        assert old is not None
        assert old.const_value is not None
        tensor = old.const_value

        def make(array: Floats) -> Floats:
            return (array.astype(np.float64) * factor).astype(array.dtype)

        node.replace_input_with(slot, derived(graph, tensor, f"{old.name}.scaled", tensor.shape.numpy(), make))
        drop_unused(graph, old)
