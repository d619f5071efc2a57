"""A graph as a function of token ids and some of its weights that torch can differentiate.

    graph = Differentiable(model, window, trained)      # compared with ONNX Runtime before it is handed out
    hidden = graph.hidden(ids, given)                   # what the head reads
    logits = graph.logits(hidden[:, 100:200], given)    # of some tokens: all at once fill memory

Nodes fall into three kinds. What depends neither on token ids nor on large or trained weights (shapes, masks,
positions) is the same for all windows of one length: ONNX Runtime computes it once. What depends on frozen weights
alone (a table transposed for the head) is computed once by torch. The rest runs for each window, by the functions of
`differentiable_ops`; weights are views of the memory that the model's tensors lie in.

Imports torch: to be imported where it is used.

Axes: S tokens of a window, V vocabulary, R rank, N out features, K in features
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from torch.utils.checkpoint import checkpoint

from onnxpress.compiler import differentiable_ops as ops
from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.compiler.linears import Linear, find_linears
from onnxpress.compiler.pass_ import subgraphs
from onnxpress.compiler.probe import Probe
from onnxpress.compiler.region import first_line
from onnxpress.compiler.verify import in_place

Array = npt.NDArray[Any]
Tensor = Any  # torch.Tensor: mypy does not follow torch
Given = Mapping[int, Any]  # tensors by the id of the ir.Value that they stand for

# Largest difference from ONNX Runtime, relative to the largest logit. Float16 is computed in float32 here.
TOLERANCE = {ir.DataType.FLOAT: 1e-4, ir.DataType.FLOAT16: 2e-2}
_LARGE = 4096  # bytes from which a constant is a weight: what follows from it is not asked of ONNX Runtime
_KEPT = 2 << 30  # bytes of activations that are kept for the way back; with more, parts of the graph run twice
_SHORTEST = 8  # nodes of such a part
_MOST_PARTS = 48
_SHAPES = ("Shape", "Size")
# What may stand between the head's product and the logits: operators that treat every token alike.
_POINTWISE = ("Add", "Mul", "Div", "Tanh", "Cast", "Identity")


@dataclass
class Factors:
    """A product B A that is added to a frozen matrix: y = x w^T + (x A^T) B^T.

    Attributes:
        linear: the frozen one.
        down: A [R, K].
        up: B [N, R].
    """

    linear: Linear
    down: Tensor
    up: Tensor


@dataclass
class _Part:
    """Nodes in a row, the values they read of earlier parts, and those that later ones read."""

    nodes: list[ir.Node]
    inputs: list[ir.Value] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)


class Differentiable:
    """The logits of a language model, from token ids, with gradients for chosen weights.

    Attributes:
        difference: the largest from ONNX Runtime's logits on the window it was compared on, relative to the largest.
        is_recomputed: whether activations are computed again on the way back, since they are too many to keep.
        is_chunked: whether `logits` takes some tokens at a time; else all or none.
        vocabulary: V.
    """

    def __init__(
        self,
        model: ir.Model,
        window: Mapping[str, Array],
        trained: Collection[ir.Value],
        work_dir: Path,
        *,
        recompute: bool | None = None,
    ) -> None:
        """Plans the graph and compares it with ONNX Runtime.

        Args:
            model: a language model; not changed.
            window: its inputs by name, for one window of text; others must have as many tokens.
            trained: initializers for which tensors will be given.
            work_dir: scratch folder.
            recompute: see `is_recomputed`; by default when activations of a window take more than 2 GB.

        Raises:
            UnsupportedModelError: an operator has no gradients here, or the logits are not those of ONNX Runtime.
        """
        self._linears = {id(one.node): one for one in find_linears(model, expand_pairs=True)}
        self._codes: dict[int, ops.Codes] = {}
        self._ids, self._logits = _ends(model)
        self._constants: dict[int, Tensor] = {}
        self._trained = {id(value): value for value in trained}
        self._bytes = 0
        self.is_recomputed = bool(recompute)
        moving, frozen, asked = self._sort(model)
        known, expected = _ask(model, window, asked, work_dir)
        for value in asked:
            self._constants[id(value)] = _tensor(known[str(value.name)])
        self._split(moving)
        start = {id(value): self._weight(value) for value in trained}
        with torch.no_grad():
            self._evaluate(frozen, self._constants, start)
            ids = torch.from_numpy(np.asarray(window["input_ids"]))
            logits = self.logits(self.hidden(ids, start), start).numpy()
        self.is_recomputed = self._bytes > _KEPT if recompute is None else recompute
        self.is_chunked, self.vocabulary = bool(self._tail), int(logits.shape[-1])
        self.difference = _compared(model, logits, expected)

    def hidden(self, ids: Tensor, given: Given, factors: Mapping[int, Factors] | None = None) -> Tensor:
        """What the head reads, [1, S, H].

        Args:
            ids: token ids [1, S], as many as in the window of the beginning.
            given: the trained weights by the id of their value.
            factors: of linears by the id of their node.
        """
        values: dict[int, Tensor] = {id(self._ids): ids}

        def run(part: _Part, *inputs: Tensor) -> tuple[Tensor, ...]:
            inside = {id(value): tensor for value, tensor in zip(part.inputs, inputs, strict=True)}
            self._evaluate(part.nodes, inside, given, factors)
            return tuple(inside[id(value)] for value in part.outputs)

        for part in self._parts:
            inputs = [values[id(value)] for value in part.inputs]
            if self.is_recomputed and torch.is_grad_enabled():
                found = checkpoint(run, part, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                found = run(part, *inputs)
            values |= {id(value): tensor for value, tensor in zip(part.outputs, found, strict=True)}
        return values[id(self._entry)]

    def logits(self, hidden: Tensor, given: Given) -> Tensor:
        """float32 [1, any number of tokens, V] of rows of what `hidden` gave."""
        inside = {id(self._entry): hidden}
        self._evaluate(self._tail, inside, given)
        return inside[id(self._logits)]

    def touched(self) -> list[ir.Node]:
        """Nodes that run for each window, in order."""
        return [*(node for part in self._parts for node in part.nodes), *self._tail]

    def _sort(self, model: ir.Model) -> tuple[list[ir.Node], list[ir.Node], list[ir.Value]]:
        """(nodes that run for each window, nodes of frozen weights, values that ONNX Runtime gives)."""
        moves = _followers(model, {id(self._ids), *self._trained})
        self._read = _followers(model, {id(self._ids)})
        large = {
            id(value) for value in model.graph.initializers.values() if (value.const_value or _NONE).nbytes > _LARGE
        }
        heavy = _followers(model, {id(self._ids), *self._trained, *large})
        moving: list[ir.Node] = []
        frozen: list[ir.Node] = []
        asked: dict[int, ir.Value] = {}
        wanted = {id(self._logits)}
        for node in reversed(list(model.graph)):
            if not any(id(value) in wanted for value in node.outputs):
                continue
            if subgraphs(node):
                raise ops.refusal(node, "it holds a graph of its own")
            if node.op_type in _SHAPES or not any(id(value) in heavy for value in self._reads(node)):
                asked |= {id(value): value for value in node.outputs if id(value) in wanted}
                continue
            self._prepare(node)
            (moving if any(id(value) in moves for value in node.outputs) else frozen).append(node)
            wanted |= {id(value) for value in self._reads(node)}
        for node in (*moving, *frozen):
            for value in self._reads(node):
                if value.const_value is None and value.producer() is None and value is not self._ids:
                    asked[id(value)] = value  # a mask or positions, the same for all windows
                elif value.const_value is not None and id(value) not in self._trained:
                    self._constants[id(value)] = self._weight(value)
        return moving[::-1], frozen[::-1], list(asked.values())

    def _prepare(self, node: ir.Node) -> None:
        """Looks whether a node can be run, and finds its codes."""
        linear = self._linears.get(id(node))
        if linear is None or not linear.is_quantized:
            if node.op_type != "GatherBlockQuantized":
                ops.find(node)
        elif linear.holder == "MatMulNBits":
            self._codes[id(node)] = ops.blocks(node)
        elif linear.holder == "MatMulBnb4":
            self._codes[id(node)] = ops.Codes(linear.w_NK, linear.shape)
        else:
            raise ops.refusal(node, "it rounds its activations, which has no gradient")

    def _reads(self, node: ir.Node) -> list[ir.Value]:
        """Values that torch needs for a node: of quantized ones not the codes."""
        linear = self._linears.get(id(node))
        if linear is not None and linear.is_quantized:
            slots = [0, 2, 5] if linear.holder == "MatMulNBits" else [0]
            operands = [node.inputs[slot] for slot in slots if slot < len(node.inputs)]
        elif node.op_type == "GatherBlockQuantized":
            operands = [node.inputs[1]]
        else:
            operands = list(node.inputs)
        return [value for value in operands if value is not None]

    def _split(self, moving: list[ir.Node]) -> None:
        """Divides the nodes into parts, and what is behind the hidden state off."""
        self._tail = _tail(self._logits, self._read)
        entry = self._tail[0].inputs[0] if self._tail else self._logits
        assert entry is not None
        self._entry = entry
        behind = {id(node) for node in self._tail}
        nodes = [node for node in moving if id(node) not in behind]
        made = {id(value): place for place, node in enumerate(nodes) for value in node.outputs}
        last = {key: len(nodes) for key in [id(entry)]}
        for place, node in enumerate(nodes):
            for value in self._reads(node):
                if id(value) in made and id(value) != id(entry):
                    last[id(value)] = max(place, last.get(id(value), 0))
        crossing = np.zeros(len(nodes) + 1, int)  # values that are alive in front of each node
        for key, end in last.items():
            if key in made:
                crossing[made[key] + 1 : end + 1] += 1
        middle = crossing[len(nodes) // 4 : 3 * len(nodes) // 4]
        narrow = int(middle.min()) + 1 if middle.size else 0
        least, cuts = max(_SHORTEST, len(nodes) // _MOST_PARTS), [0]
        for place in range(1, len(nodes)):
            if crossing[place] <= narrow and place - cuts[-1] >= least:
                cuts.append(place)
        self._parts = [_Part(nodes[a:b]) for a, b in zip(cuts, [*cuts[1:], len(nodes)], strict=True)]
        for number, part in enumerate(self._parts):
            inside = {id(value) for node in part.nodes for value in node.outputs}
            read = {id(value): value for node in part.nodes for value in self._reads(node)}
            part.inputs = [
                value for key, value in read.items() if key not in inside and (key in made or value is self._ids)
            ]
            end = ([*cuts[1:], len(nodes)])[number]
            outputs = [value for node in part.nodes for value in node.outputs]
            part.outputs = [value for value in outputs if last.get(id(value), -1) >= end]

    def _evaluate(
        self,
        nodes: Iterable[ir.Node],
        values: dict[int, Tensor],
        given: Given,
        factors: Mapping[int, Factors] | None = None,
    ) -> None:
        """Runs nodes; `values` has what they read, and gets what they make."""

        def get(value: ir.Value | None) -> Tensor:
            if value is None:
                return None
            for source in (values, given, self._constants):
                if id(value) in source:
                    return source[id(value)]
            return None  # codes, which `Product` reads itself

        for node in nodes:
            codes = self._codes.get(id(node))
            if codes is not None:
                found = ops.Product.apply(get(node.inputs[0]), get(node.inputs[2]), codes)
                bias = get(node.inputs[5]) if len(node.inputs) > 5 else None
                found = found if bias is None else found + bias
            elif node.op_type == "GatherBlockQuantized":
                found = ops.gathered(node, get(node.inputs[1]))
            else:
                found = ops.find(node)(node, [get(value) for value in node.inputs])
            if factors is not None and (added := factors.get(id(node))) is not None:
                found = found + (get(node.inputs[0]) @ added.down.T) @ added.up.T
            made = found if isinstance(found, tuple | list) else (found,)
            for value, tensor in zip(node.outputs, made, strict=False):
                values[id(value)] = tensor
                if tensor is not None:
                    self._bytes += tensor.nbytes

    def _weight(self, value: ir.Value) -> Tensor:
        assert value.const_value is not None
        return _tensor(value.const_value.numpy())


class _Nothing:
    nbytes = 0


_NONE: Any = _Nothing()


def _ends(model: ir.Model) -> tuple[ir.Value, ir.Value]:
    """Token ids and logits."""
    ids = next((value for value in model.graph.inputs if value.name == "input_ids"), None)
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    if ids is None or logits is None:
        raise UnsupportedModelError(
            "expected a model that makes logits of input_ids, found inputs "
            f"{', '.join(str(one.name) for one in model.graph.inputs)} and outputs "
            f"{', '.join(str(one.name) for one in model.graph.outputs)}",
            hint="only language models are healed",
        )
    return ids, logits


def _followers(model: ir.Model, roots: Iterable[int]) -> set[int]:
    """Values whose numbers, not only their shapes, depend on the roots."""
    found = set(roots)
    for node in model.graph:
        if node.op_type not in _SHAPES and any(id(value) in found for value in node.inputs):
            found |= {id(value) for value in node.outputs}
    return found


def _tail(logits: ir.Value, read: set[int]) -> list[ir.Node]:
    """The head's product and what follows it, in order; [] when the logits are no such thing."""
    nodes: list[ir.Node] = []
    value = logits
    while (node := value.producer()) is not None:
        nodes.append(node)
        if node.op_type in ("MatMul", "MatMulNBits", "MatMulBnb4"):
            return nodes[::-1]
        sides = [one for one in node.inputs if one is not None and id(one) in read]
        if node.op_type not in _POINTWISE or len(sides) != 1:
            break
        value = sides[0]
    return []


