"""CastFloat16 where activations leave float16's range: what stays in float32, how many Casts, what the report says."""

from __future__ import annotations

from typing import Any

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.ranges import largest_magnitudes
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.quantization.cast_float16 import HALF, LARGEST, CastFloat16

IDS = np.arange(96, dtype=np.int64)
FEEDS = {"input_ids": IDS[None]}
TEXT = CalibrationText(vocab_size=96, own=lambda tokens, length: IDS[None, :length])
CUDA, CPU = (Context(target=TARGETS[name], calibration=TEXT) for name in ("cuda", "cpu"))
TOLERANCE = 5e-3


def decoder(scale: float = 100.0) -> ir.Model:
    """Two MLPs behind norms, the first with gate and up `scale` times as large, which its down takes back."""
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table")
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    unit = builder.norm(x)
    gate, up = (builder.op("MatMul", unit, builder.weight(32, 64), width=64) for _ in range(2))
    silu = builder.op("Mul", gate, builder.op("Sigmoid", gate, width=64), width=64)
    product = builder.op("Identity", builder.op("Mul", silu, up, width=64), width=64)
    y = builder.op("MatMul", product, builder.weight(64, 32), width=32)
    for weight in builder.weights:
        array = weight.const_value.numpy()  # type: ignore[union-attr]
        factor = {(32, 64): scale, (64, 32): scale**-2}.get(array.shape)
        if factor is not None:
            weight.const_value = ir.tensor((array * factor).astype(np.float32), name=weight.name)
    x = builder.step("residual", x, y)
    x = builder.step("residual", x, builder.step("gated", builder.norm(x), x))
    return builder.finish(x, False, table)


