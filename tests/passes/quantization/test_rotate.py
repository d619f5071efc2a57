"""Rotations: orthogonal for every size, invisible in the logits, and of use to what rounds afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import check
import folds
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration_text import CalibrationText, feeds
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.quantization._hadamard import hadamard, rotation
from onnxpress.passes.quantization.rotate import Rotate, _turn_columns, _turn_rows
from onnxpress.passes.quantization.rtn import Rtn

FEW = {"tokens": 256, "length": 32, "trials": 2}
SIZES = (1, 2, 4, 12, 20, 28, 36, 40, 44, 60, 64, 76, 80, 96, 128, 140, 148, 576, 640, 768, 896, 960, 1152, 1536, 2560)


@pytest.mark.parametrize("size", SIZES)
def test_law_rows_of_a_hadamard_matrix_are_orthogonal(size: int) -> None:
    found = hadamard(size)
    assert found is not None
    assert set(np.unique(found)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(found @ found.T, size * np.eye(size))


def test_sizes_without_a_construction() -> None:
    assert all(hadamard(size) is None for size in (3, 6, 7, 52 * 3 + 1, 172))
    assert rotation(6, np.random.default_rng(0)) is None


def test_law_a_rotation_keeps_lengths_and_spreads_an_outlier() -> None:
    turn = rotation(64, np.random.default_rng(0))
    assert turn is not None
    np.testing.assert_allclose(turn @ turn.T, np.eye(64), atol=1e-13)
    outlier = np.zeros(64)
    outlier[3] = 8
    np.testing.assert_allclose(np.abs(outlier @ turn), 1.0)
    assert not np.array_equal(turn, rotation(64, np.random.default_rng(1)))


def test_law_turned_weights_give_turned_outputs() -> None:
    rng = np.random.default_rng(0)
    turn = rotation(8, rng)
    assert turn is not None
    w_NK, x_K = rng.standard_normal((16, 24)), rng.standard_normal(24)
    y = w_NK @ x_K
    np.testing.assert_allclose(_turn_rows(w_NK, turn) @ x_K, _turn_rows(y, turn), atol=1e-13)
    np.testing.assert_allclose(_turn_rows(y, turn), (y.reshape(2, 8) @ turn).ravel(), atol=1e-13)
    turned_x = (x_K.reshape(3, 8) @ turn).ravel()
    np.testing.assert_allclose(_turn_columns(w_NK, turn) @ turned_x, y, atol=1e-12)


def fused(export: Path, work_dir: Path) -> ir.Model:
    source = models.load(export, work_dir=work_dir)
    pipeline.run(source.model, pipeline.parse("fuse"), Context(config=source.config))
    return source.model


def steps(model: ir.Model) -> dict[str, np.ndarray]:
    """Outputs of a prompt, and the logits of a step on its cache."""
    ids = np.random.default_rng(0).integers(3, 200, (1, 24))
    first = feeds(model.graph, ids)[0]
    found = graphs.run(model, first)
    names = [value.name or "" for value in model.graph.inputs]
    second = {name: found[name.replace("past_key_values", "present")] for name in names if "past" in name}
    second |= {"input_ids": ids[:, :1], "attention_mask": np.ones((1, 25), np.int64), "position_ids": np.array([[24]])}
    return {**found, "step": graphs.run(model, {**first, **second})["logits"]}


def run(model: ir.Model, **options: object) -> Report:
    return Rotate(**{**FEW, **options}).run(model, Context(calibration=CalibrationText(vocab_size=200)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "biased", "qwen2", "qwen3", "phi3"])
def test_law_logits_stay_the_same(
    tiny_export: Callable[..., Path], architecture: str, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    biases = {"attention_bias": 1, "mlp_bias": 1} if architecture == "biased" else {}
    model = fused(tiny_export("llama" if biases else architecture, **biases), tmp_path)
    before = steps(model)
    # Every rotation counts as an improvement: random weights have no outliers to spread.
    for name in ("_turned_head", "_turned_stream"):
        monkeypatch.setattr(Rotate, name, lambda *_: 0.0)
    report = run(model, stream=stream)
    assert len(report.changed) == 2 + stream, report.reasons()
    after = steps(model)
    for name in ("logits", "step"):
        check.close(before[name], after[name], name, tolerance=2e-5)
    keys = [name for name in before if name.endswith("key")]
    assert keys
    for name in keys:
        check.close(before[name], after[name], name, tolerance=2e-5)
    assert not np.allclose(before["present.0.value"], after["present.0.value"], atol=1e-2), "values are turned"
    if stream:
        assert find_embeddings(model)[0].head is None


def test_outliers_are_spread_and_rounding_costs_less(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    def network() -> ir.Model:
        model = fused(tiny_export("llama", hidden_size=128), tmp_path)
        for one in find_linears(model):
            if one.kind == "o":  # some columns are large
                factor = np.where(np.arange(one.num_in) % 16 == 0, 30, 1).astype(np.float32)
                new = (one.w_NK() * factor).copy()
                one.set_weight(lambda new=new: new, f"{one.name}.large")
        return model

    def loss(rotated: bool) -> float:
        model = network()
        want = steps(model)["logits"]
        if rotated:
            report = run(model, block_size=16)
            assert report.changed
            assert report.metrics["error_ratio"] < 0.95
        Rtn(
            bits=4,
            block_size=16,
            symmetric=False,
            accuracy_level=0,
            exclude=("head", "embedding", "*.q", "*.k", "*.gate", "*.up", "*.down"),
        ).run(model, Context())
        return float(np.square(steps(model)["logits"] - want).mean())

    assert loss(True) < 0.9 * loss(False)


def test_what_does_not_help_is_dropped(
    tiny_export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fused(tiny_export("llama"), tmp_path)
    before = steps(model)
    for name in ("_turned_head", "_turned_stream"):
        monkeypatch.setattr(Rotate, name, lambda *_: 1e9)
    report = run(model, stream=True)
    assert not report.changed
    assert report.reasons() == {"no rotation makes its error smaller": 3}
    assert report.metrics["error_ratio"] == 1
    for name, value in steps(model).items():
        np.testing.assert_array_equal(before[name], value)


def test_what_stands_in_the_way_is_named(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    for architecture, reason in (("gpt2", "does not commute"), ("gemma2", "adds what is not the output")):
        report = run(fused(tiny_export(architecture), tmp_path), stream=True)
        reasons = [skip.reason for skip in report.skipped if skip.site == "the residual stream"]
        assert len(reasons) == 1
        assert reason in reasons[0], architecture


@pytest.mark.parametrize("place", ["values shared", "values seen", "heads seen", "written seen"])
def test_what_others_read_is_left(
    tiny_export: Callable[..., Path], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fused(tiny_export("llama"), tmp_path)
    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    values = attentions[0].inputs[2]
    written = next(one.output for one in find_linears(model) if one.kind == "o")
    if place == "values shared":
        attentions[1].replace_input_with(2, values)
    else:
        seen = {"values seen": values, "heads seen": attentions[0].outputs[0], "written seen": written}[place]
        assert seen is not None
        model.graph.outputs.append(seen)
    before = steps(model)
    for name in ("_turned_head", "_turned_stream"):
        monkeypatch.setattr(Rotate, name, lambda *_: 0.0)
    report = run(model, stream=place == "written seen")
    assert any("something else reads" in skip.reason for skip in report.skipped)
    assert len(report.changed) == {"values shared": 0, "written seen": 2}.get(place, 1)
    after = steps(model)
    for name in before:
        if not name.startswith("present"):
            check.close(before[name], after[name], name, tolerance=2e-5)


def test_what_is_quantized_is_left(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    model = fused(tiny_export("llama"), tmp_path)
    Rtn(bits=4, block_size=16).run(model, Context())
    report = run(model, stream=True)
    assert not report.changed
    assert "already quantized: comes before quantizers" in report.reasons()
    assert "the embedding is quantized already" in report.reasons()


def test_no_attention_no_rotation() -> None:
    report = run(folds.network())
    assert not report.changed


@pytest.mark.parametrize("options", ["bits=3", "block_size=7", "tokens=0", "length=0", "trials=0"])
def test_options_out_of_range(options: str) -> None:
    with pytest.raises(OptionError, match="rotate"):
        pipeline.parse(f"rotate({options})")


@pytest.mark.parametrize("kind", ["number by stream", "stream by number"])
def test_what_does_not_commute_is_refused(
    tiny_export: Callable[..., Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fused(tiny_export("llama"), tmp_path)
    for name in ("_turned_head", "_turned_stream"):
        monkeypatch.setattr(Rotate, name, lambda *_: 0.0)
    embedded = find_embeddings(model)[0].node.outputs[0]
    one = ir.Tensor(np.array(1.0, np.float32), name="one")
    value = ir.Value(name="one", shape=one.shape, type=ir.TensorType(one.dtype), const_value=one)
    model.graph.register_initializer(value)
    readers = list(embedded.uses())
    node = ir.node("Div", [value, embedded] if kind == "number by stream" else [embedded, value], name="inverse")
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = "inverse", embedded.shape, embedded.dtype
    for reader, index in readers:
        reader.replace_input_with(index, node.outputs[0])
    model.graph.insert_before(readers[0][0], [node])
    reasons = [skip for skip in run(model, stream=True).skipped if skip.site == "the residual stream"]
    assert bool(reasons) == (kind == "number by stream")