def _tensor(array: Array) -> Tensor:
    """A view where torch has the type and it is not narrower than float32."""
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        array = np.asarray(array, np.float32)
    elif array.dtype.kind in "iu" and array.dtype != np.uint8:
        array = np.asarray(array, np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # memory of a file that is mapped may not be written; nobody does
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))


def _ask(
    model: ir.Model, window: Mapping[str, Array], asked: Sequence[ir.Value], work_dir: Path
) -> tuple[dict[str, Array], Array]:
    """What ONNX Runtime gives for values of the graph, and the logits; products do not round their activations."""
    given = in_place(model)
    if given is None:
        ir.save(model, work_dir / "before-training.onnx", external_data="before-training.onnx.data")
        proto, folder = onnx.load(work_dir / "before-training.onnx", load_external_data=False), work_dir
    else:
        proto, folder = onnx.ModelProto.FromString(given[0]), given[1]
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level" and attribute.i == 4:
                attribute.i = 1
    names = [str(value.name) for value in asked]
    inputs = {one.name for one in proto.graph.input}
    known = {one.name for one in proto.graph.output}
    for name in names:
        if name not in known and name not in inputs:
            proto.graph.output.add().name = name
    try:
        probe = Probe(proto.SerializeToString(), folder=folder)
        made = [name for name in names if name not in inputs]
        found = probe.session.run([*made, "logits"], dict(window))
    except Exception as error:  # ORT has one exception type per C++ code
        raise UnsupportedModelError(
            f"the model does not run on text on the CPU: {first_line(error)}",
            hint="heal before casting the model to a type that the CPU has no kernels for",
        ) from error
    finally:
        for path in work_dir.glob("before-training.onnx*"):
            path.unlink()
    values = dict(zip(made, found, strict=False))
    return values | {name: np.asarray(window[name]) for name in names if name in inputs}, found[-1]


def _compared(model: ir.Model, logits: Array, expected: Array) -> float:
    """The largest difference, relative to the largest logit.

    Raises:
        UnsupportedModelError: it is more than rounding explains.
    """
    floats = {value.dtype for value in model.graph.initializers.values()} & set(TOLERANCE)
    tolerance = max((TOLERANCE[one] for one in floats if one is not None), default=TOLERANCE[ir.DataType.FLOAT])
    if logits.shape != expected.shape:
        raise UnsupportedModelError(
            f"logits with gradients are {list(logits.shape)}, those of ONNX Runtime {list(expected.shape)}",
            hint="this is a bug; please report it",
        )
    expected = expected.astype(np.float32)
    scale = max(float(np.abs(expected).max()), 1e-30)
    difference = float(np.abs(logits - expected).max()) / scale
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"logits with gradients differ from those of ONNX Runtime by {difference:.1e} of the largest one,"
            f" expected at most {tolerance:.0e}",
            hint="an operator means something else here than there; please report it",
        )
    return difference
