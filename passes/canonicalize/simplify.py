"""Folds constants, shares equal weights, stores weights the way they are read, and drops what nothing uses.

onnxscript's constant folding (with shape inference) and onnx_ir's common passes do the most; this pass adds what they
leave: transposes of weights become lazily transposed weights, copies of a tied weight (also transposed ones) become one
initializer, and the IR version is one that ONNX Runtime accepts. onnxscript's default rewrite rules are left out: the
matcher walks the whole graph for every rule and node, 45 s on the 7,426 nodes of an exported 135M model.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from onnxpress.compiler.linears import MICROSOFT, derived, drop_unused, is_slot
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report, subgraphs

# What ONNX Runtime 1.31 loads; newer IR versions and opsets fail at load.
IR_VERSION = 10
NEWEST_OPSET = 24
_LARGE = 4096  # elements from which on a weight is worth sharing
_LARGEST_FOLDED = 1024  # elements; larger constants (rotary tables) are cheaper to compute at load than to store
_MAX_ROUNDS = 6
_FIRST_ROUNDS = 2  # on thousands of nodes; what a third round finds, the run after fusion finds on hundreds
# Weights that a runtime feeds on purpose: they stay inputs, and nothing that reads them is folded.
COUNTS = ("logits_to_keep", "num_logits_to_keep")
# Folded by numpy, these may differ from ONNX Runtime's kernels in the last bit.
_ROUNDS_OTHERWISE = (
    "Cos",
    "Sin",
    "Exp",
    "Log",
    "Tanh",
    "Erf",
    "Pow",
    "Sqrt",
    "Reciprocal",
    "Softmax",
    "MatMul",
    "Gemm",
)


def _is_for_callers(value: ir.Value) -> bool:
    """Whether a weight is an input on purpose: a count of logits, or a slot for adapters."""
    return value.name in COUNTS or is_slot(value)


@dataclass(frozen=True, kw_only=True)
class Simplify(Pass):
    """Brings graphs of different exporters to one form, without changing a result."""

    promise: ClassVar[Promise] = Promise.EXACT

    shapes: bool = True  # fold what follows from known sizes too; slow before fusion, where thousands of nodes do it

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        graph = model.graph
        lifted = _lift_tensors(graph) > 0
        lifted |= common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model).modified
        for value in [one for one in graph.inputs if one.name in graph.initializers and not _is_for_callers(one)]:
            graph.inputs.remove(value)
            report.change(f"input {value.name}")
        before = _sizes(graph)
        logging.getLogger("onnxscript").setLevel(logging.WARNING)
        for number in range(_MAX_ROUNDS if self.shapes else _FIRST_ROUNDS):
            size = len(graph)
            _fold(model, self.shapes)
            if number == 0 and not self.shapes:
                _infer_shapes(model)  # once for all nodes: types tell which casts do nothing
            elif len(graph) == size:
                break
        after = _sizes(graph)
        if before != after:
            report.change("graph", nodes_before=before[0], nodes_after=after[0])
        for name in _share_equal_weights(graph):
            report.change(f"shared {name}")
        for name in _fold_transposes(graph):
            report.change(f"transposed {name}")
        common.RemoveUnusedNodesPass()(model)
        if (model.ir_version or 0) != IR_VERSION:
            report.change("ir version", before=model.ir_version, after=IR_VERSION)
            model.ir_version = IR_VERSION
        for node in graph:
            if subgraphs(node):
                report.skip(node.name or node.op_type, f"no pass looks into the graphs inside {node.op_type}")
        if model.opset_imports.get("", 0) > NEWEST_OPSET:
            report.skip(
                f"opset {model.opset_imports['']}", "newer than what ONNX Runtime is known to run; left as it is"
            )
        if self.shapes:
            _infer_shapes(model)
        if lifted and not report.changed:
            report.change("constants")
        return report


def _lift_tensors(graph: ir.Graph) -> int:
    """Makes tensors of Constant nodes initializers, for the many of a large graph three times as fast as onnx_ir does.

    Its check that a tensor is one asks for every property of it.
    """
    lifted = []
    for node in graph:
        attribute = node.attributes.get("value") if node.op_type == "Constant" and not node.domain else None
        if attribute is None or node.outputs[0].is_graph_output():
            continue
        tensor: ir.TensorProtocol = attribute.value
        value = node.outputs[0]
        initializer = ir.Value(
            metadata_props=dict(value.metadata_props),
            name=value.name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(initializer)
        value.replace_all_uses_with(initializer)
        lifted.append(node)
    graph.remove(lifted, safe=True)
    return len(lifted)


def _sizes(graph: ir.Graph) -> tuple[int, int]:
    """Nodes and initializers, those of branches and loops included."""
    sizes = [_sizes(inner) for node in graph for inner in subgraphs(node)]
    return len(graph) + sum(one for one, _ in sizes), len(graph.initializers) + sum(two for _, two in sizes)


def _fold(model: ir.Model, shapes: bool) -> None:
    """One round of folding and clean-up; a folded value can make the next one foldable."""
    optimizer.fold_constants(
        model, onnx_shape_inference=shapes, output_size_limit=_LARGEST_FOLDED, should_fold=_may_fold
    )
    _drop_identities(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.DeduplicateInitializersPass()(model)


def _drop_identities(model: ir.Model) -> None:
    """onnx_ir's elimination, but for outputs that must have a maker of their own.

    A branch or loop gives out what it makes itself, not a value from around it; and one value cannot be two outputs.
    """
    kept = [
        node
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.op_type == "Identity" and node.outputs[0].is_graph_output() and _is_others(node.inputs[0], node)
    ]
    for node in kept:
        node.domain = "kept"
    common.IdentityEliminationPass()(model)
    for node in kept:
        node.domain = ""


def _is_others(value: ir.Value | None, reader: ir.Node) -> bool:
    """Whether the value is made outside of the reader's graph, or is an output already."""
    maker = None if value is None else value.producer()
    return maker is not None and (maker.graph is not reader.graph or value.is_graph_output())  # type: ignore[union-attr]


