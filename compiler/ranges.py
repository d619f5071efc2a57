"""How large the values of a graph become on text: what decides whether float16 holds them.

Each stage of a calibration run gets a few nodes more, which find the largest magnitudes of what it makes; only these
numbers leave the session, so memory holds what it holds in any other run over text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.calibration import Calibration, Stage, divide
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Tracker


def largest_magnitudes(
    model: ir.Model,
    windows: Sequence[Mapping[str, npt.NDArray[Any]]],
    values: Iterable[ir.Value],
    track: Tracker,
    work_dir: Path | None = None,
) -> dict[int, float]:
    """The largest finite |element| of each of `values` over all windows, by id, in the unit of the value.

    Infinities and NaN do not count (a mask of -inf says nothing of a range), and a value without elements has 0. A
    value that nothing leads from, to a linear or an output, is not among the results.

    Args:
        model: a graph without branches and loops; the same afterwards as before.
        windows: inputs of the model by name, all of the same shapes; one run each.
        values: float32 ones, made by nodes.
        track: progress.
        work_dir: where values between stages are kept; the system's temporary folder by default.

    Raises:
        UnsupportedModelError: a graph inside a node is in the way.
        StreamingError: part of the graph does not run on these windows.
    """
    linears = find_linears(model, expand_pairs=True)
    reached = {id(node) for stage in divide(model, linears) for node in stage.nodes}
    # What lies behind the last linear; outputs on the way to one need no stages of their own.
    ends = [one for one in model.graph.outputs if (node := one.producer()) is not None and id(node) not in reached]
    wanted = {id(value) for value in values}
    found: dict[int, float] = {}
    gauges: list[_Gauge] = []
    try:
        with Calibration(model, windows, linears, work_dir, ends=ends) as run:
            read = {id(value) for stage in run.stages for value in stage.inputs}
            for stage in run.stages:
                gauges.append(_Gauge(stage, wanted, read))
            for gauge in track(gauges, "the range of values"):
                for numbers in run.values(gauge.stage):
                    for value, number in zip(gauge.values, numbers.tolist(), strict=True):
                        found[id(value)] = max(found.get(id(value), 0.0), number)
    finally:
        for gauge in gauges:
            gauge.remove()
    return found


class _Gauge:
    """Nodes at the end of a stage that join the magnitudes of `values`, which it makes, to one vector."""

    def __init__(self, stage: Stage, wanted: set[int], read: set[int]) -> None:
        self.stage = stage
        self.values = [one for node in stage.nodes for one in node.outputs if id(one) in wanted]
        self.nodes: list[ir.Node] = []
        zero = _constant("zero", np.zeros(1, np.float32))
        infinity = _constant("infinity", np.array(np.inf, np.float32))
        flat = _constant("flat", np.array([-1], np.int64))
        peaks = []
        for value in self.values:
            size = self._add("Abs", self._add("Reshape", value, flat))
            finite = self._add("Where", self._add("Less", size, infinity), size, zero)
            # The zero in front gives values without elements a largest one, and so the empty stage.
            peaks.append(self._add("ReduceMax", self._add("Concat", zero, finite, axis=0), keepdims=1))
        end = self._add("Concat", *peaks, axis=0) if peaks else self._add("Slice", zero, *(3 * [flat]))
        stage.nodes = [*stage.nodes, *self.nodes]
        stage.outputs = [*(one for one in stage.outputs if id(one) in read), end]
        stage.dying = [*stage.dying, end]
        stage.end = end

    def _add(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes or None)
        self.nodes.append(node)
        return node.outputs[0]

    def remove(self) -> None:
        """Takes back that the nodes read values of the graph."""
        for node in self.nodes:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)


def _constant(name: str, array: npt.NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
