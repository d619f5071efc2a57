"""Teaches a compressed model to predict what the original predicts: a few weights, by the original's logits on text.

Of each token the original's `TOP` most likely successors are kept, with the mass of all others as one more: 2 KB a
token where all logits of a vocabulary of 50,000 take 200. What is minimized is the KL divergence of these parts, which
is at most that of the whole distribution (data processing), and differs from it by what lies within the rest.

Imports torch: to be imported where it is used.

Paper: arXiv:1503.02531 (distillation); arXiv:2106.09685 (factors added to frozen matrices); arXiv:1412.6980 (Adam)

Axes: W windows, S tokens of a window, C tokens of a chunk, V vocabulary, k = TOP successors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from onnxpress.compiler.differentiable import Differentiable, Factors
from onnxpress.compiler.journal import Section
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.probe import Probe
from onnxpress.compiler.threads import workers

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]
Tensor = Any  # torch.Tensor: mypy does not follow torch
Tracker = Callable[[Sequence[Any], str], Iterable[Any]]

TOP = 256
_CHUNK = 16 << 20  # bytes of logits at once: about three copies of them are alive
_WARM_UP = 0.05  # share of the steps in which the rate rises
_CLIP = 1.0  # largest norm of all gradients together
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.99, 1e-8
_LOOKS = 10  # how often the held-out windows are looked at
_EPSILON_KL = 1e-4  # nats per token below which there is nothing to win


class Targets:
    """What the original predicts after each token of some windows; in files when there is a folder."""

    def __init__(self, num_windows: int, length: int, width: int, folder: Path | None) -> None:
        """Makes room for windows of `length` tokens; `width` is k."""
        shape = (num_windows, length, width)
        self.ids = _room(shape, np.int32, folder, "successors")
        self.log_p = _room(shape, np.float32, folder, "log-probabilities")
        self.log_rest = np.zeros(shape[:2], np.float32)

    def put(self, number: int, logits_SV: Array) -> None:
        """Keeps the successors of window `number`."""
        log_p, ids = torch.log_softmax(torch.from_numpy(logits_SV), -1).topk(self.ids.shape[2])
        self.ids[number], self.log_p[number] = ids.numpy(), log_p.numpy()
        mass = np.exp(log_p.numpy().astype(np.float64)).sum(-1)
        self.log_rest[number] = np.log(np.maximum(1 - mass, 1e-12))

    def get(self, number: int, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [C, k], log-probabilities [C, k], that of the rest [C]) of tokens of a window."""
        place = number, slice(start, end)
        ids = torch.from_numpy(self.ids[place].astype(np.int64))
        return ids, torch.from_numpy(np.array(self.log_p[place])), torch.from_numpy(self.log_rest[place])


def _room(shape: tuple[int, ...], dtype: Any, folder: Path | None, name: str) -> Array:
    if folder is None:
        return np.zeros(shape, dtype)
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)


def observe(
    original: Path,
    ids_WS: Ids,
    folder: Path | None,
    track: Tracker,
    kept: Ids | None = None,
) -> Iterator[tuple[int, Targets]]:
    """Runs the original on all windows; yields their targets, with V at first.

    Args:
        original: graph file.
        ids_WS: token ids of the compressed model.
        folder: for the files; None for memory.
        track: progress.
        kept: [V], the original's id of each token of the compressed model, where tokens were dropped.
    """
    probe = Probe(original, optimized=True)
    targets: Targets | None = None
    for number in track(range(len(ids_WS)), "heal: the original's predictions"):
        ids = ids_WS[number : number + 1]
        logits = probe.logits(ids if kept is None else kept[ids])[0]
        logits = logits if kept is None else logits[:, kept]
        if targets is None:
            targets = Targets(len(ids_WS), ids_WS.shape[1], min(TOP, logits.shape[1]), folder)
        targets.put(number, logits)
        yield logits.shape[1], targets


def divergence(logits_CV: Tensor, ids_Ck: Tensor, log_p_Ck: Tensor, log_rest_C: Tensor) -> Tensor:
    """KL(p || q) in nats, summed over tokens; the tokens that p does not name are one event.

    Args:
        logits_CV: of q.
        ids_Ck: tokens that p names.
        log_p_Ck: their log-probabilities.
        log_rest_C: that of all others together.
    Laws:   never below 0; 0 when q is p; with all tokens named the whole divergence.
    """
    named = logits_CV.gather(1, ids_Ck)
    log_named = torch.logsumexp(named, 1)
    p = log_p_Ck.exp()
    if ids_Ck.shape[1] == logits_CV.shape[1]:
        return (p * (log_p_Ck - named + log_named[:, None])).sum()
    log_others = torch.logsumexp(logits_CV.scatter(1, ids_Ck, -math.inf), 1)
    log_all = torch.logaddexp(log_named, log_others)
    rest = log_rest_C.exp() * (log_rest_C - log_others + log_all)
    return (p * (log_p_Ck - named + log_all[:, None])).sum() + rest.sum()


