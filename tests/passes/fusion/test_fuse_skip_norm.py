"""FuseSkipNorm: sum and norm in one operator, the sum still readable."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import check
import graphs
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import common

from onnxpress.compiler.blocks import find_blocks
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.fusion.fuse_rmsnorm import FuseRmsnorm
from onnxpress.passes.fusion.fuse_skip_norm import FuseSkipNorm


def residual(reads_sum: bool, constant: bool = False) -> ir.Model:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    branch = builder.step("linear", x, x)
    total = builder.op("Add", x, builder.weight(32) if constant else branch, width=32)
    last = builder.norm(total, 1e-3)
    if reads_sum:
        last = builder.op("Add", builder.step("linear", last, last), total, width=32)
    return builder.finish(last, False, table)


def fuse(model: ir.Model) -> Counter[str]:
    FuseRmsnorm().run(model, Context())
    FuseSkipNorm().run(model, Context())
    return Counter(node.op_type for node in model.graph)


def test_sum_that_is_read_again_is_an_output() -> None:
    model = residual(True)
    before = graphs.run(model)
    ops = fuse(model)
    assert ops["SkipSimplifiedLayerNormalization"] == 1
    assert ops["Add"] == 1, "the second addition alone"
    check.close(before["logits"], graphs.run(model)["logits"])


def test_sum_that_nobody_reads_is_no_output() -> None:
    model = residual(False)
    before = graphs.run(model)
    fuse(model)
    node = next(node for node in model.graph if node.op_type == "SkipSimplifiedLayerNormalization")
    assert len(node.outputs) == 1
    assert node.attributes["epsilon"].as_float() == np.float32(1e-3)
    check.close(before["logits"], graphs.run(model)["logits"])


def test_an_added_constant_is_no_residual() -> None:
    model = residual(False, constant=True)
    FuseRmsnorm().run(model, Context())
    report = FuseSkipNorm().run(model, Context())
    assert report.reasons() == {"a constant is added, not a residual": 1}


def layer_normed(*, post_norm: bool = False, bias: bool = False, read_again: bool = False) -> ir.Model:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    branch = builder.step("linear", x, x)
    if bias:
        branch = builder.op("Add", branch, builder.weight(32), width=32)
    total = builder.op("Add", x, branch, width=32)
    norm = builder.op("LayerNormalization", total, builder.weight(32), builder.weight(32), width=32, epsilon=1e-3)
    if read_again:
        norm = builder.op("Mul", norm, branch, width=32)
    last = builder.op("Add", builder.step("linear", norm, norm), norm if post_norm else total, width=32)
    return builder.finish(last, False, table)


def test_layer_norm_with_its_bias() -> None:
    model = layer_normed()
    before = graphs.run(model)
    assert fuse(model)["SkipLayerNormalization"] == 1
    check.close(before["logits"], graphs.run(model)["logits"])


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_apart_stays_apart_when_the_model_is_loaded(tmp_path: Path, bias: bool) -> None:
    model = layer_normed(post_norm=True, bias=bias)
    before, streams = graphs.run(model), [block.stream_out.name for block in find_blocks(model) if block.stream_out]
    report = FuseSkipNorm(layer_norm="sum").run(model, Context())
    assert len(report.changed) == 1
    check.close(before["logits"], graphs.run(model)["logits"])
    found = [block.stream_out.name for block in find_blocks(model) if block.stream_out]
    assert found == streams != [], "either form is a residual too, and its bias belongs to the block"
    assert not FuseSkipNorm(layer_norm="sum").run(model, Context()).changed
    kept, undone = loaded_operators(model, tmp_path), loaded_operators(layer_normed(post_norm=True), tmp_path)
    assert (kept["Sum"], kept["LayerNormalization"], kept["SkipLayerNormalization"]) == (not bias, 1, 0)
    assert undone["SkipLayerNormalization"] == 1, "ONNX Runtime leaves an Add alone too: the form has lost its reason"


@pytest.mark.parametrize(
    ("p", "bias", "addition"),
    [
        ("batch, seq, 8", "w", "Add"),
        ("batch, seq, 8", "Constant<value = float[1, 1, 8] {1, 2, 3, 4, 5, 6, 7, 8}>()", "Sum"),
        ("batch, seq, 1", "w", "Sum"),
    ],
)
def test_what_is_no_bias_stays_before_the_residual(p: str, bias: str, addition: str) -> None:
    made = f"c = {bias}" if bias != "w" else "c = Identity(w)"
    body = f"{made} h = Relu(p) b = Add(h, c) a = Add(x, b) y = LayerNormalization(a, w)"
    model = skip(body, p=p)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.IdentityEliminationPass()(model)
    assert len(FuseSkipNorm(layer_norm="sum").run(model, Context()).changed) == 1
    assert model.graph.node(-2).op_type == addition


def test_bias_that_is_read_elsewhere_stays_before_the_residual() -> None:
    model = layer_normed(post_norm=True, bias=True, read_again=True)
    before = graphs.run(model)
    assert len(FuseSkipNorm(layer_norm="sum").run(model, Context()).changed) == 1
    assert sum(node.op_type == "Sum" for node in model.graph) == 1
    check.close(before["logits"], graphs.run(model)["logits"])


def loaded_operators(model: ir.Model, folder: Path) -> Counter[str]:
    """What ONNX Runtime makes of the graph at its highest level."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in ir.load(folder / "optimized.onnx").graph)


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        (["batch", "sequence", 32], ["other", "sequence", 32], "the operands differ in size"),
        (["batch", 1, 32], ["batch", "sequence", 32], "the operands differ in size"),
        (["batch", "sequence", 32], ["unk__1", "unk__2", 32], None),
    ],
)
def test_operands_of_different_sizes_stay(left: list[object], right: list[object], reason: str | None) -> None:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    y = builder.step("linear", x, x)
    x.shape, y.shape = ir.Shape(left), ir.Shape(right)
    last = builder.op("LayerNormalization", builder.op("Add", x, y, width=32), builder.weight(32), width=32)
    report = FuseSkipNorm().run(builder.finish(last, False, table), Context())
    assert [skip.reason for skip in report.skipped] == ([] if reason is None else [reason])


