"""explain_fusion: complete blocks, a block with a reason, and what `strict` makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.compiler.explain_fusion import explain_fusion, unfused_layers
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.pass_ import Context

Export = Callable[..., Path]


@pytest.fixture
def half_fusable(tiny_export: Export, tmp_path: Path) -> Path:
    """A llama whose second layer scores with a number that nobody knows, in a directory."""
    source = models.load(tiny_export("llama"), work_dir=tmp_path)
    graph = source.model.graph
    softmax = [node for node in graph if node.op_type == "Softmax"][1]
    unknown = ir.Node("", "ReduceMax", [softmax.inputs[0]], [ir.AttrInt64("keepdims", 1)], name="unknown")
    scaled = ir.Node("", "Mul", [softmax.inputs[0], unknown.outputs[0]], name="scaled")
    for node in (unknown, scaled):
        node.outputs[0].name = node.name
        node.outputs[0].type = softmax.inputs[0].type
    graph.insert_before(softmax, [unknown, scaled])
    softmax.replace_input_with(0, scaled.outputs[0])
    directory = tmp_path / "half"
    directory.mkdir()
    ir.save(source.model, directory / "model.onnx", external_data="model.onnx.data")
    for name, file in source.files.items():
        (directory / name).write_bytes(file.read_bytes())
    (directory / "config.json").write_text(json.dumps(source.config))
    return directory


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_every_block_is_complete(tiny_export: Export, tmp_path: Path, architecture: str) -> None:
    source = models.load(tiny_export(architecture), work_dir=tmp_path)
    *blocks, rest = explain_fusion(source.model, Context(config=source.config))
    assert [one.index for one in blocks] == [0, 1]
    assert all(one.is_complete and one.operators[0] > one.operators[1] for one in blocks)
    assert all({"GroupQueryAttention", "MultiHeadAttention"} & set(one.fused) for one in blocks)
    assert rest.index is None
    assert unfused_layers(source.model) == 0


def test_an_encoder_whose_attention_stays_apart(tiny_export: Export, tmp_path: Path) -> None:
    directory = tiny_export("bert")
    assert unfused_layers(models.load(directory, work_dir=tmp_path).model) == 2
    with pytest.raises(UnsupportedModelError, match="2 layers"):
        optimize(directory, output=tmp_path / "out", passes="simplify, fuse_attention", strict=True)


def test_a_block_that_is_half_fused_says_why(half_fusable: Path, tmp_path: Path) -> None:
    source = models.load(half_fusable, work_dir=tmp_path)
    first, second, _ = explain_fusion(source.model, Context(config=source.config))
    assert first.is_complete
    assert not second.is_complete
    assert "fuse_attention" in {left.fusion for left in second.left}
    assert all(left.reason for left in second.left)


def test_strict_makes_an_error_of_the_warning(half_fusable: Path, tmp_path: Path) -> None:
    artifact = optimize(half_fusable, output=tmp_path / "out", recipe="fp32")
    assert artifact.report["warnings"] == ["the attention of 1 layers was not fused"]
    with pytest.raises(UnsupportedModelError, match="1 layers"):
        optimize(half_fusable, output=tmp_path / "strict", recipe="fp32", strict=True)
    assert not (tmp_path / "strict").exists()
