"""Graphs that are fused or quantized already, by us or by others, as input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import graphs
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from decoders import decoder

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.explain_fusion import explain_fusion
from onnxpress.compiler.inspect import summarize
from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.pass_ import Context
from onnxpress.models.onnx_file import load_onnx
from onnxpress.passes.quantization._rounding import round_matrix
from onnxpress.passes.quantization.rtn import Rtn

Export = Callable[..., Path]


def rows(card: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["pass"].partition("(")[0]: row for row in card["passes"]}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each recipe makes of one decoder."""
    folder = tmp_path_factory.mktemp("artifacts")
    ir.save(decoder(), folder / "model.onnx")
    return {
        recipe: optimize(folder / "model.onnx", output=folder / recipe, recipe=recipe, measure=False).directory
        for recipe in ("fp32", "int8", "int4-rtn")
    }


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4-rtn"])
def test_our_own_artifacts_are_left_alone(artifacts: dict[str, Path], tmp_path: Path, recipe: str) -> None:
    card = optimize(artifacts[recipe], output=tmp_path / "again", recipe=recipe, verify=True).report
    found = rows(card)
    assert card["warnings"] == []
    for name, row in found.items():
        if name.startswith(("fuse_", "pack_")):
            assert (row["changed"], row["skipped"]) == (0, []), name
    if recipe != "fp32":
        skips = found["rtn"]["skipped"]
        assert all(skip["reason"].startswith("already quantized: ") for skip in skips)
        assert found["rtn"]["changed"] == 0
        formats = summarize(models.load(artifacts[recipe], work_dir=tmp_path).model).quantized
        assert sum(formats.values()) == sum(skip["count"] for skip in skips)


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4-rtn"])
def test_blocks_of_a_fused_graph_are_complete(artifacts: dict[str, Path], tmp_path: Path, recipe: str) -> None:
    blocks = explain_fusion(models.load(artifacts[recipe], work_dir=tmp_path).model, Context())
    assert len(blocks) > 1
    assert all(one.is_complete and not one.left for one in blocks)
    assert all("GroupQueryAttention" in one.fused for one in blocks if one.index is not None)


_ROUNDING: dict[str, Any] = {"scales": "mse", "scale_dtype": np.dtype(np.float32)}


def network(tied: bool) -> ir.Model:
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64, name="table")
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    for step in ("gated", "biased", "linear"):
        x = builder.step(step, x, x)
    return builder.finish(x, tied, table)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_requantize_reads_back_and_rounds_anew(tied: bool, symmetric: bool) -> None:
    model, exact = network(tied), network(tied)
    Rtn(bits=8, block_size=32, symmetric=symmetric).run(model, Context())
    weights = {one.name: one.w_NK() for one in find_linears(model)}
    report = Rtn(bits=4, block_size=16, requantize=True, accuracy_level=0, scale_bits=32).run(model, Context())
    assert report.reasons() == {}
    linears = find_linears(model)
    formats = summarize(model).quantized
    assert {how.partition(", ")[2] for how in formats} == {"4 bits in blocks of 16"}
    for one in linears:
        fresh, *_ = round_matrix(weights[one.name], bits=4, block_size=16, symmetric=True, **_ROUNDING)
        assert np.array_equal(one.w_NK(), fresh.w_NK())
    (embedding,) = find_embeddings(model, linears)
    assert (embedding.head is not None) == tied
    read = {value.name for node in model.graph for value in node.inputs if value is not None}
    assert set(model.graph.initializers) <= read, "codes of the first time are left over"
    # Every node reads the new codes with the new format: the same network with these weights in float agrees.
    got = graphs.run(model)["logits"]
    for one, plain in zip(linears, find_linears(exact), strict=True):
        plain.set_weight(one.w_NK, f"{plain.name}.read")
    if tied:
        return  # the table of the plain network keeps its weights
    find_embeddings(exact)[0].table.const_value = ir.tensor(embedding.table_VH())
    check.close(graphs.run(exact)["logits"], got, tolerance=1e-3)


def test_requantizing_to_the_same_format_changes_nothing() -> None:
    model = network(tied=True)
    rtn = Rtn(bits=4, requantize=True)
    rtn.run(model, Context())
    before = graphs.text(model)
    report = rtn.run(model, Context())
    assert not report.modified
    assert report.reasons() == {"already quantized: MatMulNBits, 4 bits in blocks of 32, as asked for": 6}
    assert graphs.text(model) == before


def test_a_bias_inside_of_the_operator_survives() -> None:
    model = network(tied=False)
    Rtn(bits=8).run(model, Context())
    node = find_linears(model)[0].node
    rng = np.random.default_rng(3)
    size = node.attributes["N"].as_int()
    bias = ir.tensor(rng.standard_normal(size).astype(np.float32), name="inner_bias")
    value = ir.Value(name="inner_bias", shape=bias.shape, type=ir.TensorType(bias.dtype), const_value=bias)
    model.graph.register_initializer(value)
    node.resize_inputs(6)
    node.replace_input_with(5, value)
    before = graphs.run(model)["logits"]
    Rtn(bits=8, block_size=16, requantize=True, scale_bits=32).run(model, Context())
    check.close(before, graphs.run(model)["logits"], tolerance=0.02)


