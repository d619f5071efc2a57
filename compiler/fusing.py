"""The one way in which a fusion enters a graph: propose nodes, let execution decide, replace or report why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from onnxpress.compiler.pass_ import Report
from onnxpress.compiler.region import Array, NotCuttable, Region, build_model, disagreement, random_feed

# Largest difference between a fused and an unfused region, relative to the largest output, in float32 and float16.
TOLERANCE = {ir.DataType.FLOAT: 1e-4, ir.DataType.FLOAT16: 2e-2, ir.DataType.BFLOAT16: 6e-2}

Feeds = Callable[[Sequence[ir.Value]], Iterable[Sequence[Array]]]
Valid = Callable[[Sequence[ir.Value], Sequence[Array], int, Array], Array]


@dataclass
class Fuser:
    """Collects the fusions of one run of a pass.

    Attributes:
        model: the model that is rewritten.
        report: accepted sites are noted as changed, refused ones as skipped with what differed.
        seed: of the random inputs.
    """

    model: ir.Model
    report: Report
    seed: int = 0
    verdicts: dict[str, str | None] = field(default_factory=dict)
    inserted: list[ir.Node] = field(default_factory=list)
    weights_before: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.weights_before = set(self.model.graph.initializers)

    def verdict(
        self,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        new_outputs: Sequence[ir.Value],
        feeds: Feeds | None = None,
        valid: Valid | None = None,
    ) -> str | None:
        """None when the new form agrees with the old one, else the first thing that differs.

        Args:
            inputs: values at which the replaced region begins.
            outputs: values that the region computes.
            new_outputs: the values that are to take their place, in the same order; computed from the same leaves.
            feeds: `feeds(leaves)` yields sample inputs; random ones for batch 2, sequence 3 by default.
            valid: `valid(leaves, feed, index, array)` blanks what may differ (rows of padding tokens).
        """
        try:
            old = Region(inputs, outputs)
            new = Region(old.leaves, new_outputs)
            leaves = new.leaves
            # Layers differ in the weights that both forms read; what only one reads, as a mask's table, is part of it.
            held = {id(value) for value in new.constants}
            shared = [value for value in old.constants if id(value) in held]
            key = old.signature(shared) + new.signature(shared)
            if key not in self.verdicts:
                self.verdicts[key] = self._compare(old, new, leaves, feeds, valid)
            return self.verdicts[key]
        except NotCuttable as reason:
            return str(reason)

    def _compare(
        self, old: Region, new: Region, leaves: Sequence[ir.Value], feeds: Feeds | None, valid: Valid | None
    ) -> str | None:
        opset = self.model.opset_imports.get("", 18)
        samples = list(feeds(leaves) if feeds is not None else self._random(leaves))
        blank = None if valid is None else (lambda feed, index, array: valid(leaves, feed, index, array))
        dtype = next((value.dtype for value in old.outputs if value.dtype is not None), ir.DataType.FLOAT)
        return disagreement(
            build_model(old.nodes, leaves, old.outputs, old.constants, opset),
            build_model(new.nodes, leaves, new.outputs, new.constants, opset),
            samples,
            TOLERANCE.get(dtype, 1e-4),
            blank,
        )

    def _random(self, leaves: Sequence[ir.Value]) -> Iterable[list[Array]]:
        rng = np.random.default_rng(self.seed)
        yield random_feed(leaves, {"batch": 2, "sequence": 3}, rng, {})

    def replace(
        self,
        site: str,
        outputs: Sequence[ir.Value],
        new_outputs: Sequence[ir.Value],
        new_nodes: Sequence[ir.Node],
        **facts: Any,
    ) -> None:
        """Lets `new_outputs` take the names, shapes and readers of `outputs`; the old nodes die in `finish`."""
        for old, new in zip(outputs, new_outputs, strict=True):
            name = old.name
            old.name = f"{name}/unfused"
            new.name = name
            new.shape, new.type = old.shape, old.type
        self.insert(new_nodes)
        for old, new in zip(outputs, new_outputs, strict=True):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.report.change(site, **facts)

    def insert(self, nodes: Sequence[ir.Node]) -> None:
        """Adds nodes at the end; `finish` sorts the graph."""
        fresh = [node for node in nodes if node.graph is None]
        self.model.graph.extend(fresh)
        self.inserted += fresh
        for node in nodes:
            if node.domain:
                self.model.opset_imports.setdefault(node.domain, 1)

    def finish(self) -> None:
        """Sorts the graph and removes what the fusions left unused; without any fusion the graph is as it was."""
        graph = self.model.graph
        if self.report.changed:
            graph.sort()
            common.RemoveUnusedNodesPass()(self.model)
            return
        graph.remove(self.inserted[::-1], safe=True)
        for name in set(graph.initializers) - self.weights_before:
            del graph.initializers[name]


def discard(nodes: Iterable[ir.Node]) -> None:
    """Takes nodes that did not make it into a graph off the values they read: they would count as readers for ever."""
    for node in nodes:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds, None for anything else."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(-1)[0])


def vector(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """A constant of rank 1 with more than one element, None for anything else."""
    if value is None or value.const_value is None or len(value.const_value.shape) != 1 or value.const_value.size < 2:
        return None
    return value.const_value.numpy()


def producer(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node behind `value` if it is one of `ops` (any operator when none is named)."""
    node = value.producer() if value is not None else None
    return node if node is not None and (not ops or node.op_type in ops) else None


def other(node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """The operand of a binary node that is not `value`."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def split_scalar(node: ir.Node) -> tuple[ir.Value | None, float | None]:
    """(x, c) of x * c or x / c with a constant of one element (1 / c for a division); (None, None) otherwise."""
    left, right = node.inputs[0], node.inputs[1]
    number = scalar(right)
    if node.op_type == "Div":
        return (left, 1.0 / number) if number else (None, None)
    if number is not None:
        return left, number
    number = scalar(left)
    return (right, number) if number is not None else (None, None)


def constant(graph: ir.Graph, array: npt.NDArray[Any], name: str) -> ir.Value:
    """The initializer `name` holding `array`, made on first use; under another name where that one is taken."""
    while (there := graph.initializers.get(name)) is not None:
        held = None if there.const_value is None else there.const_value.numpy()
        if held is not None and held.dtype == array.dtype and np.array_equal(held, array):
            return there
        name += "_"
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def last_axis(node: ir.Node, rank: int | None) -> bool:
    """Whether a reduction works on just the last axis, given as an attribute or as a constant input."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        axes = list(attribute.as_ints())
    elif len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].const_value is not None:
        axes = node.inputs[1].const_value.numpy().reshape(-1).tolist()
    else:
        return False
    return axes == [-1] or (rank is not None and axes == [rank - 1])
