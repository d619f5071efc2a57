"""Fuser and Region: what is compared, with what, and what a graph looks like afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler import region
from onnxpress.compiler.fusing import Fuser, constant, last_axis, scalar, split_scalar
from onnxpress.compiler.pass_ import Report
from onnxpress.compiler.region import NotCuttable, Region, Sample, build_model, disagreement, random_feed

X = "float[batch, seq, 8] x"
BODY = "s = Sigmoid(x) y = Mul(x, s)"


def model(body: str = BODY, inputs: str = X, outputs: str = "float[batch, seq, 8] y", opset: int = 18) -> ir.Model:
    made = ir.from_onnx_text(f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}')
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(made)
    ir.passes.common.ShapeInferencePass()(made)
    return made


def named(made: ir.Model, name: str) -> ir.Value:
    return next(one for one in ir.convenience.create_value_mapping(made.graph).values() if one.name == name)


def verdict(made: ir.Model, new: ir.Node, x: str = "x", y: str = "y", fuser: Fuser | None = None) -> str | None:
    fuser = fuser or Fuser(made, Report())
    return fuser.verdict([named(made, x)], [named(made, y)], [new.outputs[0]])


def silu(x: ir.Value, alpha: float = 1.0) -> ir.Node:
    return ir.Node("com.microsoft", "QuickGelu", [x], [ir.AttrFloat32("alpha", alpha)], name="silu")


@pytest.mark.parametrize("alpha", [1.0, 1.001, 1.702])
def test_only_what_agrees_is_accepted(alpha: float) -> None:
    made = model()
    reason = verdict(made, silu(named(made, "x"), alpha))
    assert reason is None if alpha == 1.0 else "differs by" in str(reason)


def test_another_shape_is_no_agreement() -> None:
    made = model()
    new = ir.Node("", "ReduceMean", [named(made, "x")])
    assert "shape (2, 3, 8) became (1, 1, 1)" in str(verdict(made, new))


def test_what_is_not_a_number_agrees_with_nothing() -> None:
    made = model("z = Sub(x, x) y = Div(z, z)")
    assert "differs by nan" in str(verdict(made, silu(named(made, "x"))))


PAIRS: dict[str, str] = {
    "another attribute": "a = Elu<alpha=1.0>(x) b = Elu<alpha=3.0>(x)",
    "another constant": ("one = Constant<value = float {1.0}>() two = Constant<value = float {2.0}>()"
                         " e = Elu(x) a = Mul(e, one) b = Mul(e, two)"),
    "another operand": "s = Sin(x) t = Sin(s) a = Sub(t, s) b = Sub(t, t)",
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_the_verdict_on_one_form_is_not_that_on_another(case: str) -> None:
    made = model(f"{PAIRS[case]} y = Add(a, b)")
    fuser = Fuser(made, Report())
    for value in ("a", "b"):
        # a is replaced by a copy of itself, and so is b: wrong
        node = named(made, "a").producer()
        assert node is not None
        copy = ir.Node("", node.op_type, list(node.inputs), list(node.attributes.values()))
        reason = verdict(made, copy, "x", value, fuser)
        assert (reason is None) == (value == "a"), reason


def test_the_verdict_on_one_replacement_is_not_that_on_another() -> None:
    made = model()
    fuser = Fuser(made, Report())
    assert verdict(made, silu(named(made, "x")), fuser=fuser) is None
    assert verdict(made, silu(named(made, "x"), 1.702), fuser=fuser) is not None


def test_the_verdict_on_one_width_is_not_that_on_another() -> None:
    made = model(
        "a = ReduceSum<keepdims=1>(x) b = ReduceSum<keepdims=1>(z) y = Add(a, b)",
        inputs="float[batch, seq, 1] x, float[batch, seq, 4] z",
        outputs="float[1, 1, 1] y",
    )
    fuser = Fuser(made, Report())
    axes = constant(made.graph, np.array([0, 1]), "axes")
    for value, result, agrees in (("x", "a", True), ("z", "b", False)):
        new = ir.Node("", "ReduceSum", [named(made, value), axes])  # of the last axis nothing is summed
        assert (verdict(made, new, value, result, fuser) is None) == agrees


def test_the_verdict_on_one_table_is_not_that_on_another() -> None:
    """Weights are left out of the signature where both forms read them: a table that only one reads is not."""
    made = model(
        "a = Mul(x, ones) b = Mul(x, twos) c = Mul(x, threes) y = Sum(a, b, c)",
        inputs="float[batch, seq, 96] x, float[96] ones, float[96] twos, float[96] threes",
        outputs="float[batch, seq, 96] y",
    )
    for value in made.graph.inputs[1:]:
        number = {"ones": 1.0, "twos": 2.0, "threes": 3.0}[str(value.name)]
        value.const_value = ir.tensor(np.full(96, number, np.float32), name=value.name)
        made.graph.register_initializer(value)
    del made.graph.inputs[1:]
    fuser, x = Fuser(made, Report()), named(made, "x")
    assert verdict(made, ir.Node("", "Identity", [x]), "x", "a", fuser) is None
    assert verdict(made, ir.Node("", "Identity", [x]), "x", "b", fuser) is not None
    fuser.verdicts.clear()
    for weight, result in (("twos", "b"), ("threes", "c")):
        assert verdict(made, ir.Node("", "Mul", [named(made, weight), x]), "x", result, fuser) is None
    assert len(fuser.verdicts) == 1, "equal layers are run once"


def test_the_region_runs_with_the_opset_of_the_model() -> None:
    made = model("y = ReduceMean<axes=[-1]>(x)", outputs="float[batch, seq, 1] y", opset=13)
    copy = ir.Node("", "ReduceMean", [named(made, "x")], [ir.AttrInt64s("axes", [-1])])
    assert verdict(made, copy) is None  # an attribute that opset 18 has no more


def test_what_is_replaced_keeps_name_shape_and_being_an_output() -> None:
    made = model(f"{BODY} z = Neg(y)", outputs="float[batch, seq, 8] y, float[batch, seq, 8] z")
    report = Report()
    fuser, old = Fuser(made, report), named(made, "y")
    new = silu(named(made, "x"))
    fuser.replace("site", [old], [new.outputs[0]], [new], fact=1)
    fuser.finish()
    assert [node.op_type for node in made.graph] == ["QuickGelu", "Neg"]
    output = made.graph.outputs[0]
    assert output is new.outputs[0]
    assert (output.name, output.dtype) == ("y", ir.DataType.FLOAT)
    assert list(output.shape or []) == ["batch", "seq", 8]
    assert made.opset_imports["com.microsoft"] == 1
    assert report.ledger == [{"site": "site", "fact": 1}]


def test_without_a_change_the_graph_is_as_it_was() -> None:
    made = model()
    before = ir.to_proto(made).SerializeToString(deterministic=True)
    fuser = Fuser(made, Report())
    value = constant(made.graph, np.array(1.0), "made")
    first = ir.Node("", "Neg", [value], name="first")
    fuser.insert([first, ir.Node("", "Neg", [first.outputs[0]], name="second")])
    fuser.finish()
    assert ir.to_proto(made).SerializeToString(deterministic=True) == before


def test_a_constant_takes_no_other_ones_name() -> None:
    made = model()
    one, same, other, typed = (
        constant(made.graph, array, "c")
        for array in (np.array([1]), np.array([1]), np.array([2]), np.array([1], np.int32))
    )
    assert one is same
    assert len({id(value) for value in (one, other, typed)}) == 3
    assert [value.const_value.numpy().tolist() for value in (one, other, typed)] == [[1], [2], [1]]  # type: ignore


NUMBERS: dict[str, tuple[str, tuple[str | None, float | None]]] = {
    "product": ("y = Mul(x, c)", ("x", 4.0)),
    "product, turned": ("y = Mul(c, x)", ("x", 4.0)),
    "division": ("y = Div(x, c)", ("x", 0.25)),
    "division of a number": ("y = Div(c, x)", (None, None)),
    "division by zero": ("y = Div(x, o)", (None, None)),
    "several numbers": ("y = Mul(x, v)", (None, None)),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_a_factor_is_one_number(case: str) -> None:
    body, (name, number) = NUMBERS[case]
    constants = "c = Constant<value = float {4.0}>() o = Constant<value = float {0.0}>()"
    made = model(f"{constants} v = Constant<value = float[2] {{4.0, 4.0}}>() {body}", inputs="float[batch, 2] x",
                 outputs="float[batch, 2] y")  # fmt: skip
    node = named(made, "y").producer()
    assert node is not None
    value, found = split_scalar(node)
    assert (None if value is None else value.name, found) == (name, number)


def test_one_number_is_a_scalar_and_several_are_none() -> None:
    values = [constant(model().graph, np.array(array), "c") for array in (2.0, [2.0], [2.0, 2.0])]
    assert [scalar(value) for value in (*values, None)] == [2.0, 2.0, None, None]


@pytest.mark.parametrize(("axes", "expected"), [([-1], True), ([2], True), ([1], False), ([1, 2], False), ([], False)])
def test_the_last_axis_and_no_other(axes: Sequence[int], expected: bool) -> None:
    as_attribute = ir.Node("", "ReduceMean", [], [ir.AttrInt64s("axes", axes)])
    as_input = ir.Node("", "ReduceMean", [None, constant(model().graph, np.array(axes, np.int64), "axes")])
    assert last_axis(as_attribute, 3) is last_axis(as_input, 3) is expected
    assert not last_axis(ir.Node("", "ReduceMean", []), 3)


def test_random_inputs_are_not_all_alike_and_unknown_sizes_have_their_own_number() -> None:
    value, count = ir.val("x", ir.DataType.FLOAT, ["b", "s", 8]), ir.val("n", ir.DataType.INT64, ["b", "s"])
    array, zeros = random_feed([value, count], {"batch": 2, "sequence": 3}, np.random.default_rng(0), {})
    assert array.shape == (2, 3, 8)
    assert array.std() > 0.5
    assert zeros.shape == (2, 3)
    with pytest.raises(NotCuttable, match="so no samples can be made"):
        random_feed([ir.val("y", ir.DataType.FLOAT)], {}, np.random.default_rng(0), {})


def test_a_sample_carries_each_forms_own_output_over() -> None:
    """The second output of a step is the second input of the next: a form that keeps another one is found out."""
    made = model("y = Add(x, past) kept = Neg(x)", inputs=f"{X}, float[batch, seq, 8] past",
                 outputs="float[batch, seq, 8] y, float[batch, seq, 8] kept")  # fmt: skip
    whole = Region(made.graph.inputs, made.graph.outputs)
    old = build_model(whole.nodes, whole.leaves, whole.outputs)
    zero, one = np.zeros((1, 1, 8), np.float32), np.ones((1, 1, 8), np.float32)
    steps = [[one, zero], Sample([one, zero], carry={1: 1})]
    seen: list[np.ndarray] = []

    def valid(feed: Sequence[np.ndarray], index: int, array: np.ndarray) -> np.ndarray:
        seen.append(array)
        return array if index == 0 else array * 0  # what is kept shows in the next step alone

    assert disagreement(old, old, steps, 1e-6, valid) is None
    assert [float(array.mean()) for array in seen[::2]] == [1, -1, 0, -1]
    other = model("y = Add(x, past) kept = Identity(x)", inputs=f"{X}, float[batch, seq, 8] past",
                  outputs="float[batch, seq, 8] y, float[batch, seq, 8] kept")  # fmt: skip
    cut = Region(other.graph.inputs, other.graph.outputs)
    new = build_model(cut.nodes, cut.leaves, cut.outputs)
    assert "output 0 of sample 1" in str(disagreement(old, new, steps, 1e-6, valid))


CUTS: dict[str, tuple[str, Any, str]] = {
    "far up": ("_FAR", 3, "reaches too far up"),
    "weights": ("_LARGEST_CONSTANT", 3, "reaches the weight"),
}


@pytest.mark.parametrize("case", CUTS)
def test_a_region_has_bounds(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, limit, reason = CUTS[case]
    made = model("c = Constant<value = float {4.0}>() a = Neg(x) b = Neg(a) d = Mul(b, c) y = Neg(d)")
    assert len(Region([named(made, "x")], [named(made, "y")]).nodes) == 4
    monkeypatch.setattr(region, name, limit)
    with pytest.raises(NotCuttable, match=reason):
        Region([named(made, "x")], [named(made, "y")])


def test_of_an_activation_that_is_only_measured_the_size_is_fed() -> None:
    made = model("h = Neg(x) n = Shape(h) y = Reshape(z, n)", inputs=f"{X}, float[batch, seq, 8] z")
    cut = Region([named(made, "z")], [named(made, "y")])
    assert [leaf.name for leaf in cut.leaves] == ["z", "h"]
