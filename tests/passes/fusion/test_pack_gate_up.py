"""PackGateUp: rows in the order gate, up; the same outputs whatever the activation; and what must stay apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.fusion.pack_gate_up import PackGateUp
from onnxpress.passes.quantization.rtn import Rtn

WIDTH, INNER = 16, 24


def gated(
    activation: str = "silu", *, biases: tuple[bool, bool] = (False, False), up_first: bool = False, extra: bool = False
) -> ir.Model:
    """f(x W + a) * (x V + b), the width of W and V being `INNER`; `extra`: the gate is read a second time."""
    builder = graphs.Builder(WIDTH, 96, 0)
    table = builder.weight(96, WIDTH, name="table")
    x = builder.op("Gather", table, builder.ids, width=WIDTH, axis=0)
    halves = []
    for has_bias in biases:
        half = builder.op("MatMul", x, builder.weight(WIDTH, INNER), width=INNER)
        halves.append(builder.op("Add", half, builder.weight(INNER), width=INNER) if has_bias else half)
    gate, up = halves
    if activation == "silu":
        active = builder.op("Mul", gate, builder.op("Sigmoid", gate, width=INNER), width=INNER)
    elif activation == "gelu":  # as exporters write it out
        erf = builder.op("Erf", builder.op("Div", gate, builder.scalar(2**0.5), width=INNER), width=INNER)
        sum_ = builder.op("Add", erf, builder.scalar(1.0), width=INNER)
        active = builder.op("Mul", builder.op("Mul", gate, sum_, width=INNER), builder.scalar(0.5), width=INNER)
    else:
        active = builder.op(activation, gate, width=INNER)
    product = builder.op("Mul", *((up, active) if up_first else (active, up)), width=INNER)
    if extra:
        product = builder.op("Add", product, up, width=INNER)
    return builder.finish(builder.op("MatMul", product, builder.weight(INNER, WIDTH), width=WIDTH), False, table)


@pytest.mark.parametrize("activation", ["silu", "gelu", "Relu", "Tanh"])
@pytest.mark.parametrize("biases", [(False, False), (True, True)])
@pytest.mark.parametrize("up_first", [False, True])
def test_one_product_gives_both_halves(activation: str, biases: tuple[bool, bool], up_first: bool) -> None:
    model = gated(activation, biases=biases, up_first=up_first)
    before = graphs.run(model)
    gate, up = [one.w_NK().copy() for one in find_linears(model)[:2]]
    report = PackGateUp().run(model, Context())
    assert len(report.changed) == 1
    assert report.bytes_after == report.bytes_before + 16  # the widths
    packed = find_linears(model)[0]
    assert packed.shape == (2 * INNER, WIDTH)
    assert np.array_equal(packed.w_NK(), np.concatenate([gate, up]))
    assert sum(node.op_type == "MatMul" for node in model.graph) == 3  # with down and the head
    check.close(before["logits"], graphs.run(model)["logits"], tolerance=1e-5)


def test_a_half_that_others_read_stays() -> None:
    report = PackGateUp().run(gated(extra=True), Context())
    assert not report.changed
    assert len(report.skipped) == 1


@pytest.mark.parametrize("opset", [11, 12])
def test_old_opsets_have_another_split(opset: int) -> None:
    model = gated("Relu")
    model.graph.opset_imports[""] = opset
    report = PackGateUp().run(model, Context())
    assert not report.changed
    assert list(report.reasons()) == ["Split takes sizes as an input from opset 13 on"]


@pytest.mark.parametrize("what", ["product", "weight", "bias"])
def test_what_a_graph_output_needs_stays(what: str) -> None:
    """The product before the bias is an output; a weight or a bias serves an output too."""
    model = gated("Relu", biases=(True, True))
    linear = find_linears(model)[0]
    add = linear.output.consumers()[0]
    if what == "product":
        extra = linear.output
    elif what == "weight":
        node = ir.node("MatMul", [linear.activation, linear.weight], name="again")
        model.graph.append(node)
        extra = node.outputs[0]
    else:
        node = ir.node("Add", [linear.output, add.inputs[1]], name="again")
        model.graph.append(node)
        extra = node.outputs[0]
    extra.name, extra.dtype, extra.shape = "extra", ir.DataType.FLOAT, ir.Shape([None, None, INNER])
    model.graph.outputs.append(extra)
    before = graphs.run(model)
    report = PackGateUp().run(model, Context())
    assert not report.changed
    assert len(report.skipped) == 1
    check.close(before["extra"], graphs.run(model)["extra"], tolerance=1e-6)


TEXTS: dict[str, tuple[str, list[str]]] = {
    "plain": ("a = Relu(g) p = Mul(a, u)", []),
    "of another input": ("h = MatMul(z, wu) a = Relu(g) p = Mul(a, h)", []),
    "of itself": ("a = Relu(g) p = Mul(a, g)", []),
    "of two gates": ("h = MatMul(x, wh) a = Relu(g) b = Tanh(h) c = Add(a, b) p = Mul(c, u)",
                     ["gate or up is read elsewhere too, or held in a way that cannot be joined"]),
    "product before the bias is read": (
        "f = Add(g, bias) v = Add(u, bias2) a = Relu(f) b = Mul(a, v) n = ReduceSum(g) p = Mul(b, n)",
        ["some projections have a bias and some have none"],
    ),
    "bias wider than the product": (
        "h = MatMul(x, one) k = MatMul(x, one2) f = Add(h, bias) v = Add(k, bias2) a = Relu(f) p = Mul(a, v)",
        ["gate or up is read elsewhere too, or held in a way that cannot be joined"],
    ),
}  # fmt: skip


def written(body: str, outputs: str = "") -> ir.Model:
    """p from g = x wg and u = x wu, both [batch, seq, 8], by `body`."""
    shapes = {"wg": (4, 8), "wu": (4, 8), "wh": (4, 8), "one": (4, 1), "one2": (4, 1), "bias": (8,), "bias2": (8,)}
    declared = ", ".join(f"float{list(shape)} {name}" for name, shape in shapes.items())
    model = ir.from_onnx_text(
        f"""<ir_version: 9, opset_import: ["" : 18]> g (float[batch, seq, 4] x, float[batch, seq, 4] z, {declared}) =>
        (float[batch, seq, 8] p{outputs}) {{ g = MatMul(x, wg) u = MatMul(x, wu) {body} }}"""
    )
    rng = np.random.default_rng(0)
    for value in [one for one in model.graph.inputs if one.name in shapes]:
        model.graph.inputs.remove(value)
        array = rng.standard_normal(shapes[str(value.name)]).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    ir.passes.common.ShapeInferencePass()(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return model


@pytest.mark.parametrize("case", TEXTS)
def test_what_is_gated_and_what_is_not(case: str) -> None:
    body, reasons = TEXTS[case]
    model = written(body)
    rng = np.random.default_rng(1)
    given = {name: rng.standard_normal((2, 3, 4)).astype(np.float32) for name in "xz"}
    before = graphs.run(model, given)["p"]
    report = PackGateUp().run(model, Context())
    assert len(report.changed) == (case == "plain")
    assert [skip.reason for skip in report.skipped] == reasons
    check.close(before, graphs.run(model, given)["p"], tolerance=1e-6)


def test_a_weight_that_is_an_output_stays() -> None:
    model = written("a = Relu(g) p = Mul(a, u)")
    model.graph.outputs.append(model.graph.initializers["wu"])
    reason = "other nodes read a weight too: joined, it would be stored twice"
    assert PackGateUp().run(model, Context()).reasons() == {reason: 1}


def test_an_order_of_columns_stays() -> None:
    """The fifth input of MatMulNBits, which a product of both weights could have only one of."""
    model = gated("Relu")
    Rtn(bits=4, block_size=16, symmetric=False).run(model, Context())
    for node in [node for node in model.graph if node.op_type == "MatMulNBits"]:
        order = ir.Value(name=f"{node.name}.order", const_value=ir.tensor(np.zeros(WIDTH, np.int32)))
        model.graph.register_initializer(order)
        node.resize_inputs(5)
        node.replace_input_with(4, order)
    report = PackGateUp().run(model, Context())
    assert not report.changed
    assert len(report.skipped) == 1


def test_two_layers_in_one_scope_get_names_of_their_own() -> None:
    builder = graphs.Builder(WIDTH, 96, 0)
    table = builder.weight(96, WIDTH, name="table")
    x = builder.op("Gather", table, builder.ids, width=WIDTH, axis=0)
    for _ in range(2):
        x = builder.step("gated", x, x)
    model = builder.finish(x, False, table)
    for number, node in enumerate(model.graph):
        node.name = f"/mlp/{node.op_type}_{number}"
    before = graphs.run(model)
    assert len(PackGateUp().run(model, Context()).changed) == 2
    check.close(before["logits"], graphs.run(model)["logits"], tolerance=1e-5)


def test_layers_that_share_weights_stay() -> None:
    builder = graphs.Builder(WIDTH, 96, 0)
    table, w, v, d = (builder.weight(*shape) for shape in ((96, WIDTH), (WIDTH, 24), (WIDTH, 24), (24, WIDTH)))
    x = builder.op("Gather", table, builder.ids, width=WIDTH, axis=0)
    for _ in range(2):
        gate, up = (builder.op("MatMul", x, one, width=24) for one in (w, v))
        x = builder.op("MatMul", builder.op("Mul", builder.op("Relu", gate, width=24), up, width=24), d, width=WIDTH)
    report = PackGateUp().run(builder.finish(x, False, table), Context())
    assert not report.changed
    assert len(report.skipped) == 2


def test_one_bias_alone_is_told() -> None:
    report = PackGateUp().run(gated(biases=(True, False)), Context())
    assert not report.changed
    assert set(report.reasons()) == {"some projections have a bias and some have none"}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_every_gated_layer_of_an_export(
    tiny_export: Callable[[str, str], Path], tmp_path: Path, architecture: str
) -> None:
    source = models.load(tiny_export(architecture, "optimum"), work_dir=tmp_path)
    done = pipeline.run(source.model, pipeline.parse("fuse, pack"), Context(config=source.config))
    report = next(report for pass_, report in done if pass_.name() == "pack_gate_up")
    kinds = [one.kind for one in find_linears(source.model)]
    layers = 0 if architecture == "gpt2" else source.config["num_hidden_layers"]
    assert len(report.changed) == kinds.count("gate_up") == layers
    assert "gate" not in kinds
    assert not report.skipped


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_packed_as_floats_are(symmetric: bool) -> None:
    rtn = Rtn(bits=4, block_size=16, symmetric=symmetric)
    early, late = gated(biases=(True, True)), gated(biases=(True, True))
    for passes, model in (((PackGateUp(), rtn), early), ((rtn, PackGateUp()), late)):
        for pass_ in passes:
            assert pass_.run(model, Context()).changed
    one, two = (next(one for one in find_linears(model) if one.num_out == 2 * INNER) for model in (early, late))
    assert one.holder == two.holder == "MatMulNBits"
    assert np.array_equal(one.w_NK(), two.w_NK())
    assert np.array_equal(graphs.run(early)["logits"], graphs.run(late)["logits"])


def test_different_formats_stay_apart() -> None:
    model = gated()
    Rtn(bits=4, block_size=16, overrides={"n1": {"bits": 8}}).run(model, Context())
    report = PackGateUp().run(model, Context())
    assert not report.changed
    assert set(report.reasons()) == {"the projections are stored in different formats"}
