"""Asks the installed ONNX Runtime whether it has the kernels that our artifacts use, by loading one-node models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from onnxpress.compiler.region import first_line

_MICROSOFT = "com.microsoft"


def probe_kernels(provider: str = "CPUExecutionProvider", dtype: ir.DataType = ir.DataType.FLOAT) -> dict[str, str]:
    """ "yes", or why not, for each operator that an artifact may hold.

    Args:
        provider: ONNX Runtime's name of the execution provider.
        dtype: float type of the activations.
    """
    return {name: _loads(model, provider) for name, model in _models(dtype)}


def _models(dtype: ir.DataType) -> Iterator[tuple[str, ir.Model]]:
    width, rows = 64, 32
    for bits in (4, 8, 2):
        codes = np.zeros((rows, width // 32, 32 * bits // 8), np.uint8)
        scales = np.ones((rows, width // 32), dtype.numpy())
        attributes = {"K": width, "N": rows, "bits": bits, "block_size": 32, "accuracy_level": 4}
        x = _input("x", dtype, ["b", "s", width])
        yield f"MatMulNBits, {bits} bits", _one("MatMulNBits", [x, codes, scales], attributes, dtype)
    for bits in (4, 8):
        ids = _input("ids", ir.DataType.INT64, ["b", "s"])
        table = np.zeros((rows, width * bits // 8), np.uint8)
        zeros = np.zeros((rows, width // 32 * bits // 8 or 1), np.uint8)
        scales = np.ones((rows, width // 32), dtype.numpy())
        attributes = {"bits": bits, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
        made = _one("GatherBlockQuantized", [table, ids, scales, zeros], attributes, dtype)
        yield f"GatherBlockQuantized, {bits} bits", made
    x, gamma = _input("x", dtype, ["b", "s", width]), np.ones(width, dtype.numpy())
    epsilon = {"epsilon": 1e-5}
    skip = _input("skip", dtype, ["b", "s", width])
    yield "SkipSimplifiedLayerNormalization", _one("SkipSimplifiedLayerNormalization", [x, skip, gamma], epsilon, dtype)
    x = _input("x", dtype, ["b", "s", width])
    yield "SimplifiedLayerNormalization", _one("SimplifiedLayerNormalization", [x, gamma], epsilon, dtype, domain="")
    q, k, v = (_input(name, dtype, ["b", "s", size]) for name, size in (("q", 64), ("k", 32), ("v", 32)))
    past = [_input(f"past_{name}", dtype, ["b", 2, "p", 16]) for name in "kv"]
    lengths = [_input("seqlens_k", ir.DataType.INT32, ["b"]), _input("total", ir.DataType.INT32, [])]
    attention = {"num_heads": 4, "kv_num_heads": 2}
    yield "GroupQueryAttention", _one("GroupQueryAttention", [q, k, v, *past, *lengths], attention, dtype, outputs=3)


def _input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.val(name, dtype, shape)


def _one(
    op_type: str,
    operands: Sequence[ir.Value | np.ndarray[Any, Any]],
    attributes: dict[str, Any],
    dtype: ir.DataType,
    *,
    domain: str = _MICROSOFT,
    outputs: int = 1,
) -> ir.Model:
    """A model of one node; arrays become initializers."""
    values, weights = [], []
    for index, operand in enumerate(operands):
        if isinstance(operand, ir.Value):
            values.append(operand)
            continue
        tensor = ir.Tensor(operand, name=f"w{index}")
        weight = ir.Value(name=f"w{index}", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        weights.append(weight)
        values.append(weight)
    fields = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
    node = ir.Node(domain, op_type, values, fields, num_outputs=outputs)
    for index, output in enumerate(node.outputs):
        output.name, output.dtype = f"y{index}", dtype
    inputs = [value for value in values if value.const_value is None]
    opsets = {"": 18, _MICROSOFT: 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=weights, opset_imports=opsets, name="probe")
    return ir.Model(graph, ir_version=10)


def _loads(model: ir.Model, provider: str) -> str:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        data = ir.to_proto(model).SerializeToString()
        ort.InferenceSession(data, options, providers=[provider], enable_fallback=0)
    except Exception as error:  # ORT has one exception type per C++ code; all mean "no"
        return first_line(error)
    return "yes"
