"""Removes whole blocks: the residual stream runs past them, their caches go, and the rest is numbered anew.

The only pruning that makes every phase faster, and the least accurate per parameter: one or two of thirty blocks.

Paper:   block influence, Men et al., arXiv:2403.03853; which blocks to protect from the same source.
Differs: the activations come from random tokens, since a pass has no tokenizer; on a 135M model the order of blocks
         then has a rank correlation of 0.85 with the one seen on English text.
Axes:    B batch, S tokens, H width of the stream
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from onnxpress.compiler.blocks import Block, find_blocks
from onnxpress.compiler.errors import OptionError, PreconditionError
from onnxpress.compiler.linears import find_embeddings
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.probe import Probe, Step

_SHAPE_ONLY = ("Shape", "Size")
# Norms by operator: index of gamma and beta among the inputs, index of the output that carries the sum.
_NORMS: dict[str, tuple[int, int | None, int | None]] = {
    "SimplifiedLayerNormalization": (1, None, None),
    "RMSNormalization": (1, None, None),
    "LayerNormalization": (1, 2, None),
    "SkipSimplifiedLayerNormalization": (2, None, 3),
    "SkipLayerNormalization": (2, 3, 3),
}
_PLAIN = {
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
    "SkipLayerNormalization": "LayerNormalization",
}
_FIRST, _LAST = 2, 1  # blocks at the ends that are never chosen: without them a model stops making sense
_BATCH, _TOKENS = 4, 64
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers")


def block_influence(in_BSH: npt.NDArray[Any], out_BSH: npt.NDArray[Any]) -> float:
    """1 - E cos(x_in, x_out) over tokens, in [0, 2]: how far a block turns the stream.

    The first token of a sequence is left out: it is an attention sink whose activations dwarf the others'.
    """
    start = 1 if in_BSH.shape[1] > 1 else 0
    x, y = (a[:, start:].reshape(-1, a.shape[-1]).astype(np.float64) for a in (in_BSH, out_BSH))
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(1 - np.mean((x * y).sum(axis=1) / np.maximum(norms, 1e-30)))


@dataclass(frozen=True, kw_only=True)
class DropBlocks(Pass):
    """Removes blocks of the network, chosen by number or by their small influence on the stream.

    Give `count` to let the pass choose: it runs the model once on random tokens and drops the blocks that turn the
    residual stream least; the first two and the last one stay. Give `indices` to choose yourself. Caches are renumbered
    and the number of layers in the config follows.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    paper: ClassVar[str] = "arXiv:2403.03853"

    count: int | None = None  # blocks to drop, those with the least influence
    indices: tuple[int, ...] | None = None  # or: numbers of the blocks to drop, from 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.count is None) == (self.indices is None):
            raise OptionError("drop_blocks: expected either count or indices", hint="write drop_blocks(count=2)")
        self.check(self.count is None or self.count >= 1, "count", "at least 1")
        if self.indices is not None:
            distinct = len(set(self.indices)) == len(self.indices) > 0 and min(self.indices) >= 0
            self.check(distinct, "indices", "distinct numbers from 0", "write indices=(12, 13)")

    @classmethod
    def example(cls, model: ir.Model) -> DropBlocks:
        blocks = find_blocks(model)
        return cls(indices=(len(blocks) // 2,)) if len(blocks) > 1 else cls(count=1)

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        blocks = find_blocks(model)
        chosen, influences = self._choose(model, blocks, context, report)
        before = _elements(model.graph)
        removed: set[str] = set()
        for index in sorted(chosen, reverse=True):
            size = _elements(model.graph)
            removed |= _drop(model, index)
            facts: dict[str, Any] = {"parameters": size - _elements(model.graph)}
            if influences:
                facts |= {"influence": influences[index], "influences": influences}
            report.change(f"block{index}", **facts)
        _renumber(model.graph, removed)
        _edit_config(context.config, len(blocks), chosen, report)
        report.metrics |= {
            "blocks_before": len(blocks),
            "blocks_after": len(blocks) - len(chosen),
            "parameters_removed": 1 - _elements(model.graph) / before if before else 0.0,
        }
        if influences:
            report.metrics["influence_dropped"] = sum(influences[index] for index in chosen)
        return report

    def _choose(
        self, model: ir.Model, blocks: list[Block], context: Context, report: Report
    ) -> tuple[list[int], list[float]]:
        """Numbers of the blocks to drop, and the influence of every block ([] when it was not needed)."""
        total = len(blocks)
        if self.indices is not None:
            if max(self.indices) >= total or len(self.indices) >= total:
                raise OptionError(
                    f"drop_blocks: indices must name some, not all, of {total} blocks, got {self.indices!r}",
                    hint=f"numbers go from 0 to {total - 1}" if total else "this model has no residual blocks",
                )
            return sorted(self.indices), []
        assert self.count is not None
        free = list(range(_FIRST, total - _LAST))
        if self.count > len(free):
            raise OptionError(
                f"drop_blocks: count must be at most {len(free)} of {total} blocks, got {self.count}",
                hint="the first two and the last one are protected; name them in indices=(...) if you mean it",
            )
        influences = _influences(model, blocks, context)
        chosen = sorted(sorted(free, key=lambda index: influences[index])[: self.count])
        for index in range(total):
            if index not in chosen:
                kept = "has more influence than those dropped" if index in free else "protected"
                report.skip(f"block{index}", kept)
        return chosen, influences


def _influences(model: ir.Model, blocks: list[Block], context: Context) -> list[float]:
    """Block influence of every block, from one run on random tokens; that of a swallowed last sum is nan."""
    graph = model.graph
    streams = [block.stream_in for block in blocks]
    if blocks[-1].stream_out is not None:
        streams.append(blocks[-1].stream_out)
    extra = [value for value in streams if not value.is_graph_output() and not value.is_graph_input()]
    with tempfile.TemporaryDirectory(dir=context.work_dir) as scratch:
        path = Path(scratch) / "streams.onnx"
        untyped = [value for value in extra if value.dtype is None]
        for value in untyped:
            value.dtype = next((one.dtype for one in graph.outputs if one.dtype in _FLOATS), ir.DataType.FLOAT)
        graph.outputs.extend(extra)
        try:
            ir.save(model, path, external_data="streams.onnx.data")
        finally:
            del graph.outputs[len(graph.outputs) - len(extra) :]
            for value in untyped:
                value.type = None
        probe = Probe(path)
        feeds = probe.random_feeds(context.seed)
        if "input_ids" in probe.inputs:
            vocabulary = max((one.num_rows for one in find_embeddings(model)), default=2)
            ids = np.random.default_rng(context.seed).integers(0, vocabulary, (_BATCH, _TOKENS))
            feeds = probe.decoder_feeds(Step(ids, np.ones_like(ids)))
        names = [str(value.name) for value in streams]
        fetched = dict(zip(names, probe.session.run(names, feeds), strict=True))
    seen = [fetched[name] for name in names]
    scores = [block_influence(x, y) for x, y in itertools.pairwise(seen)]
    return scores + [float("nan")] * (len(blocks) - len(scores))


def _drop(model: ir.Model, index: int) -> set[str]:
    """Takes block `index` out; returns the names of the cache inputs and outputs that went with it."""
    graph = model.graph
    blocks = find_blocks(model)
    block = blocks[index]
    inside = {id(node) for node in block.nodes}
    living = [value for value in graph.inputs if _is_cache(value) and _reaches_output(value)]
    _forget_removed_readers(block)
    _bypass(graph, block, inside)
    presents = [value for value in graph.outputs if _is_cache(value) and id(value.producer()) in inside]
    for value in presents:
        graph.outputs.remove(value)
    _sweep(model)
    neighbour = blocks[index + 1] if index + 1 < len(blocks) else blocks[index - 1]
    if _borrow_shapes(block, neighbour):
        _sweep(model)
    pasts = [value for value in living if not _reaches_output(value)]
    kept = [value for value in graph.inputs if _is_cache(value) and value not in pasts]
    for value in pasts:
        if _readers(value):  # the length of the past is read off the first cache input
            value.replace_all_uses_with(_substitute(value, kept))
        graph.inputs.remove(value)
    try:
        graph.sort()
    except ValueError as error:
        raise PreconditionError(f"drop_blocks: block {index} computes shapes that earlier blocks need") from error
    return {str(value.name) for value in (*pasts, *presents)}


def _bypass(graph: ir.Graph, block: Block, inside: set[int]) -> None:
    """Lets everything that reads the stream behind the block read the stream before it."""
    stream, join = block.stream_in, block.residuals[-1]
    exits = [value for node in block.nodes for value in node.outputs if _leaves(value, inside)]
    if join.op_type in _PLAIN:
        sum_index = _NORMS[join.op_type][2]
        assert sum_index is not None
        ends = {id(value): position for position, value in enumerate(join.outputs)}
        allowed = [value for value in exits if ends.get(id(value)) in (0, sum_index)]
    else:
        allowed = exits[:1]
    if not exits or len(allowed) != len(exits):
        names = ", ".join(str(value.name) for value in exits)
        raise PreconditionError(f"drop_blocks: block {block.index} must only feed the stream, but {names} leave it")
    for value in exits:
        is_normed = join.op_type in _PLAIN and value is join.outputs[0]
        new = _renormed(graph, stream, join, inside) if is_normed else stream
        if value.is_graph_output():
            # The output keeps its name, and the stream may be an output of its own.
            copy = ir.Node("", "Identity", [new])
            copy.outputs[0].name, copy.outputs[0].shape, copy.outputs[0].type = value.name, value.shape, value.type
            value.name = None
            graph.append(copy)
            new = copy.outputs[0]
        value.replace_all_uses_with(new, replace_graph_outputs=True)


def _leaves(value: ir.Value, inside: set[int]) -> bool:
    """Whether data of the block leaves through `value`; a reader of its shape does not count, nor does a cache."""
    if value.is_graph_output() and not _is_cache(value):
        return True
    return any(id(node) not in inside and node.op_type not in _SHAPE_ONLY for node in _readers(value))


def _readers(value: ir.Value) -> list[ir.Node]:
    """Nodes of the graph that read `value`; one that a pass has taken out may still be listed as its reader."""
    return [node for node in value.consumers() if node.graph is not None]


def _renormed(graph: ir.Graph, stream: ir.Value, join: ir.Node, inside: set[int]) -> ir.Value:
    """The stream before the block, normed as the join behind the block did it.

    The norm in front of the block has lost its readers; it takes over gamma. Where there is none, a new one is made.
    """
    gamma, beta, _ = _NORMS[join.op_type]
    weights = [join.inputs[gamma]] + ([join.inputs[beta]] if beta is not None and len(join.inputs) > beta else [])
    source = stream.producer()
    candidates = [*_readers(stream), *([source] if source is not None else [])]
    plain = _PLAIN[join.op_type]
    # SkipLayerNormalization alone has another default than the plain norms: always write it out.
    epsilon = join.attributes.get("epsilon", ir.AttrFloat32("epsilon", 1e-12))
    for norm in candidates:
        if norm is join or norm.op_type not in (plain, join.op_type):
            continue
        own_gamma, own_beta, own_sum = _NORMS[norm.op_type]
        if own_sum is None:
            is_before = norm.inputs[0] is stream
        else:
            is_before = len(norm.outputs) > own_sum and norm.outputs[own_sum] is stream
        readers = [node for node in _readers(norm.outputs[0]) if node.op_type not in _SHAPE_ONLY]
        is_free = not norm.outputs[0].is_graph_output() and all(id(node) in inside for node in readers)
        takes_beta = len(weights) < 2 or (own_beta is not None and len(norm.inputs) > own_beta)
        if is_before and is_free and takes_beta:
            norm.replace_input_with(own_gamma, weights[0])
            if len(weights) > 1 and own_beta is not None:
                norm.replace_input_with(own_beta, weights[1])
            norm.attributes["epsilon"] = epsilon
            return norm.outputs[0]
    norm = ir.Node("", plain, [stream, *weights], [epsilon], name=f"{join.name}/norm")
    norm.outputs[0].shape, norm.outputs[0].type = join.outputs[0].shape, join.outputs[0].type
    norm.outputs[0].name = f"{join.outputs[0].name}/renormed"
    graph.append(norm)
    return norm.outputs[0]


def _borrow_shapes(block: Block, neighbour: Block) -> bool:
    """Lets readers of the shape of an activation in `block` read that of its counterpart in `neighbour`."""
    changed = False
    for node, twin in zip(block.nodes, neighbour.nodes, strict=False):
        if node.graph is None or node.op_type != twin.op_type or twin.graph is None or node is twin:
            continue
        for value, counterpart in zip(node.outputs, twin.outputs, strict=False):
            for reader, index in list(value.uses()):
                if reader.op_type in _SHAPE_ONLY:
                    reader.replace_input_with(index, counterpart)
                    changed = True
    return changed


def _forget_removed_readers(block: Block) -> None:
    """Cuts the ties to nodes that are no longer in the graph: they would keep the block's nodes in use."""
    for node in block.nodes:
        for value in node.outputs:
            for reader, index in list(value.uses()):
                if reader.graph is None:
                    reader.replace_input_with(index, None)


def _substitute(value: ir.Value, kept: Sequence[ir.Value]) -> ir.Value:
    """A remaining cache input of the same role: `past_key_values.1.key` for `past_key_values.0.key`."""
    role = _role(value)
    for other in kept:
        if _role(other) == role:
            return other
    raise PreconditionError(f"drop_blocks: nothing can replace {value.name}, whose shape other nodes read")


def _reaches_output(value: ir.Value) -> bool:
    """Whether data (not just the shape) of `value` flows into a graph output."""
    queue, seen = [value], {id(value)}
    while queue:
        current = queue.pop()
        if current.is_graph_output():
            return True
        for node in _readers(current):
            for output in () if node.op_type in _SHAPE_ONLY else node.outputs:
                if id(output) not in seen:
                    seen.add(id(output))
                    queue.append(output)
    return False


def _sweep(model: ir.Model) -> None:
    common.RemoveUnusedNodesPass()(model)


def _is_cache(value: ir.Value) -> bool:
    return any(word in (value.name or "") for word in ("past", "present", "cache"))


def _role(value: ir.Value) -> str:
    """The name without its number."""
    return re.sub(r"\d+", "#", value.name or "", count=1)


def _number(name: str) -> int | None:
    found = re.search(r"\d+", name)
    return int(found.group()) if found else None


def _renumber(graph: ir.Graph, removed: Iterable[str]) -> None:
    """Gives the remaining caches consecutive numbers, in order."""
    gone = {number for number in map(_number, removed) if number is not None}
    if not gone:
        return
    for value in sorted((*graph.inputs, *graph.outputs), key=lambda one: _number(one.name or "") or 0):
        number = _number(value.name or "")
        if number is None or not _is_cache(value):
            continue
        new = number - sum(one < number for one in gone)
        if new != number:
            value.name = re.sub(r"\d+", str(new), value.name or "", count=1)


def _edit_config(config: dict[str, Any], total: int, dropped: Sequence[int], report: Report) -> None:
    """Number of layers and every list with one entry per layer; also in a nested text config."""
    nested = config.get("text_config")
    if isinstance(nested, dict):
        _edit_config(nested, total, dropped, report)
    keys = [key for key in _COUNTS if isinstance(config.get(key), int)]
    for key in keys:
        if config[key] != total:
            report.skip(f"config {key}", f"says {config[key]}, but the graph has {total} blocks")
            return
        config[key] = total - len(dropped)
    if not keys:
        return
    for key, value in config.items():
        if isinstance(value, list) and len(value) == total and "layer" in key:
            config[key] = [one for index, one in enumerate(value) if index not in dropped]
    if isinstance(config.get("max_window_layers"), int):
        config["max_window_layers"] -= sum(index < config["max_window_layers"] for index in dropped)


def _elements(graph: ir.Graph) -> int:
    """Elements of all initializers, shared ones counted once."""
    tensors = {id(value.const_value): value.const_value for value in graph.initializers.values()}
    return sum(tensor.size for tensor in tensors.values() if tensor is not None)
