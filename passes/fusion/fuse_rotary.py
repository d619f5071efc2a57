"""Fuses rotary position embedding into com.microsoft RotaryEmbedding with caches of cosines and sines.

Paper:   Su et al., arXiv:2104.09864, in the half-rotated spelling: y = x cos(p) + [-x_2, x_1] sin(p).
         The operator of ai.onnx 23 is read as well: the one of com.microsoft can be taken into attention.
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

from onnxpress.compiler.fusing import Fuser, constant, discard, other, producer, scalar
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
        batches: dict[int, ir.Value] = {}
        for node in list(model.graph):
            if node.op_type == "RotaryEmbedding" and node.domain in ("", "ai.onnx"):
                found: _Rotary | None = _of_operator(node)
            else:
                found = _match(node) if node.op_type == "Add" else None
            if found is None:
                continue
            site = node.outputs[0].name or "rotary"
            try:
                source = positions = found.positions or _positions(found.cos)
                cos, sin, rows = found.cos, found.sin, length
                if found.positions is not None:
                    rows = _rows(cos)
                else:
                    cos, sin = (caches.get(one, source, found.is_operator) for one in (cos, sin))
                    positions = source if source.is_graph_input() else _for_batch(fuser, source, batches)
                attributes, shapes = _operator_attributes(node) if found.is_operator else _partial(found)
                before = [value.shape for value, _ in shapes]
                for value, shape in shapes:  # the samples need them, and later passes
                    value.shape = shape
            except NotCuttable as finding:
                report.skip(site, str(finding))
                continue
            operands = [found.x, positions, cos, sin]
            new = ir.Node("com.microsoft", "RotaryEmbedding", operands, attributes, name=f"{site}/rotary")

            is_row = source is not positions or (source.shape is not None and source.shape[0] == 1)

            def feeds(
                leaves: Sequence[ir.Value], source: ir.Value = source, is_row: bool = is_row, rows: int = rows
            ) -> Iterable[list[Array]]:
                rng = np.random.default_rng(context.seed)
                # The first positions, any, and few beside many: frequencies that depend on the positions show.
                for places in ([[0, 1, 2]] * 2, rng.integers(0, rows, (2, 3)), [[0, 1, 2], [0, 1, rows - 1]]):
                    numbers = np.array(places, np.int64 if source.dtype is None else source.dtype.numpy())
                    given = {id(source): numbers[-1:] if is_row else numbers}
                    yield random_feed(leaves, {"batch": 2, "sequence": 3}, rng, given)

            reason = fuser.verdict([found.x, source], [found.output], [new.outputs[0]], feeds)
            if reason is not None:
                discard([new])
                for (value, _), old in zip(shapes, before, strict=True):
                    value.shape = old
                report.skip(site, reason)
                continue
            fuser.replace(site, [found.output], [new.outputs[0]], [new])
        fuser.finish()
        return report


@dataclass
class _Rotary:
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    output: ir.Value
    is_operator: bool = False  # cos and sin hold half of each head's width
    positions: ir.Value | None = None  # rows of cos and sin that an operator picks


def _of_operator(node: ir.Node) -> _Rotary | None:
    """Reads RotaryEmbedding of ai.onnx: X, tables or one row for each token, positions in the tables."""
    x, cos, sin, positions = [*node.inputs, None][:4]
    if x is None or cos is None or sin is None:
        return None
    return _Rotary(x, cos, sin, node.outputs[0], is_operator=True, positions=positions)


def _rows(table: ir.Value) -> int:
    """How many positions a table [M, D / 2] holds."""
    length = None if table.shape is None or len(table.shape) != 2 else table.shape[0]
    if not isinstance(length, int):
        raise NotCuttable(f"the number of positions in {table.name} is unknown")
    return length


def _operator_attributes(node: ir.Node) -> tuple[list[ir.Attr], list[tuple[ir.Value, ir.Shape]]]:
    """The attributes of ai.onnx for com.microsoft, which wants the heads told where a part of each is turned."""
    numbers = {name: int(attribute.value) for name, attribute in node.attributes.items()}
    x = node.inputs[0]
    if numbers.get("rotary_embedding_dim") and x is not None and x.shape is not None and len(x.shape) == 4:
        heads = x.shape[1]
        if not isinstance(heads, int):
            raise NotCuttable("a part of each head is turned, and the number of heads is unknown")
        numbers["num_heads"] = heads
    return [ir.AttrInt64(name, number) for name, number in numbers.items()], []


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
                    return _Rotary(x, cos, sin, add.outputs[0])
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


def _partial(found: _Rotary) -> tuple[list[ir.Attr], list[tuple[ir.Value, ir.Shape]]]:
    """Attributes of the operator, and shapes that were found out on the way.

    Where only the first columns of each head are turned, `found` takes the rest in:
    Slice(x, :r) turned and joined with Slice(x, r:) is one operator on x [B, heads, S, D]; also with r = D and nothing
    left (Phi-3).

    Raises:
        NotCuttable: the widths are unknown.
    """
    joins = found.output.consumers()
    cut = producer(found.x, "Slice", "Split")
    join = joins[0] if len(joins) == 1 and joins[0].op_type == "Concat" and len(joins[0].inputs) == 2 else None
    if cut is None or join is None or found.output.is_graph_output():
        return [], []
    rest = producer(join.inputs[1], "Slice", "Split")
    whole = cut.inputs[0]
    if rest is None or whole is None or rest.inputs[0] is not whole:
        return [], []
    turned = None if found.cos.shape is None else found.cos.shape[-1]
    heads, width = _heads_and_width(whole)
    if not isinstance(turned, int) or heads is None or width is None:
        raise NotCuttable("a part of each head is turned, and the number or width of heads is unknown")
    found.x, found.output = whole, join.outputs[0]
    sizes = [0, heads, 0, width]
    shapes = [
        (value, ir.Shape([known or size for known, size in zip(sizes, value.shape, strict=True)]))
        for value in (found.x, found.output)
        if value.shape is not None and len(value.shape) == len(sizes)
    ]
    if turned == width:
        return [], shapes
    return [ir.AttrInt64("num_heads", heads), ir.AttrInt64("rotary_embedding_dim", turned)], shapes


def _heads_and_width(value: ir.Value) -> tuple[int | None, int | None]:
    """Heads and their width of [B, heads, S, D], from the shape or from the [B, S, heads D] it was split from."""
    if value.shape is None or len(value.shape) != 4:
        return None, None
    heads, width = value.shape[1], value.shape[3] if isinstance(value.shape[3], int) else _cut_width(value)
    apart = value
    while (cut := producer(apart, "Slice", "Split")) is not None and cut.inputs[0] is not None:
        apart = cut.inputs[0]  # queries, keys and values of one head side by side
    transpose = producer(apart, "Transpose")
    split = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if not isinstance(heads, int) and split is not None and apart.shape is not None:
        flat, wide = split.inputs[0].shape if split.inputs[0] is not None else None, apart.shape[3]
        if flat is not None and len(flat) == 3 and isinstance(flat[2], int) and isinstance(wide, int):
            heads = flat[2] // wide
    return heads if isinstance(heads, int) else None, width if isinstance(width, int) else None


def _cut_width(value: ir.Value) -> int | None:
    """Width of Slice(x, start, end) on the last axis of a known width, from its constants."""
    cut = producer(value, "Slice")
    whole = None if cut is None or cut.inputs[0] is None else cut.inputs[0].shape
    if cut is None or whole is None or not isinstance(whole[-1], int) or len(cut.inputs) < 4:
        return None
    numbers = [scalar(one) for one in cut.inputs[1:]]
    start, end, axis = (int(one) if one is not None else None for one in numbers[:3])
    if start is None or end is None or axis not in (-1, len(whole) - 1) or numbers[3:] not in ([], [1.0]):
        return None
    return len(range(whole[-1])[start:end])


def _positions(cos: ir.Value) -> ir.Value:
    """The integers [B or 1, S] that the angles are computed from: a graph input, or counted from the cache's length.

    Raises:
        NotCuttable: there are none, or more than one.
    """
    region = Region([], [cos])
    leaves = [leaf for leaf in region.leaves if leaf.is_graph_input()]
    if len(leaves) > 1:
        leaves = [leaf for leaf in leaves if leaf.name == "position_ids"]
    # Of token ids only the size is asked, where positions are counted.
    used = [leaf for leaf in leaves if any(leaf in node.inputs for node in region.nodes if node.op_type != "Shape")]
    if len(used) == 1 and _is_integer(used[0]) and used[0].shape is not None and len(used[0].shape) == 2:
        return used[0]
    counted: dict[int, ir.Value] = {}
    for node in region.nodes:
        value = node.inputs[0] if node.op_type == "Cast" else None
        if value is None or not _is_integer(value) or _is_integer(node.outputs[0]):
            continue
        while value.shape is not None and len(value.shape) > 2 and (up := producer(value, "Unsqueeze")) is not None:
            assert up.inputs[0] is not None
            value = up.inputs[0]
        counted[id(value)] = value
    found = list(counted.values())
    if len(found) != 1 or found[0].shape is None or len(found[0].shape) != 2:
        raise NotCuttable("the positions are neither a graph input nor one list of integers")
    return found[0]


def _is_integer(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT64, ir.DataType.INT32)


def _for_batch(fuser: Fuser, positions: ir.Value, made: dict[int, ir.Value]) -> ir.Value:
    """`positions` [1 or B, S] as [B, S], which the operator wants."""
    if id(positions) not in made:
        graph = fuser.model.graph
        ids = next((one for one in graph.inputs if one.name in ("input_ids", "inputs_embeds")), None)
        if ids is None:
            raise NotCuttable("no input_ids to take the batch size from")
        name = f"rotary/{(positions.name or 'positions').strip('/')}"
        sizes = ir.Node("", "Shape", [ids], name=f"{name}/sizes")
        zero, one = (constant(graph, np.array([n], np.int64), f"rotary/{n}") for n in (0, 1))
        size = ir.Node("", "Gather", [sizes.outputs[0], zero], [ir.AttrInt64("axis", 0)], name=f"{name}/batch")
        shape = ir.Node("", "Concat", [size.outputs[0], one], [ir.AttrInt64("axis", 0)], name=f"{name}/shape")
        rows = ir.Node("", "Expand", [positions, shape.outputs[0]], name=f"{name}/rows")
        for node in (sizes, size, shape, rows):
            node.outputs[0].name = f"{node.name}.out"
            node.outputs[0].dtype = ir.DataType.INT64
        rows.outputs[0].type, rows.outputs[0].shape = positions.type, ir.Shape([None, None])
        fuser.insert([sizes, size, shape, rows])
        made[id(positions)] = rows.outputs[0]
    return made[id(positions)]


@dataclass
class _Caches:
    """Makes each cosine or sine table once."""

    fuser: Fuser
    length: int
    made: dict[int, ir.Value] = field(default_factory=dict)

    def get(self, value: ir.Value, positions: ir.Value, is_half: bool) -> ir.Value:
        """The table [M, D / 2] of `value` [B, 1, S, D] or [B, S, D] over all positions; [B, S, D / 2] if `is_half`."""
        base = value
        while (node := producer(base, "Unsqueeze", "Reshape", "Identity")) is not None and node.inputs[0] is not None:
            base = node.inputs[0]
        if id(base) not in self.made:
            self.made[id(base)] = self._make(base, positions, is_half)
        return self.made[id(base)]

    def _make(self, base: ir.Value, positions: ir.Value, is_half: bool) -> ir.Value:
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
        self._feed_all_positions(table, is_half)
        optimizer.optimize(table, output_size_limit=256)  # folds what is about shapes, not the table itself
        return self._splice(table, name)

    def _opset(self) -> int:
        return self.fuser.model.opset_imports.get("", 18)

    def _feed_all_positions(self, table: ir.Model, is_half: bool) -> None:
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
        half = full
        if not is_half:
            given_as = [ir.AttrInt64("axis", -1), *([ir.AttrInt64("num_outputs", 2)] if self._opset() >= 18 else [])]
            halves = ir.Node("", "Split", [full], given_as, num_outputs=2)
            graph.append(halves)
            half = halves.outputs[0]
        shape = constant(graph, np.array([self.length, -1], np.int64), "table_shape")
        flat = ir.Node("", "Reshape", [half, shape])
        graph.append(flat)
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
        raise NotCuttable("the shape of what it reads is unknown, so no samples can be made")
    sizes = [size if isinstance(size, int) else 1 for size in leaf.shape]
    row = constant(graph, np.zeros(sizes, (leaf.dtype or ir.DataType.FLOAT).numpy()), f"row/{given.name}")
    given.replace_all_uses_with(row)