@dataclass
class Trained:
    """A tensor that is trained, as start + size * change, so that one rate suits tensors of any size.

    Attributes:
        start: float32, where it begins.
        size: unit of its change, one number or one for each of its own.
        change: what the optimizer moves, from 0.
    """

    start: Tensor
    size: Any = 1.0
    change: Tensor = field(init=False)
    _mean: Tensor = field(init=False)
    _square: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Begins at the start."""
        self.change, self._mean, self._square = (torch.zeros_like(self.start) for _ in range(3))

    def value(self) -> Tensor:
        """The tensor as it is now."""
        return self.start + self.size * self.change

    def step(self, gradient: Tensor, rate: float, number: int) -> None:
        """One step of Adam; `gradient` is that of `change`, `number` counts from 1."""
        self._mean.lerp_(gradient, 1 - _BETA_1)
        self._square.lerp_(gradient.square(), 1 - _BETA_2)
        mean = self._mean / (1 - _BETA_1**number)
        root = (self._square / (1 - _BETA_2**number)).sqrt_().add_(_EPSILON)
        self.change.sub_(rate * mean / root)

    def state(self) -> dict[str, Tensor]:
        """What a run that was killed goes on from."""
        return {"change": self.change, "mean": self._mean, "square": self._square}


@dataclass
class Student:
    """A compressed model and what is trained of it.

    Attributes:
        graph: the model.
        weights: trained initializers by the id of their value.
        factors: pairs by the id of the linear's node: (linear, A [R, K], B [N, R]).
    """

    graph: Differentiable
    weights: dict[int, Trained]
    factors: dict[int, tuple[Linear, Trained, Trained]] = field(default_factory=dict)

    def all(self) -> list[Trained]:
        """Everything that is trained, in a fixed order."""
        return [*self.weights.values(), *(one for _, *pair in self.factors.values() for one in pair)]

    def loss(self, ids_S: Ids, targets: Targets, number: int) -> float:
        """KL divergence per token on a window, in nats."""
        with torch.no_grad():
            return self._loss(ids_S, targets, number)[0]

    def gradients(self, ids_S: Ids, targets: Targets, number: int) -> tuple[float, list[Tensor]]:
        """KL divergence per token on a window, and its gradients by `change` of each of `all`."""
        return self._loss(ids_S, targets, number)

    def _loss(self, ids_S: Ids, targets: Targets, number: int) -> tuple[float, list[Tensor]]:
        # Leaves of their own: each chunk of tokens goes back through the head alone, and adds to their gradients.
        is_training = torch.is_grad_enabled()
        leaves = [one.value().requires_grad_(is_training) for one in self.all()]
        given = dict(zip(self.weights, leaves, strict=False))
        pairs = iter(leaves[len(given) :])
        factors = {key: Factors(pair[0], next(pairs), next(pairs)) for key, pair in self.factors.items()}
        hidden = self.graph.hidden(torch.from_numpy(ids_S[None]), given, factors)
        seen = hidden.detach().requires_grad_(is_training)
        total, length = 0.0, len(ids_S)
        width = max(1, _CHUNK // (4 * self.graph.vocabulary)) if self.graph.is_chunked else length
        for start in range(0, length, width):
            end = min(start + width, length)
            logits = self.graph.logits(seen[:, start:end], given)[0]
            loss = divergence(logits, *targets.get(number, start, end)) / length
            if is_training:
                loss.backward()
            total += float(loss.detach())
        if not is_training:
            return total, []
        if hidden.requires_grad:
            hidden.backward(seen.grad)
        return total, [
            torch.zeros_like(leaf) if leaf.grad is None else one.size * leaf.grad
            for one, leaf in zip(self.all(), leaves, strict=True)
        ]


def student_of(
    graph: Differentiable,
    vectors: Sequence[ir.Value],
    scales: Sequence[ir.Value],
    linears: Sequence[Linear],
    *,
    rank: int,
    seed: int,
) -> Student:
    """What is trained, as it begins: nothing has changed yet.

    Args:
        graph: knows `vectors` and `scales` as trained.
        vectors: initializers that change by their root mean square.
        scales: initializers of which each number changes by its own size.
        linears: get factors of this rank R, A random, B zero.
        seed: of the random numbers.
    """
    weights = {}
    for value in vectors:
        start = _start(value)
        weights[id(value)] = Trained(start, float(start.square().mean().sqrt()) or 1.0)
    for value in scales:
        weights[id(value)] = Trained(_start(value), _start(value).abs())
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for linear in linears:
        down = torch.randn(rank, linear.num_in, generator=generator) / linear.num_in**0.5
        factors[id(linear.node)] = linear, Trained(down), Trained(torch.zeros(linear.num_out, rank))
    return Student(graph, weights, factors)


def _start(value: ir.Value) -> Tensor:
    assert value.const_value is not None
    return torch.from_numpy(np.array(value.const_value.numpy(), np.float32))


def identity() -> str:
    """What beside model and text decides the bits of a training: version and threads of torch."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


