"""Gives linears a slot each: two inputs of low rank, empty by default, that a request fills with its adapter.

y = x W^T + (x A) B with inputs `NAME.lora_A` [K, R] and `NAME.lora_B` [R, N]. Their defaults have R = 0, so a caller
who knows nothing of them gets what it got before, and one session serves any number of adapters, each of any rank. A
packed matrix (`qkv`, `gate_up`) gets a slot for each part, so the same adapter file fits packed and unpacked graphs.

Paper:   Hu et al., arXiv:2106.09685
Axes:    N out features, K in features, R rank
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.errors import OptionError, near_miss
from onnxpress.compiler.linears import Embedding, find_embeddings, find_linears
from onnxpress.compiler.lora_graph import Site, check_is_graph, find_sites, float_type, refuse_transformed
from onnxpress.compiler.lora_slots import PATHS, read_paths, write_paths
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.roles import KINDS

_KINDS = (*KINDS, "embedding", "table")
_LATER = ("head", "router", "embedding", "table")  # only when asked for


@dataclass(frozen=True, kw_only=True)
class LoraSlots(Pass):
    """Adds slots for adapters. Comes last: passes before it see, fuse and pack the products as they were."""

    promise: ClassVar[Promise] = Promise.EXACT
    paper: ClassVar[str] = "arXiv:2106.09685"

    kinds: tuple[str, ...] = ()  # roles that get one: "q", "v", "head", ...; () for all but head, router, embedding
    also: tuple[str, ...] = ()  # roles beside these: ("head", "embedding")
    exclude: tuple[str, ...] = ()  # patterns of names that get none: "block0.*", "*.down"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("kinds", "also"):
            self.check(set(getattr(self, option)) <= set(_KINDS), option, f"among {', '.join(_KINDS)}")

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        refuse_transformed(model, context.history)
        linears = find_linears(model)
        sites = find_sites(linears, find_embeddings(model, linears))
        self._check(sites)
        together: dict[int, list[Site]] = {}
        for site in sites:
            together.setdefault(id(site.holder), []).append(site)
        paths: dict[str, tuple[str, ...]] = {}
        for parts in context.track(list(together.values()), "lora_slots"):
            wanted = [part for part in parts if self._wants(part, report)]
            if not wanted:
                continue
            if any(f"{part.target.name}.lora_A" in model.graph.initializers for part in parts):
                report.skip(parts[0].target.name, "has a slot already")
                continue
            if isinstance(parts[0].holder, Embedding):
                _add_to_table(model.graph, parts[0], parts[0].holder)
            else:
                _add(model.graph, parts)
            for part in parts:  # all of a packed matrix: what is added to its output is as wide as that
                report.change(part.target.name, kind=part.target.kind, shape=list(part.target.shape))
                paths[part.target.name] = part.target.paths
        if paths:
            model.metadata_props[PATHS] = write_paths({**read_paths(model.metadata_props.get(PATHS)), **paths})
        return report

    def _check(self, sites: Sequence[Site]) -> None:
        """Raises OptionError for an option that has no effect on this model."""
        names, kinds = [site.target.name for site in sites], {site.target.kind for site in sites}
        for kind in (*self.kinds, *self.also):
            if kind not in kinds:
                known = ", ".join(sorted(kinds))
                raise OptionError(f"lora_slots: this model has no linear of kind {kind!r}", hint=f"it has: {known}")
        for pattern in self.exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                hint = near_miss(pattern, names) or "see their names with inspect"
                raise OptionError(f"lora_slots: exclude={pattern!r} matches no linear", hint=hint)

    def _wants(self, site: Site, report: Report) -> bool:
        target = site.target
        if any(fnmatch.fnmatchcase(target.name, pattern) for pattern in self.exclude):
            report.skip(target.name, "excluded")
        elif target.kind not in self.also and (target.kind not in self.kinds if self.kinds else target.kind in _LATER):
            report.skip(target.name, "not among the kinds asked for")
        else:
            return True
        return False


def _add(graph: ir.Graph, parts: Sequence[Site]) -> None:
    """x A B of each part, side by side, added to what the linear gives with its bias."""
    linear = parts[0].linear
    end, dtype = _end(linear.output, linear.bias), float_type(linear)
    nodes: list[ir.Node] = []
    pieces = [_product(graph, nodes, part, linear.source, "MatMul", dtype, end) for part in parts]
    if len(pieces) > 1:
        name = f"{linear.name}/lora"
        joined = ir.Node("", "Concat", pieces, [ir.AttrInt64("axis", -1)], name=name)
        _describe(joined.outputs[0], name, dtype, end, linear.num_out)
        nodes.append(joined)
        pieces = [joined.outputs[0]]
    _sum(graph, nodes, end, pieces[0], dtype, f"{linear.name}/lora_sum")


def _add_to_table(graph: ir.Graph, site: Site, embedding: Embedding) -> None:
    ids, end = embedding.node.inputs[1], embedding.node.outputs[0]
    assert ids is not None
    tensor = embedding.table.const_value
    if embedding.node.op_type == "GatherBlockQuantized":
        scale = embedding.node.inputs[2]
        tensor = None if scale is None else scale.const_value
    assert tensor is not None
    nodes: list[ir.Node] = []
    delta = _product(graph, nodes, site, ids, "Gather", tensor.dtype, end)
    _sum(graph, nodes, end, delta, tensor.dtype, f"{site.target.name}/lora_sum")


def _product(
    graph: ir.Graph, nodes: list[ir.Node], site: Site, source: ir.Value, first: str, dtype: ir.DataType, end: ir.Value
) -> ir.Value:
    """Appends the two nodes of one slot, and gives their result."""
    rows, columns = site.target.shape
    name = site.target.name
    a = _input(graph, f"{name}.lora_A", (columns, 0), (columns, f"{name}.rank"), dtype)
    b = _input(graph, f"{name}.lora_B", (0, rows), (f"{name}.rank", rows), dtype)
    operands = [a, source] if first == "Gather" else [source, a]
    attributes = [ir.AttrInt64("axis", 0)] if first == "Gather" else []
    narrow = ir.Node("", first, operands, attributes, name=f"{name}/lora_A")
    _describe(narrow.outputs[0], f"{name}/lora_narrow", dtype, end, f"{name}.rank")
    wide = ir.Node("", "MatMul", [narrow.outputs[0], b], name=f"{name}/lora_B")
    _describe(wide.outputs[0], f"{name}/lora_wide", dtype, end, rows)
    nodes += [narrow, wide]
    return wide.outputs[0]


def _input(
    graph: ir.Graph, name: str, sizes: tuple[int, int], shape: tuple[int | str, int | str], dtype: ir.DataType
) -> ir.Value:
    """An input with an empty default."""
    tensor = ir.Tensor(np.zeros(sizes, dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    graph.inputs.append(value)
    return value


def _sum(graph: ir.Graph, nodes: list[ir.Node], end: ir.Value, delta: ir.Value, dtype: ir.DataType, name: str) -> None:
    """Puts end + delta in the place of `end`, whose name the sum takes over where it is an output."""
    total = ir.Node("", "Add", [end, delta], name=name)
    result = total.outputs[0]
    maker = end.producer()
    assert maker is not None
    uses = list(end.uses())
    result.shape, result.type = end.shape, end.type or ir.TensorType(dtype)
    if end.is_graph_output():
        result.name, end.name = end.name, f"{end.name}/plain"
        for index, output in enumerate(graph.outputs):
            if output is end:
                graph.outputs[index] = result
    else:
        result.name = name
    check_is_graph(maker.graph).insert_after(maker, [*nodes, total])
    for node, index in uses:
        if node is not total:
            node.replace_input_with(index, result)


def _end(output: ir.Value, bias: ir.Value | None) -> ir.Value:
    """What a linear gives with the bias that a node of its own adds."""
    readers = output.consumers()
    if bias is not None and len(readers) == 1 and readers[0].op_type == "Add" and bias in readers[0].inputs:
        return readers[0].outputs[0]
    return output


def _describe(value: ir.Value, name: str, dtype: ir.DataType, like: ir.Value, width: int | str) -> None:
    value.name, value.type = name, ir.TensorType(dtype)
    if like.shape is not None:
        value.shape = ir.Shape([*list(like.shape)[:-1], width])
