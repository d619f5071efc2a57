"""FuseRmsnorm: every spelling fires, every guard holds."""

from __future__ import annotations

from collections import Counter

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.fusion.fuse_rmsnorm import FuseRmsnorm

OPSET = '<ir_version: 9, opset_import: ["" : 18]> g'
HEAD = f"{OPSET} (float[batch, seq, 32] x) => (float[batch, seq, 32] y)"
TAIL = """
  two = Constant <value = float {2.0}> ()
  one = Constant <value = float {1.0}> ()
  eps = Constant <value = float {0.3}> ()
  axis = Constant <value_ints = [-1]> ()
"""
SPELLINGS = {
    "reciprocal": "r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) y = Mul(w, n)",
    "one over root": "r = Sqrt(e) i = Div(one, r) n = Mul(i, x) y = Mul(n, w)",
    "division": "r = Sqrt(e) n = Div(x, r) y = Mul(n, w)",
}


def case(body: str, square: str = "Pow(x, two)", mean: str = "m = ReduceMean(s, axis)", head: str = HEAD) -> ir.Model:
    weights = ", ".join(str(0.5 + 0.1 * i) for i in range(32))
    source = f"{head} <float[32] w = {{{weights}}}> {{ {TAIL} s = {square} {mean} e = Add(m, eps) {body} }}"
    model = ir.from_onnx_text(source)
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def fuse(model: ir.Model) -> tuple[Report, Counter[str]]:
    report = FuseRmsnorm().run(model, Context())
    return report, Counter(node.op_type for node in model.graph)


X = {"x": np.random.default_rng(3).standard_normal((2, 3, 32)).astype(np.float32)}


@pytest.mark.parametrize("body", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("square", ["Pow(x, two)", "Mul(x, x)"])
def test_every_spelling_becomes_one_operator(body: str, square: str) -> None:
    model = case(body, square)
    before = graphs.run(model, X)
    report, ops = fuse(model)
    assert ops == {"SimplifiedLayerNormalization": 1}
    assert report.changed == ["y"]
    check.close(before["y"], graphs.run(model, X)["y"])
    assert model.graph[0].attributes["epsilon"].as_float() == pytest.approx(0.3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"square": "Mul(x, w)"},
        {"square": "Pow(x, one)"},
        {"mean": "m = ReduceSum(s, axis)"},
    ],
    ids=["not a square", "first power", "sum, not mean"],
)
def test_must_not_fire(arguments: dict[str, str]) -> None:
    model = case(SPELLINGS["reciprocal"], **arguments)
    report, ops = fuse(model)
    assert not report.changed
    assert not report.skipped, "no norm at all is no norm that was left"
    assert "SimplifiedLayerNormalization" not in ops


def test_other_axis_must_not_fire() -> None:
    model = case(SPELLINGS["reciprocal"], mean="ax = Constant <value_ints = [1]> () m = ReduceMean(s, ax)")
    report, _ = fuse(model)
    assert not report.changed
    assert not report.skipped


def test_a_chain_that_is_not_rmsnorm_is_refused_by_execution() -> None:
    # Walks like a norm, but takes the root twice: only running both forms shows it.
    model = case("r0 = Sqrt(e) r = Sqrt(r0) i = Reciprocal(r) n = Mul(x, i) y = Mul(w, n)")
    before = graphs.run(model, X)
    report, _ = fuse(model)
    assert not report.changed
    assert "differs" in report.skipped[0].reason
    check.close(before["y"], graphs.run(model, X)["y"])


def test_without_weight_the_weight_is_one() -> None:
    model = case("r = Sqrt(e) i = Reciprocal(r) y = Mul(x, i)")
    before = graphs.run(model, X)
    _, ops = fuse(model)
    assert ops == {"SimplifiedLayerNormalization": 1}
    check.close(before["y"], graphs.run(model, X)["y"])


def test_a_product_with_an_activation_is_no_weight() -> None:
    head = f"{OPSET} (float[batch, seq, 32] x, float[batch, seq, 32] g) => (float[batch, seq, 32] y)"
    model = case("r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) y = Mul(n, g)", head=head)
    before = graphs.run(model, {**X, "g": X["x"] + 1})
    report, ops = fuse(model)
    assert report.changed == ["n"]
    assert ops == {"SimplifiedLayerNormalization": 1, "Mul": 1}
    check.close(before["y"], graphs.run(model, {**X, "g": X["x"] + 1})["y"])


@pytest.mark.parametrize(("more", "count"), [("n", 1), ("r", 0)], ids=["the unit", "the root"])
def test_values_in_between_that_others_need(more: str, count: int) -> None:
    """A unit that is an output too is fused up to there; whoever reads the root keeps the chain alive."""
    read = "z = Identity(r)" if more == "r" else ""
    width = 1 if more == "r" else 32
    name = "z" if more == "r" else "n"
    head = f"{OPSET} (float[batch, seq, 32] x) => (float[batch, seq, 32] y, float[batch, seq, {width}] {name})"
    model = case(f"r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) y = Mul(n, w) {read}", head=head)
    before = graphs.run(model, X)
    report, ops = fuse(model)
    assert len(report.changed) == count
    assert ops["ReduceMean"] == 1 - count
    for key, want in before.items():
        check.close(want, graphs.run(model, X)[key])


def test_without_weight_the_width_must_be_known() -> None:
    head = f"{OPSET} (float[batch, seq, width] x) => (float[batch, seq, width] y)"
    report, ops = fuse(case("r = Sqrt(e) i = Reciprocal(r) y = Mul(x, i)", head=head))
    assert report.reasons() == {"no weight, and the width is unknown": 1}
    assert ops["ReduceMean"] == 1


def test_ones_are_of_the_type_of_the_activation() -> None:
    model = case("r = Sqrt(e) i = Reciprocal(r) y = Mul(x, i)")
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.dtype = ir.DataType.FLOAT16 if value.dtype == ir.DataType.FLOAT else value.dtype
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT16:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
    half = {"x": X["x"].astype(np.float16)}
    before = graphs.run(model, half)["y"]
    report, ops = fuse(model)
    assert ops == {"SimplifiedLayerNormalization": 1}, report.reasons()
    check.close(before, graphs.run(model, half)["y"], tolerance=4e-3)  # steps of half precision


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [("", None), ("<axis = 2, epsilon = 0.3>", None), ("<axis = 1>", "more than the last axis is normalized")],
)
def test_the_operator_of_ai_onnx_is_read(attributes: str, reason: str | None) -> None:
    weights = ", ".join(str(0.5 + 0.1 * i) for i in range(32))
    head = HEAD.replace("18", "23").replace("version: 9", "version: 10")
    model = ir.from_onnx_text(f"{head} <float[32] w = {{{weights}}}> {{ y = RMSNormalization {attributes} (x, w) }}")
    if reason is not None:
        assert fuse(model)[0].reasons() == {reason: 1}
        return
    before = graphs.run(model, X)
    _, ops = fuse(model)
    assert ops == {"SimplifiedLayerNormalization": 1}
    check.close(before["y"], graphs.run(model, X)["y"])
