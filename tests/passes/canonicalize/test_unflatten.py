"""Unflatten: rows on three axes between Reshapes that only fold, and nothing else."""

from __future__ import annotations

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler.pass_ import Context
from onnxpress.passes.canonicalize.unflatten import Unflatten

WIDTH, OUT = 16, 24


def flattened(kind: str = "") -> ir.Model:
    """A Gemm between Reshapes; sizes are asked of the input as exporters do."""
    builder = graphs.Builder(WIDTH, 96, 0)
    table = builder.weight(96, WIDTH, name="table")
    x = builder.op("Gather", table, builder.ids, width=WIDTH, axis=0)
    turned = kind == "transB"
    weight = builder.weight(OUT, WIDTH) if turned else builder.weight(WIDTH, OUT)
    flat = builder.op("Reshape", x, builder.axes(-1, WIDTH))
    attributes = {"transB": 1} if turned else {}
    if kind == "alpha":
        attributes["alpha"] = 0.5
    bias = () if kind == "no bias" else (builder.weight(OUT),)
    product = builder.op("Gemm", flat, weight, *bias, **attributes)
    product.shape = ir.Shape([None, OUT])
    if kind in ("residual", "norm over rows"):  # as OPT: norm, product, activation, product, residual
        norm = builder.op("LayerNormalization", flat, builder.weight(WIDTH), axis=0 if kind != "residual" else -1)
        inner = builder.op("Relu", builder.op("Gemm", norm, weight, *bias))
        product = builder.op("Add", flat, builder.op("Gemm", inner, builder.weight(OUT, WIDTH), builder.weight(WIDTH)))
        product = builder.op("Gemm", product, weight, *bias)
    if kind == "joined with others":
        product = builder.op("Add", product, builder.op("ReduceMean", x, builder.axes(0, 1, 2), keepdims=1))
    product.shape = ir.Shape([None, OUT])
    size = builder.op("Shape", x, start=0, end=2)
    size.dtype = ir.DataType.INT64
    shape = builder.op("Concat", size, builder.axes(OUT), axis=0)
    shape.dtype = ir.DataType.INT64
    if kind == "rows mixed":  # [S, B, N] read as [B, S, N]
        sizes = [builder.op("Shape", x, start=start, end=start + 1) for start in (1, 0)]
        for one in sizes:
            one.dtype = ir.DataType.INT64
        shape = builder.op("Concat", *sizes, builder.axes(OUT), axis=0)
        shape.dtype = ir.DataType.INT64
        product = builder.op("Reshape", product, shape, width=OUT)
        product = builder.op("Transpose", product, perm=[1, 0, 2], width=OUT)
    else:
        product = builder.op("Reshape", product, shape, width=OUT)
    return builder.finish(builder.op("MatMul", product, builder.weight(OUT, WIDTH), width=WIDTH), False, table)


@pytest.mark.parametrize("kind", ["", "transB", "no bias", "residual"])
def test_the_reshapes_go(kind: str) -> None:
    model = flattened(kind)
    before = graphs.run(model)["logits"]
    assert len(Unflatten().run(model, Context()).changed) == 1
    assert not {"Reshape", "Gemm", "Shape"} & {node.op_type for node in model.graph}
    check.close(before, graphs.run(model)["logits"])


@pytest.mark.parametrize("kind", ["alpha", "rows mixed", "norm over rows", "joined with others"])
def test_what_is_more_than_a_fold_stays(kind: str) -> None:
    model = flattened(kind)
    before = graphs.text(model)
    report = Unflatten().run(model, Context())
    assert not report.changed
    assert len(report.skipped) == 1
    assert graphs.text(model) == before


def test_a_product_that_is_read_twice_stays() -> None:
    model = flattened()
    gemm = next(node for node in model.graph if node.op_type == "Gemm")
    gemm.outputs[0].name = "also"
    gemm.outputs[0].dtype = ir.DataType.FLOAT
    model.graph.outputs.append(gemm.outputs[0])
    assert not Unflatten().run(model, Context()).changed
    assert np.isfinite(graphs.run(model)["also"]).all()


@pytest.mark.parametrize("sizes", [(2, -1, OUT), (-1, 3, OUT)])
def test_sizes_that_fit_one_batch_by_chance_are_no_unfolding(sizes: tuple[int, ...]) -> None:
    model = flattened()
    unfold = [node for node in model.graph if node.op_type == "Reshape"][-1]
    fixed = ir.tensor(np.array(sizes, np.int64), name="fixed")
    value = ir.Value(name="fixed", shape=fixed.shape, type=ir.TensorType(fixed.dtype), const_value=fixed)
    model.graph.register_initializer(value)
    unfold.replace_input_with(1, value)
    assert not Unflatten().run(model, Context()).changed
