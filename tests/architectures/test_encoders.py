"""Every encoder: one attention operator per layer, and the outputs that torch gives, padding included."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest
import transformers
from onnx_ir.passes import common

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.probe import Probe, image_sizes
from onnxpress.compiler.sample_text import sample_tokens
from onnxpress.models.tiny import VOCABULARY, tiny

LAYERS, HIDDEN = 3, 128
ENCODERS = ["bert", "distilbert", "modernbert", "roberta", "vit"]
TOLERANCE = 1e-5  # of the largest output

Export = Callable[..., Path]


def inputs_of(architecture: str, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    if architecture == "vit":
        return {"pixel_values": rng.standard_normal((batch, 3, 32, 32)).astype(np.float32)}
    ids = rng.integers(3, 200, (batch, 24))  # longer than the local window of ModernBERT
    mask = np.ones_like(ids)
    if batch > 1:
        ids[-1, 17:] = 0
        mask[-1, 17:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def torch_output(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.asarray(model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits)


@pytest.mark.parametrize("exporter", ["optimum", "dynamo"])
@pytest.mark.parametrize("architecture", ENCODERS)
def test_encoder(
    tiny_export: Export, tmp_path: Path, architecture: str, exporter: str, architectures: list[dict[str, Any]]
) -> None:
    layers = LAYERS if exporter == "optimum" or architecture == "modernbert" else 1  # torch needs seconds for a layer
    exported = tiny_export(architecture, exporter, num_layers=layers, hidden_size=HIDDEN)
    source = models.load(exported, work_dir=tmp_path)
    before = len(source.model.graph)
    done = pipeline.run(source.model, pipeline.parse("fp32"), Context(config=source.config))
    reasons = [reason for _, report in done for reason in report.reasons()]
    ops = Counter(node.op_type for node in source.model.graph)
    differences = {}
    model = tiny(architecture, num_layers=layers, hidden_size=HIDDEN)
    for name, batch in (("prompt, past 0", 1), ("batch 2, padded", 2)):
        inputs = inputs_of(architecture, batch)
        given = {
            one.name: np.zeros_like(inputs["input_ids"]) for one in source.model.graph.inputs if "type" in one.name
        }
        want, got = torch_output(model, inputs), graphs.run(source.model, inputs | given)["logits"]
        seen = inputs["attention_mask"][:, :, None] if "attention_mask" in inputs else 1
        differences[name] = float(np.abs((want - got) * seen).max() / np.abs(want).max())
    fused = ("Attention", "MultiHeadAttention", "LayerNormalization", "Sum", "Gelu", "RotaryEmbedding")
    architectures.append(
        {
            "model": architecture,
            "exporter": exporter,
            "opset": 18,
            "attention": "its own" if exporter == "optimum" else "eager",
            "layers": layers,
            "nodes": (before, len(source.model.graph)),
            "operators": {name: ops[name] / layers for name in fused if ops[name]},
            "stray": Counter(),
            "differences": differences,
        }
    )
    # NOTE: in transformers 4 the eager form of DistilBERT replaces scores where a token is hidden, which no bias can.
    selects = architecture == "distilbert" and exporter == "dynamo" and transformers.__version__ < "5"
    attentions = sum("Attention" in node.op_type and node.domain == "com.microsoft" for node in source.model.graph)
    assert (attentions, ops["Softmax"]) == ((0, layers) if selects else (layers, 0)), reasons
    assert all(difference <= TOLERANCE for difference in differences.values()), differences


@pytest.mark.parametrize(("recipe", "least"), [("int8", 0.9995), ("int4-rtn", 0.97), ("w8a8", 0.999)])
def test_quantized_encoders_stay_near(big_tiny_export: Export, tmp_path: Path, recipe: str, least: float) -> None:
    artifact = optimize(big_tiny_export("bert", "optimum"), output=tmp_path / recipe, recipe=recipe)
    quality = artifact.report["quality"]
    assert quality["kl"] > 0
    assert least <= quality["cosine_similarity"] < 1
    assert artifact.report["operators"]["com.microsoft.MultiHeadAttention"] == LAYERS
    inputs = inputs_of("bert", 1)
    want = torch_output(tiny("bert", num_layers=LAYERS, hidden_size=HIDDEN), inputs)
    model = models.load(artifact.directory, work_dir=tmp_path).model
    got = graphs.run(model, inputs | {"token_type_ids": np.zeros_like(inputs["input_ids"])})["logits"]
    assert (want * got).sum() / np.sqrt((want**2).sum() * (got**2).sum()) >= least


@pytest.mark.parametrize(("architecture", "has_kl"), [("bert_classifier", True), ("vit", False), ("embedder", False)])
@pytest.mark.parametrize(("recipe", "least"), [("int8", 0.998), ("int4-rtn", 0.8)])
def test_the_cosine_in_the_card_is_that_of_the_outputs(
    tiny_export: Export, tmp_path: Path, architecture: str, has_kl: bool, recipe: str, least: float
) -> None:
    """Classes of a text or an image, or the last hidden state of a text."""
    source = tiny_export("bert" if architecture == "embedder" else architecture)
    if architecture == "embedder":
        source = headless(source, tmp_path / "embedder")
    card = optimize(source, output=tmp_path / "out", recipe=recipe).report
    quality = card["quality"]
    assert least <= quality["cosine_similarity"] < 1
    assert quality["output_error"] > 0
    if architecture == "vit":
        feeds = Probe(source / "model.onnx").random_feeds(
            sizes=image_sizes(models.load(source, work_dir=tmp_path).config)
        )
    else:
        assert ("kl" in quality) == has_kl
        assert quality["tokens"] == 128, "ids are those of the vocabulary, not of the classes"
        files = models.load(source, work_dir=tmp_path).files
        ids, _ = sample_tokens(files, "", count=128, vocab_size=VOCABULARY, seed=0)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    want, got = (Probe(path / "model.onnx", optimized=True).run(feeds) for path in (source, tmp_path / "out"))
    cosines = [
        float((want[name] * got[name]).sum() / np.linalg.norm(want[name]) / np.linalg.norm(got[name])) for name in want
    ]
    assert quality["cosine_similarity"] == pytest.approx(min(cosines), abs=1e-4)
    (rtn,) = [row for row in card["passes"] if row["pass"].startswith("rtn")]
    assert rtn["metrics"]["cosine_similarity"] == quality["cosine_similarity"]


def headless(source: Path, target: Path) -> Path:
    """The encoder below a head for masked tokens, with two outputs."""
    target.mkdir()
    model = models.load(source, work_dir=target).model
    inner = [value for node in model.graph if node.op_type == "LayerNormalization" for value in node.outputs]
    states = [value for value in inner if value.name is not None and "/encoder/" in value.name]
    model.graph.outputs[:] = [states[-1], states[0]]
    model.graph.outputs[0].name, model.graph.outputs[1].name = "last_hidden_state", "first_hidden_state"
    for value in model.graph.outputs:
        value.dtype = ir.DataType.FLOAT
    common.RemoveUnusedNodesPass()(model)
    ir.save(model, target / "model.onnx", external_data="model.onnx.data")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, target / name)
    return target
