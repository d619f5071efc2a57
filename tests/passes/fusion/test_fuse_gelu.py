"""FuseGelu: both forms fire in several spellings, what is nearly GELU does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.fusion.fuse_gelu import FuseGelu

Make = Callable[[graphs.Builder, Any], Any]


def number(builder: graphs.Builder, value: float) -> Any:
    return builder.const(np.array(value, np.float32), f"c{len(builder.weights)}")


def erf(half: str, inner: float = math.sqrt(2), one: float = 1.0) -> Make:
    """x Phi(x), with the half multiplied in first, last, or to x."""

    def make(b: graphs.Builder, x: Any) -> Any:
        def op(kind: str, *operands: Any) -> Any:
            return b.op(kind, *operands, width=32)

        total = op("Add", op("Erf", op("Div", x, number(b, inner))), number(b, one))
        if half == "first":
            return op("Mul", op("Mul", x, number(b, 0.5)), total)
        if half == "inside":
            return op("Mul", x, op("Mul", total, number(b, 0.5)))
        return op("Mul", op("Mul", x, total), number(b, 0.5))

    return make


def tanh(cubic: float = 0.044715, by_power: bool = True) -> Make:
    def make(b: graphs.Builder, x: Any) -> Any:
        def op(kind: str, *operands: Any) -> Any:
            return b.op(kind, *operands, width=32)

        cube = op("Pow", x, number(b, 3.0)) if by_power else op("Mul", op("Mul", x, x), x)
        sum_ = op("Add", x, op("Mul", cube, number(b, cubic)))
        total = op("Add", op("Tanh", op("Mul", sum_, number(b, math.sqrt(2 / math.pi)))), number(b, 1.0))
        return op("Mul", op("Mul", x, number(b, 0.5)), total)

    return make


CASES: dict[str, tuple[Make, str | None]] = {
    "half first": (erf("first"), "Gelu"),
    "half last": (erf("last"), "Gelu"),
    "half inside": (erf("inside"), "Gelu"),
    "tanh": (tanh(), "FastGelu"),
    "tanh, products": (tanh(by_power=False), "FastGelu"),
    "another width": (erf("last", inner=1.5), None),
    "another offset": (erf("last", one=1.1), None),
    "another cubic": (tanh(cubic=0.06), None),
    "a soft cap": (lambda b, x: b.op("Mul", b.op("Tanh", x, width=32), number(b, 3.0), width=32), None),
}


@pytest.mark.parametrize("case", CASES)
def test_fires_on_gelu_and_on_nothing_else(case: str) -> None:
    make, expected = CASES[case]
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, scale=2.0)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    model = builder.finish(make(builder, x), False, table)
    before = graphs.run(model)
    (anchor,) = {node.op_type for node in model.graph} & {"Erf", "Tanh"}
    report = FuseGelu().run(model, Context())
    assert len(report.skipped) == (expected is None and anchor == "Erf"), "of a tanh nobody expects to be GELU"
    ops = {node.op_type for node in model.graph} & {"Gelu", "FastGelu", "Erf", "Tanh"}
    assert ops == {expected or anchor}
    check.close(before["logits"], graphs.run(model)["logits"])


def test_each_layer_keeps_its_own_vector() -> None:
    """The trailing product with a vector of ones is no part of GELU: the next layer's vector is another."""
    builder = graphs.Builder(96, 96, 0)
    table = builder.weight(96, 96, scale=2.0)
    x = builder.op("Gather", table, builder.ids, width=96, axis=0)
    for factor in (1.0, 3.0):
        vector = builder.const(np.full(96, factor, np.float32), f"v{factor}")
        x = builder.op("Mul", wide(builder, x), vector, width=96)
    model = builder.finish(x, False, table)
    before = graphs.run(model)
    assert len(FuseGelu().run(model, Context()).changed) == 2
    check.close(before["logits"], graphs.run(model)["logits"])


def wide(b: graphs.Builder, x: Any) -> Any:
    total = b.op(
        "Add", b.op("Erf", b.op("Div", x, number(b, math.sqrt(2)), width=96), width=96), number(b, 1), width=96
    )
    return b.op("Mul", b.op("Mul", x, total, width=96), number(b, 0.5), width=96)


def text(body: str = "h = Mul(x, t) y = Mul(h, half)", inputs: str = "", outputs: str = "") -> ir.Model:
    """GELU of x by its error function, t being 1 + erf(x / sqrt(2)); `body` makes y of both."""
    numbers = {"root": math.sqrt(2), "one": 1.0, "half": 0.5, "two": 2.0, "hundred": 100.0, "zero": 0.0}
    weights = ", ".join(f"float {name} = {{{number}}}" for name, number in numbers.items())
    return ir.from_onnx_text(
        f"""<ir_version: 9, opset_import: ["" : 18]> g (float[batch, seq, 8] x{inputs}) =>
        (float[batch, seq, 8] y{outputs}) <{weights}> {{ d = Div(x, root) e = Erf(d) t = Add(e, one) {body} }}"""
    )


KEPT: dict[str, tuple[str, list[str]]] = {
    "nothing": ("h = Mul(x, t) y = Mul(h, half)", ["Gelu"]),
    "half alone": ("h = Mul(x, t) g = Mul(h, half) y = Mul(g, two)", ["Gelu", "Mul"]),
    "a gate": ("h = Mul(x, t) g = Mul(h, half) y = Mul(g, gate)", ["Gelu", "Mul"]),
    "a gate in front": ("h = Mul(gate, t) y = Mul(h, half)", ["Add", "Div", "Erf", "Mul", "Mul"]),
    "a tanh beside it": ("n = Tanh(x) h = Mul(x, t) g = Mul(h, half) y = Mul(n, g)", ["Gelu", "Mul", "Tanh"]),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_around_it_stays(case: str) -> None:
    body, ops = KEPT[case]
    model = text(body, inputs=", float[batch, seq, 8] gate")
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal((2, 3, 8)).astype(np.float32) for name in ("x", "gate")}
    before = graphs.run(model, given)["y"]
    FuseGelu().run(model, Context())
    assert sorted(node.op_type for node in model.graph) == ops
    check.close(before, graphs.run(model, given)["y"])


@pytest.mark.parametrize("output", ["h", "t", "e"])
def test_values_in_between_that_are_outputs_stay(output: str) -> None:
    report = FuseGelu().run(text(outputs=f", float[batch, seq, 8] {output}"), Context())
    assert not report.changed
    assert len(report.skipped) == 1


def test_values_in_between_that_others_read_stay() -> None:
    body = "h = Mul(x, t) y = Mul(h, half) z = Neg(h)"
    assert not FuseGelu().run(text(body, outputs=", float[batch, seq, 8] z"), Context()).changed


def test_what_differs_only_far_out_is_seen_by_its_operators() -> None:
    """Zero for x above 100, which no random number is: running both forms would not tell."""
    body = "far = Greater(x, hundred) f = Where(far, zero, half) h = Mul(x, t) y = Mul(h, f)"
    report = FuseGelu().run(text(body), Context())
    assert not report.changed
    assert len(report.skipped) == 1


def test_half_precision_is_for_the_target_that_has_a_kernel() -> None:
    found = {}
    for name in ("cpu", "cuda"):
        model = text()
        for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
            value.dtype = ir.DataType.FLOAT16
            if value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
        report = FuseGelu().run(model, Context(target=TARGETS[name]))
        found[name] = report.changed or [skip.reason for skip in report.skipped]
    assert found == {"cpu": ["there is no FLOAT16 kernel on the CPU"], "cuda": ["e"]}
