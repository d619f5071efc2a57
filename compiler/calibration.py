"""Streams text through a model, stage by stage, and shows a pass what each group of linears reads.

    with Calibration(model, windows, linears) as run:
        for stage in run.stages:
            group = run.observe(stage)
            group.replace(linear, new_w_NK)      # what later stages compute with

A stage is the part of the graph between the activation of one group (linears that read the same value) and that of the
next: each node runs once per stream, whatever the architecture. Two streams run: the teacher's, with the weights as
they came, and the compressed one, with what `replace` was given. Values that cross from a stage to a later one lie in
files, so memory holds one stage and the second moments of one activation. The graph itself is not changed.

Weights are inputs of a stage's graph: stages of equal layers share one session, and no weight is copied into it.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from onnxpress.compiler.errors import StreamingError, UnsupportedModelError
from onnxpress.compiler.linears import Float2D, Linear
from onnxpress.compiler.pass_ import subgraphs
from onnxpress.compiler.region import build_model, first_line
from onnxpress.compiler.stats import Stats
from onnxpress.compiler.threads import session_threads

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_CHOOSING = ("NonZero", "Compress", "Unique")
_INLINE = 1024  # bytes up to which a constant is part of a stage's graph


@dataclass
class Group:
    """Linears that read one activation, and what is known of it.

    Attributes:
        linears: in topological order.
        stats: of the activation.
    """

    linears: list[Linear]
    stats: Stats
    _replacements: dict[int, Array] = field(repr=False, default_factory=dict)

    def replace(self, linear: Linear, w_NK: Float2D) -> None:
        """From now on the compressed stream multiplies with `w_NK`, float32 [N, K]."""
        self._replacements[id(linear.weight)] = linear.stored_form(w_NK)


@dataclass
class Stage:
    """Part of a graph that leads to the activation of some linears.

    Attributes:
        linears: all read the same activation; none where only a value was asked for.
        end: that activation, or that value.
        nodes: those that no earlier stage has run.
        inputs: what they read of earlier stages and of the graph's inputs.
        weights: constants that are fed.
        outputs: what later stages read, and the end.
        dying: values that no later stage reads.
    """

    linears: list[Linear]
    end: ir.Value
    nodes: list[ir.Node]
    inputs: list[ir.Value]
    weights: list[ir.Value]
    outputs: list[ir.Value] = field(default_factory=list)
    dying: list[ir.Value] = field(default_factory=list)


class Calibration:
    """A model, the windows of text that run through it, and the state in between.

    Attributes:
        stages: to be observed one after the other.
    """

    def __init__(
        self,
        model: ir.Model,
        windows: Sequence[Feeds],
        linears: Sequence[Linear],
        work_dir: Path | None = None,
        *,
        ends: Sequence[ir.Value] = (),
    ) -> None:
        """Divides the graph into stages.

        Args:
            model: not to be changed before the last stage was observed.
            windows: inputs of the model by name, all of the same shapes; one run each.
            linears: those that the caller wants to see, of `find_linears(model, expand_pairs=True)`.
            work_dir: where values between stages are kept; the system's temporary folder by default.
            ends: further values that the caller wants to see, whoever reads them; each ends a stage.

        Raises:
            UnsupportedModelError: a graph inside a node is in the way.
        """
        self.stages = divide(model, linears, ends)
        self._opset = model.graph.opset_imports.get("", 18)
        self._num_windows = len(windows)
        self._folder = Path(tempfile.mkdtemp(prefix="streams-", dir=work_dir))
        self._streams = _Streams(self._folder, windows)
        self._sessions: dict[bytes, ort.InferenceSession] = {}
        self._replacements: dict[int, Array] = {}
        self._digest = _digest_of(windows)
        self._prepared: tuple[Stage, bytes, str] | None = None  # graph and digest of the next stage
        self._chosen = _chosen(model.graph)

    def __enter__(self) -> Calibration:
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def digest(self, stage: Stage) -> str:
        """Of the next of `stages`, all before it, and the windows: equal replacements then lead to equal stats."""
        return self._prepare(stage)[1]

    def _prepare(self, stage: Stage) -> tuple[bytes, str]:
        """Graph and digest of the next stage."""
        if self._prepared is None or self._prepared[0] is not stage:
            types = {id(value): self._streams.dtype(value) for value in stage.inputs}
            inputs = [*stage.inputs, *stage.weights]
            part = build_model(stage.nodes, inputs, stage.outputs, opset=self._opset, dtypes=types)
            graph = bytes(ir.to_proto(part).SerializeToString(deterministic=True))
            digest = hashlib.sha256(self._digest.encode())
            digest.update(graph)
            for value in stage.weights:
                _add(digest, _array(value))
            for linear in stage.linears:
                digest.update(linear.name.encode())
                _add(digest, _array(linear.weight))
            self._prepared = stage, graph, digest.hexdigest()
        return self._prepared[1:]

    def observe(self, stage: Stage, *, with_stats: bool = True) -> Group:
        """Runs the next of `stages`.

        Args:
            stage: the next one.
            with_stats: whether anybody will look at them; without, only the streams advance.

        Raises:
            StreamingError: this part of the graph does not run on these windows.
        """
        streams, activation = self._streams, stage.end
        stats, is_aligned, is_chosen = Stats(stage.linears[0].num_in), True, id(activation) in self._chosen
        for number in self._advance(stage):
            if not with_stats:
                continue
            teacher = streams.read(activation, number, compressed=False)
            compressed = streams.read(activation, number, compressed=True)
            rows = {teacher.size // stats.num_in, compressed.size // stats.num_in}
            is_aligned &= len(rows) == 1 and not is_chosen
            stats.update(compressed, teacher if is_aligned and streams.differ(activation) else None)
        if not is_aligned:
            # A router sends an expert other tokens once the model is compressed: rows of the streams do not correspond.
            stats.drift_KK = None
        streams.drop(stage.dying)
        return Group(stage.linears, stats, self._replacements)

    def values(self, stage: Stage) -> list[Array]:
        """Runs the next of `stages`, and gives what its end is in each window, in the compressed model.

        The arrays lie in a file, which lasts as long as they do.

        Raises:
            StreamingError: this part of the graph does not run on these windows.
        """
        found = [self._streams.read(stage.end, number, compressed=True) for number in self._advance(stage)]
        self._streams.drop(stage.dying)
        return found

    def teacher(self, stage: Stage) -> list[Array]:
        """Runs the next of `stages` in the model as it came only, and gives what its end is in each window.

        In the compressed model the stage's values are the same until `assign` gives others. The arrays lie in a file.

        Raises:
            StreamingError: this part of the graph does not run on these windows.
        """
        advance = self._advance(stage, only_teacher=True)
        found = [self._streams.read(stage.end, number, compressed=False) for number in advance]
        self._streams.drop(stage.dying)
        return found

    def both(self, stage: Stage) -> tuple[list[Array], list[Array]]:
        """Runs the next of `stages`, and gives what its end is in each window: in the model as it came, compressed.

        The arrays lie in files, which last as long as they do.

        Raises:
            StreamingError: this part of the graph does not run on these windows.
        """
        found: tuple[list[Array], list[Array]] = ([], [])
        for number in self._advance(stage):
            for compressed, arrays in enumerate(found):
                arrays.append(self._streams.read(stage.end, number, compressed=bool(compressed)))
        self._streams.drop(stage.dying)
        return found

    def assign(self, value: ir.Value, arrays: Iterable[Array]) -> list[Array]:
        """From now on `value`, the end of the stage that was run last, is this in the compressed model.

        Args:
            value: which later stages read; nothing happens to one that none reads.
            arrays: one for each window.

        Returns:
            The same arrays, in a file.
        """
        digest = hashlib.sha256(self._digest.encode())
        self._streams.forget(value)
        (sink,) = self._streams.create([value], compressed=True).stored
        for array in arrays:
            sink.append(array)
            _add(digest, array)
        self._digest, self._prepared = digest.hexdigest(), None
        return [self._streams.read(value, number, compressed=True) for number in range(self._num_windows)]

    def _advance(self, stage: Stage, *, only_teacher: bool = False) -> Iterator[int]:
        """Runs the next of `stages`; yields the number of each window once it is through."""
        streams = self._streams
        plain = [_array(value) for value in stage.weights]
        weights = [plain]
        changed = any(id(value) in self._replacements for value in stage.weights)
        if not only_teacher and (changed or any(streams.differ(value) for value in stage.inputs)):
            replaced = [self._replacements.get(id(value)) for value in stage.weights]
            weights.append([old if new is None else new for old, new in zip(plain, replaced, strict=True)])
        sinks = [streams.create(stage.outputs, compressed=bool(which)) for which in range(len(weights))]
        graph, self._digest = self._prepare(stage)
        session = self._session(stage, graph) if stage.nodes else None
        for number in range(self._num_windows):
            if session is not None:
                for which, sink in enumerate(sinks):
                    feeds = [streams.read(value, number, compressed=bool(which)) for value in stage.inputs]
                    sink.append(call(session, [*feeds, *weights[which]], stage))
            yield number
        for value in stage.weights:
            self._replacements.pop(id(value), None)

    def _session(self, stage: Stage, data: bytes) -> ort.InferenceSession:
        if data not in self._sessions:
            self._sessions[data] = open_session(data, stage)
        return self._sessions[data]


class _Streams:
    """Values between stages: one file per value and stream, [windows, *shape]; graph inputs are what they are."""

    def __init__(self, folder: Path, windows: Sequence[Feeds]) -> None:
        self._folder, self._windows = folder, windows
        self._stored: dict[tuple[int, bool], _Stored] = {}
        self._count = itertools.count()

    def create(self, values: Sequence[ir.Value], *, compressed: bool) -> _Sink:
        stored = [_Stored(self._folder / f"{next(self._count)}") for _ in values]
        self._stored |= {(id(value), compressed): one for value, one in zip(values, stored, strict=True)}
        return _Sink(stored)

    def differ(self, value: ir.Value) -> bool:
        return (id(value), True) in self._stored

    def read(self, value: ir.Value, number: int, *, compressed: bool) -> Array:
        stored = self._stored.get((id(value), compressed)) or self._stored.get((id(value), False))
        if stored is not None:
            return stored.read(number)
        assert value.name is not None
        return self._windows[number][value.name]

    def dtype(self, value: ir.Value) -> ir.DataType:
        return ir.DataType.from_numpy(self.read(value, 0, compressed=False).dtype)

    def forget(self, value: ir.Value) -> None:
        """Lets what the compressed model gave be that of the teacher again."""
        if stored := self._stored.pop((id(value), True), None):
            stored.remove()

    def drop(self, values: Sequence[ir.Value]) -> None:
        for value in values:
            for compressed in (False, True):
                if stored := self._stored.pop((id(value), compressed), None):
                    stored.remove()


class _Stored:
    """One array per window, one after the other in a file; shapes may differ (an expert gets what was sent to it)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: list[tuple[int, tuple[int, ...], np.dtype[Any]]] = []

    def append(self, array: Array) -> None:
        with self._path.open("ab") as file:
            self._places.append((file.tell(), array.shape, array.dtype))
            file.write(np.ascontiguousarray(array).data)

    def read(self, number: int) -> Array:
        offset, shape, dtype = self._places[number]
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.asarray(np.memmap(self._path, dtype, mode="r", offset=offset, shape=shape))

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


