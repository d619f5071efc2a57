"""Each graph of an encoder-decoder model, as optimum exports it, on its own; and a network without attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.pass_ import Context
from onnxpress.models.tiny import save_tiny, tiny
from onnxpress.passes.fusion import fuse_encoder_attention
from onnxpress.passes.fusion.fuse_encoder_attention import FuseEncoderAttention

LAYERS = 2
# Attentions per layer: a decoder looks at itself and at the encoder.
PARTS = {"encoder_model": 1, "decoder_model": 2, "decoder_with_past_model": 2}
TOLERANCE = {"fp32": 1e-5, "int8": 0.05}  # of the largest value of an output
# (batch, new tokens, tokens in the cache, padding on the right of what the encoder read)
CALLS = ((1, 5, 0, 0), (2, 1, 0, 2), (2, 1, 3, 2), (1, 1, 30, 0))

Parts = Callable[[str], Path]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Directory with the graphs of a small random model."""
    found: dict[str, Path] = {}

    def export(architecture: str) -> Path:
        pytest.importorskip("optimum.exporters.onnx", reason="optimum is not installed")
        from optimum.exporters.onnx import onnx_export_from_model

        from onnxpress.models.exporters import quiet

        if architecture not in found:
            found[architecture] = tmp_path_factory.mktemp(architecture)
            with quiet():
                model = tiny(architecture, num_layers=LAYERS)
                onnx_export_from_model(model, found[architecture], opset=18, do_validation=False)
        return found[architecture]

    return export


