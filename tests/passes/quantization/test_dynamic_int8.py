"""DynamicInt8: the kernel against numpy, the bound of its error, what is left in float, and what is refused."""

from __future__ import annotations

import decoders
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.quantization._columns import fake_quantize, round_columns, spread
from onnxpress.passes.quantization.dynamic_int8 import DynamicInt8


def single(kind: str) -> tuple[ir.Model, np.ndarray, np.ndarray | None]:
    """One linear with a float input, its weight [N, K] and its bias."""
    builder = graphs.Builder(64, 96, 0)
    x = ir.val("x", ir.DataType.FLOAT, ["batch", "sequence", 64])
    y = builder.step(kind, x, x)
    y.name = "y"
    graph = ir.Graph([x], [y], nodes=builder.nodes, initializers=builder.weights, opset_imports={"": 18}, name="single")
    model = ir.Model(graph, ir_version=9)
    (linear,) = find_linears(model)
    bias = None if linear.bias is None else np.array(linear.bias.const_value.numpy())  # type: ignore[union-attr]
    return model, np.array(linear.w_NK()), bias


@pytest.mark.parametrize("kind", ["linear", "transposed", "biased"])
def test_kernel_computes_what_numpy_says_within_the_bound(kind: str) -> None:
    model, w_NK, bias = single(kind)
    DynamicInt8(tokens=0).run(model, Context())
    assert [node.op_type for node in model.graph] == ["DynamicQuantizeMatMul"]
    x = np.random.default_rng(1).standard_normal((2, 5, 64)).astype(np.float32)
    got = graphs.run(model, {"x": x})["y"]
    chosen = spread(float(x.min()), float(x.max()))
    (linear,) = find_linears(model)
    q_NK, add = linear.w_NK(), 0.0 if bias is None else bias
    assert np.allclose(got, fake_quantize(x, chosen) @ q_NK.T + add, atol=2e-5)
    codes_KN, scale_N = round_columns(w_NK)
    assert np.array_equal(q_NK, (codes_KN * scale_N).T)
    # Half a step of each activation, one where the rounded zero point cuts an end off; half a step of each weight.
    bound = chosen.scale * np.abs(q_NK).sum(axis=1) + np.abs(x).sum(axis=-1, keepdims=True) * scale_N / 2
    assert (np.abs(got - (x @ w_NK.T + add)) <= bound + 1e-5).all()


def test_a_linear_that_loses_too_much_stays_in_float() -> None:
    model = decoders.decoder()
    context = Context()
    report = DynamicInt8(max_error=1e-6, tokens=32, length=16).run(model, context)
    assert not report.changed
    assert any("more than max_error" in reason for reason in report.reasons())
    report = DynamicInt8(max_error=1.0, tokens=32, length=16).run(model, context)
    assert all(0 < row["output_error"] < 0.1 for row in report.ledger)


def test_second_run_skips_with_a_reason_and_views_stay() -> None:
    model = decoders.decoder()
    before = [(one.name, one.kind, one.shape) for one in find_linears(model)]
    DynamicInt8(tokens=0).run(model, Context())
    assert [(one.name, one.kind, one.shape) for one in find_linears(model)] == before
    report = DynamicInt8(tokens=0).run(model, Context())
    assert not report.modified
    assert all(reason.startswith("already quantized") for reason in report.reasons() if "table" not in reason)


def test_cuda_is_refused_and_patterns_must_match() -> None:
    with pytest.raises(OptionError, match="on the CPU only"):
        DynamicInt8().run(decoders.decoder(), Context(target=TARGETS["cuda"]))
    with pytest.raises(OptionError, match="matches no linear"):
        DynamicInt8(exclude=("nothing*",)).run(decoders.decoder(), Context())