def skip(
    body: str = "a = Add(p, x) y = LayerNormalization<epsilon=0.5>(a, w)",
    p: str = "batch, seq, 8",
    x: str = "batch, seq, 8",
    more: str = "",
) -> ir.Model:
    """y from the inputs p and x of the given sizes; `more` outputs."""
    weights = ", ".join(str(0.5 + 0.25 * i) for i in range(8))
    model = ir.from_onnx_text(
        f"""<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
        g (float[{p}] p, float[{x}] x) => (float[{x}] y{more}) <float[8] w = {{{weights}}}> {{ {body} }}"""
    )
    ir.passes.common.ShapeInferencePass()(model)
    return model


def streams(*shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in zip("px", shapes, strict=True)}


@pytest.mark.parametrize("order", ["a = Add(p, x)", "a = Add(x, p)"])
@pytest.mark.parametrize("sizes", ["unk__0, seq, 8", "unk__0, unk__1, 8"])
def test_one_row_of_positions_is_added_to_a_batch(order: str, sizes: str) -> None:
    """The kernel takes the shape of its first operand: with the positions there, one row would come out."""
    model = skip(f"{order} y = LayerNormalization(a, w)", p=sizes)
    given = streams((1, 3, 8), (2, 3, 8))
    before = graphs.run(model, given)["y"]
    assert FuseSkipNorm().run(model, Context()).changed == ["y"]
    check.close(before, graphs.run(model, given)["y"])
    assert graphs.run(model, streams((2, 3, 8), (2, 3, 8)))["y"].shape == (2, 3, 8)


