"""A model that parts are taken out of on paper: a copy of its graph, which shares the weights, says what that does.

Nothing is rewritten for it: what leaves a part is read where it entered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.blocks import find_blocks
from onnxpress.compiler.calibration import Calibration, Feeds
from onnxpress.compiler.errors import PreconditionError
from onnxpress.compiler.journal import Section
from onnxpress.compiler.linears import Linear, find_linears
from onnxpress.compiler.pass_ import Tracker
from onnxpress.passes.pruning._parts import NORMS, Part, exits, find_parts, split_skip_norms
from onnxpress.passes.pruning._refit import fit

Array = npt.NDArray[Any]

_VIEWS = ("Reshape", "Identity", "Cast", "Squeeze", "Unsqueeze")


@dataclass
class Gap:
    """Parts that are gone, one right behind the other.

    Attributes:
        name: of the first of them.
        end: the stream behind them.
        linear: the projection that is added last before them.
        scale: what its result is multiplied with before that.
        weight: its new matrix, as the graph stores it; None as long as nothing was fitted.
        facts: of the fit.
    """

    name: str
    end: ir.Value
    linear: Linear
    scale: float
    weight: Array | None = field(default=None, repr=False)
    facts: dict[str, Any] = field(default_factory=dict)

    def fitted(self, windows: Sequence[tuple[Array, Array, Array]]) -> dict[str, Array]:
        """New weights for the activation, the stream as it was and as it is; no weights where nothing is gained."""
        w_HK = self.linear.w_NK()
        found = fit(windows, w_HK)
        if found is None:
            return {}
        new_HK = (w_HK + found.delta_HK / self.scale).astype(np.float32)
        facts = {name: np.array(getattr(found, name)) for name in ("form", "ridge", "before", "after")}
        return {"weight": self.linear.stored_form(new_HK), **facts}

    def take(self, record: Mapping[str, Array]) -> None:
        """Takes what `fitted` gave."""
        self.weight = record.get("weight")
        self.facts = {name: array.item() for name, array in record.items() if name != "weight"}

    def new_w_NK(self) -> npt.NDArray[np.float32]:  # noqa: N802
        """The new matrix, float32 [N, K]."""
        assert self.weight is not None
        return np.asarray(self.weight.T if self.linear.is_turned() else self.weight, np.float32)


class Network:
    """The copy, its parts, and where each of them leaves.

    Attributes:
        model: the copy; norms that add are split in it.
        parts: of both, in the same order.
        outs: of each part the value by which it leaves, None where something else does too.
        streams: of each part the stream behind it, mostly the same.
    """

    def __init__(self, model: ir.Model, *, sublayers: bool) -> None:
        self.model = model.clone()
        split_skip_norms(self.model)
        self.parts = find_parts(self.model, sublayers=sublayers)
        self.outs = [_exit(part) for part in self.parts]
        blocks = find_blocks(self.model, apart=True)
        ends = [
            _exit(Part("", 0, one.nodes, one.residuals[-1], one.stream_in, one.stream_in, one.has_attention))
            for one in blocks
        ]
        self._stops = {id(value) for one in blocks for value in (one.stream_in, one.stream_out)}
        self._stops |= {id(value) for value in ends}
        by_join = {id(node): end for one, end in zip(blocks, ends, strict=True) for node in one.nodes}
        joins = {id(node) for one in blocks for node in one.residuals}
        self.streams = [
            out if id(part.join) in joins else by_join.get(id(part.join), out)
            for part, out in zip(self.parts, self.outs, strict=True)
        ]

    @property
    def ends(self) -> list[ir.Value]:
        """All values that parts begin and end with."""
        values = [value for part in self.parts for value in (part.stay, part.stream)] + [*self.outs, *self.streams]
        return list(dict.fromkeys(value for value in values if value is not None))

    def gone(self, removed: Collection[int]) -> list[tuple[ir.Value, ir.Value]]:
        """Of the parts with these numbers, what leaves each and what is read in its place."""
        found: dict[int, tuple[ir.Value, ir.Value]] = {}
        for index in sorted(removed):
            part, out, stream = self.parts[index], self.outs[index], self.streams[index]
            twins = [other for other in removed if other != index and self.parts[other].join is part.join]
            out, stay = (stream, part.stream) if twins else (out, part.stay)
            assert out is not None
            found[id(out)] = out, stay
        return list(found.values())

    def bypasses(self, removed: Collection[int]) -> dict[int, ir.Value]:
        """What is read in place of what leaves the parts with these numbers, by the id of that."""
        return {id(out): stay for out, stay in self.gone(removed)}

    def gaps(self, removed: Sequence[int]) -> tuple[list[Gap], dict[str, str]]:
        """Gaps with a projection before them, in order; and names of the others with the reason.

        Args:
            removed: numbers of parts.
        """
        linears = {id(one.output): one for one in find_linears(self.model, expand_pairs=True)}
        stays = self.bypasses(removed)
        last_of: dict[int, int] = {}  # stream behind a gap, by the value that goes through it
        first_of: dict[int, int] = {}
        for index in sorted(removed):
            stream = self.streams[index]
            assert stream is not None
            root = _root(stream, stays)
            first_of.setdefault(id(root), index)
            last_of[id(root)] = index
        gaps, reasons = [], {}
        for key, index in last_of.items():
            name, end = self.parts[first_of[key]].name, self.streams[index]
            assert end is not None
            found = self._projection(end, stays, linears)
            if isinstance(found, str):
                reasons[name] = found
            else:
                gaps.append(Gap(name, end, *found))
        return gaps, reasons

    def _projection(
        self, end: ir.Value, stays: dict[int, ir.Value], linears: dict[int, Linear]
    ) -> tuple[Linear, float] | str:
        """The projection that the stream was last added the result of, times a factor; or what is in the way."""
        start = _root(end, stays)
        if end.is_graph_output() or (producer := start.producer()) is None:
            return "nothing reads the stream behind it" if end.is_graph_output() else "no projection comes before it"
        if producer.op_type in NORMS:
            return "a norm closes the block before it"
        found: list[tuple[Linear, float]] = []
        reasons: list[str] = []
        queue = [(start, 1.0)]
        while queue:
            value, scale = queue.pop()
            value = _root(value, stays)
            node = value.producer()
            if node is None or (value is not start and id(value) in self._stops):
                continue
            if (linear := linears.get(id(value))) is not None:
                found.append((linear, scale))
            elif node.op_type in ("Add", "Sum", *_VIEWS):
                queue += [(one, scale) for one in node.inputs[: None if node.op_type in ("Add", "Sum") else 1] if one]
            elif node.op_type in ("Mul", "Div") and (factor := _factor(node)) is not None:
                queue.append((factor[0], scale * factor[1]))
            elif node.op_type in NORMS or node.op_type in ("Mul", "Div"):
                reasons.append("a norm stands between the projection before it and the stream")
        usable = []
        for linear, scale in found:
            if reason := _obstacle(linear):
                reasons.append(reason)
            else:
                usable.append((linear, scale))
        if not usable:
            return reasons[0] if reasons else "no projection comes before it"
        return next((one for one in usable if one[0].kind == "down"), usable[-1])

    def fit(
        self,
        removed: Sequence[int],
        gaps: Sequence[Gap],
        windows: Sequence[Feeds],
        work_dir: Path | None,
        section: Section,
        digest: str,
        track: Tracker,
    ) -> None:
        """Fills in new weights, in order, so that a gap sees what those before it were given.

        Args:
            removed: numbers of parts.
            gaps: of them, of `gaps`.
            windows: inputs of the model.
            work_dir: for activations between stages.
            section: where finished gaps are kept, and found.
            digest: of everything that the fits depend on.
            track: progress.
        """
        records = [section.read(gap.name, digest) for gap in gaps]
        for one, record in zip(gaps, records, strict=True):
            if record is not None:
                one.take(record)
        if all(record is not None for record in records):
            return
        gone = self.gone(removed)
        outs = {id(out): stay for out, stay in gone}
        gap_at = {id(gap.end): gap for gap in gaps}
        needed = {id(gap.linear.activation): gap.linear.activation for gap in gaps}
        needed |= {id(stay): stay for _, stay in gone}
        ends = [*needed.values(), *(out for out, _ in gone), *(gap.end for gap in gaps)]
        seen: dict[int, list[Array]] = {}
        with Calibration(self.model, windows, [], work_dir, ends=list(dict.fromkeys(ends))) as run:
            for stage in track(run.stages, "drop_blocks: what makes up for the gaps"):
                end, key = stage.end, id(stage.end)
                gap = gap_at.get(key)
                if key in outs:
                    before = run.teacher(stage)
                    now = seen[id(outs[key])]
                elif gap is not None:
                    before, now = run.both(stage)
                else:
                    now = run.values(stage)
                if gap is not None and gap.weight is None:
                    inputs = seen[id(gap.linear.activation)]
                    record = gap.fitted(list(zip(inputs, before, now, strict=True)))
                    section.write(gap.name, digest, record)
                    gap.take(record)
                if gap is not None and gap.weight is not None:
                    now = run.assign(end, _moved(gap, seen[id(gap.linear.activation)], now))
                elif key in outs:
                    now = run.assign(end, now)
                if key in needed or key in outs:
                    seen[key] = now


def _moved(gap: Gap, inputs: Sequence[Array], streams: Sequence[Array]) -> Iterator[Array]:
    """The stream of each window with the new weights of the gap."""
    delta_KH = gap.scale * (gap.new_w_NK() - gap.linear.w_NK()).T
    for a, stream in zip(inputs, streams, strict=True):
        move = a.reshape(-1, a.shape[-1]).astype(np.float32, copy=False) @ delta_KH
        yield (stream + move.reshape(stream.shape)).astype(stream.dtype)


def _exit(part: Part) -> ir.Value | None:
    try:
        found = exits(part)
    except PreconditionError:
        return None
    return found[0] if len(found) == 1 else None


def _root(value: ir.Value, stays: Mapping[int, ir.Value]) -> ir.Value:
    """What is read where `value` was."""
    while (stay := stays.get(id(value))) is not None:
        value = stay
    return value


def _factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    """The value that a node multiplies with, or divides by, one constant number, and the factor."""
    for index, value in enumerate(node.inputs[:2]):
        tensor = None if value is None else value.const_value
        other = node.inputs[1 - index]
        if tensor is not None and tensor.size == 1 and other is not None and (index == 1 or node.op_type == "Mul"):
            number = float(tensor.numpy().reshape(()))
            return other, number if node.op_type == "Mul" else 1 / number
    return None


def _obstacle(linear: Linear) -> str | None:
    """Why the projection cannot be given other weights; None when it can."""
    if linear.is_quantized:
        return f"{linear.name} before it is quantized: prune first, then quantize"
    if linear.is_shared:
        return f"something else reads the weights of {linear.name} before it"
    if len(linear.output.uses()) != 1 or linear.output.is_graph_output():
        return f"something else reads what {linear.name} before it gives"
    return None