def _may_fold(node: ir.Node) -> bool | None:
    """False forbids, None leaves it to onnxscript."""
    if any(value is not None and value.name in COUNTS for value in node.inputs):
        return False
    return False if node.op_type in _ROUNDS_OTHERWISE else None


def _infer_shapes(model: ir.Model) -> None:
    """ONNX's own shape inference; operators it does not know keep what their pass wrote down."""
    level = logging.getLogger("onnx_ir").level
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    with _known_products(model.graph):
        common.ShapeInferencePass()(model)
    logging.getLogger("onnx_ir").setLevel(level)


@contextmanager
def _known_products(graph: ir.Graph) -> Iterator[None]:
    """Lets every MatMulNBits without a shape be a MatMul for a while, which ONNX's shape inference knows."""
    disguised = []
    for node in graph:
        if node.op_type == "MatMulNBits" and node.domain == MICROSOFT and node.outputs[0].shape is None:
            sizes = [node.attributes[name].as_int() for name in ("K", "N")]
            weight = ir.val(f"{node.outputs[0].name}/weight", ir.DataType.FLOAT, sizes)
            disguised.append((node, weight, list(node.inputs), dict(node.attributes)))
    for node, weight, _, _ in disguised:
        node.op_type, node.domain = "MatMul", ""
        node.resize_inputs(2)
        node.replace_input_with(1, weight)
        node.attributes.clear()
        graph.inputs.append(weight)
    try:
        yield
    finally:
        for node, weight, inputs, attributes in disguised:
            node.op_type, node.domain = "MatMulNBits", MICROSOFT
            node.resize_inputs(len(inputs))
            for index, value in enumerate(inputs):
                node.replace_input_with(index, value)
            node.attributes.update(attributes)
            graph.inputs.remove(weight)


def _share_equal_weights(graph: ir.Graph) -> Iterator[str]:
    """Lets equal large weights be one initializer; a transposed copy is read through a Transpose of the original."""
    originals: dict[tuple[Any, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.size < _LARGE or value.is_graph_output() or not value.uses():
            continue
        array = tensor.numpy()
        twin = originals.setdefault(_corner(array), value)
        if twin is not value:
            if np.array_equal(array, twin.const_value.numpy()):  # type: ignore[union-attr]
                value.replace_all_uses_with(twin)
                drop_unused(graph, value)
                yield value.name or "weight"
            continue
        twin = originals.get(_corner(array.T), value) if array.ndim == 2 else value
        if twin is not value and np.array_equal(array.T, twin.const_value.numpy()):  # type: ignore[union-attr]
            # The table keeps the orientation in which it is gathered.
            base, copy = (value, twin) if _is_gathered(value) else (twin, value)
            _read_transposed(graph, base, copy)
            yield copy.name or "weight"


def _corner(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    """A key that equal arrays share and different weights practically never do."""
    corner = array[tuple(slice(0, 8) for _ in array.shape)]
    return array.dtype.str, array.shape, corner.tobytes()


def _read_transposed(graph: ir.Graph, base: ir.Value, copy: ir.Value) -> None:
    """Replaces `copy`, which holds the transposed bytes of `base`, by a Transpose of `base`."""
    node = ir.Node("", "Transpose", [base], [ir.AttrInt64s("perm", [1, 0])], name=f"transpose/{copy.name}")
    node.outputs[0].name = f"{copy.name}/transposed"
    node.outputs[0].shape, node.outputs[0].type = copy.shape, copy.type
    graph.insert_before(graph[0], node)
    copy.replace_all_uses_with(node.outputs[0])
    drop_unused(graph, copy)


def _is_gathered(value: ir.Value) -> bool:
    return any(node.op_type == "Gather" and index == 0 for node, index in value.uses())


def _fold_transposes(graph: ir.Graph) -> Iterator[str]:
    """Transpose(weight) becomes a weight that is transposed when it is read; a weight with other readers stays."""
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.const_value is None or not source.is_initializer():
            continue
        if node.outputs[0].is_graph_output() or source.is_graph_output():
            continue
        tensor = source.const_value
        permutation = node.attributes.get("perm")
        axes = tuple(permutation.as_ints()) if permutation is not None else tuple(range(len(tensor.shape)))[::-1]
        is_tied = len(source.uses()) != 1
        if is_tied and not (_is_gathered(node.outputs[0]) and axes == (1, 0)):
            continue  # a transposed copy would double it
        sizes = [tensor.shape.numpy()[axis] for axis in axes]
        base = f"{source.name}/{'rows' if is_tied else 'transposed'}"
        new = derived(graph, tensor, base, sizes, functools.partial(np.transpose, axes=axes))
        node.outputs[0].replace_all_uses_with(new)
        graph.remove(node, safe=True)
        if is_tied:  # the table is stored as it is gathered, the head reads it through a Transpose
            _read_transposed(graph, new, source)
        drop_unused(graph, source)
        yield source.name or "weight"
