"""Settings are found whoever wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnxpress.compiler.errors import BadModelFileError
from onnxpress.runtime.config import find_model, read_config


def write(directory, **files):
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def test_reads_hugging_face(tmp_path):
    write(
        tmp_path,
        config={"max_position_embeddings": 99, "vocab_size": 7, "hidden_size": 64, "num_attention_heads": 4},
        generation_config={"eos_token_id": [2, 3], "pad_token_id": 2},
    )
    found = read_config(tmp_path)
    assert (found.context_length, found.vocab_size, found.head_dim) == (99, 7, 16)
    assert (found.eos_token_ids, found.pad_token_id) == ({2, 3}, 2)


def test_reads_genai(tmp_path):
    model = {"context_length": 5, "vocab_size": 9, "eos_token_id": 4, "decoder": {"filename": "x.onnx", "head_size": 8}}
    write(tmp_path, genai_config={"model": model})
    (tmp_path / "x.onnx").touch()
    (tmp_path / "y.onnx").touch()
    found = read_config(tmp_path)
    assert (found.context_length, found.vocab_size, found.head_dim, found.eos_token_ids) == (5, 9, 8, {4})
    assert find_model(tmp_path).name == "x.onnx"


def test_nothing_there_is_no_error(tmp_path):
    assert read_config(tmp_path).context_length is None


def test_a_single_graph_of_any_name_is_found_and_two_are_not(tmp_path):
    (tmp_path / "decoder7.onnx").touch()
    assert find_model(tmp_path).name == "decoder7.onnx"
    assert find_model(tmp_path / "decoder7.onnx").name == "decoder7.onnx"
    (tmp_path / "encoder.onnx").touch()
    with pytest.raises(BadModelFileError, match=r"decoder7.onnx, encoder.onnx"):
        find_model(tmp_path)


def test_broken_json_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadModelFileError, match="expected JSON"):
        read_config(tmp_path)
    with pytest.raises(BadModelFileError, match="found nothing"):
        find_model(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_weights_of_other_formats_are_told_how_they_become_onnx(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(
        BadModelFileError, match=f"expected an .onnx file, got a .{name.partition('.')[2]} file"
    ) as caught:
        find_model(tmp_path / name)
    assert "onnxpress export" in (caught.value.hint or "")
