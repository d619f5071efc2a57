"""The key-value heads of one attention, each with the query heads that read it: where they come from, who reads them.

Queries, keys and values are followed back from the operator to the products that make them, through whatever treats
heads alike: biases, splitting and joining of heads, rotary embeddings, norms of each head. Everything whose size
depends on the number of heads is noted on the way; a walk that meets anything else says what it met.

Axes:    H query heads, G key-value heads, D width of a head, W = heads D, B batch, S sequence, T past + S
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.fusing import constant
from onnxpress.compiler.inner_features import choose_constant, inner_biases
from onnxpress.compiler.linears import MICROSOFT, Linear, drop_unused
from onnxpress.compiler.projections import unused_name
from onnxpress.compiler.region import NotCuttable, Region, build_model, run
from onnxpress.passes.pruning._coded import cut_rows

Index = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]
Rows = Callable[[Index], Index]  # which rows are left, given the numbers of the key-value heads that are
Edit = Callable[[Index], None]

OPERATORS = ("GroupQueryAttention", "MultiHeadAttention", "Attention")
_NORMS = ("SimplifiedLayerNormalization", "RMSNormalization", "LayerNormalization")
_MOVES = ("Slice", "Split", "Gather", "Concat", "Expand", "Squeeze", "Unsqueeze", "Softmax", "MatMul", "Where")
_FAR = 16  # nodes between a product and attention
_TRIED = ((2, 3), (1, 5))  # (B, S) at which the size of a bias is measured


class _RefusedError(Exception):
    """Heads cannot be taken out; the text says why."""


@dataclass
class Heads:
    """The heads of one layer.

    Attributes:
        reader: the linear whose columns they are, [N, H Dv].
        total: G.
        group: query heads of a key-value head, H / G.
        makers: the linears whose rows they are, and which rows those of some heads are.
        edits: what else changes with the number of heads, in the order in which to do it.
        numbers: parameters of one key-value head and its query heads in all matrices.
        nbytes: of all heads, as stored.
    """

    reader: Linear
    total: int
    group: int
    makers: list[tuple[Linear, Rows]] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    numbers: int = 0
    nbytes: int = 0

    def cut(self, kept: Index, results: dict[int, npt.NDArray[np.floating]]) -> None:
        """Leaves the heads `kept` in everything but the reader.

        Args:
            kept: numbers of key-value heads, ascending.
            results: new matrices of makers by id of their output; those of this layer are taken out.
        """
        # Shapes first: a matrix in codes gets another node, which takes them over.
        for edit in self.edits:
            edit(kept)
        for maker, rows in self.makers:
            left = rows(kept)
            for slot in inner_biases(maker):
                maker.bias = choose_constant(maker.node, slot, left)
            cut_rows(maker, left, results.pop(id(maker.output), None))


@dataclass
class _Stream:
    """Queries, keys or values, or all of them side by side, as attention reads them.

    Attributes:
        rows: that belong to some key-value heads.
        width: of all.
        heads: that lie in it; 0 where queries, keys and values are packed.
        size: of one head.
    """

    rows: Rows
    width: int
    heads: int
    size: int


def is_attention(node: ir.Node | None) -> bool:
    """Whether it is an operator whose heads may be taken out."""
    return node is not None and node.op_type in OPERATORS and node.domain == MICROSOFT


def read_heads(node: ir.Node, linears: Sequence[Linear], opset: int) -> Heads | str:
    """The heads of an attention operator, or why they cannot be told apart.

    Args:
        node: `is_attention`.
        linears: of `find_linears(model)`.
        opset: of the model.
    """
    try:
        return _Reader(node, linears, opset).read()
    except _RefusedError as reason:
        return str(reason)


class _Reader:
    """Reads one attention."""

    def __init__(self, node: ir.Node, linears: Sequence[Linear], opset: int) -> None:
        self.node, self.opset = node, opset
        self.by_output = {id(one.output): one for one in linears}
        self.inputs: list[ir.Value | None] = [*node.inputs, *[None] * 16][:16]
        heads = _number(node, "num_heads")
        self.found = Heads(self._output(linears), heads, 1)
        if node.op_type == "GroupQueryAttention":
            self.found.total = _number(node, "kv_num_heads")
        self.heads, self.total = heads, self.found.total
        if heads < 1 or self.total < 1 or heads % self.total or self.found.reader.num_in % heads:
            raise _RefusedError("its numbers of heads do not fit each other")
        self.found.group = heads // self.total
        self.width = self.found.reader.num_in // heads

    def read(self) -> Heads:
        found, group, kind = self.found, self.found.group, self.node.op_type
        self._count("num_heads", group)
        self._resize(self.node.outputs[0], 2, group * self.width)
        found.numbers = found.reader.num_out * group * self.width
        found.nbytes = found.reader.nbytes
        if kind == "GroupQueryAttention":
            self._count("kv_num_heads", 1)
            self._read_grouped()
        elif kind == "MultiHeadAttention":
            self._read_plain()
        else:
            self._read_packed_operator()
        for maker, rows in found.makers:
            found.numbers += maker.num_in * len(rows(np.array([0])))
            found.nbytes += maker.nbytes
        return found

    def _output(self, linears: Sequence[Linear]) -> Linear:
        """The linear that alone reads what attention gives."""
        value = self.node.outputs[0]
        readers = [node for node in value.consumers() if not _asks_besides(node, 2, 3)]
        reader = next((one for one in linears if one.activation is value), None)
        if value.is_graph_output() or len(readers) != 1 or reader is None or reader.source is not value:
            names = ", ".join(sorted({node.op_type for node in readers})) or "nobody"
            raise _RefusedError(f"what it gives is not read by one projection alone, but by {names}")
        return reader

    def _read_grouped(self) -> None:
        """GroupQueryAttention: q, k, v, cache, lengths, tables, positions, bias, sinks, scales of the cache, norms."""
        for slot in (12, 13):
            if self.inputs[slot] is not None:
                raise _RefusedError("its cache has fixed scales: comes before quantize_kv")
        per_head = self.found.group, 1, 1
        if self.inputs[1] is None:
            starts = (0, self.heads * self.width, (self.heads + self.total) * self.width)
            rows = [_rows(count * self.width, start) for count, start in zip(per_head, starts, strict=True)]
            width = (self.heads + 2 * self.total) * self.width
            self._follow(self.inputs[0], _Stream(_together(rows), width, 0, self.width))
        else:
            for value, count in zip(self.inputs[:3], per_head, strict=True):
                heads = count * self.total
                rows_of = _rows(count * self.width)
                self._follow(value, _Stream(rows_of, heads * self.width, heads, self.width))
        self._follow_cache(self.inputs[3:5])
        self._follow_bias(10)
        if self.inputs[11] is not None:
            self._choose(11, _rows(self.found.group), self.heads)
        if len(self.node.outputs) > 3 and _is_read(self.node.outputs[3]):
            raise _RefusedError("somebody reads its scores")

    def _read_plain(self) -> None:
        """MultiHeadAttention: q, k, v, their biases, padding, bias of scores, cache, its length, beams."""
        if any(value is None for value in self.inputs[:3]):
            raise _RefusedError("queries, keys and values lie in one operand of five axes: unpack before")
        if self.inputs[9] is not None:
            raise _RefusedError("its cache is that of a beam search inside of the model")
        widths = [self._width(value) for value in self.inputs[:3]]
        if widths[2] != self.found.reader.num_in:
            raise _RefusedError("the width of its values is not that of its output")
        for value, width in zip(self.inputs[:3], widths, strict=True):
            size = width // self.heads
            self._follow(value, _Stream(_rows(size), width, self.heads, size))
        if self.inputs[3] is not None:
            starts = (0, widths[0], sum(widths[:2]))
            parts = [_rows(width // self.heads, start) for width, start in zip(widths, starts, strict=True)]
            self._choose(3, _together(parts), sum(widths))
        self._follow_bias(5)
        self._follow_cache(self.inputs[6:8])
        if len(self.node.outputs) > 3 and _is_read(self.node.outputs[3]):
            raise _RefusedError("somebody reads its scores")

    def _read_packed_operator(self) -> None:
        """Attention: x, the projections as one matrix [K, W], their biases, a mask, cache, bias of scores, length."""
        weight, bias = self.inputs[1:3]
        if self.inputs[4] is not None or any(_is_read(value) for value in self.node.outputs[1:]):
            raise _RefusedError("keys and values of its cache lie in one tensor: unpack_attention before")
        if weight is None or weight.const_value is None or weight.is_graph_input():
            raise _RefusedError("its matrix is no constant")
        rows, width = (int(size) for size in weight.const_value.shape.numpy())
        attribute = self.node.attributes.get("qkv_hidden_sizes")
        widths = [width // 3] * 3 if attribute is None else list(attribute.as_ints())
        if sum(widths) != width or any(one % self.heads for one in widths):
            raise _RefusedError("the widths of queries, keys and values do not fit its matrix")
        starts = (0, widths[0], sum(widths[:2]))
        parts = [_rows(one // self.heads, start) for one, start in zip(widths, starts, strict=True)]
        for slot in (1, 2) if bias is not None else (1,):
            self._choose(slot, _together(parts), width)
        if attribute is not None:
            sizes = [one // self.heads for one in widths]

            def resize(kept: Index) -> None:
                left = [len(kept) * size for size in sizes]
                self.node.attributes["qkv_hidden_sizes"] = ir.AttrInt64s("qkv_hidden_sizes", left)

            self.found.edits.append(resize)
        self.found.numbers += rows * width // self.heads
        self.found.nbytes += weight.const_value.nbytes
        self._follow_bias(5)

    def _width(self, value: ir.Value | None) -> int:
        """W of an operand, from the product behind it where its shape does not say."""
        width: object = None
        for _ in range(_FAR):
            if value is None or (value.shape is not None and len(value.shape) != 3):
                break
            maker = self.by_output.get(id(value))
            width = maker.num_out if maker is not None else value.shape[-1] if value.shape is not None else None
            node = value.producer()
            if isinstance(width, int) or node is None or node.op_type not in ("Add", "Cast", "Identity"):
                break
            value = next((one for one in node.inputs if _size(one) is None), None)
        if not isinstance(width, int):
            raise _RefusedError("the width of its operands is not known")
        if width % self.heads:
            raise _RefusedError("the width of its operands does not fit its number of heads")
        return width

    def _follow(self, value: ir.Value | None, stream: _Stream) -> None:
        """Walks from an operand back to the product that makes it."""
        reader = self.node
        axis: int | None = None  # of the heads, which at first lie side by side in the last
        for _ in range(_FAR):
            if value is None:
                raise _RefusedError("an operand is missing")
            self._check_read_once(value, reader, 2 if axis is None else axis, 3 if axis is None else 4)
            maker = self.by_output.get(id(value))
            if axis is None:
                self._resize(value, 2, stream.width // self.total)
            else:
                self._resize(value, axis, stream.heads // self.total)
            if maker is not None:
                if axis is not None or maker.num_out != stream.width:
                    raise _RefusedError(f"{maker.name} makes something else too")
                self.found.makers.append((maker, stream.rows))
                return
            node = value.producer()
            if node is None:
                raise _RefusedError(f"{value.name} is an input of the model")
            if value is not node.outputs[0]:
                raise _RefusedError(f"{node.op_type} makes them" + (": fuse before" if node.op_type in _MOVES else ""))
            value, axis = self._step(node, axis, stream)
            reader = node
        raise _RefusedError("no product of matrices is near")

    def _step(self, node: ir.Node, axis: int | None, stream: _Stream) -> tuple[ir.Value | None, int | None]:
        """What a node reads, and where the heads are in it."""
        kind, source = node.op_type, node.inputs[0]
        if kind in ("Cast", "Identity"):
            return source, axis
        if kind in ("Add", "Sub", "Mul", "Div"):
            return self._step_over_vector(node, axis, stream), axis
        if not stream.heads and kind in ("Reshape", "Transpose", "RotaryEmbedding", *_NORMS):
            raise _RefusedError(f"{kind} lies between the packed product and attention")
        if kind == "Reshape" and axis != 1:
            if axis is None:
                self._entry(node, 2, 3, stream.width, stream.width // self.total)
            else:
                self._entry(node, 2, 4, stream.heads, stream.heads // self.total)
            return source, 2 if axis is None else None
        if kind == "Transpose" and axis is not None and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]:
            return source, 3 - axis
        if kind == "RotaryEmbedding" and axis != 2:
            if _number(node, "num_heads"):
                self._count("num_heads", stream.heads // self.total, node)
            return source, axis
        if kind in _NORMS:
            last = node.attributes.get("axis")
            if axis is None or (last is not None and last.as_int() not in (-1, 3)):
                raise _RefusedError(f"{kind} takes all heads together")
            if any(_size(value) != stream.size for value in node.inputs[1:] if value is not None):
                raise _RefusedError(f"{kind} treats heads differently")
            return source, axis
        raise _RefusedError(f"{kind} makes them" + (": fuse before" if kind in _MOVES else ""))

    def _step_over_vector(self, node: ir.Node, axis: int | None, stream: _Stream) -> ir.Value | None:
        """The operand beside a constant, which is one number, or along all heads, or along each."""
        slots = [slot for slot, value in enumerate(node.inputs) if _size(value) is not None]
        if len(slots) != 1:
            raise _RefusedError(f"{node.op_type} joins two activations")
        value = node.inputs[slots[0]]
        assert value is not None
        assert value.const_value is not None
        size, last = value.const_value.size, [1, *value.const_value.shape.numpy()][-1]
        if size != 1:
            if axis is None and size == last == stream.width:
                self._choose(slots[0], stream.rows, stream.width, node)
            elif axis is None or not size == last == stream.size:
                raise _RefusedError(f"{value.name} is no vector along them")
        return node.inputs[1 - slots[0]]

    def _entry(self, node: ir.Node, index: int, length: int, expected: int, per_head: int) -> None:
        """Checks one entry of what a Reshape is told, and notes it where it is no -1."""
        told = node.inputs[1]
        entries = _entries(told)
        if entries is None or len(entries) != length:
            raise _RefusedError("Reshape makes them of another number of axes")
        entry = entries[index]
        if entry == -1:
            return
        if entry != expected or told is None or told.const_value is None:
            raise _RefusedError("Reshape is told a size that is computed: fuse before")

        def write(kept: Index) -> None:
            old, graph = node.inputs[1], node.graph
            assert old is not None
            assert old.const_value is not None
            assert isinstance(graph, ir.Graph)
            sizes = np.array(old.const_value.numpy())
            sizes[index] = per_head * len(kept)
            node.replace_input_with(1, constant(graph, sizes, "shape/" + "x".join(map(str, sizes))))
            drop_unused(graph, old)

        self.found.edits.append(write)

    def _follow_cache(self, pasts: Sequence[ir.Value | None]) -> None:
        """Past keys and values that are inputs of the model, and present ones that are its outputs."""
        for past in pasts:
            if past is None:
                continue
            if not past.is_graph_input():
                raise _RefusedError("its cache is no input of the model")
            self._check_read_once(past, self.node, 1, 4)
            self._resize(past, 1, 1)
        for present in self.node.outputs[1:3]:
            if any(not _asks_besides(node, 1, 4) for node in present.consumers()):
                raise _RefusedError("others read its cache too")
            self._resize(present, 1, 1)

    def _follow_bias(self, slot: int) -> None:
        """What is added to the scores [B, 1 or H, S, T]: a part of it is taken where every head has its own."""
        value = self.inputs[slot]
        if value is None:
            return
        known = value.shape[1] if value.shape is not None and len(value.shape) == 4 else None
        count = known if isinstance(known, int) else self._measured(value)
        if count == 1:
            return
        if count != self.heads:
            raise _RefusedError(f"{value.name}, added to its scores, has {count} heads")
        node, rows = self.node, _rows(self.found.group)

        def choose(kept: Index) -> None:
            graph, old = node.graph, node.inputs[slot]
            assert isinstance(graph, ir.Graph)
            assert old is not None
            left = np.asarray(rows(kept), np.int64)
            name = unused_name(graph, f"{node.name or node.outputs[0].name}/bias")
            index = constant(graph, left, "heads/" + "_".join(map(str, left)))
            gather = ir.Node("", "Gather", [old, index], [ir.AttrInt64("axis", 1)], name=name)
            made = gather.outputs[0]
            made.name, made.type = f"{name}.out", old.type
            first, _, *rest = [*old.shape] if old.shape is not None else [None] * 4
            made.shape = ir.Shape([first, len(left), *rest])
            graph.insert_before(node, gather)
            node.replace_input_with(slot, made)

        self.found.edits.append(choose)

    def _measured(self, value: ir.Value) -> int:
        """Size of a value's second axis, the same at several lengths; the nodes before it are run."""
        try:
            region = Region([], [value])
            model = build_model(region.nodes, region.leaves, region.outputs, region.constants, self.opset)
            shapes = [run(model, [_sample(leaf, *sizes) for leaf in region.leaves])[0].shape for sizes in _TRIED]
        except NotCuttable as reason:
            raise _RefusedError(f"how many heads {value.name} has is not known: {reason}") from None
        except Exception:  # ONNX Runtime's exceptions have no common type
            raise _RefusedError(f"how many heads {value.name} has is not known: it does not run by itself") from None
        sizes = {shape[1] if len(shape) == 4 else 0 for shape in shapes}
        return sizes.pop() if len(sizes) == 1 else 0

    def _check_read_once(self, value: ir.Value, reader: ir.Node, axis: int, rank: int) -> None:
        """Raises where another node than `reader` reads the value, unless it asks for sizes of other axes."""
        if value.is_graph_output():
            raise _RefusedError(f"{value.name} is an output of the model")
        others = [node for node, _ in value.uses() if node is not reader and not _asks_besides(node, axis, rank)]
        if others:
            raise _RefusedError(f"{others[0].op_type} reads them too")
        if sum(node is reader for node, _ in value.uses()) > 1:
            raise _RefusedError(f"{reader.op_type} reads {value.name} twice")

    def _count(self, name: str, per_head: int, node: ir.Node | None = None) -> None:
        """Notes an attribute that counts heads."""
        one = node or self.node

        def write(kept: Index) -> None:
            one.attributes[name] = ir.AttrInt64(name, per_head * len(kept))

        self.found.edits.append(write)

    def _choose(self, slot: int, rows: Rows, width: int, node: ir.Node | None = None) -> None:
        """Notes a constant of which elements of the last axis go."""
        one = node or self.node
        value = one.inputs[slot]
        if value is None or _size(value) is None or value.is_graph_input():
            raise _RefusedError(f"{value.name if value is not None else slot} is no constant")
        assert value.const_value is not None
        if int([1, *value.const_value.shape.numpy()][-1]) != width:
            raise _RefusedError(f"{value.name} does not fit the heads")
        self.found.edits.append(lambda kept: _ignore(choose_constant(one, slot, rows(kept))))

    def _resize(self, value: ir.Value, axis: int, per_head: int) -> None:
        """Notes a value whose shape tells the number of heads."""
        if value.shape is None or len(value.shape) <= axis or not isinstance(value.shape[axis], int):
            return
        if value.shape[axis] != per_head * self.total:
            raise _RefusedError(f"axis {axis} of {value.name} is {value.shape[axis]}, not {per_head * self.total}")

        def write(kept: Index) -> None:
            assert value.shape is not None
            sizes = list(value.shape)
            sizes[axis] = per_head * len(kept)
            value.shape = ir.Shape(sizes)

        self.found.edits.append(write)