@dataclass
class _Sink:
    stored: list[_Stored]

    def append(self, arrays: Sequence[Array]) -> None:
        for one, array in zip(self.stored, arrays, strict=True):
            one.append(array)


def divide(model: ir.Model, linears: Sequence[Linear], ends: Sequence[ir.Value] = ()) -> list[Stage]:
    """Divides what leads to the activations of `linears` and to `ends`; equal activations share a stage.

    Args:
        model: holds `linears`.
        linears: of `find_linears(model, expand_pairs=True)`.
        ends: values of the graph; each ends a stage of its own, without linears, unless it is an activation.

    Raises:
        UnsupportedModelError: a graph inside a node is in the way.
    """
    grouped: dict[int, tuple[ir.Value, list[Linear]]] = {}
    for one in linears:
        grouped.setdefault(id(one.activation), (one.activation, []))[1].append(one)
    for value in ends:
        grouped.setdefault(id(value), (value, []))
    place = {id(node): number for number, node in enumerate(model.graph)}

    def position(group: tuple[ir.Value, list[Linear]]) -> int:
        producer = group[0].producer()
        return -1 if producer is None else place[id(producer)]

    stages: list[Stage] = []
    done: set[int] = set()
    replaceable = {id(one.weight) for one in linears}
    for end, group in sorted(grouped.values(), key=position):
        nodes = sorted(_ancestors(end, done), key=lambda node: place[id(node)])
        done |= {id(node) for node in nodes}
        stages.append(Stage(group, end, nodes, *_operands(nodes, replaceable)))
    # Backwards: a value lives from the stage that makes it to the last one that reads it.
    read_later: dict[int, int] = {}
    asked = {id(stage.end) for stage in stages}
    for number, stage in reversed(list(enumerate(stages))):
        made = [value for node in stage.nodes for value in node.outputs]
        # Two stages may have ends made by one node, of which the second is read by no other stage.
        stage.outputs = [value for value in made if id(value) in read_later or id(value) in asked]
        last_read = [value for value in (*stage.inputs, stage.end) if id(value) not in read_later]
        # The end itself is read while the stage runs, and by the next stages at most.
        stage.dying = [*dict.fromkeys(last_read)]
        for value in stage.inputs:
            read_later.setdefault(id(value), number)
    return stages


