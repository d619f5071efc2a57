"""Nf4: the kernel reads back the nearest levels, and every weight is near one."""

from __future__ import annotations

from typing import Literal

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler.formats import FP4, NF4, levels_matrix
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.quantization.nf4 import Nf4, round_levels


@pytest.mark.parametrize("kind", ["linear", "biased"])
@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_kernel_reads_back_the_planned_codes(kind: str, levels: Literal["nf4", "fp4"]) -> None:
    builder = graphs.Builder(64, 96, 0)
    x = ir.val("x", ir.DataType.FLOAT, ["batch", "sequence", 64])
    y = builder.step(kind, x, x)
    y.name = "y"
    graph = ir.Graph([x], [y], nodes=builder.nodes, initializers=builder.weights, opset_imports={"": 18}, name="one")
    model = ir.Model(graph, ir_version=9)
    report = Nf4(levels=levels, block_size=32).run(model, Context())
    (linear,) = find_linears(model)
    assert linear.holder == "MatMulBnb4"
    bias = 0.0 if linear.bias is None else linear.bias.const_value.numpy()  # type: ignore[union-attr]
    got = graphs.run(model, {"x": np.eye(64, dtype=np.float32)[None]})["y"]
    assert np.allclose(got[0], linear.w_NK().T + bias, atol=1e-6)
    assert 0 < report.metrics["weight_error"] < 0.2
    assert report.metrics["bits_per_weight"] == 5
    assert not Nf4().run(model, Context()).modified


@pytest.mark.parametrize("levels", [NF4, FP4])
def test_law_every_weight_becomes_its_nearest_level(levels: np.ndarray) -> None:
    w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    w[0] = 0
    codes, absmax = round_levels(w, levels, 32)
    got = levels_matrix(codes, levels, absmax, 32).reshape(w.shape)
    scale = np.repeat(absmax, 32).reshape(w.shape)
    best = np.abs(w[..., None] - levels * scale[..., None]).min(axis=-1)
    assert np.allclose(np.abs(got - w), best, atol=1e-6)
