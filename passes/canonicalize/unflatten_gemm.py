"""Turns Reshape, Gemm, Reshape back into the product of three axes that it was: MatMul and the bias.

GPT-2 flattens batch and sequence before each projection and unfolds them afterwards. The two Reshapes, with the sizes
they ask for, stand between all projections and whatever wants to fuse with them.

Axes:    B batch, S sequence, K in features, N out features
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, producer, vector
from onnxpress.compiler.linears import unique_name
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.region import Array, NotCuttable, Region, build_model, first_line, random_feed, session

_BATCH, _SEQUENCE = 2, 3


@dataclass(frozen=True, kw_only=True)
class UnflattenGemm(Pass):
    """[B S, K] times [K, N] between two Reshapes becomes [B, S, K] times [K, N]."""

    promise: ClassVar[Promise] = Promise.CLOSE

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        for node in list(model.graph):
            found = _flattened(node)
            if found is None:
                continue
            x, unfold = found
            site = node.name or node.outputs[0].name or "Gemm"
            try:
                _check(fuser, node, x, unfold)
                nodes = _product(model.graph, node, x, site)
            except NotCuttable as reason:
                report.skip(site, str(reason))
                continue
            fuser.replace(site, unfold.outputs, [nodes[-1].outputs[0]], nodes)
        fuser.finish()
        return report


def _flattened(gemm: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """(x [B, S, K], the Reshape that unfolds) around a Gemm with a constant matrix; None when it stands alone."""
    if gemm.op_type != "Gemm" or gemm.domain or gemm.inputs[1] is None or gemm.inputs[1].const_value is None:
        return None
    fold = producer(gemm.inputs[0], "Reshape")
    x = None if fold is None else fold.inputs[0]
    readers = gemm.outputs[0].consumers()
    if x is None or x.shape is None or len(x.shape) != 3 or len(readers) != 1 or readers[0].op_type != "Reshape":
        return None
    return None if gemm.outputs[0].is_graph_output() or readers[0].outputs[0].is_graph_output() else (x, readers[0])


def _check(fuser: Fuser, gemm: ir.Node, x: ir.Value, unfold: ir.Node) -> None:
    """Runs both Reshapes: rows must come back where they were."""
    flat, product, output = gemm.inputs[0], gemm.outputs[0], unfold.outputs[0]
    assert flat is not None
    width = _width(gemm)
    region = Region([x, product], [flat, output])
    opset = fuser.model.opset_imports.get("", 18)
    rng = np.random.default_rng(fuser.seed)
    y = rng.standard_normal((_BATCH * _SEQUENCE, width)).astype((product.dtype or ir.DataType.FLOAT).numpy())
    feed = random_feed(region.leaves, {"batch": _BATCH, "sequence": _SEQUENCE}, rng, {id(product): y})
    try:
        model = build_model(region.nodes, region.leaves, region.outputs, region.constants, opset)
        folded, unfolded = session(model)(feed)
    except NotCuttable:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common type
        raise NotCuttable(f"the Reshapes do not run by themselves: {first_line(error)}") from None
    given = feed[[id(leaf) for leaf in region.leaves].index(id(x))]
    same = (
        np.array_equal(folded, given.reshape(-1, given.shape[-1])),
        np.array_equal(unfolded, y.reshape(_BATCH, _SEQUENCE, width)),
    )
    if not all(same):
        raise NotCuttable("the Reshapes do more than fold batch and sequence")


def _product(graph: ir.Graph, gemm: ir.Node, x: ir.Value, site: str) -> list[ir.Node]:
    """MatMul and Add in the place of a Gemm."""
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    factors = [gemm.attributes[name].as_float() for name in ("alpha", "beta") if name in gemm.attributes]
    if "transA" in gemm.attributes and gemm.attributes["transA"].as_int():
        raise NotCuttable("the activation is transposed")
    if any(factor != 1.0 for factor in factors):
        raise NotCuttable(f"the product or the bias is scaled: {factors}")
    if bias is not None and vector(bias) is None:
        raise NotCuttable("the bias is no constant vector")
    weight = gemm.inputs[1]
    assert weight is not None
    if "transB" in gemm.attributes and gemm.attributes["transB"].as_int():
        weight = _transposed(graph, weight)
    nodes = [ir.Node("", "MatMul", [x, weight], name=f"{site}/product")]
    if bias is not None:
        nodes.append(ir.Node("", "Add", [nodes[0].outputs[0], bias], name=f"{site}/bias"))
    assert x.shape is not None
    for node in nodes:
        node.outputs[0].name = f"{node.name}.out"
        node.outputs[0].shape = ir.Shape([*list(x.shape)[:2], _width(gemm)])
        node.outputs[0].type = gemm.outputs[0].type
    return nodes


def _width(gemm: ir.Node) -> int:
    """N, from the matrix."""
    assert gemm.inputs[1] is not None
    assert gemm.inputs[1].const_value is not None
    turned = "transB" in gemm.attributes and gemm.attributes["transB"].as_int()
    return int(gemm.inputs[1].const_value.shape.numpy()[0 if turned else 1])


def _transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """An initializer [K, N] that reads a matrix [N, K] when it is saved."""
    tensor = weight.const_value
    assert tensor is not None
    name = unique_name(graph, f"{weight.name}.T")
    sizes = tensor.shape.numpy()[::-1]

    def read() -> ir.Tensor[Any]:
        turned: Array = np.ascontiguousarray(tensor.numpy().T)
        return ir.Tensor(turned, dtype=tensor.dtype, name=name)

    lazy = ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(sizes), name=name)
    new = ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(tensor.dtype), const_value=lazy)
    graph.register_initializer(new)
    return new
