"""Checkpoints become graphs that compute what transformers computes; bad ones are refused in one line."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from onnxpress import models
from onnxpress.compiler.errors import (
    BadModelFileError,
    OnnxpressError,
    OptionError,
    UnsupportedModelError,
    UserError,
)
from onnxpress.models import export, tiny

LENGTH = 20  # longer than the sliding window of the tiny models


def session(directory: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])


def feeds(run: onnxruntime.InferenceSession, tokens: np.ndarray, past: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs for `tokens` after `past`, of which only those the graph has are kept."""
    batch, new = tokens.shape
    before = next(iter(past.values())).shape[2] if past else 0
    known = {
        "input_ids": tokens,
        "attention_mask": np.ones((batch, before + new), np.int64),
        "position_ids": np.arange(before, before + new)[None].repeat(batch, 0),
        "token_type_ids": np.zeros((batch, new), np.int64),
        **past,
    }
    empty = {
        value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
        for value in run.get_inputs()
        if value.name.startswith("past_key_values")
    }
    return {value.name: {**empty, **known}[value.name] for value in run.get_inputs()}


def reference(architecture: str, **inputs: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        output = tiny.tiny(architecture)(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return np.asarray(output.logits)


@pytest.mark.parametrize(
    "architecture, exporter",
    [
        *((name, "optimum") for name in tiny.tiny_names() if name not in ("resnet", "t5", "vit", "whisper")),
        ("llama", "dynamo"),
    ],
)
def test_text_models_compute_what_transformers_computes(
    tiny_export: Callable[..., Path], architecture: str, exporter: str
) -> None:
    run = session(tiny_export(architecture, exporter))
    tokens = np.random.default_rng(0).integers(3, 259, (3, LENGTH))
    expected = reference(architecture, input_ids=tokens)
    np.testing.assert_allclose(run.run(["logits"], feeds(run, tokens, {}))[0], expected, atol=2e-5)
    names = [value.name for value in run.get_outputs()]
    if names == ["logits"]:
        assert architecture in ("bert", "bert_classifier", "distilbert", "modernbert", "roberta")
        return
    # In three pieces through the cache, the second of several tokens.
    past: dict[str, np.ndarray] = {}
    for start, stop in ((0, 7), (7, LENGTH - 1), (LENGTH - 1, LENGTH)):
        outputs = dict(zip(names, run.run(None, feeds(run, tokens[:, start:stop], past)), strict=True))
        np.testing.assert_allclose(outputs["logits"], expected[:, start:stop], atol=2e-5)
        past = {name.replace("present", "past_key_values"): outputs[name] for name in names if name != "logits"}


@pytest.mark.parametrize("exporter", export.EXPORTERS)
@pytest.mark.parametrize("architecture", ["resnet", "vit"])
def test_vision_models_compute_what_transformers_computes(
    tiny_export: Callable[..., Path], architecture: str, exporter: str
) -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    run = session(tiny_export(architecture, exporter))
    expected = reference(architecture, pixel_values=images)
    np.testing.assert_allclose(run.run(["logits"], {"pixel_values": images})[0], expected, atol=2e-5)


def test_both_exporters_give_the_same_face(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    faces = []
    for exporter in ("optimum", "dynamo"):
        graph = models.load(tiny_export("llama", exporter), work_dir=tmp_path).model.graph
        faces.append([(value.name, value.dtype, str(value.shape)) for value in (*graph.inputs, *graph.outputs)])
    assert faces[0] == faces[1]
    assert faces[0][1][2] == "[batch_size,past_sequence_length + sequence_length]"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny("llama", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_what_a_source_brings(checkpoint: Path, tmp_path: Path) -> None:
    said: list[str] = []
    source = models.load(checkpoint, work_dir=tmp_path, progress=said.append)
    assert source.kind == "huggingface"
    assert source.directory.is_relative_to(tmp_path)
    assert source.config["num_key_value_heads"] == 2
    assert source.generation_config["eos_token_id"] == 2
    assert source.files["tokenizer.json"] == checkpoint / "tokenizer.json"
    assert source.files["chat_template.jinja"].is_file()
    exporter, why = export.choose(None)
    assert source.provenance["exporter"] == exporter
    assert source.provenance.get("exporter_because", "") == why
    assert source.provenance["versions"]["torch"]
    assert len(source.provenance["files"]["model.safetensors"]["sha256"]) == 64
    assert said == [f"exporting llama with {exporter}" + (f" ({why})" if why else "")]
    large = [value.const_value for value in source.model.graph.initializers.values() if value.const_value is not None]
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in large if tensor.nbytes > 4096)


def test_exporters_are_silent(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models.load(checkpoint, work_dir=tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def no_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without optimum."""
    version = importlib.metadata.version

    def asked(name: str) -> str:
        if name.startswith("optimum"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", asked)


@pytest.mark.usefixtures("no_optimum")
def test_without_optimum_dynamo_stands_in_and_says_so(checkpoint: Path, tmp_path: Path) -> None:
    said: list[str] = []
    source = models.load(checkpoint, work_dir=tmp_path, progress=said.append)
    assert said == ["exporting llama with dynamo (optimum is not installed)"]
    assert source.provenance["exporter"] == "dynamo"
    assert source.provenance["exporter_because"] == "optimum is not installed"


@pytest.mark.usefixtures("no_optimum")
def test_optimum_is_asked_for_and_not_installed(copy: Path) -> None:
    refuse(copy, OptionError, "optimum-onnx", "pip install '.[optimum]'", "'dynamo'", exporter="optimum")


def test_optimum_is_the_default_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    assert export.choose(None) == ("optimum", "")
    assert export.choose("dynamo") == ("dynamo", "")


def test_a_child_process_exports_the_same(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    graphs = []
    for name, isolate in (("here", False), ("child", True)):
        (tmp_path / name).mkdir()
        job = export.Job("huggingface", str(checkpoint), str(tmp_path / name), export.choose(None)[0], 18)
        assert export.run(job, isolate=isolate)["architecture"] == "LlamaForCausalLM"
        graphs.append((tmp_path / name / "model.onnx").read_bytes())
        left = {path.name for path in (tmp_path / name).iterdir()}
        assert "result.json" not in left
        assert "export.log" not in left
    assert graphs[0] == graphs[1]
    assert capfd.readouterr() == ("", "")


class StandIn(subprocess.Popen[bytes]):
    """A child process that runs `program` instead of an export; sys.argv[1] is the output directory."""

    program = ""

    def __init__(self, command: list[str], **options: Any) -> None:
        super().__init__([sys.executable, "-c", self.program, json.loads(command[-1])["out"]], **options)


def test_errors_of_a_child_process_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = {"type": "UnsupportedModelError", "message": "no such thing", "hint": "another"}
    (tmp_path / "prepared.json").write_text(json.dumps({"error": error}))
    StandIn.program = "import os, sys; os.chdir(sys.argv[1]); os.rename('prepared.json', 'result.json')"
    monkeypatch.setattr(subprocess, "Popen", StandIn)
    with pytest.raises(UnsupportedModelError) as caught:
        export.run(export.Job("huggingface", "x", str(tmp_path), "optimum", 18), isolate=True)
    assert (caught.value.message, caught.value.hint) == ("no such thing", "another")


@pytest.mark.parametrize(
    "program, words",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
        ("raise SystemExit('all is lost')", "status 1: all is lost"),
        ("", "it said nothing"),
    ],
)
def test_a_child_process_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, words: str) -> None:
    StandIn.program = program
    monkeypatch.setattr(subprocess, "Popen", StandIn)
    with pytest.raises(OnnxpressError, match=words):
        export.run(export.Job("huggingface", "x", str(tmp_path), "optimum", 18), isolate=True)


@pytest.mark.parametrize("is_said", [True, False])
def test_an_export_that_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_said: bool) -> None:
    """Said by an exporter in its own way, or not at all because the log found no room either."""
    words = "'RuntimeError: No space left on device, 3 of 7'" if is_said else "1"
    StandIn.program = f"raise SystemExit({words})"
    monkeypatch.setattr(subprocess, "Popen", StandIn)
    if not is_said:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(OSError, match="No space left") as caught:
        export.run(export.Job("huggingface", "x", str(tmp_path), "optimum", 18), isolate=True)
    assert caught.value.errno == errno.ENOSPC


def test_a_child_process_ends_with_its_parent(checkpoint: Path, tmp_path: Path) -> None:
    job = json.dumps(dataclasses.asdict(export.Job("huggingface", str(checkpoint), str(tmp_path), "optimum", 18)))
    command = [sys.executable, "-m", "onnxpress.models.export", job]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdin
    child.stdin.close()  # what happens when the parent is gone
    assert child.wait(timeout=60) == 1
    assert not (tmp_path / "model.onnx").exists()


# --- bad input ----------------------------------------------------------------------------------------------------


def edit(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refuse(directory: Path, kind: type[UserError], *words: str, **options: Any) -> None:
    work = directory.parent / "work"
    work.mkdir()
    with pytest.raises(kind) as caught:
        models.load(directory, work_dir=work, **options)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.hint
    assert len(caught.value.message.splitlines()) == 1


def test_truncated_weights(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refuse(copy, BadModelFileError, "model.safetensors", "truncated")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"notjson!"])
def test_weights_that_are_no_safetensors(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    refuse(copy, BadModelFileError, "model.safetensors")


def test_a_missing_shard(copy: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(copy, BadModelFileError, "missing model-1.safetensors")


def test_a_missing_weight_is_no_random_number(copy: Path) -> None:
    edit(copy, num_hidden_layers=3)
    refuse(copy, BadModelFileError, "9 weights are missing", "model.layers.2")


def test_weights_of_another_size(copy: Path) -> None:
    edit(copy, intermediate_size=96)
    refuse(copy, BadModelFileError, "do not load")


def test_pickled_weights(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refuse(copy, UnsupportedModelError, "pickled", "safetensors")


def test_an_unknown_architecture(copy: Path) -> None:
    edit(copy, model_type="unheard-of")
    refuse(copy, UnsupportedModelError, "'unheard-of'")


def test_code_of_a_checkpoint_never_runs(copy: Path) -> None:
    (copy / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    edit(copy, model_type="unheard-of", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    refuse(copy, UnsupportedModelError, "own code")
    assert not (copy / "ran").exists()


def test_a_quantized_checkpoint(copy: Path) -> None:
    edit(copy, quantization_config={"quant_method": "gptq"})
    refuse(copy, UnsupportedModelError, "'gptq'")


def test_an_encoder_decoder(copy: Path) -> None:
    edit(copy, is_encoder_decoder=True)
    refuse(copy, UnsupportedModelError, "encoder-decoder")


def test_dynamo_is_for_text_and_images(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ASTModel(transformers.ASTConfig(**sizes)).save_pretrained(tmp_path / "sounds")
    refuse(tmp_path / "sounds", UnsupportedModelError, "ASTModel reads input_values", "optimum", exporter="dynamo")


@pytest.mark.parametrize(
    ("architecture", "attention"), [("falcon", "eager"), ("falcon_alibi", "sdpa"), ("gpt2", "sdpa")]
)
def test_dynamo_exports_the_attention_that_computes_right(tmp_path: Path, architecture: str, attention: str) -> None:
    directory = tiny.save_tiny(architecture, tmp_path / "checkpoint", num_layers=1)
    source = models.load(directory, work_dir=tmp_path, exporter="dynamo")
    assert source.provenance["attention"] == attention


def test_a_model_without_a_plain_cache(tmp_path: Path) -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, state_size=8)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    refuse(tmp_path / "mamba", UnsupportedModelError, "MambaForCausalLM", exporter="dynamo")


def test_optimum_cannot_write_every_opset(copy: Path) -> None:
    if not export.has_optimum():
        pytest.skip("optimum is not installed")
    refuse(copy, OptionError, "opset=24", "'dynamo'", opset=24)