def logits(model: ir.Model) -> np.ndarray:
    """Every value has the type that the graph says: ONNX Runtime's CPU provider drops Casts between float16 nodes that
    it computes in float32, and with them the overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        (found,) = ReferenceEvaluator(ir.to_proto(model)).run(["logits"], FEEDS)
    return np.asarray(found)


def cast(model: ir.Model, context: Context = CUDA, **options: Any) -> Report:
    return CastFloat16(**options).run(model, context)


def casts(model: ir.Model) -> int:
    return sum(node.op_type == "Cast" for node in model.graph)


def _name(node: ir.Node) -> str:
    return node.outputs[0].name or ""


def node(model: ir.Model, name: str) -> ir.Node:
    return next(one for one in model.graph if one.name == name)


def test_a_decoder_that_overflows_stays_close() -> None:
    before = logits(decoder())
    broken = decoder()
    report = cast(broken, tokens=0)
    assert not np.isfinite(logits(broken)).all()
    assert not report.skipped
    assert not report.notes
    mended = decoder()
    report = cast(mended)
    after = logits(mended)
    assert after.dtype == np.float16
    check.close(before, after.astype(np.float32), tolerance=TOLERANCE)
    check.close(before, graphs.run(mended, FEEDS)["logits"].astype(np.float32), tolerance=TOLERANCE)
    # The product of gate and up, the view and the product behind it, and the residual addition in front of a norm.
    reasons = {skip.site: skip.reason for skip in report.skipped}
    large = "kept in float32, since what it makes or reads is too large for float16"
    between = "kept in float32, between others that are"
    assert reasons == {"n12": large, "n13": large, "n14": large, "n15": between}
    assert report.metrics["float32_nodes"] == 4
    assert report.calibration["windows"] == [1, 96]
    magnitude = report.metrics["largest_activation"]
    assert magnitude > LARGEST[HALF]
    assert report.notes == [f"{one}: up to {magnitude:.3g} on the text" for one in ("v12 of n12", "v13 of n13")]
    down = node(mended, "n14").inputs[1]
    assert down is not None
    assert down.dtype == ir.DataType.FLOAT
    again = cast(mended)
    assert not again.modified
    assert node(mended, "n14").outputs[0].dtype == ir.DataType.FLOAT


def test_magnitudes_are_those_of_the_graph() -> None:
    model = decoder()
    text = graphs.text(model)
    values = [one.outputs[0] for one in model.graph]
    seen: list[int] = []

    def track(items: Any, label: str) -> Any:
        seen.append(len(items))
        return items

    windows = [{"input_ids": part[None]} for part in (IDS[:48], IDS[48:])]
    found = largest_magnitudes(model, windows, values, track)
    assert graphs.text(model) == text
    assert all(len(one.uses()) > 0 or one.is_graph_output() for one in values)
    assert sum(len(one.uses()) for one in values) == sum(
        any(value is one for one in values) for reader in model.graph for value in reader.inputs
    )
    assert seen[0] > 4
    model.graph.outputs.extend(values[:-1])
    outputs = graphs.run(model, FEEDS)
    assert set(found) == {id(value) for value in values}
    for value in values:
        assert found[id(value)] == pytest.approx(float(np.abs(outputs[value.name or ""]).max()), rel=1e-4)


def test_infinities_and_empty_values_count_for_nothing() -> None:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table")
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    masked = builder.op("Where", builder.op("Less", x, builder.scalar(0.0)), builder.scalar(-np.inf), x, width=32)
    builder.nodes[-2].outputs[0].dtype = ir.DataType.BOOL
    empty = builder.op("Slice", masked, builder.axes(0), builder.axes(0), builder.axes(1))
    joined = builder.op("Concat", masked, empty, axis=1, width=32)
    model = builder.finish(builder.op("Softmax", joined, axis=-1, width=32), False, table)
    found = largest_magnitudes(model, [FEEDS], [x, masked, empty, joined], lambda items, label: items)
    rows = table.const_value.numpy()  # type: ignore[union-attr]
    assert [found[id(one)] for one in (masked, empty, joined)] == [rows.max(), 0, rows.max()]
    assert found[id(x)] == np.abs(rows).max()


def test_nothing_is_kept_where_nothing_overflows() -> None:
    plain, searched = decoder(1.0), decoder(1.0)
    cast(plain, tokens=0)
    report = cast(searched)
    assert not report.skipped
    assert not report.notes
    assert 0 < report.metrics["largest_activation"] < LARGEST[HALF] / 2
    assert "float32_nodes" not in report.metrics
    assert graphs.text(searched) == graphs.text(plain)


def test_the_margin_is_kept() -> None:
    largest = cast(decoder(1.0)).metrics["largest_activation"]
    share = largest / LARGEST[HALF]
    assert not cast(decoder(1.0), margin=share * 1.001).skipped
    assert cast(decoder(1.0), margin=share * 0.999).skipped
    for wrong in (0.0, 1.5):
        with pytest.raises(OptionError, match="margin"):
            CastFloat16(margin=wrong)


def test_bfloat16_is_not_searched() -> None:
    model = decoder()
    report = cast(model, dtype="bfloat16")
    assert not report.skipped
    assert "largest_activation" not in report.metrics
    assert not report.notes


@pytest.mark.parametrize("why", ["no text", "not text"])
def test_the_report_says_when_nothing_was_searched(why: str) -> None:
    model = decoder()
    if why == "not text":
        model.graph.inputs.append(ir.val("pixels", ir.DataType.FLOAT, ["batch", 3]))
    report = cast(model, Context(target=TARGETS["cuda"]) if why == "no text" else CUDA)
    assert report.modified
    (note,) = report.notes
    assert note.startswith("activations were not searched for what overflows float16: ")
    assert ("there is no calibration text" if why == "no text" else "'pixels'") in note


def test_named_nodes_stay() -> None:
    model = decoder(1.0)
    report = cast(model, tokens=0, keep=("head", "n12"))
    asked = {skip.site for skip in report.skipped if skip.reason == "kept in float32, as asked for"}
    assert asked == {"n12", next(one.name for one in model.graph if one.op_type == "MatMul" and "logits" in _name(one))}
    weights = [one for one in model.graph.initializers.values() if one.dtype == ir.DataType.FLOAT and one.shape]
    assert (32, 96) in {tuple(one.shape) for one in weights}  # type: ignore[arg-type]
    assert logits(model).dtype == np.float16, "the type of outputs does not depend on what is kept"
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert not cast(model, tokens=0).modified
    with pytest.raises(OptionError, match=r"keep='\*\.dwon' matches no linear and no node"):
        cast(decoder(), keep=("*.dwon",))


def test_an_output_that_is_too_large_stays_in_float32() -> None:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table", scale=1e4)
    model = builder.finish(builder.op("Gather", table, builder.ids, width=32, axis=0), False, table)
    before = logits(model)
    report = cast(model)
    assert logits(model).dtype == np.float32
    check.close(before, logits(model), tolerance=TOLERANCE)
    assert ("output logits", "computed in float32") in {(skip.site, skip.reason) for skip in report.skipped}


def test_a_mask_makes_no_island() -> None:
    """-3.4e38 is added, and carried on by a view: saturated as ever, nothing stays in float32."""
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table")
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    added = builder.op("Add", x, builder.scalar(float(np.finfo(np.float32).min)), width=32)
    probabilities = builder.op("Softmax", builder.op("Identity", added, width=32), width=32, axis=-1)
    model = builder.finish(probabilities, False, table)
    report = cast(model)
    assert not report.skipped
    assert report.metrics["largest_activation"] < 100


@pytest.mark.parametrize("context", [CUDA, CPU])
def test_what_has_no_float32_kernel_is_skipped_and_reads_no_infinity(context: Context) -> None:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table", scale=1e4)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    x = builder.op("Mul", x, builder.scalar(10.0), width=32)
    lengths, total = builder.const(np.array([95], np.int32), "lengths"), builder.const(np.array(96, np.int32), "total")
    attributes = {"num_heads": 2, "kv_num_heads": 2}
    attention = ir.node(
        "GroupQueryAttention",
        [x, x, x, None, None, lengths, total],
        attributes,
        domain="com.microsoft",
        name="attention",
        num_outputs=3,
    )
    for index, value in enumerate(attention.outputs):
        value.name, value.dtype = f"a{index}", ir.DataType.FLOAT
    builder.nodes.append(attention)
    attention.outputs[0].shape = ir.Shape(["batch", "sequence", 32])
    small = builder.op("Mul", attention.outputs[0], builder.scalar(1e-3), width=32)
    model = builder.finish(small, False, table)
    model.graph.opset_imports["com.microsoft"] = 1
    report = cast(model, context)
    stuck = [skip for skip in report.skipped if "no float32 kernel" in skip.reason]
    is_cuda = context is CUDA
    assert [skip.site for skip in stuck] == (["attention"] if is_cuda else [])
    kinds = {one.dtype for one in attention.inputs[:3] if one is not None}
    assert kinds == {ir.DataType.FLOAT16 if is_cuda else ir.DataType.FLOAT}
    assert any(one.op_type == "Clip" for one in model.graph) == is_cuda
    assert node(model, "n1").outputs[0].dtype == ir.DataType.FLOAT


def test_as_few_casts_as_possible() -> None:
    """A chain between two islands joins them; one that leads elsewhere does not grow."""
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table")
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    first = builder.op("Mul", x, builder.scalar(1e5), width=32)
    back = builder.op("Mul", first, builder.scalar(1e-5), width=32)
    between = builder.op("Sigmoid", back, width=32)
    second = builder.op("Mul", between, builder.scalar(1e5), width=32)
    small = builder.op("Mul", second, builder.scalar(1e-5), width=32)
    after = builder.op("Neg", builder.op("Neg", small, width=32), width=32)
    model = builder.finish(builder.step("linear", after, after), False, table)
    before = logits(model)
    report = cast(model)
    types = [one.outputs[0].dtype for one in (value.producer() for value in (first, back, between, second, small))]  # type: ignore[union-attr]
    assert types == 5 * [ir.DataType.FLOAT]
    assert after.dtype == ir.DataType.FLOAT16
    assert casts(model) == 2
    assert report.reasons()["kept in float32, between others that are"] == 1
    check.close(before, logits(model).astype(np.float32), tolerance=TOLERANCE)


def test_a_cast_of_an_exporter_behind_a_large_value_is_part_of_the_island() -> None:
    before, model = logits(decoder()), decoder()
    view = node(model, "n13")
    view.op_type = "Cast"
    view.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    cast(model)
    check.close(before, logits(model).astype(np.float32), tolerance=TOLERANCE)


def test_a_cache_that_is_too_large_saturates() -> None:
    model = decoder()
    value = node(model, "n12").outputs[0]
    value.name = "present.0.value"
    value.shape = ir.Shape(["batch", "sequence", 64])
    model.graph.outputs.append(value)
    cast(model)
    found = graphs.run(model, FEEDS)
    assert found["present.0.value"].dtype == np.float16, "as the past that it becomes"
    assert np.isfinite(found["present.0.value"]).all()
    assert np.abs(found["present.0.value"]).max() == LARGEST[HALF]