def test_columns_in_another_order_are_not_requantized() -> None:
    model = network(tied=False)
    Rtn(bits=4).run(model, Context())
    node = find_linears(model)[0].node
    order = ir.tensor(np.arange(64, dtype=np.int32) // 32, name="g_idx")
    value = ir.Value(name="g_idx", shape=order.shape, type=ir.TensorType(order.dtype), const_value=order)
    model.graph.register_initializer(value)
    node.resize_inputs(5)
    node.replace_input_with(4, value)
    report = Rtn(bits=8, requantize=True).run(model, Context())
    (skip,) = report.skipped
    assert skip.reason.endswith("with its columns in another order (g_idx)")


@pytest.fixture(scope="module")
def encoder(tiny_export: Export) -> Path:
    return tiny_export("bert_classifier") / "model.onnx"


def quantized_by_onnxruntime(encoder: Path, how: str, folder: Path) -> Path:
    from onnxruntime import quantization
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    path = folder / f"{how}.onnx"
    if how == "dynamic":
        quantization.quantize_dynamic(encoder, path, weight_type=quantization.QuantType.QInt8)
    elif how == "nbits":
        quantizer = MatMulNBitsQuantizer(onnx.load(encoder), block_size=32, is_symmetric=False, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path))
    else:

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                rng = np.random.default_rng(0)
                ids = [rng.integers(3, 250, (1, 16)) for _ in range(2)]
                rest = {"attention_mask": np.ones((1, 16), np.int64), "token_type_ids": np.zeros((1, 16), np.int64)}
                self.feeds = iter([{"input_ids": one, **rest} for one in ids])

            def get_next(self) -> Any:
                return next(self.feeds, None)

        kind = quantization.QuantFormat.QDQ if how == "qdq" else quantization.QuantFormat.QOperator
        quantization.quantize_static(encoder, path, Reader(), quant_format=kind)
    return path


@pytest.mark.parametrize(
    ("how", "format_", "fuses"),
    [
        ("dynamic", "MatMulInteger, 8 bits", True),
        ("qdq", "DequantizeLinear+MatMul, 8 bits per column", False),
        ("qop", "QLinearMatMul, 8 bits", False),
        ("nbits", "MatMulNBits, 4 bits in blocks of 32, zero points", True),
    ],
)
def test_what_onnxruntime_quantized(encoder: Path, tmp_path: Path, how: str, format_: str, fuses: bool) -> None:
    path = quantized_by_onnxruntime(encoder, how, tmp_path)
    model = models.load(path, work_dir=tmp_path).model
    summary = summarize(model)
    assert summary.quantized[format_] >= 2 * 6  # layers, matrices
    if how != "qop":
        assert len(summary.blocks) == 2
    card = optimize(path, output=tmp_path / "out", recipe="int8", verify=True).report
    found = rows(card)
    reasons = {skip["reason"].partition(";")[0]: skip["count"] for skip in found["rtn"]["skipped"]}
    assert reasons[f"already quantized: {format_}"] == summary.quantized[format_]
    assert card["operators"].get("com.microsoft.MultiHeadAttention", 0) == (2 if fuses else 0)
    assert bool(found["fuse_encoder_attention"]["skipped"]) == (how == "qdq")
    if how == "nbits":  # without a config nobody knows that the table of positions has 128 rows
        assert card["quality"]["tokens"] == 128
        assert card["quality"]["measured_on"].startswith("the first 128 of 512 random tokens")
    ids = np.random.default_rng(1).integers(3, 250, (2, 20))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    want = graphs.run(ir.load(path), feeds)["logits"]
    got = graphs.run(load_onnx(tmp_path / "out" / "model.onnx"), feeds)["logits"]
    check.close(want, got, tolerance=0.05)  # a last bit can become a whole step of a rounded activation


def test_a_difference_is_noted_where_the_graph_rounds(encoder: Path, tmp_path: Path) -> None:
    """Verifying goes on behind a fusion that is right; a MatMulNBits is compared without its rounding."""
    path = quantized_by_onnxruntime(encoder, "nbits", tmp_path)
    card = optimize(path, output=tmp_path / "out", recipe="fp32", verify=True).report
    assert card["verified"]
    assert all("note" not in row and row["largest_difference"] < 1e-4 for row in card["verified"])


def test_requantize_says_what_it_cannot_read(encoder: Path, tmp_path: Path) -> None:
    model = models.load(quantized_by_onnxruntime(encoder, "dynamic", tmp_path), work_dir=tmp_path).model
    ((_, report),) = pipeline.run(model, pipeline.parse("rtn(requantize=True)"), Context())
    assert any(reason.endswith("MatMulInteger, 8 bits, which requantize does not read") for reason in report.reasons())
