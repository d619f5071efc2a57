"""The contract of a pass: what it is, what it is given, what it reports.

Read this before writing a pass, and think twice before changing it: every pass, the pipeline, the CLI, the artifact
and the contract tests hang on these few classes. A new wish of one pass belongs into that pass or into `Context`.

A pass is a frozen, keyword-only dataclass that is also an `onnx_ir.passes.InPlacePass`, so ours and theirs mix in one
`Sequential`. Its fields are its options; its text, `rtn(bits=4, block_size=32)`, parses back to an equal pass. State
lives in the model and in the `Context`, never in the pass.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import enum
import logging
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.calibration_arrays import CalibrationArrays
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import OnnxpressError, OptionError, PassError, near_miss
from onnxpress.compiler.journal import Journal
from onnxpress.compiler.target import TARGETS, Target

logger = logging.getLogger(__name__)
T = TypeVar("T")
Self = TypeVar("Self", bound="Pass")


class Promise(enum.Enum):
    """How far the outputs after a pass may be from those before; picks the tolerance of tests and of `--verify`."""

    EXACT = "exact"  # bit-equal
    CLOSE = "close"  # equal up to the order of float additions
    LOSSY = "lossy"  # different; the pass reports by how much


@dataclass(frozen=True)
class Skip:
    """A site that a pass could have changed and did not, with the reason."""

    site: str
    reason: str


@dataclass
class Report:
    """What one run of a pass did.

    Attributes:
        changed: names of the sites that were rewritten (nodes, weights, blocks).
        skipped: sites left as they were, each with its reason.
        metrics: name to number; a LOSSY pass fills at least one that says how much was lost.
        ledger: one row of facts per changed site, for the card (`site` is its first key).
        calibration: what a pass saw of text, {} when it needs none.
        notes: what a person should read, a line each: a decision, a table.
        files: what is to lie beside the model in an artifact: name to a function that writes it to a path.
        seconds: wall time of the run.
        bytes_before, bytes_after: bytes of all initializers, shared ones counted once.
    """

    changed: list[str] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def modified(self) -> bool:
        """Whether the model differs from before; derived, never set."""
        return bool(self.changed)

    def change(self, site: str, **facts: Any) -> None:
        """Notes that `site` was rewritten; `facts` become its row in the ledger."""
        self.changed.append(site)
        if facts:
            self.ledger.append({"site": site, **facts})

    def skip(self, site: str, reason: str) -> None:
        """Notes that `site` was left as it was, and why."""
        self.skipped.append(Skip(site, reason))

    def reasons(self) -> dict[str, int]:
        """How often each reason for skipping occurred."""
        counts: dict[str, int] = {}
        for skip in self.skipped:
            counts[skip.reason] = counts.get(skip.reason, 0) + 1
        return counts


Tracker = Callable[[Sequence[Any], str], Iterable[Any]]


class Stopwatch(typing.Protocol):
    """A model that is open and ready to run."""

    def seconds(self) -> float:
        """What one round takes now; compare with another model's next round, not with yesterday's."""


def _silent(items: Sequence[Any], label: str) -> Iterable[Any]:
    return items


@dataclass
class Context:
    """What a pass is given beside the model.

    Attributes:
        target: provider and float type that the artifact is built for.
        config: the model's `config.json`; a pass that changes the architecture edits it.
        generation_config: its `generation_config.json`.
        files: companion files (tokenizer, chat template) by name; a pass that changes one writes another below
            `work_dir` and enters that. They are copied into the artifact.
        kept_ids: [V], the id that each token had in the source; None while no pass has renumbered them.
        seed: of everything random.
        track: `for item in context.track(items, "layers")` lets the CLI draw a progress bar; silent in the library.
        work_dir: scratch folder that is removed afterwards; None when a pass must do without one.
        calibration: text for passes that look at activations, and what turns it into tokens.
        arrays: samples for models that read no text, by the name of an input.
        journal: where long passes keep what they have finished; nowhere by default.
        stored_types: how the source file stored a weight, by the weight's name here: "block3.gate" to
            ("blk.3.ffn_gate.weight", "Q4_0"); {} when the file does not say.
        history: texts of the passes and pipelines that have changed this model before, oldest first.
        compose: runs passes by their text, `compose(model, "rtn(bits=4)", context)`, for a pass that consists of
            others; None outside of a pipeline.
        stopwatch: opens a model as the target will run it, `stopwatch(model, context, "decode")`, to be timed; None
            where nothing can run it.
        original: graph file of the model as it was before the first pass; None when it came from memory.
    """

    target: Target = TARGETS["cpu"]
    config: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    kept_ids: npt.NDArray[np.int64] | None = None
    seed: int = 0
    track: Tracker = _silent
    work_dir: Path | None = None
    calibration: CalibrationText = field(default_factory=CalibrationText)
    arrays: CalibrationArrays = field(default_factory=CalibrationArrays)
    journal: Journal = field(default_factory=Journal)
    stored_types: dict[str, tuple[str, str]] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    compose: Callable[[ir.Model, str, Context], list[Report]] | None = None
    stopwatch: Callable[[ir.Model, Context, str], Stopwatch] | None = None
    original: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Pass(ir.passes.InPlacePass):
    """Base of all passes. A subclass sets `promise`, declares options as fields, and implements `rewrite`.

    The name of a pass is the name of its file.
    """

    promise: ClassVar[Promise]
    paper: ClassVar[str] = ""  # "arXiv:2210.17323" or "" when the method is folklore

    @abc.abstractmethod
    def rewrite(self, model: ir.Model, context: Context) -> Report:
        """Changes `model` in place. Sites that cannot be rewritten are skipped with a reason, never with an error.

        Raises:
            OptionError: an option has no effect on this model.
            PreconditionError: the model lacks something that the pass needs.
        """

    def __post_init__(self) -> None:
        """Checks the type of every option; a subclass that checks ranges calls `super().__post_init__()` first."""
        for option in dataclasses.fields(self):
            value, kind = getattr(self, option.name), _hints(type(self))[option.name]
            if not _is(value, kind):
                choices = (
                    [str(one) for one in typing.get_args(kind)] if typing.get_origin(kind) is typing.Literal else []
                )
                expected = kind.__name__ if isinstance(kind, type) else " or ".join(choices) or str(kind)
                hint = near_miss(str(value), choices)
                raise OptionError(f"{self.name()}: {option.name} must be {expected}, got {value!r}", hint=hint)

    @classmethod
    def name(cls) -> str:
        """The name by which pipelines call the pass: that of its file."""
        return cls.__module__.rpartition(".")[2].lstrip("_")

    @classmethod
    def example(cls: type[Self], model: ir.Model) -> Self:
        """An instance that has work to do on `model`, for the contract tests."""
        return cls()

    def check(self, condition: bool, option: str, expected: str, hint: str | None = None) -> None:
        """Raises OptionError unless `condition`; for ranges in `__post_init__`."""
        if not condition:
            raise OptionError(f"{self.name()}: {option} must be {expected}, got {getattr(self, option)!r}", hint=hint)

    def run(self, model: ir.Model, context: Context) -> Report:
        """`rewrite`, timed and weighed; errors get the place added."""
        before, start = weight_bytes(model), time.perf_counter()
        with located(str(self)):
            report = self.rewrite(model, context)
        report.seconds = time.perf_counter() - start
        report.bytes_before, report.bytes_after = before, weight_bytes(model)
        changed, skipped = len(report.changed), len(report.skipped)
        logger.info("%s  %d changed, %d skipped  %.1f s", self, changed, skipped, report.seconds)
        return report

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Runs with a default context; this is what makes ours and onnx_ir's passes mix."""
        return ir.passes.PassResult(model, self.run(model, Context()).modified)

    def __str__(self) -> str:
        """The text that parses back: options that differ from their default, in order of declaration."""
        options = [
            f"{option.name}={getattr(self, option.name)!r}"
            for option in dataclasses.fields(self)
            if getattr(self, option.name) != _default(option)
        ]
        return f"{self.name()}({', '.join(options)})" if options else self.name()


