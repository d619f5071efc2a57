"""What an artifact holds, and that its readers accept it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from decoders import HEAD_SIZE, KV_HEADS, VOCABULARY, decoder, write_decoder

from onnxpress.compiler.artifact import Artifact, open_artifact
from onnxpress.compiler.errors import BadModelFileError, CalibrationError, OptionError
from onnxpress.compiler.genai import find_cache, genai_config
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.quantization.gptq import Gptq

# Every key that onnxruntime-genai knows among those we might write; it refuses a file with any other.
GENAI_MODEL = {"bos_token_id", "context_length", "decoder", "eos_token_id", "pad_token_id", "type", "vocab_size"}
GENAI_DECODER = {
    "session_options",
    "filename",
    "head_size",
    "hidden_size",
    "inputs",
    "outputs",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("artifact") / "source")


@pytest.fixture(scope="module")
def artifact(source: Path) -> Artifact:
    return optimize(source, output=source.parent / "out", passes="rtn(bits=4)")


def test_holds_what_it_promises(artifact: Artifact) -> None:
    names = {path.name for path in artifact.directory.iterdir()}
    assert names == {
        *("model.onnx", "model.onnx.data", "config.json", "generation_config.json", "genai_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "onnxpress.json"),
    }


def test_the_card_says_what_was_done(artifact: Artifact) -> None:
    card = json.loads((artifact.directory / "onnxpress.json").read_text())
    assert open_artifact(artifact.directory).report == card
    assert card["pipeline"] == "rtn"
    (row,) = card["passes"]
    assert row["promise"] == "lossy"
    assert row["changed"] > 0
    assert row["bytes_after"] < row["bytes_before"] / 4
    assert row["metrics"]["kl"] == row["metrics"]["kl_added"] == card["quality"]["kl"] > 0
    assert 0 < card["quality"]["top1_agreement"] <= 1
    for name in ("model.onnx", "model.onnx.data"):
        content = (artifact.directory / name).read_bytes()
        assert card["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert card["source"]["files"]
    assert card["versions"]["onnxpress"]
    assert card["requires"]["ir_version"] == 10
    assert card["machine"]["cores"]
    assert card["seconds"].keys() == {"load", "passes", "write", "measure"}


def test_the_graph_is_set_up_for_onnx_runtime(artifact: Artifact) -> None:
    model = ir.load(artifact.model_path)
    assert model.ir_version == 10
    assert model.opset_imports.keys() == {"", "com.microsoft"}
    assert model.producer_name == "onnxpress"
    assert model.metadata_props["onnxpress.pipeline"] == "rtn"
    session = ort.InferenceSession(str(artifact.model_path), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["onnxpress.pipeline"] == "rtn"


def test_small_tensors_stay_in_the_graph_file(artifact: Artifact) -> None:
    for value in ir.load(artifact.model_path).graph.initializers.values():
        assert value.const_value is not None
        assert isinstance(value.const_value, ir.ExternalTensor) == (value.const_value.nbytes > 256), value.name


def test_the_same_run_gives_the_same_bytes(artifact: Artifact, source: Path, tmp_path: Path) -> None:
    again = optimize(source, output=tmp_path / "again", passes="rtn(bits=4)")
    for name in ("model.onnx", "model.onnx.data"):
        assert again.report["files"][name] == artifact.report["files"][name]


def test_python_use(artifact: Artifact, source: Path) -> None:
    assert artifact.session().vocab_size == VOCABULARY
    assert artifact.generate([1, 5, 9], max_new_tokens=4) == artifact.generate([1, 5, 9], max_new_tokens=4)
    found = artifact.evaluate(reference=source, context=32, tokens=128)
    assert found.tokens == 128
    assert found.kl is not None
    assert found.kl > 0


def test_no_output_writes_to_a_temporary_directory(source: Path) -> None:
    artifact = optimize(source, passes="", measure=False)
    assert artifact.model_path.is_file()
    assert artifact.report["passes"] == []


def test_float_graph_survives_unchanged(source: Path, tmp_path: Path) -> None:
    artifact = optimize(source, output=tmp_path / "plain", passes="")
    before, after = (ir.load(path / "model.onnx") for path in (source, artifact.directory))
    assert [node.op_type for node in before.graph] == [node.op_type for node in after.graph]
    for name, value in before.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), after.graph.initializers[name].const_value.numpy())


def test_genai_config_has_known_keys_only(artifact: Artifact) -> None:
    config = json.loads((artifact.directory / "genai_config.json").read_text())
    assert config.keys() == {"model", "search"}
    assert config["model"].keys() == GENAI_MODEL
    assert config["model"]["decoder"].keys() == GENAI_DECODER
    assert config["model"]["type"] == "llama"
    assert config["model"]["eos_token_id"] == [2]
    assert config["model"]["vocab_size"] == VOCABULARY
    assert config["model"]["decoder"]["inputs"].keys() == {
        *("input_ids", "attention_mask", "past_key_names", "past_value_names")
    }
    assert config["model"]["decoder"]["head_size"] == HEAD_SIZE
    assert config["model"]["decoder"]["num_key_value_heads"] == KV_HEADS
    assert config["search"]["past_present_share_buffer"] is True


def test_an_unknown_architecture_is_a_plain_decoder_and_cuda_names_its_provider() -> None:
    config = genai_config(decoder(), {"model_type": "brandnew"}, {}, TARGETS["cuda"])
    assert config is not None
    assert config["model"]["type"] == "decoder"
    assert config["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]


def test_a_cache_that_is_concatenated_is_not_shared() -> None:
    model = decoder(layers=1)
    attention = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    present = attention.outputs[1]
    joined = ir.Node("", "Identity", [present])
    joined.outputs[0].name, present.name = "present.0.key", "inner"
    model.graph.append(joined)
    model.graph.outputs[model.graph.outputs.index(present)] = joined.outputs[0]
    cache = find_cache(model)
    assert cache is not None
    assert not cache.is_shareable


def test_no_cache_no_genai_config() -> None:
    model = decoder(layers=1)
    for value in [value for value in model.graph.outputs if (value.name or "").startswith("present")]:
        model.graph.outputs.remove(value)
    assert find_cache(model) is None
    assert genai_config(model, {}, {}, TARGETS["cpu"]) is None


def test_without_a_tokenizer_the_card_says_what_the_loss_was_measured_on(tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "source", tokenizer=False)
    artifact = optimize(source, output=tmp_path / "out", passes="rtn(bits=8)")
    assert "random tokens" in artifact.report["quality"]["measured_on"]


def test_calibration_text_must_be_there(source: Path, tmp_path: Path) -> None:
    for content in (None, b"", b"\xff\xfe\x00"):
        if content is not None:
            (tmp_path / "text").write_bytes(content)
        with pytest.raises(CalibrationError):
            optimize(source, output=tmp_path / "out", passes="", calibration=tmp_path / "text")
    assert not (tmp_path / "out").exists()


def test_calibration_text_needs_a_tokenizer(tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "source", tokenizer=False)
    (tmp_path / "text.txt").write_text("words " * 100)
    with pytest.raises(CalibrationError, match=r"text\.txt: the model has no tokenizer\.json"):
        optimize(source, output=tmp_path / "out", passes="gptq", calibration=tmp_path / "text.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", [0, 2])
def test_who_interrupts_is_told_what_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path / "cache"))
    real, fits = Gptq._fit, []

    def fit(self: Gptq, *given: Any) -> Any:
        if len(fits) == stage:
            raise KeyboardInterrupt
        fits.append(given)
        return real(self, *given)

    monkeypatch.setattr(Gptq, "_fit", fit)
    # Not text that the model writes, which is kept too.
    passes, given = "gptq(tokens=128, length=32, block_size=16)", "english"
    with pytest.raises(KeyboardInterrupt) as caught:
        optimize(source, output=tmp_path / "out", passes=passes, calibration=given, measure=False)
    assert ("the same command goes on from there" in str(caught.value)) == bool(stage)


def test_recipe_and_passes_exclude_each_other(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="both"):
        optimize(source, output=tmp_path / "out", recipe="int4", passes="rtn")


@pytest.mark.parametrize("damage", ["no manifest", "not json", "a list", "no graph"])
def test_opening_what_is_no_artifact(tmp_path: Path, damage: str) -> None:
    content = {"not json": "{", "a list": "[]", "no graph": "{}"}.get(damage)
    if content is not None:
        (tmp_path / "onnxpress.json").write_text(content)
    with pytest.raises(BadModelFileError):
        open_artifact(tmp_path)
