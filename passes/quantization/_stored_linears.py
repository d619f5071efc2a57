"""What passes share that store each linear in one operator of its own: which linears, and the node they become.

Axes: N out features, K in features
"""

from __future__ import annotations

import abc
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler import formats
from onnxpress.compiler.errors import OptionError, near_miss
from onnxpress.compiler.linears import MICROSOFT, Linear, drop_unused, find_embeddings, find_linears, unique_name
from onnxpress.compiler.nbits import replace
from onnxpress.compiler.other_weights import find_other_weights, node_format
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report

Floats = npt.NDArray[Any]
Tensors = dict[str, ir.Tensor[Any]]

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True, kw_only=True)
class StoredLinears(Pass):
    """Base of passes that put every linear into one operator; a subclass says which, and what it holds.

    A head that shares its bytes with the embedding is left alone, since the table would stay beside it: `rtn(bits=8)`
    stores both in one set of bytes. The report has the relative error of the weights of each linear.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    operator: ClassVar[str]
    float_types: ClassVar[tuple[ir.DataType, ...]]  # of activations for which there is a kernel

    exclude: tuple[str, ...] = ()  # patterns of names that stay as they are: "block0.*", "*.down", "head"
    requantize: bool = False  # linears that are quantized already: read back, stored anew

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        self.check_target(context)
        report = Report()
        linears = self.choose(model, report)
        ready = self.prepare(model, linears, context, report)
        kept: dict[tuple[int, bool], tuple[dict[str, ir.Value], dict[str, Any]]] = {}
        loss = norm = 0.0
        weights = nbytes = 0
        for linear in context.track(linears, self.name()):
            if id(linear) not in ready:
                continue
            key = id(linear.weight), linear.is_turned()
            if key not in kept:
                w_NK = linear.w_NK()
                if not np.isfinite(w_NK).all():
                    report.skip(linear.name, "weights are not finite")
                    continue
                tensors = self.encode(w_NK, dtype_of(linear))
                values = {what: add(model.graph, f"{linear.name}.{what}", one) for what, one in tensors.items()}
                self.put(linear, values, ready[id(linear)])
                lost = float(np.square(linear.w_NK() - w_NK, dtype=np.float64).sum())
                energy = float(np.square(w_NK, dtype=np.float64).sum())
                kept[key] = (
                    values,
                    {
                        "weight_error": math.sqrt(lost / energy) if energy else 0.0,
                        "snr_db": 10 * math.log10(energy / lost) if energy and lost else math.inf,
                    },
                )
                loss, norm = loss + lost, norm + energy
                weights, nbytes = weights + w_NK.size, nbytes + linear.nbytes
            else:
                self.put(linear, kept[key][0], ready[id(linear)])
            errors = {**kept[key][1], **ready[id(linear)]}
            facts = {"kind": linear.kind, "shape": list(linear.shape), "bits": self.bits_of_codes}
            report.change(
                linear.name, **facts, block_size=self.weights_of_a_scale(linear), bytes=linear.nbytes, **errors
            )
        if weights:
            report.metrics["weight_error"] = math.sqrt(loss / norm) if norm else 0.0
            report.metrics["bits_per_weight"] = 8 * nbytes / weights
        return report

    bits_of_codes: ClassVar[int] = 8

    def check_target(self, context: Context) -> None:
        """Raises OptionError where the target has no kernel."""

    def weights_of_a_scale(self, linear: Linear) -> int:
        """How many weights share a scale: a column's, unless the format says otherwise."""
        return linear.num_in

    def prepare(
        self, model: ir.Model, linears: list[Linear], context: Context, report: Report
    ) -> dict[int, dict[str, Any]]:
        """What is known of each linear to store before the graph changes, by id; others were given to `report.skip`."""
        return {id(linear): {} for linear in linears}

    @abc.abstractmethod
    def encode(self, w_NK: Floats, dtype: ir.DataType) -> Tensors:
        """The matrix as the operator reads it: initializers by what they are, in the order of its inputs.

        Args:
            w_NK: float32, finite.
            dtype: of the activations.
        """

    def attributes(self, linear: Linear) -> dict[str, Any]:
        """Those of the operator."""
        return {}

    def put(self, linear: Linear, values: dict[str, ir.Value], facts: dict[str, Any]) -> None:
        """Lets the operator compute in the place of the linear, and `linear` describe it.

        Args:
            values: what `encode` made, as initializers.
            facts: what `prepare` found of this linear.
        """
        replace_with(linear, self.operator, values, self.attributes(linear))

    def choose(self, model: ir.Model, report: Report) -> list[Linear]:
        """The linears to store; reasons against go to the report, those of other weights too."""
        linears = find_linears(model, expand_pairs=True)
        tables = find_embeddings(model, linears)
        tied = {id(one.head) for one in tables if one.head is not None}
        names = [one.name for one in linears]
        for pattern in self.exclude:
            if not fnmatch.filter(names, pattern):
                hint = f"{near_miss(pattern, names)}; names are like {names[:3]}"
                raise OptionError(f"{self.name()}: exclude={pattern!r} matches no linear", hint=hint)
        chosen = []
        for linear in linears:
            reason = self._refuse(linear, is_tied=id(linear) in tied)
            if reason is None:
                chosen.append(linear)
            else:
                report.skip(linear.name, reason)
        for number in range(len(tables)):
            site = "embedding" if number == 0 else f"embedding.{number + 1}"
            report.skip(site, "a table is looked up, not multiplied: rtn(bits=8) stores it in blocks")
        for other in find_other_weights(model, linears, tables):
            report.skip(other.site, other.reason)
        return chosen

    def _refuse(self, linear: Linear, *, is_tied: bool) -> str | None:
        if stored := node_format(linear.node):
            if not self.requantize:
                return f"already quantized: {stored}; {self.name()}(requantize=True) stores it anew"
            if linear.holder == formats.QDQ:
                return f"already quantized: {stored}, together with its activation, which requantize does not read"
            if linear.holder == self.operator:
                return f"already quantized: {stored}"
        if any(fnmatch.fnmatchcase(linear.name, pattern) for pattern in self.exclude):
            return "excluded"
        if linear.kind == "router":
            return "it picks the experts, and is small"
        if is_tied:
            return "the embedding reads the same bytes: rtn(bits=8) stores both at once"
        dtype = dtype_of(linear)
        if dtype not in self.float_types:
            wanted = " or ".join(one.name.lower() for one in self.float_types)
            return f"{self.operator} has a kernel for {wanted} activations, not for {dtype.name.lower()}"
        return None