@pytest.mark.parametrize(
    ("p", "x", "reason"),
    [
        ("unk__0, seq, 8", "unk__1, seq, 8", "it is unknown which operand has the size of the sum"),
        ("unk__0, seq, 8", "batch, unk__1, 8", "it is unknown which operand has the size of the sum"),
        ("1, seq, 8", "unk__1, seq, 8", None),
        ("unk__0, seq, 8", "unk__0, seq, 8", None),
        ("batch, heads, seq, 8", "batch, heads, seq, 8", "the operands are not both of rank 3"),
        ("seq, 8", "batch, seq, 8", "the operands are not both of rank 3"),
    ],
)
def test_sizes_that_inference_made_up(p: str, x: str, reason: str | None) -> None:
    report = FuseSkipNorm().run(skip(p=p, x=x), Context())
    assert [skip.reason for skip in report.skipped] == ([] if reason is None else [reason])


@pytest.mark.parametrize("order", ["a = Add(t, p)", "a = Add(p, t)"])
def test_what_is_added_to_the_stream_it_is_computed_from(order: str) -> None:
    model = skip(f"u = Tanh(p) t = Mul(u, x) {order} y = LayerNormalization(a, w)", p="unk__0, unk__1, 8", x="1, 1, 8")
    branch = next(node.outputs[0] for node in model.graph if node.op_type == "Mul")
    branch.shape = ir.Shape(["unk__5", "unk__6", 8])
    assert FuseSkipNorm().run(model, Context()).changed == ["y"]
    assert [value.name for value in model.graph[-1].inputs[:2] if value is not None] == ["p", "t"]


def test_inference_gives_no_name_twice() -> None:
    """Equal names are taken for equal sizes: also those of a second run, on a graph with new nodes, must be new."""
    model = skip("c = Compress<axis=1>(x, k) y = Identity(p)", p="batch, seq, 8")
    keep = ir.val("k", ir.DataType.BOOL, ["seq"])
    for node in [node for node in model.graph if node.op_type == "Compress"]:
        node.replace_input_with(1, keep)
        model.graph.inputs.append(keep)
        for number in range(2):
            again = ir.node("Compress", [model.graph.inputs[number], keep], {"axis": 1}, name=f"again{number}")
            again.outputs[0].name = f"again{number}"
            model.graph.insert_before(node, again)
            ir.passes.common.ShapeInferencePass()(model)
    sizes = [str(node.outputs[0].shape[1]) for node in model.graph if node.op_type == "Compress"]  # type: ignore[index]
    assert len(set(sizes)) == 3
    assert all(size.startswith("unk__") for size in sizes)


def test_without_an_epsilon_it_is_that_of_the_norm() -> None:
    """The fused operator has another default: a stream of small numbers would show it."""
    model = skip("a = Add(p, x) y = LayerNormalization(a, w)")
    assert FuseSkipNorm().run(model, Context()).changed == ["y"]
    assert model.graph[0].attributes["epsilon"].as_float() == np.float32(1e-5)


def test_mean_that_is_read_stays() -> None:
    model = skip("a = Add(p, x) y, m = LayerNormalization(a, w) n = Neg(m)", more=", float[batch, seq, 1] n")
    assert FuseSkipNorm().run(model, Context()).reasons() == {"mean or deviation are read": 1}


def test_sum_that_is_an_output_is_the_operators() -> None:
    model = skip(more=", float[batch, seq, 8] a")
    given = streams((2, 3, 8), (2, 3, 8))
    before = graphs.run(model, given)
    FuseSkipNorm().run(model, Context())
    assert [node.op_type for node in model.graph] == ["SkipLayerNormalization"]
    for name, got in graphs.run(model, given).items():
        check.close(before[name], got)


def test_an_operator_of_that_name_from_elsewhere_is_not_meant() -> None:
    model = skip("a = Add(p, x) y = com.microsoft.LayerNormalization(a, w)")
    report = FuseSkipNorm().run(model, Context())
    assert not report.changed
    assert not report.skipped
