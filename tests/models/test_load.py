"""`load` finds out what the user means, and says in one line what is wrong when it means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler.errors import BadModelFileError, OptionError, UnsupportedModelError, UserError


def write_graph(path: Path) -> Path:
    """A graph with one weight, written to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x = ir.val("x", ir.DataType.FLOAT, [4])
    weight = ir.val("w", const_value=ir.tensor(np.ones(4, np.float32), name="w"))
    node = ir.node("Add", [x, weight])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape([4])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 18}, name="g")
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_an_onnx_file(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "any name.onnx")
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 2})
    write_json(tmp_path / "tokenizer.json", {})
    source = models.load(graph, work_dir=tmp_path)
    assert (source.kind, source.name) == ("onnx", str(graph))
    assert (source.model_path, source.directory) == (graph, tmp_path)
    assert source.config == {"model_type": "llama"}
    assert source.generation_config == {"eos_token_id": 2}
    assert source.files == {"tokenizer.json": tmp_path / "tokenizer.json"}
    assert set(source.provenance["files"]["any name.onnx"]) == {"bytes", "sha256"}


@pytest.mark.parametrize("name", ["model.onnx", "decoder.onnx", "onnx/model.onnx"])
def test_a_directory_with_a_graph(tmp_path: Path, name: str) -> None:
    graph = write_graph(tmp_path / name)
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    source = models.load(tmp_path, work_dir=tmp_path)
    assert source.model_path == graph
    assert source.config == {"model_type": "llama"}


def test_model_onnx_is_preferred(tmp_path: Path) -> None:
    write_graph(tmp_path / "other.onnx")
    graph = write_graph(tmp_path / "model.onnx")
    assert models.load(tmp_path, work_dir=tmp_path).model_path == graph


def test_genai_layout(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "decoder.onnx")
    write_graph(tmp_path / "embedding.onnx")
    decoder = {"filename": "decoder.onnx", "num_hidden_layers": 3, "head_size": 8, "num_key_value_heads": 2}
    model = {"type": "llama", "vocab_size": 320, "context_length": 64, "eos_token_id": [2, 5], "decoder": decoder}
    write_json(tmp_path / "genai_config.json", {"model": model, "search": {}})
    source = models.load(tmp_path, work_dir=tmp_path)
    assert source.model_path == graph
    assert source.config["model_type"] == "llama"
    assert source.config["max_position_embeddings"] == 64
    assert source.config["head_dim"] == 8
    assert source.generation_config == {"eos_token_id": [2, 5]}


def test_an_artifact(tmp_path: Path) -> None:
    write_graph(tmp_path / "model.onnx")
    write_json(tmp_path / "onnxpress.json", {"pipeline": "fuse"})
    source = models.load(tmp_path, work_dir=tmp_path)
    assert source.kind == "artifact"
    assert source.provenance["artifact"] == {"pipeline": "fuse"}


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_graph(tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    assert models.load("model.onnx", work_dir=tmp_path).model_path == tmp_path / "model.onnx"
    assert models.load(".", work_dir=tmp_path).model_path == tmp_path / "model.onnx"


def test_opening_onnx_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write_graph(tmp_path / "model.onnx")
    program = (
        "import sys; from pathlib import Path; import onnxpress.models as models\n"
        "models.load(sys.argv[1], work_dir=Path())\n"
        "print(*sorted({'torch', 'transformers', 'optimum', 'gguf', 'huggingface_hub'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == []


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    write_graph(tmp_path / "onnx" / "model.onnx")

    def snapshot(model_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((model_id, "onnx/model.onnx" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    said: list[str] = []
    source = models.load("some-org/Some.Model-1", work_dir=tmp_path, progress=said.append)
    assert source.model_path == tmp_path / "onnx" / "model.onnx"
    # The graph is fetched only when there is no checkpoint.
    assert asked == [("some-org/Some.Model-1", False), ("some-org/Some.Model-1", True)]
    assert said == ["fetching some-org/Some.Model-1 from the Hugging Face hub"]


# --- bad input ----------------------------------------------------------------------------------------------------


def refuse(spec: str | Path, kind: type[UserError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        models.load(spec, work_dir=Path("unused"))
    for word in words:
        assert word in str(caught.value)
    assert caught.value.hint
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize("spec", ["missing.onnx", "missing.gguf", "./missing", "a/b/c", "/no/such/directory"])
def test_missing(spec: str) -> None:
    refuse(spec, BadModelFileError, spec, "no such file")


def test_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").symlink_to(tmp_path / "gone.onnx")
    refuse(tmp_path / "model.onnx", BadModelFileError, "gone.onnx")


def test_a_zoo_name_with_a_slip() -> None:
    refuse("smollm2-153m", UnsupportedModelError, "smollm2-153m", "did you mean 'smollm2-135m'?")


def test_a_word_that_means_nothing() -> None:
    refuse("xyzzy", UnsupportedModelError, "known: smollm2-135m")


def test_a_hub_id_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refuse("org/name", UserError, "org/name", "check the network")


def test_an_empty_directory(tmp_path: Path) -> None:
    refuse(tmp_path, BadModelFileError, "model.onnx", ".gguf")


def test_several_graphs(tmp_path: Path) -> None:
    write_graph(tmp_path / "a.onnx")
    write_graph(tmp_path / "b.onnx")
    refuse(tmp_path, BadModelFileError, "a.onnx, b.onnx", "give one of the files")


def test_an_artifact_without_its_graph(tmp_path: Path) -> None:
    write_json(tmp_path / "onnxpress.json", {})
    refuse(tmp_path, BadModelFileError, "model.onnx")


@pytest.mark.parametrize("filename", ["gone.onnx", "../model.onnx", "/model.onnx"])
def test_genai_config_names_a_graph_that_is_not_there(tmp_path: Path, filename: str) -> None:
    write_json(tmp_path / "genai_config.json", {"model": {"decoder": {"filename": filename}}})
    with pytest.raises(BadModelFileError, match="genai_config"):
        models.load(tmp_path, work_dir=tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00", "[" * 100_000])
def test_a_config_that_is_no_json_object(tmp_path: Path, content: str) -> None:
    write_graph(tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadModelFileError, match="config"):
        models.load(tmp_path, work_dir=tmp_path)


def test_a_config_without_weights(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    refuse(tmp_path, BadModelFileError, "weights", "fetch")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.ort"])
def test_files_that_are_no_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    refuse(tmp_path / name, UnsupportedModelError, name)


def test_options(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"opset must be in \[18, 24\], got 17"):
        models.load("x", work_dir=tmp_path, opset=17)
    with pytest.raises(OptionError, match="did you mean 'dynamo'"):
        models.load("x", work_dir=tmp_path, exporter="dynamic")  # type: ignore[arg-type]


def test_an_exported_directory_opens_again(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny_export("llama", "optimum")
    source = models.load(directory, work_dir=tmp_path)
    assert source.config["architectures"] == ["LlamaForCausalLM"]
    assert list(tmp_path.iterdir()) == []  # ONNX input needs no scratch