def _ancestors(value: ir.Value, done: set[int]) -> list[ir.Node]:
    """Nodes that `value` needs and that are not `done`."""
    found: dict[int, ir.Node] = {}
    queue = [value]
    while queue:
        node = queue.pop().producer()
        if node is None or id(node) in done or id(node) in found:
            continue
        if subgraphs(node):
            raise UnsupportedModelError(
                f"calibration: {node.op_type} {node.name!r} holds a graph of its own, which is not streamed",
                hint="give the parts of a merged decoder one by one",
            )
        found[id(node)] = node
        queue += [one for one in node.inputs if one is not None]
    return list(found.values())


def _operands(nodes: Sequence[ir.Node], replaceable: set[int]) -> tuple[list[ir.Value], list[ir.Value]]:
    """(activations that `nodes` read from outside, weights that are fed to them: large ones and `replaceable` ones)."""
    made = {id(value) for node in nodes for value in node.outputs}
    inputs: dict[int, ir.Value] = {}
    weights: dict[int, ir.Value] = {}
    for node in nodes:
        for value in node.inputs:
            if value is None or id(value) in made:
                continue
            if value.const_value is None:
                inputs[id(value)] = value
            elif value.const_value.nbytes > _INLINE or id(value) in replaceable:
                weights[id(value)] = value
    return list(inputs.values()), list(weights.values())


