"""FoldAttentionBias: the biases of keys and values leave attention, its outputs stay; and what has to keep them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.fusion.fold_attention_bias import FoldAttentionBias

HEADS, WIDTH, OUT = 2, 6, 10
B, S, N = 2, 5, HEADS * WIDTH


def attention(
    *,
    key_bias: int | None = N,
    value_bias: int | None = N,
    out_bias: int | None = OUT,
    out: int = OUT,
    masked: bool = False,
    inputs: dict[int, str] | None = None,
    reads: str = "",
    seed: int = 0,
) -> ir.Model:
    """(MultiHeadAttention(q + a, k + b, v + c) W) + d; a size of None leaves a bias out, `reads` adds a reader."""
    builder = graphs.Builder(N, 8, seed)
    q, k, v = (ir.val(name, ir.DataType.FLOAT, ["batch", "tokens", N]) for name in "qkv")
    more = {place: ir.val(name, ir.DataType.FLOAT, shape) for place, name, shape in _MORE if name in (inputs or {})}
    x = [builder.op("Add", q, builder.weight(N), width=N)]
    for stream, size in ((k, key_bias), (v, value_bias)):
        x.append(stream if size is None else builder.op("Add", builder.weight(size), stream, width=N))
    mask = ir.val("mask", ir.DataType.FLOAT, ["batch", 1, "tokens", "tokens"])
    operands: list[ir.Value | None] = [*x, None, None, mask if masked else None]
    for place, value in more.items():
        operands += [None] * (place + 1 - len(operands))
        operands[place] = value
    node = ir.node(
        "MultiHeadAttention", operands, attributes={"num_heads": HEADS}, domain="com.microsoft", name="attention"
    )
    builder.nodes.append(node)
    given = node.outputs[0]
    given.name, given.dtype, given.shape = "given", ir.DataType.FLOAT, ir.Shape(["batch", "tokens", N])
    y = builder.op("MatMul", given, builder.weight(N, out), width=out)
    if out_bias is not None:
        y = builder.op("Add", y, builder.weight(out_bias), width=OUT)
    outputs = [y]
    if reads:
        source = {"keys": x[1], "values": x[2], "attention": given}[reads.split()[0]]
        outputs.append(builder.op("Shape" if reads.endswith("size") else "Tanh", source))
        outputs[1].dtype = ir.DataType.INT64 if reads.endswith("size") else ir.DataType.FLOAT
    graph = ir.Graph(
        [q, k, v, *([mask] if masked else []), *more.values()],
        outputs,
        nodes=builder.nodes,
        initializers=builder.weights,
        opset_imports={"": 18, "com.microsoft": 1},
        name="attention",
    )
    return ir.Model(graph, ir_version=10)


_MORE = (
    (3, "bias", [3 * N]),
    (6, "past_key", ["batch", HEADS, "past", WIDTH]),
    (7, "past_value", ["batch", HEADS, "past", WIDTH]),
)


def feeds(model: ir.Model, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {"batch": B, "tokens": S, "past": 3}
    given = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else sizes[str(size.value)] for size in value.shape or ()]
        given[str(value.name)] = rng.standard_normal(shape).astype(np.float32)
    if "mask" in given:  # most keys are hidden, from one query all
        given["mask"] = np.where(given["mask"] > 0.5, 0.0, np.finfo(np.float32).min).astype(np.float32)
        given["mask"][0, 0, 1] = np.finfo(np.float32).min
    return given


def folded(model: ir.Model) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    before = graphs.run(model, feeds(model))
    report = FoldAttentionBias().run(model, Context())
    return report, before, graphs.run(model, feeds(model))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_softmax_sees_no_key_bias_and_rows_sum_to_one(masked: bool, seed: int) -> None:
    model = attention(masked=masked, seed=seed)
    report, before, after = folded(model)
    assert [one["folded"] for one in report.ledger] == [["keys", "values"]]
    assert Counter(node.op_type for node in model.graph)["Add"] == 2, "that of the queries and that behind"
    name = model.graph.outputs[0].name
    check.close(before[name], after[name], tolerance=1e-5)


@pytest.mark.parametrize("without", ["key_bias", "value_bias"])
def test_either_alone(without: str) -> None:
    model = attention(**{without: None})
    report, before, after = folded(model)
    assert len(report.changed) == 1
    assert Counter(node.op_type for node in model.graph)["Add"] == 2
    for name, want in before.items():
        check.close(want, after[name], tolerance=1e-5)


def test_nothing_to_fold_is_no_skip() -> None:
    report, _, _ = folded(attention(key_bias=None, value_bias=None))
    assert not report.changed
    assert not report.skipped


KEPT: dict[str, dict[str, Any]] = {
    "a bias of its own": {"inputs": {"bias": ""}},
    "a cache": {"inputs": {"past_key": "", "past_value": ""}},
}


@pytest.mark.parametrize("case", KEPT)
def test_attention_keeps_them(case: str) -> None:
    model = attention(**KEPT[case])
    before = graphs.text(model)
    report = FoldAttentionBias().run(model, Context())
    assert not report.changed
    assert list(report.reasons()) == ["attention has a cache or a bias of its own"]
    assert graphs.text(model) == before


def test_a_second_look_at_the_present_keeps_them() -> None:
    model = attention()
    (node,) = (one for one in model.graph if one.op_type == "MultiHeadAttention")
    node.resize_outputs(3)
    for place, name in ((1, "present_key"), (2, "present_value")):
        node.outputs[place].name, node.outputs[place].dtype = name, ir.DataType.FLOAT
        model.graph.outputs.append(node.outputs[place])
    before = graphs.text(model)
    report = FoldAttentionBias().run(model, Context())
    assert not report.changed
    assert list(report.reasons()) == ["attention has a cache or a bias of its own"]
    assert graphs.text(model) == before


def test_keys_and_values_in_heads_are_left() -> None:
    builder = graphs.Builder(N, 8, 0)
    q = ir.val("q", ir.DataType.FLOAT, ["batch", "tokens", N])
    k, v = (ir.val(name, ir.DataType.FLOAT, ["batch", HEADS, "tokens", WIDTH]) for name in "kv")
    apart = builder.op("Add", v, builder.weight(WIDTH))
    apart.shape = v.shape
    node = ir.node("MultiHeadAttention", [q, k, apart], attributes={"num_heads": HEADS}, domain="com.microsoft")
    builder.nodes.append(node)
    given = node.outputs[0]
    given.name, given.dtype, given.shape = "given", ir.DataType.FLOAT, ir.Shape(["batch", "tokens", N])
    y = builder.op(
        "Add", builder.op("MatMul", given, builder.weight(N, OUT), width=OUT), builder.weight(OUT), width=OUT
    )
    opsets = {"": 18, "com.microsoft": 1}
    graph = ir.Graph([q, k, v], [y], nodes=builder.nodes, initializers=builder.weights, opset_imports=opsets, name="g")
    report = FoldAttentionBias().run(ir.Model(graph, ir_version=10), Context())
    assert not report.changed
    assert not report.skipped


VALUES_KEPT: dict[str, dict[str, Any]] = {
    "no bias behind": {"out_bias": None},
    "a bias that widens": {"out": 1},
    "others read attention": {"reads": "attention"},
}


@pytest.mark.parametrize("case", VALUES_KEPT)
def test_values_keep_theirs(case: str) -> None:
    model = attention(**VALUES_KEPT[case])
    report, before, after = folded(model)
    assert [one["folded"] for one in report.ledger] == [["keys"]]
    assert list(report.reasons()) == [
        "no projection with a bias alone reads what attention gives: the values keep theirs"
    ]
    for name, want in before.items():
        check.close(want, after[name], tolerance=1e-5)


@pytest.mark.parametrize("which", ["keys", "values"])
def test_what_others_read_stays(which: str) -> None:
    model = attention(reads=which)
    report, before, after = folded(model)
    assert [one["folded"] for one in report.ledger] == [["values" if which == "keys" else "keys"]]
    for name, want in before.items():
        check.close(want, after[name], tolerance=1e-5)


@pytest.mark.parametrize("which", ["keys", "values"])
def test_who_asks_for_the_size_asks_what_is_left(which: str) -> None:
    model = attention(reads=f"{which} size")
    report, before, after = folded(model)
    assert [one["folded"] for one in report.ledger] == [["keys", "values"]]
    assert Counter(node.op_type for node in model.graph)["Add"] == 2
    for name, want in before.items():
        check.close(want, after[name], tolerance=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "vit"])
def test_encoders(tiny_export: Callable[..., Path], tmp_path: Path, architecture: str) -> None:
    source = models.load(tiny_export(architecture), work_dir=tmp_path)
    steps = pipeline.parse("simplify, fuse_encoder_attention, unflatten, split_projections")
    pipeline.run(source.model, steps, Context(config=source.config))
    report = FoldAttentionBias().run(source.model, Context())
    assert [one["folded"] for one in report.ledger] == [["keys", "values"]] * 2
    assert not report.skipped
