"""What a change of weights does to a model's output: which matrix may lose how much.

The model runs once with its own weights; all values that cross from one stage of the graph to a later one are kept.
For a changed matrix only the stages that its error reaches run again.

Axes: T tokens, V vocabulary
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from onnxpress.compiler.calibration import Array, Feeds, Stage, call, divide, open_session
from onnxpress.compiler.calibration_text import CalibrationText, feeds
from onnxpress.compiler.errors import CalibrationError
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.probe import kl_divergence, log_softmax
from onnxpress.compiler.region import build_model

_POSITIONS = 256  # at which next-token distributions are compared at most: more cost more than they tell


class Sensitivity:
    """A model, one window of text, and the distance of its output from what it would be with other weights.

    The distance is the mean KL divergence per token (nats) from the model's next-token distribution; for a model
    without logits the squared error of its first output, relative.

    Attributes:
        measure: "KL divergence" or "squared output error".
    """

    def __init__(
        self,
        model: ir.Model,
        window: Feeds,
        linears: Sequence[Linear],
        *,
        ends: Sequence[ir.Value] = (),
        positions: int = _POSITIONS,
    ) -> None:
        """Runs the model once.

        Args:
            model: not to be changed while this is in use.
            window: inputs of the model by name.
            linears: those of which weights will change.
            ends: values that will be bypassed, or read in their place.
            positions: at which next-token distributions are compared at most.

        Raises:
            CalibrationError: the model does not run on this window, or not to finite outputs.
            UnsupportedModelError: a graph inside a node is in the way.
        """
        last = next((value for value in model.graph.outputs if value.name == "logits"), model.graph.outputs[0])
        self.measure = "KL divergence" if last.name == "logits" else "squared output error"
        self._last = last
        self._stages = divide(model, linears, [last, *ends])
        self._bypasses: dict[int, ir.Value] = {}
        self._sessions: list[ort.InferenceSession | None] = []
        self._values: dict[int, Array] = {}
        shared: dict[bytes, ort.InferenceSession] = {}
        for stage in self._stages:
            for value in stage.inputs:
                if id(value) not in self._values:
                    self._values[id(value)] = window[str(value.name)]
            self._sessions.append(self._open(stage, shared, model.graph.opset_imports.get("", 18)))
            self._run(stage, self._sessions[-1], self._values, {})
        output = self._values[id(last)]
        if not np.isfinite(output).all():
            raise CalibrationError("the model's outputs are not finite on the calibration text", hint="try other text")
        self._step = max(1, -(-output.size // output.shape[-1] // positions))
        self._reference = self._outcome(output)

    @classmethod
    def on_text(
        cls, model: ir.Model, text: CalibrationText, tokens: int, linears: Sequence[Linear]
    ) -> tuple[Sensitivity, npt.NDArray[np.int64], dict[str, Any]]:
        """On one window of calibration text; also its ids [W, S], of which the first row is used, and facts about it.

        Args:
            model: see above.
            text: gives the window.
            tokens: of the window; the option `probe` of passes.
            linears: see above.
        """
        ids_WS, facts = text.windows(tokens, tokens)
        try:
            return cls(model, feeds(model.graph, ids_WS[:1])[0], linears), ids_WS, facts
        except CalibrationError as error:
            if error.hint and "length=" in error.hint:
                error.hint = "does the model take fewer tokens at once? try a smaller probe="
            raise

    def value(self, value: ir.Value) -> Array:
        """What one of `ends` is on the window, with what was bypassed for good."""
        return self._values[id(value)]

    def bypass(self, bypasses: Mapping[int, ir.Value]) -> None:
        """Bypasses values for good: later distances are still those from the model as it came.

        Args:
            bypasses: id of one of `ends` to another, earlier one that is read in its place.
        """
        changed = self._changes({}, bypasses)
        self._bypasses |= bypasses
        self._values |= changed

    def distance(
        self, replacements: Mapping[int, Array], bypasses: Mapping[int, ir.Value] = MappingProxyType({})
    ) -> float:
        """How far the output moves when weights are replaced.

        Args:
            replacements: id of a weight's `ir.Value` to its array, as the graph stores it.
            bypasses: id of one of `ends` to another, earlier one that is read in its place.
        """
        changed = self._changes(replacements, bypasses)
        output = changed.get(id(self._last), self._values[id(self._last)] if self._bypasses else None)
        if output is None:
            return 0.0  # nothing that reads these weights leads to the output
        found = self._outcome(output)
        if self.measure == "KL divergence":
            return float(kl_divergence(self._reference, found).mean())
        energy = float(np.vdot(self._reference, self._reference)) or 1.0
        return float(np.square(found - self._reference).sum()) / energy

    def _changes(self, replacements: Mapping[int, Array], bypasses: Mapping[int, ir.Value]) -> dict[int, Array]:
        """Every value that differs, by its id."""
        changed: dict[int, Array] = {}
        for stage, session in zip(self._stages, self._sessions, strict=True):
            is_changed = any(id(value) in replacements for value in stage.weights)
            is_changed |= any(id(value) in changed for value in stage.inputs)
            gone = {id(value) for value in stage.outputs} & (bypasses.keys() | self._bypasses.keys())
            if is_changed and len(gone) < len(stage.outputs):
                self._run(stage, session, changed, replacements)
            for key in gone:
                source = bypasses.get(key, self._bypasses.get(key))
                if key in bypasses or id(source) in changed:
                    changed[key] = changed.get(id(source), self._values[id(source)])
                else:
                    changed.pop(key, None)
        return changed

    def _open(self, stage: Stage, shared: dict[bytes, ort.InferenceSession], opset: int) -> ort.InferenceSession | None:
        """Equal stages share a session; a stage that computes nothing has none."""
        if not stage.nodes:
            return None
        types = {id(value): ir.DataType.from_numpy(self._values[id(value)].dtype) for value in stage.inputs}
        part = build_model(stage.nodes, [*stage.inputs, *stage.weights], stage.outputs, opset=opset, dtypes=types)
        graph = bytes(ir.to_proto(part).SerializeToString(deterministic=True))
        if graph not in shared:
            shared[graph] = open_session(graph, stage)
        return shared[graph]

    def _run(
        self,
        stage: Stage,
        session: ort.InferenceSession | None,
        into: dict[int, Array],
        replacements: Mapping[int, Array],
    ) -> None:
        if session is None:
            return
        arrays = [into.get(id(value), self._values.get(id(value))) for value in stage.inputs]
        arrays += [_weight(value, replacements) for value in stage.weights]
        for value, array in zip(stage.outputs, call(session, arrays, stage), strict=True):  # type: ignore[arg-type]
            into[id(value)] = array

    def _outcome(self, output: Array) -> Array:
        rows = output.reshape(-1, output.shape[-1])[:: self._step].astype(np.float32, copy=False)
        return log_softmax(rows) if self.measure == "KL divergence" else rows


def digest_of(model: ir.Model) -> str:
    """Of all that decides what a change of weights does to the output: every node and every weight."""
    digest = hashlib.sha256(f"onnxruntime {ort.__version__} numpy {np.__version__}".encode())
    for node in model.graph:
        digest.update(ir.to_proto(node).SerializeToString(deterministic=True))
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        digest.update(value.const_value.tobytes())
    return digest.hexdigest()


def _weight(value: ir.Value, replacements: Mapping[int, Array]) -> Array:
    array = replacements.get(id(value))
    if array is None:
        assert value.const_value is not None
        array = value.const_value.numpy()
    return array