def _chosen(graph: ir.Graph) -> set[int]:
    """Values of which the data decides how many rows they have: an expert's share of the tokens, for one."""
    found: set[int] = set()
    for node in graph:
        if node.op_type in _CHOOSING or (
            # Rows that are put back into a value of all tokens are no choice any more.
            not node.op_type.startswith("Scatter") and any(id(value) in found for value in node.inputs)
        ):
            found |= {id(value) for value in node.outputs}
    return found


def _digest_of(windows: Sequence[Feeds]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        for name in sorted(window):
            digest.update(f"{name}{window[name].dtype}{window[name].shape}".encode())
            _add(digest, window[name])
    return digest.hexdigest()


def _add(digest: Any, array: Array) -> None:
    """The bytes of an array, whatever its type (numpy hands out no buffer of some)."""
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def open_session(graph: bytes, stage: Stage) -> ort.InferenceSession:
    """A session of a stage's graph.

    Raises:
        StreamingError: ONNX Runtime refuses it.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = session_threads()
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT has one exception type per C++ code
        raise _cannot_run(stage, error) from error


def call(session: ort.InferenceSession, arrays: Sequence[Array], stage: Stage) -> list[Array]:
    """Outputs of a stage from its inputs and weights, in their order.

    Raises:
        StreamingError: this part of the graph does not run on them.
    """
    try:
        return list(session.run(None, {f"i{index}": array for index, array in enumerate(arrays)}))
    except Exception as error:  # ORT has one exception type per C++ code
        raise _cannot_run(stage, error) from error


def _cannot_run(stage: Stage, error: Exception) -> StreamingError:
    place = stage.linears[0].name if stage.linears else stage.end.name or "a value"
    return StreamingError(
        f"calibration: what leads to {place} does not run on windows of text: {first_line(error)}",
        hint="does the model take fewer tokens at once? try a smaller length=",
    )