@dataclass
class Course:
    """How training went.

    Attributes:
        curve: (steps done, KL divergence per token on the held-out windows), from step 0.
        best: steps after which it was lowest; what is trained is as it was then.
    """

    curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> int:
        """Steps after which the held-out divergence was lowest, the earliest of equals."""
        return min(self.curve, key=lambda one: one[1])[0]

    @property
    def has_nothing_to_learn(self) -> bool:
        """Whether the model predicted what the original does from the beginning."""
        return bool(self.curve) and self.curve[0][1] < _EPSILON_KL


def rate_at(step: int, steps: int, rate: float) -> float:
    """Learning rate of a step, from 0: rises over the first twentieth, then falls along half a cosine."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return rate * (step + 1) / warm
    return rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def order(num_windows: int, steps: int, seed: int) -> Ids:
    """Number of the window of each step: all of them, in another order each time around."""
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(num_windows) for _ in range(-(-steps // num_windows))]
    return np.concatenate(rounds)[:steps]


def train(
    student: Student,
    ids_WS: Ids,
    targets: Targets,
    *,
    held_out: int,
    steps: int,
    rate: float,
    seed: int,
    section: Section,
    digest: str,
    track: Tracker,
) -> Course:
    """Trains on all windows but the first `held_out`, a window a step; leaves the student at its best.

    Args:
        student: its tensors are changed.
        ids_WS: token ids.
        targets: what the original predicts for them.
        held_out: windows at the beginning that decide which of the states is best.
        steps: of the optimizer.
        rate: learning rate, of `Trained.change`.
        seed: of the order.
        section: keeps the state several times on the way.
        digest: of everything that decides the result.
        track: progress.
    """
    course, done = Course(), 0
    best = [one.change.clone() for one in student.all()]
    numbers = held_out + order(len(ids_WS) - held_out, steps, seed)
    looks = {round((one + 1) * steps / _LOOKS) for one in range(_LOOKS)}
    record = section.read("state", digest)
    if record is not None:
        done = _restore(record, student, course, best)
    else:
        course.curve.append((0, _held_out(student, ids_WS, targets, held_out)))
    if course.has_nothing_to_learn:
        return course
    for step in track(range(done, steps), "heal: training"):
        _, gradients = student.gradients(ids_WS[numbers[step]], targets, int(numbers[step]))
        norm = math.sqrt(sum(float(one.square().sum()) for one in gradients))
        shrink = min(1.0, _CLIP / norm) if norm else 1.0
        for one, gradient in zip(student.all(), gradients, strict=True):
            one.step(shrink * gradient, rate_at(step, steps, rate), step + 1)
        if step + 1 in looks:
            course.curve.append((step + 1, _held_out(student, ids_WS, targets, held_out)))
            if course.best == step + 1:
                best = [one.change.clone() for one in student.all()]
            section.write("state", digest, _record(student, course, best, step + 1))
    for one, change in zip(student.all(), best, strict=True):
        one.change.copy_(change)
    return course


def _held_out(student: Student, ids_WS: Ids, targets: Targets, count: int) -> float:
    losses = [student.loss(ids_WS[number], targets, number) for number in range(count)]
    value = float(np.mean(losses))
    return value if math.isfinite(value) else math.inf


def _record(student: Student, course: Course, best: Sequence[Tensor], done: int) -> dict[str, Array]:
    arrays = {"done": np.array(done), "curve": np.array(course.curve, np.float64)}
    for number, (one, change) in enumerate(zip(student.all(), best, strict=True)):
        arrays |= {f"{name}{number}": tensor.numpy() for name, tensor in one.state().items()}
        arrays[f"best{number}"] = change.numpy()
    return arrays


def _restore(record: Mapping[str, Array], student: Student, course: Course, best: Sequence[Tensor]) -> int:
    course.curve = [(int(step), float(value)) for step, value in record["curve"]]
    for number, (one, change) in enumerate(zip(student.all(), best, strict=True)):
        for name, tensor in one.state().items():
            tensor.copy_(torch.from_numpy(record[f"{name}{number}"]))
        change.copy_(torch.from_numpy(record[f"best{number}"]))
    return int(record["done"])


@contextmanager
def settled() -> Iterator[None]:
    """Within it torch uses no more threads than were allowed: equal numbers of them give equal bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, workers()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