def _rows(per_head: int, start: int = 0) -> Rows:
    """Rows of key-value heads that have `per_head` rows each, one after the other."""

    def rows(kept: Index) -> Index:
        found: Index = start + (kept[:, None] * per_head + np.arange(per_head)).reshape(-1)
        return found

    return rows


def _together(parts: Sequence[Rows]) -> Rows:
    return lambda kept: np.concatenate([part(kept) for part in parts])


def _entries(value: ir.Value | None) -> list[int | None] | None:
    """The numbers of a shape, None where they are computed; None when not even their number is known."""
    if value is None:
        return None
    if value.const_value is not None:
        return [int(one) for one in value.const_value.numpy().reshape(-1)]
    node = value.producer()
    if node is None or node.op_type != "Concat":
        return None
    found: list[int | None] = []
    for part in node.inputs:
        known = _entries(part) if part is not None and part.const_value is not None else None
        size = part.shape[0] if part is not None and part.shape is not None and len(part.shape) == 1 else None
        if known is not None:
            found += known
        elif isinstance(size, int):
            found += [None] * size
        else:
            return None
    return found


def _asks_besides(node: ir.Node, axis: int, rank: int) -> bool:
    """Whether a node asks for sizes of a value of this rank, and for none along `axis`."""
    if node.op_type != "Shape" or node.attributes.get("start") or node.outputs[0].is_graph_output():
        return False
    for reader in node.outputs[0].consumers():
        index = reader.inputs[1].const_value if reader.op_type == "Gather" and reader.inputs[1] is not None else None
        if index is None or any(int(one) % rank == axis for one in index.numpy().reshape(-1)):
            return False
    return True


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _size(value: ir.Value | None) -> int | None:
    """Elements of a constant, None for anything else."""
    return None if value is None or value.const_value is None else int(value.const_value.size)


def _number(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


def _sample(value: ir.Value, batch: int, length: int) -> npt.NDArray[np.generic]:
    """Ones of the shape that an input or an activation has for a batch without a past."""
    sizes = []
    for axis, size in enumerate(value.shape or ()):
        is_past = len(value.shape or ()) == 4 and axis == 2
        sizes.append(size if isinstance(size, int) else 0 if is_past else batch if axis == 0 else length)
    return np.ones(sizes, (value.dtype or ir.DataType.FLOAT).numpy())


def _ignore(_: object) -> None:
    """A statement made of an expression."""
