"""Weights that are neither linear nor embedding are found, with a reason; quantized ones with their format."""

from __future__ import annotations

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.other_weights import OtherWeight, find_other_weights, quantized_formats
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.quantization.rtn import Rtn


def others(model: ir.Model) -> list[OtherWeight]:
    linears = find_linears(model, expand_pairs=True)
    return find_other_weights(model, linears, find_embeddings(model, linears))


def with_weight(body: str, kind: str = "float[64, 64]") -> ir.Model:
    head = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'
    model = ir.from_onnx_text(f"{head} g (float[2, 64, 64] x) => (float[2, 64, 64] y) {{ {body} }}")
    dims = [int(size) for size in kind[kind.index("[") + 1 : -1].split(",")]
    dtype = {"float": ir.DataType.FLOAT, "int8": ir.DataType.INT8, "uint8": ir.DataType.UINT8}[kind.split("[")[0]]
    array = np.ones(dims, dtype.numpy())
    weight = next(v for node in model.graph for v in node.inputs if v is not None and v.name == "w")
    value = ir.Value(name="w", shape=ir.Shape(dims), type=ir.TensorType(dtype), const_value=ir.tensor(array, name="w"))
    weight.replace_all_uses_with(value)
    if weight in model.graph.inputs:
        model.graph.inputs.remove(weight)
    model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("y = MatMul (x, w)", "float[2, 64, 64]", "a stack of matrices"),
        ("y = MatMul (w, x)", "float[64, 64]", "left factor"),
        ("y = Gemm <transA = 1> (x, w)", "float[64, 64]", "scales or transposes"),
        ("y = Conv (x, w)", "float[64, 64, 1]", "ONNX Runtime has no Conv with weights in blocks"),
        ("i = Shape (x) y = Gather (w, i)", "float[64, 64]", "chooses itself"),
        ("y = Add (x, w)", "float[64, 64]", "read by Add; only matrix products"),
    ],
)
def test_a_float_weight_has_a_reason(body: str, kind: str, words: str) -> None:
    (found,) = others(with_weight(body, kind))
    assert (found.site, found.format) == ("w", "")
    assert words in found.reason


@pytest.mark.parametrize(
    ("body", "kind", "how"),
    [
        ("i, s, z = DynamicQuantizeLinear (x) y = MatMulInteger (i, w, z)", "uint8[64, 64]", "MatMulInteger, 8 bits"),
        ("s = Constant <value = float {0.5}> () d = DequantizeLinear (w, s) y = MatMul (x, d)", "int8[64, 64]",
         "DequantizeLinear, 8 bits"),
    ],
)  # fmt: skip
def test_a_quantized_weight_has_a_format(body: str, kind: str, how: str) -> None:
    model = with_weight(body, kind)
    (found,) = others(model)
    assert found.reason == f"already quantized: {how}"
    assert quantized_formats(model, [], []) == {how: 1}


def test_linears_embeddings_and_small_arrays_are_none() -> None:
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64)
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    x = builder.step("biased", x, x)
    model = builder.finish(builder.step("norm", x, x), False, table)
    assert others(model) == []
    Rtn(bits=8, block_size=64).run(model, Context())
    assert others(model) == []
    linears = find_linears(model)
    formats = quantized_formats(model, linears, find_embeddings(model, linears))
    assert formats == {
        "MatMulNBits, 8 bits in blocks of 64": 2,
        "GatherBlockQuantized, 8 bits in blocks of 64": 1,
    }
