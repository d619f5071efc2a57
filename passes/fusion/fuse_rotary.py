"""Fuses rotary position embedding into com.microsoft RotaryEmbedding with caches of cosines and sines.

Paper:   Su et al., arXiv:2104.09864, in the half-rotated spelling: y = x cos(p) + [-x_2, x_1] sin(p).
Caches:  the graph's own nodes from positions to cosines are copied and fed with 0 .. max - 1, so every scaling rule
         (linear, Llama 3, YaRN) is carried over as it is. ONNX Runtime folds the copies at load; the file stays small:
         the table of a 135M model with 8,192 positions would be 2 % of its 4-bit size.
Axes:    B batch, S sequence, D rotated width of a head, M positions in the cache
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer

from onnxpress.compiler.fusing import Fuser, constant, discard, other, producer
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.region import Array, NotCuttable, Region, build_model, random_feed


@dataclass(frozen=True, kw_only=True)
class FuseRotary(Pass):
    """Rotary embedding in one operator, whatever rule scales its frequencies."""

    promise: ClassVar[Promise] = Promise.CLOSE
    paper: ClassVar[str] = "arXiv:2104.09864"

    max_positions: int | None = None  # length of the caches; None: max_position_embeddings of the config, else 4096

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        length = self.max_positions or int(context.config.get("max_position_embeddings") or 4096)
        caches = _Caches(fuser, length)
        for node in list(model.graph):
            found = _match(node) if node.op_type == "Add" else None
            if found is None:
                continue
            site = node.outputs[0].name or "rotary"
            try:
                positions = _positions(found.cos)
                cos, sin = caches.get(found.cos, positions), caches.get(found.sin, positions)
            except NotCuttable as finding:
                report.skip(site, str(finding))
                continue
            new = ir.Node(
                "com.microsoft",
                "RotaryEmbedding",
                [found.x, positions, cos, sin],
                name=f"{node.outputs[0].name}/rotary",
            )

            def feeds(leaves: Sequence[ir.Value], positions: ir.Value = positions) -> Iterable[list[Array]]:
                rng = np.random.default_rng(context.seed)
                given = {id(positions): rng.integers(0, length, (2, 3))}
                yield random_feed(leaves, {"batch": 2, "sequence": 3}, rng, given)

            outputs = [node.outputs[0]]
            reason = fuser.verdict([found.x], outputs, [new.outputs[0]], feeds)
            if reason is not None:
                discard([new])
                report.skip(site, reason)
                continue
            fuser.replace(site, outputs, [new.outputs[0]], [new])
        fuser.finish()
        return report


@dataclass
class _Rotary:
    x: ir.Value
    cos: ir.Value
    sin: ir.Value


def _match(add: ir.Node) -> _Rotary | None:
    """Reads x cos + rotate(x) sin, None when the addition is something else."""
    for straight, turned in ((0, 1), (1, 0)):
        one, two = producer(add.inputs[straight], "Mul"), producer(add.inputs[turned], "Mul")
        if one is None or two is None:
            continue
        for index in (0, 1):
            x = _rotated(two.inputs[index])
            if x is not None and x in one.inputs:
                cos, sin = other(one, x), two.inputs[1 - index]
                if cos is not None and sin is not None:
                    return _Rotary(x, cos, sin)
    return None


def _rotated(value: ir.Value | None) -> ir.Value | None:
    """x when `value` is Concat(-second half of x, first half of x); the halves are checked by execution."""
    joined = producer(value, "Concat")
    if joined is None or len(joined.inputs) != 2:
        return None
    negated = producer(joined.inputs[0], "Neg")
    if negated is None:
        return None
    second, first = producer(negated.inputs[0], "Slice", "Split"), producer(joined.inputs[1], "Slice", "Split")
    if second is None or first is None or second.inputs[0] is not first.inputs[0]:
        return None
    return second.inputs[0]


def _positions(cos: ir.Value) -> ir.Value:
    """The graph input that the angles are computed from.

    Raises:
        NotCuttable: there is none, or more than one.
    """
    leaves = [leaf for leaf in Region([], [cos]).leaves if leaf.is_graph_input()]
    if len(leaves) > 1:
        leaves = [leaf for leaf in leaves if leaf.name == "position_ids"]
    if len(leaves) != 1 or leaves[0].dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        raise NotCuttable("the positions are no graph input")
    return leaves[0]


@dataclass
class _Caches:
    """Makes each cosine or sine table once."""

    fuser: Fuser
    length: int
    made: dict[int, ir.Value] = field(default_factory=dict)

    def get(self, value: ir.Value, positions: ir.Value) -> ir.Value:
        """The table [M, D / 2] of `value` [B, 1, S, D] or [B, S, D] over all positions."""
        base = value
        while (node := producer(base, "Unsqueeze", "Reshape", "Identity")) is not None and node.inputs[0] is not None:
            base = node.inputs[0]
        if id(base) not in self.made:
            self.made[id(base)] = self._make(base, positions)
        return self.made[id(base)]

    def _make(self, base: ir.Value, positions: ir.Value) -> ir.Value:
        region = Region([positions], [base])
        extra = [leaf for leaf in region.leaves if leaf is not positions]
        for leaf in extra:
            readers = [node for node in region.nodes if leaf in node.inputs]
            if any(node.op_type != "Shape" for node in readers):
                raise NotCuttable(f"the angles also depend on {leaf.name}")
        name = f"rotary/{(base.name or 'table').strip('/')}"
        table = build_model(region.nodes, [positions, *extra], [base], region.constants, self._opset())
        for leaf in reversed(extra):
            _ask_batch_of_one(table.graph, leaf)
        self._feed_all_positions(table)
        optimizer.optimize(table, output_size_limit=256)  # folds what is about shapes, not the table itself
        return self._splice(table, name)

    def _opset(self) -> int:
        return self.fuser.model.opset_imports.get("", 18)

    def _feed_all_positions(self, table: ir.Model) -> None:
        """Turns the model's input into 0 .. length - 1, its output into [M, D / 2]."""
        graph = table.graph
        given = graph.inputs.pop()
        numbers = [constant(graph, np.array(n, np.int64), f"n{n}") for n in (0, self.length, 1)]
        counted = ir.Node("", "Range", numbers)
        axis = constant(graph, np.array([0], np.int64), "axis0")
        row = ir.Node("", "Unsqueeze", [counted.outputs[0], axis])
        last = row
        if given.dtype == ir.DataType.INT32:
            last = ir.Node("", "Cast", [row.outputs[0]], [ir.AttrInt64("to", ir.DataType.INT32)])
        given.replace_all_uses_with(last.outputs[0])
        graph.extend(list(dict.fromkeys((counted, row, last))))
        full = graph.outputs.pop()
        halves = ir.Node("", "Split", [full], [ir.AttrInt64("axis", -1), ir.AttrInt64("num_outputs", 2)], num_outputs=2)
        if self._opset() < 18:
            halves = ir.Node("", "Split", [full], [ir.AttrInt64("axis", -1)], num_outputs=2)
        shape = constant(graph, np.array([self.length, -1], np.int64), "table_shape")
        flat = ir.Node("", "Reshape", [halves.outputs[0], shape])
        graph.extend([halves, flat])
        graph.outputs.append(flat.outputs[0])
        graph.sort()

    def _splice(self, table: ir.Model, name: str) -> ir.Value:
        """Moves the nodes of `table` into the model."""
        graph, own = self.fuser.model.graph, table.graph
        copies: dict[int, ir.Value] = {}
        for key, value in own.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            copies[id(value)] = constant(graph, tensor.numpy(), f"{name}/{key}")
        nodes: list[ir.Node] = []
        for node in own:
            operands = [None if value is None else copies[id(value)] for value in node.inputs]
            attributes: list[Any] = list(node.attributes.values())
            new = ir.Node(node.domain, node.op_type, operands, attributes, num_outputs=len(node.outputs))
            new.name = f"{name}/{len(nodes)}"
            for index, (old, fresh) in enumerate(zip(node.outputs, new.outputs, strict=True)):
                fresh.name, fresh.type, fresh.shape = f"{name}/{len(nodes)}.{index}", old.type, old.shape
                copies[id(old)] = fresh
            nodes.append(new)
        self.fuser.insert(nodes)
        return copies[id(own.outputs[0])]


def _ask_batch_of_one(graph: ir.Graph, leaf: ir.Value) -> None:
    """Turns the last input, of which just the batch size is asked, into a constant with one row."""
    given = graph.inputs.pop()
    if leaf.shape is None:
        raise NotCuttable(f"shape of {leaf.name} is unknown")
    sizes = [size if isinstance(size, int) else 1 for size in leaf.shape]
    row = constant(graph, np.zeros(sizes, (leaf.dtype or ir.DataType.FLOAT).numpy()), f"row/{given.name}")
    given.replace_all_uses_with(row)