def options(cls: type[Pass]) -> dict[str, tuple[Any, Any]]:
    """Options of a pass class: name to (type, default), in order of declaration."""
    hints = _hints(cls)
    return {option.name: (hints[option.name], _default(option)) for option in dataclasses.fields(cls)}


def build(cls: type[Pass], arguments: dict[str, Any]) -> Pass:
    """An instance of `cls`; an unknown option is an error with the nearest known name."""
    known = options(cls)
    for name in arguments:
        if name not in known:
            hint = near_miss(name, known) if known else f"{cls.name()} has no options"
            raise OptionError(f"{cls.name()}: there is no option {name!r}", hint=hint)
    return cls(**arguments)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers and Constant nodes, those of branches and loops included; each tensor counted once."""
    seen: dict[int, int] = {}
    graphs: list[ir.Graph] = [model.graph]
    while graphs:
        graph = graphs.pop()
        for value in graph.initializers.values():
            if value.const_value is not None:
                seen[id(value.const_value)] = value.const_value.nbytes
        for node in graph:
            if node.op_type == "Constant" and (tensor := node.attributes.get("value")) is not None:
                seen[id(tensor.value)] = tensor.value.nbytes
            graphs += subgraphs(node)
    return sum(seen.values())


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The branches of an If, or the body of a Loop or Scan."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


@contextlib.contextmanager
def located(place: str) -> Iterator[None]:
    """Adds `place` to what goes wrong inside; foreign errors become a PassError that keeps its cause."""
    try:
        yield
    except OnnxpressError as error:
        if not error.message.startswith(place.partition("(")[0]):
            error.message = f"{place}: {error.message}"
        raise
    except (KeyboardInterrupt, MemoryError, OSError):
        raise
    except Exception as error:
        raise PassError(f"{place}: {type(error).__name__}: {error}", hint="this is a bug; please report it") from error


def _default(option: dataclasses.Field[Any]) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _is(value: Any, kind: Any) -> bool:
    """Whether `value` is of the annotated type `kind`: plain types, unions, Literal, tuple[int, ...] and dict."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, one) for one in typing.get_args(kind))
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(one, typing.get_args(kind)[0]) for one in value)
    if origin is dict:
        keys, values = typing.get_args(kind)
        return isinstance(value, dict) and all(_is(key, keys) and _is(one, values) for key, one in value.items())
    if kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
