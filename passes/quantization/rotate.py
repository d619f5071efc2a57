"""Turns the space of features so that no feature stands out: weights and activations get easier to round.

Two rotations that need no new node. One turns the values of each key-value head: rows of the value projection, and
columns of the output projection for every query head that reads them. The other turns the residual stream: the
embeddings, the columns of all that read it behind a norm (whose gain goes into them first) and the rows of all that
write it; RMSNorm commutes with a rotation. A head that shares its matrix with the embedding gets one of its own, since
the final gain goes into it alone; that costs a table of bytes, so it is done on request only.

Paper:   arXiv:2404.00456 (QuaRot), arXiv:2405.16406 (SpinQuant: rotations R1 and R2, several trials)
Differs: the trials are compared by the error that rounding leaves at the outputs of the matrices, by second moments of
         their activations; a rotation that does not lower it is left out.
Axes:    N out features, K in features, H width of the residual stream, D width of a head
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.calibration import Calibration
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.compiler.linears import (
    Embedding,
    Linear,
    derived,
    drop_unused,
    find_embeddings,
    find_linears,
    unique_name,
)
from onnxpress.compiler.nbits import BITS, BLOCK_SIZES
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.passes.quantization._hadamard import rotation
from onnxpress.passes.quantization._least_squares import quadratic
from onnxpress.passes.quantization._rounding import round_matrix
from onnxpress.passes.quantization._weight_only import FLOATS, Format

Floats = npt.NDArray[Any]

_RMS = {
    "SimplifiedLayerNormalization": 1,
    "RMSNormalization": 1,
    "SkipSimplifiedLayerNormalization": 2,
}  # and the slot of the gain
_ROWS = 192  # of a matrix that tell the error of a rotation


@dataclass
class _Stream:
    """The residual stream of a model: what writes it, what reads it."""

    embeddings: list[Embedding] = field(default_factory=list)
    norms: list[ir.Node] = field(default_factory=list)
    readers: dict[int, tuple[Linear, ir.Node]] = field(default_factory=dict)  # with the norm before it
    writers: dict[int, Linear] = field(default_factory=dict)


@dataclass
class _Heads:
    """A value projection and the output projection behind the attention."""

    value: Linear
    output: Linear
    num_heads: int
    num_kv_heads: int


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """Rotates values, and on request the residual stream; logits stay the same, cached values are rotated ones.

    `bits`, `block_size` and `symmetric` are those of the quantizer that follows.
    """

    promise: ClassVar[Promise] = Promise.LOSSY  # of the cache's values; logits move by float rounding
    paper: ClassVar[str] = "arXiv:2404.00456"

    stream: bool = False  # rotate the residual stream too; a head tied to the embedding gets a matrix of its own
    trials: int = 4  # rotations that are compared
    bits: int = 4  # of the quantizer that follows
    block_size: int = 32  # of the quantizer that follows
    symmetric: bool = False  # of the quantizer that follows
    tokens: int = 2048  # of calibration text
    length: int = 512  # tokens of a window

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.trials >= 1, "trials", "positive", "4 suits most models")
        self.check(self.bits in BITS, "bits", f"one of {BITS}")
        self.check(self.block_size in BLOCK_SIZES, "block_size", f"one of {BLOCK_SIZES}")
        self.check(self.tokens >= 1, "tokens", "positive", "2048 suits most models")
        self.check(self.length >= 1, "length", "positive", "512 suits most models")

    @classmethod
    def example(cls, model: ir.Model) -> Rotate:
        return cls(stream=True, tokens=32, length=16, trials=1)

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        linears = find_linears(model, expand_pairs=True)
        heads = list(self._heads(linears, report))
        stream = self._stream(model, linears, report) if self.stream else None
        wanted = {id(part): part for one in heads for part in (one.value, one.output)}
        if stream is not None:
            parts = [linear for linear, _ in stream.readers.values()] + list(stream.writers.values())
            wanted |= {id(one): one for one in parts}
        if not heads and not report.skipped:
            report.skip(
                "values", "no GroupQueryAttention or MultiHeadAttention with a linear behind it: comes after fuse"
            )
        if not wanted:
            return report
        if any(one.weight.dtype == ir.DataType.BFLOAT16 for one in wanted.values()):
            raise UnsupportedModelError(
                "rotate: text is streamed on the CPU, which has no kernels for bfloat16",
                hint="use --target cuda (float16)",
            )
        rng = np.random.default_rng(context.seed)
        sizes = {id(one): one.value.num_out // one.num_kv_heads for one in heads}
        if stream is not None:
            sizes[id(stream)] = stream.embeddings[0].width
        # The sizes have rotations: `_heads` and `_stream` looked.
        turns = {
            key: [turn for _ in range(self.trials) if (turn := rotation(size, rng)) is not None]
            for key, size in sizes.items()
        }
        losses = {key: np.zeros(1 + self.trials) for key in turns}
        ids_WS, report.calibration = context.calibration.windows(self.tokens, self.length)
        order = [one for one in linears if id(one) in wanted]
        with Calibration(model, feeds(model.graph, ids_WS), order, context.work_dir) as run:
            for stage in context.track(run.stages, self.name()):
                group = run.observe(stage)
                moments_KK = group.stats.hessian_KK
                for linear in group.linears:
                    plain = self._loss(linear.w_NK(), moments_KK)
                    for one in heads:
                        if linear in (one.value, one.output):
                            for trial, turn in enumerate(turns[id(one)]):
                                losses[id(one)][1 + trial] += self._turned_head(one, linear, turn, moments_KK)
                            losses[id(one)][0] += plain
                    if stream is not None and (id(linear) in stream.readers or id(linear) in stream.writers):
                        for trial, turn in enumerate(turns[id(stream)]):
                            losses[id(stream)][1 + trial] += self._turned_stream(stream, linear, turn, moments_KK)
                        losses[id(stream)][0] += plain
        # Weights were read until here, so nothing is changed before.
        before = after = 0.0
        places: list[_Heads | _Stream] = [*heads, *([stream] if stream else [])]
        for place in places:
            loss = losses[id(place)]
            best = int(np.argmin(loss[1:]))
            name = place.value.name if isinstance(place, _Heads) else "the residual stream"
            before, after = before + loss[0], after + min(loss[0], loss[1 + best])
            if not loss[1 + best] < loss[0]:
                report.skip(name, "no rotation makes its error smaller")
                continue
            turn = turns[id(place)][best]
            if isinstance(place, _Heads):
                _turn_head(place, turn)
            else:
                _turn_stream(place, turn)
            report.change(name)
        if before:
            report.metrics["error_ratio"] = after / before
        return report

    def _heads(self, linears: list[Linear], report: Report) -> Iterator[_Heads]:
        """Pairs of projections whose values may be turned; reasons against go to the report."""
        by_output = {id(one.output): one for one in linears}
        for output in linears:
            node = output.activation.producer()
            if (
                node is None
                or node.op_type not in ("GroupQueryAttention", "MultiHeadAttention")
                or len(node.inputs) < 3
            ):
                continue
            value = node.inputs[2]
            maker = by_output.get(id(value)) if value is not None else None
            if maker is None and value is not None and (add := value.producer()) is not None and add.op_type == "Add":
                maker = next((one for one in map(by_output.get, map(id, add.inputs)) if one is not None), None)
                maker = maker if maker is not None and any(one is maker.bias for one in add.inputs) else None
            name = maker.name if maker is not None else output.name
            reason = _unfit(maker, output)
            heads = _int(node, "num_heads")
            kv_heads = _int(node, "kv_num_heads") or heads
            if reason is None and maker is not None and value is not None:
                # Layers that share values would turn them twice, each its own way.
                is_alone = all(map(_is_read_once, (maker.output, value, output.activation)))
                reason = None if is_alone else "something else reads its values, or what the attention makes of them"
            if reason is None and node.op_type == "MultiHeadAttention" and len(node.inputs) > 3 and node.inputs[3]:
                reason = "the attention adds biases itself"
            if reason is None and len(node.inputs) > 13 and node.inputs[13] is not None:
                reason = "its cache has fixed scales: comes before quantize_kv"
            if reason is None and maker is not None:
                width = maker.num_out // kv_heads
                if rotation(width, np.random.default_rng(0)) is None:
                    reason = f"there is no Hadamard matrix here for heads of {width}"
                else:
                    yield _Heads(maker, output, heads, kv_heads)
            if reason is not None:
                report.skip(name, reason)

    def _stream(self, model: ir.Model, linears: list[Linear], report: Report) -> _Stream | None:
        """All that touches the residual stream; None, and the reason in the report, where something is in the way."""
        try:
            found = _follow(model, linears)
        except _InTheWayError as error:
            report.skip("the residual stream", str(error))
            return None
        width = found.embeddings[0].width
        if rotation(width, np.random.default_rng(0)) is None:
            report.skip("the residual stream", f"there is no Hadamard matrix here for a width of {width}")
            return None
        return found

    def _loss(self, w_NK: Floats, moments_KK: Floats) -> float:
        """Squared error that rounding leaves at the outputs, relative to them."""
        w_NK = np.ascontiguousarray(_some_rows(w_NK), dtype=np.float32)
        chosen = Format(self.bits, self.block_size, self.symmetric, "max")
        rounded, _, _ = round_matrix(w_NK, **chosen._asdict(), scale_dtype=np.dtype(np.float32))
        moments = moments_KK.astype(np.float32)
        energy = quadratic(np.ascontiguousarray(w_NK.T), moments)
        return quadratic(np.ascontiguousarray((rounded.w_NK() - w_NK).T), moments) / energy if energy > 0 else 0.0

    def _turned_head(self, heads: _Heads, linear: Linear, turn: Floats, moments_KK: Floats) -> float:
        w_NK = linear.w_NK()
        if linear is heads.value:
            return self._loss(_turn_rows(w_NK, turn), moments_KK)
        turned_KK = _turn_columns(_turn_columns(moments_KK, turn).T, turn)
        return self._loss(_turn_columns(_some_rows(w_NK), turn), turned_KK)

    def _turned_stream(self, stream: _Stream, linear: Linear, turn: Floats, moments_KK: Floats) -> float:
        w_NK = linear.w_NK()
        if id(linear) in stream.writers:
            return self._loss(_turn_rows(w_NK, turn), moments_KK)
        gain_K = _gain(stream.readers[id(linear)][1])
        # The moments without the gain, which goes into the weights; a gain of 0 lets nothing through.
        inverse_K = np.divide(1.0, gain_K, out=np.zeros_like(gain_K), where=gain_K != 0)
        plain_KK = moments_KK * inverse_K * inverse_K[:, None]
        return self._loss((_some_rows(w_NK) * gain_K) @ turn, turn.T @ plain_KK @ turn)


def _some_rows(w_NK: Floats) -> Floats:
    """Every so many rows, at most `_ROWS`: a head has as many as the vocabulary."""
    return w_NK[:: -(-len(w_NK) // _ROWS)]


class _InTheWayError(Exception):
    """Why the residual stream cannot be turned."""


def _follow(model: ir.Model, linears: list[Linear]) -> _Stream:
    """Goes along the residual stream from the embeddings to the head.

    Raises:
        _InTheWayError: something reads or writes it that does not commute with a rotation.
    """
    tables = find_embeddings(model, linears)
    if not tables:
        raise _InTheWayError("the model has no table of tokens")
    width = max(tables, key=lambda one: one.num_rows * one.width).width
    found = _Stream([one for one in tables if one.width == width])
    if any(one.node.op_type != "Gather" for one in found.embeddings):
        raise _InTheWayError("the embedding is quantized already")
    by_output, by_node = {id(one.output): one for one in linears}, {id(one.node): one for one in linears}
    stream = {id(one.node.outputs[0]) for one in found.embeddings}
    normed: dict[int, ir.Node] = {}

    def write(value: ir.Value | None, node: ir.Node) -> None:
        """`value` is added to the stream: it must be what a linear gives."""
        if value is None or id(value) in stream:
            return
        maker, add = by_output.get(id(value)), value.producer()
        if maker is None and add is not None and add.op_type == "Add":
            maker = next((one for one in map(by_output.get, map(id, add.inputs)) if one is not None), None)
            maker = maker if maker is not None and any(one is maker.bias for one in add.inputs) else None
        if (
            maker is None
            or maker.holder not in FLOATS
            or maker.num_out != width
            or maker.is_shared
            or not _has_plain_bias(maker)
        ):
            raise _InTheWayError(f"{node.op_type} {node.name!r} adds what is not the output of one float linear")
        if not (_is_read_once(maker.output) and _is_read_once(value)):
            raise _InTheWayError(f"something else reads what {node.op_type} {node.name!r} adds")
        found.writers[id(maker)] = maker

    biased = {id(one.bias) for one in linears if one.bias is not None}
    for node in model.graph:
        touched = [slot for slot, value in enumerate(node.inputs) if value is not None and id(value) in stream]
        seen = [value for value in node.inputs if value is not None and id(value) in normed]
        if node.op_type in _RMS and touched:
            gain = node.inputs[_RMS[node.op_type]]
            if gain is None or gain.const_value is None or gain.is_graph_input() or gain.const_value.size != width:
                raise _InTheWayError(f"the gain of {node.op_type} {node.name!r} is computed")
            if node.op_type.startswith("Skip"):
                if len(node.inputs) > 3 and node.inputs[3] is not None:
                    raise _InTheWayError(f"{node.op_type} {node.name!r} adds a bias")
                for value in node.inputs[:2]:
                    write(value, node)
                stream |= {id(value) for value in node.outputs[3:]}
            found.norms.append(node)
            normed[id(node.outputs[0])] = node
        elif touched and node.op_type in ("Add", "Sum") and not any(id(value) in biased for value in node.inputs):
            for value in node.inputs:
                write(value, node)
            stream.add(id(node.outputs[0]))
        elif touched and node.op_type in ("Mul", "Div") and _is_by_number(node):
            stream.add(id(node.outputs[0]))
        elif touched and node.op_type != "Shape":
            raise _InTheWayError(f"{node.op_type} {node.name!r} reads the stream, and does not commute with a rotation")
        for value in seen:
            linear = by_node.get(id(node))
            if node.op_type == "Identity" or (node.op_type == "Slice" and _is_of_tokens(node)):
                normed[id(node.outputs[0])] = normed[id(value)]
            elif node.op_type == "Shape":
                continue
            elif linear is None or linear.activation is not value or linear.holder not in FLOATS:
                raise _InTheWayError(f"{node.op_type} {node.name!r} reads a norm's output, and is no float linear")
            else:
                found.readers[id(linear)] = linear, normed[id(value)]
    if any(value for value in model.graph.outputs if id(value) in stream or id(value) in normed):
        raise _InTheWayError("the stream is an output of the model")
    return found


def _is_by_number(node: ir.Node) -> bool:
    """Whether the stream is multiplied with, or divided by, a constant of one element."""
    places = node.inputs if node.op_type == "Mul" else node.inputs[1:]
    return any(value is not None and value.const_value is not None and value.const_value.size == 1 for value in places)


def _is_of_tokens(node: ir.Node) -> bool:
    """Whether a Slice of [batch, tokens, features] leaves the features whole."""
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    if axes is None or axes.const_value is None:
        return False
    return set(axes.const_value.numpy().ravel().tolist()) <= {0, 1, -2, -3}


def _is_read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _unfit(value: Linear | None, output: Linear) -> str | None:
    if value is None:
        return "its values are not the output of one linear"
    if value.is_quantized or output.is_quantized:
        return "already quantized: comes before quantizers"
    if value.holder not in FLOATS or output.holder not in FLOATS:
        return "its matrix is a product of two"
    if any(one.is_shared for one in (value, output)):
        return "its weight is shared"
    if not _has_plain_bias(value):
        return "its bias is no constant with a number for each output"
    return None


def _has_plain_bias(linear: Linear) -> bool:
    bias = linear.bias
    return bias is None or (
        bias.const_value is not None and bias.const_value.size == linear.num_out and not bias.is_graph_input()
    )


def _gain(norm: ir.Node) -> Floats:
    value = norm.inputs[_RMS[norm.op_type]]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def _turn_rows(w: Floats, turn: Floats) -> Floats:
    """R^T of each run of rows (or of a vector's numbers) as long as R is wide."""
    size = len(turn)
    turned: Floats = (turn.T @ w.reshape(-1, size, *(w.shape[1:] or (1,))).astype(np.float64)).reshape(w.shape)
    return turned


def _turn_columns(w: Floats, turn: Floats) -> Floats:
    """Each run of columns as long as R is wide times R."""
    turned: Floats = (w.reshape(len(w), -1, len(turn)).astype(np.float64) @ turn).reshape(w.shape)
    return turned


def _change(linear: Linear, make: Callable[[Floats], Floats]) -> None:
    """Replaces a float matrix by what `make` makes of it when it is saved."""
    old, graph = dataclasses.replace(linear), linear.node.graph
    assert isinstance(graph, ir.Graph)
    linear.set_weight(lambda: make(old.w_NK()).astype(np.float32), unique_name(graph, f"{linear.name}.turned"))


def _change_input(node: ir.Node, slot: int, make: Callable[[Floats], Floats]) -> None:
    old, graph = node.inputs[slot], node.graph
    assert old is not None
    assert old.const_value is not None
    assert isinstance(graph, ir.Graph)
    tensor = old.const_value
    new = derived(graph, tensor, f"{old.name}.turned", tensor.shape.numpy(), lambda x: make(x).astype(x.dtype))
    node.replace_input_with(slot, new)
    drop_unused(graph, old)


def _turn_bias(linear: Linear, turn: Floats) -> None:
    if linear.bias is None:
        return
    node = linear.node
    if not any(value is linear.bias for value in node.inputs):
        node = linear.output.consumers()[0]
    for slot, value in enumerate(node.inputs):
        if value is linear.bias:
            _change_input(node, slot, lambda x: _turn_rows(x.ravel(), turn).reshape(x.shape))


def _turn_head(heads: _Heads, turn: Floats) -> None:
    _change(heads.value, lambda w_NK: _turn_rows(w_NK, turn))
    _turn_bias(heads.value, turn)
    # Every query head reads the values of its key-value head, which all turn alike.
    _change(heads.output, lambda w_NK: _turn_columns(w_NK, turn))


def _turn_stream(stream: _Stream, turn: Floats) -> None:
    for one in stream.embeddings:
        _change_input(one.node, 0, lambda x: x.astype(np.float64) @ turn)
    for linear, norm in stream.readers.values():
        gain_K = _gain(norm)
        _change(linear, lambda w_NK, gain_K=gain_K: (w_NK * gain_K) @ turn)  # type: ignore[misc]
    for norm in stream.norms:
        _change_input(norm, _RMS[norm.op_type], np.ones_like)
    for linear in stream.writers.values():
        _change(linear, lambda w_NK: _turn_rows(w_NK, turn))
        _turn_bias(linear, turn)


def _int(node: ir.Node, name: str) -> int:
    attribute: Any = node.attributes.get(name)
    return 0 if attribute is None else int(attribute.as_int())
