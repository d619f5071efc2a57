"""Wins back what a lossy pass lost: trains norms, biases, scales or merged factors to predict as the original does.

Runs after pruning or quantization, when it is asked for; no recipe has it. The graph stays as it is, node for node and
type for type: only values of initializers change.

Paper:   arXiv:1503.02531 (distillation); arXiv:2106.09685 (LoRA); arXiv:2407.14679 (distillation after pruning,
         logits alone)
Differs: the original's distribution is kept as its 256 likeliest tokens and the rest; steps are relative to the size of
         each tensor; a window that training does not see decides whether anything changes.
Axes:    W windows, S tokens of a window, N out features, K in features, R rank, V vocabulary
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import OptionError, PreconditionError, UnsupportedModelError
from onnxpress.compiler.linears import Linear, find_linears
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.region import first_line
from onnxpress.compiler.sensitivity import digest_of

Array = npt.NDArray[Any]

_HELD_OUT = 2048  # tokens of text that decide, in whole windows, if training runs over ten times as many windows
_RATES = {"norms": 5e-3, "scales": 1e-3, "lora": 2e-3}
_SMALLEST = 16  # numbers of a vector; shorter ones are constants of a formula
_SPARSE = 0.1  # share of zeros from which a matrix was made sparse
# What may stand between a norm's weight and the activations: Gemma's exports add 1 to it.
_CARRIERS = ("Add", "Mul", "Cast", "Identity", "Reshape", "Unsqueeze")


@dataclass(frozen=True, kw_only=True)
class Heal(Pass):
    """Distills the original model into the compressed one, on calibration text.

    `norms` trains the weights of norms and all biases, `scales` these and the scales of MatMulNBits, `lora` these and a
    product of two thin matrices beside each float matrix of the blocks, added to it in the end. The state with the
    least KL divergence on held-out windows is kept; when that is the first, nothing changes.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    paper: ClassVar[str] = "arXiv:1503.02531"

    train: Literal["norms", "scales", "lora"] = "norms"  # what is trained
    rank: int = 8  # columns of the thin matrices, for lora
    steps: int = 300  # of the optimizer, a window each
    length: int = 512  # tokens of a window
    learning_rate: float | None = None  # relative to the size of each tensor; by default as fits `train`
    teacher: str | None = None  # directory or graph file of the original; by default the model as it was loaded

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, least in (("rank", 1), ("steps", 1), ("length", 8)):
            self.check(getattr(self, option) >= least, option, f"at least {least}")
        positive = self.learning_rate is None or self.learning_rate > 0
        self.check(positive, "learning_rate", "positive", "by default 5e-3 for norms, 1e-3 for scales, 2e-3 for lora")

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        original = self._original(context)
        if importlib.util.find_spec("torch") is None:
            raise PreconditionError("heal: training takes torch, which is not installed", hint="pip install torch")
        if not context.calibration.is_text:
            raise PreconditionError(
                "heal: expected text to train on, found no tokenizer.json that would make tokens of it",
                hint="put it beside the model, and give the text: --calibration FILE",
            )
        report = Report()
        held_out = max(1, min(_HELD_OUT // self.length, self.steps // 10))
        ids_WS, report.calibration = context.calibration.windows((self.steps + held_out) * self.length, self.length)
        if len(ids_WS) < 2:
            raise OptionError(
                f"heal: expected text for two windows of {self.length} tokens, one to train on and one to decide;"
                f" found {ids_WS.size} tokens",
                hint=f"give more text, or length={max(8, ids_WS.size // 4)}",
            )
        with ExitStack() as ending:
            work_dir = context.work_dir or Path(ending.enter_context(tempfile.TemporaryDirectory()))
            self._train(model, context, original, ids_WS, min(held_out, len(ids_WS) // 2), work_dir, report)
        return report

    def _original(self, context: Context) -> Path:
        """The graph file to learn from."""
        if self.teacher is None:
            if context.original is None:
                raise OptionError(
                    "heal: expected the original model to learn from, found none: this one did not come from a file",
                    hint="name its directory: heal(teacher='path/to/model')",
                )
            return context.original
        path = Path(self.teacher).expanduser()
        path = path / "model.onnx" if path.is_dir() else path
        if not path.is_file():
            raise OptionError(
                f"heal: teacher must be a directory with model.onnx, or a graph file, got {self.teacher!r}",
                hint=f"there is no file {path}",
            )
        return path

    def _train(
        self,
        model: ir.Model,
        context: Context,
        original: Path,
        ids_WS: npt.NDArray[np.int64],
        held_out: int,
        work_dir: Path,
        report: Report,
    ) -> None:
        from onnxpress.compiler import distillation
        from onnxpress.compiler.differentiable import Differentiable

        linears = find_linears(model, expand_pairs=True)
        vectors, scales = find_vectors(model, linears), self._scales(linears, report)
        adapted = self._adapted(linears, report)
        if not vectors and not scales and not adapted:
            raise OptionError(
                f"heal: train={self.train!r} has no effect: the model has no norms or biases"
                + (", and no matrix that can be trained" if self.train != "norms" else ""),
                hint="of float matrices heal(train='lora') trains a part, of those in MatMulNBits heal(train='scales')",
            )
        window = feeds(model.graph, ids_WS[:1])[0]
        with distillation.settled():
            identity = f"{self} {context.seed} {distillation.identity()}"
            digest = _digest(model, identity, original, ids_WS)
            graph = Differentiable(model, window, [*vectors, *scales], work_dir)
            student = distillation.student_of(graph, vectors, scales, adapted, rank=self.rank, seed=context.seed)
            targets = _targets(original, ids_WS, context, work_dir, graph.vocabulary)
            course = distillation.train(
                student,
                ids_WS,
                targets,
                held_out=held_out,
                steps=self.steps,
                rate=self.learning_rate or _RATES[self.train],
                seed=context.seed,
                section=context.journal.section(self.name(), str(self), digest),
                digest=digest,
                track=context.track,
            )
        curve = dict(course.curve)
        report.metrics |= {
            "held_out_kl_before": curve[0],
            "held_out_kl_after": curve[course.best],
            "best_step": course.best,
            "trained": sum(one.start.numel() for one in student.all()),
            "gradient_model_error": graph.difference,
        }
        report.notes.append(
            f"KL divergence per token on {held_out * ids_WS.shape[1]} held-out tokens, by steps: "
            + ", ".join(f"{step}: {value:.4f}" for step, value in course.curve)
        )
        if course.best == 0:
            reason = (
                "the model predicts what the original does; if it was pruned in an earlier run, name teacher"
                if course.has_nothing_to_learn
                else (f"the held-out KL divergence did not fall below {curve[0]:.4f} in {self.steps} steps")
            )
            report.skip("all", reason)
            return
        _write(student, {id(value): value for value in (*vectors, *scales)}, report)

    def _scales(self, linears: Sequence[Linear], report: Report) -> list[ir.Value]:
        """Scales of MatMulNBits, one entry for each however many read it."""
        found: dict[int, ir.Value] = {}
        for linear in linears if self.train == "scales" else ():
            value = linear.node.inputs[2] if linear.holder == "MatMulNBits" else None
            if value is None:
                report.skip(linear.name, f"a {linear.holder} has no scales")
            elif _is_read_elsewhere(value, linear):
                report.skip(linear.name, "its scales are those of the embedding, too")
            else:
                found[id(value)] = value
        return list(found.values())

    def _adapted(self, linears: Sequence[Linear], report: Report) -> list[Linear]:
        """Linears that get factors."""
        found = []
        for linear in linears if self.train == "lora" else ():
            reason = None
            if linear.block is None:
                reason = "it is outside of the blocks"
            elif linear.is_quantized:
                reason = f"what is added to it would be rounded away: a {linear.holder} holds codes"
            elif linear.is_shared:
                reason = "its matrix is shared"
            elif min(linear.shape) <= self.rank:
                reason = f"it has only {min(linear.shape)} rows or columns"
            elif float((linear.w_NK() == 0).mean()) > _SPARSE:
                reason = "it is sparse, and its zeros would be filled"
            if reason is None:
                found.append(linear)
            else:
                report.skip(linear.name, reason)
        return found


def _digest(model: ir.Model, identity: str, original: Path, ids_WS: Array) -> str:
    """Of everything that decides what is learned."""
    digest = hashlib.sha256(f"{digest_of(model)} {identity}".encode())
    digest.update(np.ascontiguousarray(ids_WS).tobytes())
    for path in sorted(original.parent.glob(f"{original.stem}*")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def find_vectors(model: ir.Model, linears: Sequence[Linear]) -> list[ir.Value]:
    """Weights of norms and biases: vectors of floats that meet activations, other than what belongs to codes."""
    ids = {id(value) for value in model.graph.inputs if value.name == "input_ids"}
    moving = set(ids)
    for node in model.graph:
        if node.op_type not in ("Shape", "Size") and any(id(value) in moving for value in node.inputs):
            moving |= {id(value) for value in node.outputs}
    codes = {id(value) for linear in linears for value in linear.weights}
    codes |= {id(value) for node in model.graph if node.op_type == "GatherBlockQuantized" for value in node.inputs}
    found = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or id(value) in codes or not tensor.dtype.is_floating_point():
            continue
        sizes = [int(one) for one in tensor.shape.numpy()]
        is_vector = bool(sizes) and math.prod(sizes) == max(sizes) >= _SMALLEST
        if is_vector and _meets(value, moving):
            found.append(value)
    return found


def _meets(value: ir.Value, moving: set[int], depth: int = 4) -> bool:
    """Whether activations are combined with the value, or with what a constant or two make of it."""
    for node in value.consumers():
        if any(id(one) in moving for one in node.inputs):
            return True
        plain = all(one is value or one is None or _is_small(one) for one in node.inputs)
        if depth and plain and node.op_type in _CARRIERS and _meets(node.outputs[0], moving, depth - 1):
            return True
    return False


def _is_small(value: ir.Value) -> bool:
    node = value.producer()
    is_constant = node is not None and node.op_type == "Constant"
    return is_constant or (value.const_value is not None and value.const_value.size < _SMALLEST)


def _is_read_elsewhere(value: ir.Value, linear: Linear) -> bool:
    return any(node is not linear.node and node.op_type != "MatMulNBits" for node in value.consumers())


def _targets(original: Path, ids_WS: Array, context: Context, work_dir: Path, width: int) -> Any:
    """What the original predicts for all windows.

    Raises:
        OptionError: it has another vocabulary, or does not run.
    """
    from onnxpress.compiler import distillation

    kept = context.kept_ids
    found = None
    try:
        for vocabulary, targets in distillation.observe(original, ids_WS, work_dir, context.track, kept):
            found = targets
            if vocabulary != width:
                raise OptionError(
                    f"heal: {original} has logits of {vocabulary} tokens, the model to heal of {width}",
                    hint="give the model that this one was made of, before its vocabulary was pruned in the same run",
                )
    except (OptionError, OSError, MemoryError):
        raise
    except Exception as error:  # ORT has one exception type per C++ code
        raise UnsupportedModelError(
            f"heal: the original does not run on text here: {first_line(error)}",
            hint="name one that does: heal(teacher='path/to/model')",
        ) from error
    return found


def _write(student: Any, values: dict[int, ir.Value], report: Report) -> None:
    """Puts what was learned into the model's initializers, in their types."""
    for key, trained in student.weights.items():
        value, old = values[key], values[key].const_value
        assert old is not None
        new = trained.value().numpy().astype(old.dtype.numpy())
        if np.array_equal(new, old.numpy()):
            report.skip(str(value.name), "it did not change in its type")
            continue
        report.change(str(value.name), moved=_moved(new, old.numpy()))
        value.const_value = ir.Tensor(new, dtype=old.dtype, name=value.name)
    for linear, down, up in student.factors.values():
        a_RK, b_NR = down.value().numpy(), up.value().numpy()
        report.change(linear.name, moved=_moved(linear.w_NK() + b_NR @ a_RK, linear.w_NK()), rank=len(a_RK))
        linear.weight.const_value = _merged(linear, a_RK, b_NR)


def _merged(linear: Linear, a_RK: Array, b_NR: Array) -> ir.TensorProtocol:
    """The stored form of w + B A, made when it is read: the model holds the factors, not a second matrix."""
    old, name = linear.weight.const_value, linear.weight.name
    assert old is not None
    is_turned = linear.is_turned()

    def read() -> ir.Tensor[Any]:
        added = b_NR @ a_RK
        new = np.asarray(old.numpy(), np.float32) + (added.T if is_turned else added)
        return ir.Tensor(new.astype(old.dtype.numpy()), dtype=old.dtype, name=name)

    return ir.LazyTensor(read, dtype=old.dtype, shape=ir.Shape(old.shape.numpy()), name=name)


def _moved(new: Array, old: Array) -> float:
    """Root mean square of the change relative to that of the old numbers."""
    before = np.asarray(old, np.float32)
    change = np.asarray(new, np.float32) - before
    return float(np.linalg.norm(change) / max(float(np.linalg.norm(before)), 1e-30))