def dtype_of(linear: Linear) -> ir.DataType:
    """Float type of a linear's activation."""
    if formats.stored(linear.node) is not None:
        return formats.float_type(linear.node)
    value = linear.node.inputs[2] if linear.holder == "MatMulNBits" else linear.weight
    return ir.DataType.FLOAT if value is None or value.const_value is None else value.const_value.dtype


def add(graph: ir.Graph, base: str, tensor: ir.Tensor[Any]) -> ir.Value:
    """A new initializer with a name of its own that begins with `base`."""
    tensor.name = unique_name(graph, base)
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def replace_with(linear: Linear, operator: str, values: dict[str, ir.Value], attributes: dict[str, Any]) -> None:
    """Puts one node of com.microsoft into the place of a linear; a bias becomes its input, or else an Add."""
    slot = formats.OPERATORS[operator].bias
    activation, bias = linear.node.inputs[0], linear.bias
    if bias is not None and (bias.const_value is None or bias.const_value.size != linear.num_out):
        slot = None  # the operator takes a number per output only
    inputs = [activation, *values.values()]
    if bias is not None and slot is not None:
        inputs += [None] * (slot - len(inputs)) + [bias]
    product = ir.node(operator, inputs, attributes, domain=MICROSOFT, name=linear.node.name)
    nodes = [product]
    if bias is not None and slot is None:
        nodes.append(ir.Node("", "Add", [product.outputs[0], bias], name=f"{linear.node.name}/bias"))
    become(linear, product, nodes, operator)


def become(linear: Linear, product: ir.Node, nodes: Sequence[ir.Node], holder: str) -> None:
    """Puts `nodes`, the last of which gives the product with the bias added, in the place of a linear.

    The Add of a separate bias goes too. `linear` is updated, so that nothing keeps the old weight alive.
    """
    old, weights, bias = linear.node, linear.weights, linear.bias
    graph = old.graph
    assert isinstance(graph, ir.Graph)
    dead, output = [old], linear.output
    if bias is not None and all(value is not bias for value in old.inputs):
        behind = output.consumers()[0]
        dead, output = [old, behind], behind.outputs[0]
    if linear.holder == "Transpose+MatMul":
        turned = old.inputs[1].producer() if old.inputs[1] is not None else None
        if turned is not None and len(turned.outputs[0].uses()) == 1 and not turned.outputs[0].is_graph_output():
            dead.insert(0, turned)
    if nodes[-1] is not product:
        inner = product.outputs[0]
        inner.name, inner.shape, inner.type = f"{output.name}/product", output.shape, output.type
    replace(graph, old, dead, nodes, [output], [nodes[-1].outputs[0]])
    for value in weights:
        drop_unused(graph, value)
    held = formats.stored(product)
    assert held is not None
    linear.node, linear.holder, linear.weight, linear.output = product, holder, held.weights[0], product.outputs[0]