def feeds(session: ort.InferenceSession, batch: int, new: int, past: int, padding: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    encoded = 7

    def size(dim: Any) -> int:
        if isinstance(dim, int):
            return dim
        if "batch" in dim:
            return batch
        return encoded if "encoder" in dim else past if "past" in dim else new

    made: dict[str, np.ndarray] = {}
    for one in session.get_inputs():
        sizes = [size(dim) for dim in one.shape]
        if "mask" in one.name:
            made[one.name] = np.ones(sizes, np.int64)
            made[one.name][-1, encoded - padding :] = 0
        elif one.type == "tensor(int64)":
            made[one.name] = rng.integers(3, 200, sizes)
        elif one.type == "tensor(bool)":
            made[one.name] = np.full(sizes, past > 0)
        else:
            made[one.name] = rng.standard_normal(sizes).astype(np.float32)
    return made


def worst(before: Path, after: Path) -> float:
    """Largest difference of an output, relative to its largest value, over all calls."""
    old, new = (ort.InferenceSession(str(path)) for path in (before, after))
    names = [one.name for one in old.get_outputs()]
    found = 0.0
    for call in CALLS:
        given = feeds(old, *call)
        for want, got in zip(old.run(names, given), new.run(names, given), strict=True):
            found = max(found, float(np.abs(want - got).max(initial=0) / max(np.abs(want).max(initial=0), 1e-6)))
    return found


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("architecture", ["t5", "whisper"])
def test_each_graph(parts: Parts, tmp_path: Path, architecture: str, part: str, recipe: str) -> None:
    source = parts(architecture) / f"{part}.onnx"
    made = optimize(source, output=tmp_path / "made", recipe=recipe)
    assert worst(source, made.directory / "model.onnx") <= TOLERANCE[recipe]
    operators = made.report["operators"]
    reasons = [one["reason"] for row in made.report["passes"] for one in row["skipped"]]
    attentions = [operators.get(f"com.microsoft.{name}", 0) for name in ("Attention", "MultiHeadAttention")]
    assert sum(attentions) == PARTS[part] * LAYERS, reasons
    assert "Softmax" not in operators
    assert made.report["warnings"] == []
    assert all(reasons)
    norms = [name for name in operators if "LayerNormalization" in name]
    assert all(("Simplified" in name) == (architecture == "t5") for name in norms)
    if recipe == "int8":
        assert operators["com.microsoft.MatMulNBits"] >= 4 * LAYERS
        assert "not_measured" not in made.report["quality"]


def test_a_cache_is_not_turned_for_each_token(parts: Parts, tmp_path: Path) -> None:
    """Keys and values of the encoder are read as they lie."""
    source = parts("whisper") / "decoder_with_past_model.onnx"
    made = optimize(source, output=tmp_path / "made", recipe="fp32")
    model = models.load(made.directory, work_dir=tmp_path).model
    cached = [one for one in model.graph.inputs if one.name is not None and ".encoder." in one.name]
    assert len(cached) == 2 * LAYERS
    assert {node.op_type for one in cached for node in one.consumers()} == {"MultiHeadAttention"}


@pytest.mark.parametrize("architecture", ["t5", "whisper"])
def test_a_merged_decoder_is_left_whole_and_says_so(parts: Parts, tmp_path: Path, architecture: str) -> None:
    source = parts(architecture) / "decoder_model_merged.onnx"
    made = optimize(source, output=tmp_path / "made", recipe="int8")
    assert worst(source, made.directory / "model.onnx") == 0
    assert "inside If" in made.report["warnings"][0]
    reasons = [one["reason"] for row in made.report["passes"] for one in row["skipped"]]
    assert "no pass looks into the graphs inside If" in reasons


@pytest.mark.parametrize(("architecture", "task"), [("t5", "text2text-generation"), ("whisper", "speech-recognition")])
def test_a_checkpoint_is_refused_with_the_way(tmp_path: Path, architecture: str, task: str) -> None:
    checkpoint = save_tiny(architecture, tmp_path / "checkpoint")
    with pytest.raises(UnsupportedModelError, match="exports to several") as refused:
        optimize(checkpoint, output=tmp_path / "made")
    hint = str(refused.value.hint)
    assert "optimum-cli export onnx" in hint
    assert f"{task}-with-past --model {checkpoint}" in hint
    assert "onnxpress optimize PARTS/encoder_model.onnx -o OUT" in hint


def decoder(parts: Parts, tmp_path: Path) -> ir.Model:
    source = models.load(parts("whisper") / "decoder_with_past_model.onnx", work_dir=tmp_path)
    pipeline.run(source.model, pipeline.parse("simplify(shapes=False)"), Context())
    return source.model


def test_swapped_caches_are_refused(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = fuse_encoder_attention._read

    def wrong(softmax: ir.Node) -> Any:
        found = read(softmax)
        found.k.past, found.v.past = found.v.past, found.k.past
        return found

    monkeypatch.setattr(fuse_encoder_attention, "_read", wrong)
    report = FuseEncoderAttention().run(decoder(parts, tmp_path), Context())
    assert (len(report.changed), len(report.skipped)) == (LAYERS, LAYERS)  # those without a cache of their own


def test_a_guard_stays_where_a_query_may_see_nothing(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where(IsNaN(p), 0, p) may only be dropped if the mask leaves a key to every query."""
    model = decoder(parts, tmp_path)
    guarded = next(node for node in model.graph if node.op_type == "IsNaN")
    softmax = guarded.inputs[0].producer()  # type: ignore[union-attr]
    found = fuse_encoder_attention._read(softmax)  # type: ignore[arg-type]
    hidden = ir.val("hidden", const_value=ir.tensor(np.full((1, 1, 1, 1), -np.inf, np.float32), name="hidden"))
    model.graph.register_initializer(hidden)
    more = ir.node("Add", [found.mask, hidden])  # type: ignore[list-item]
    more.outputs[0].type, more.outputs[0].shape = found.mask.type, found.mask.shape  # type: ignore[union-attr]
    found.mask.replace_all_uses_with(more.outputs[0])  # type: ignore[union-attr]
    more.replace_input_with(0, found.mask)
    model.graph.append(more)
    model.graph.sort()
    report = FuseEncoderAttention().run(model, Context())
    assert report.reasons()["some probabilities are replaced"] >= 1
    assert any(node.op_type == "IsNaN" for node in model.graph)


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_a_convolution_network_keeps_its_form(tiny_export: Callable[..., Path], tmp_path: Path, recipe: str) -> None:
    source = tiny_export("resnet")
    made = optimize(source, output=tmp_path / "made", recipe=recipe)
    before, after = (ort.InferenceSession(str(path / "model.onnx")) for path in (source, made.directory))
    pixels = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)}
    want, got = before.run(None, pixels)[0], after.run(None, pixels)[0]
    assert np.abs(want - got).max() <= TOLERANCE[recipe] * np.abs(want).max()
    convolutions = [one.op_type for one in models.load(source, work_dir=tmp_path).model.graph].count("Conv")
    assert made.report["operators"]["Conv"] == convolutions > 0
    assert not any("com.microsoft" in name and recipe == "fp32" for name in made.report["operators"])
