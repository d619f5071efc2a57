"""What `summarize` counts is what is there."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from decoders import FFN, HEAD_SIZE, HEADS, HIDDEN, KV_HEADS, VOCABULARY, decoder

from onnxpress.compiler.inspect import summarize
from onnxpress.compiler.pass_ import Context, weight_bytes
from onnxpress.compiler.registry import find

BLOCK = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * HEAD_SIZE + 2 * HIDDEN * FFN


def test_a_float_decoder() -> None:
    model = decoder(layers=3)
    summary = summarize(model, config={"architectures": ["LlamaForCausalLM"]})
    assert summary.architecture == "LlamaForCausalLM"
    assert summary.nodes == len(model.graph)
    assert summary.bytes == weight_bytes(model)
    assert summary.parameters == 3 * BLOCK + 2 * VOCABULARY * HIDDEN
    assert summary.bits_per_weight == 32
    assert [block.parameters for block in summary.blocks] == [BLOCK] * 3
    assert [block.bytes for block in summary.blocks] == [4 * BLOCK] * 3
    assert all(block.has_attention for block in summary.blocks)
    assert summary.operators["com.microsoft.GroupQueryAttention"] == 3
    assert summary.flops_per_token == 2 * (3 * BLOCK + VOCABULARY * HIDDEN)
    assert summary.flops_per_cached_token == 3 * 4 * HEADS * HEAD_SIZE
    assert summary.bytes_per_token == 4 * (3 * BLOCK + VOCABULARY * HIDDEN + HIDDEN)
    assert summary.cache_bytes_per_token == 3 * 2 * KV_HEADS * HEAD_SIZE * 4
    assert summary.inputs["input_ids"] == "int64 [batch, sequence]"
    assert summary.opset == 18
    assert summary.ir_version == 10


def test_a_quantized_decoder_has_the_same_parameters_in_fewer_bytes() -> None:
    model = decoder()
    before = summarize(model)
    find("rtn")().run(model, Context())
    after = summarize(model)
    assert after.parameters == before.parameters
    assert after.bytes == weight_bytes(model)
    assert 4 < after.bits_per_weight < 9
    assert sum(kind.bytes for kind in after.kinds.values()) <= after.bytes


def test_bytes_of_a_tied_table_count_once() -> None:
    model = decoder(layers=1)
    table = model.graph.initializers["embed"]
    head = next(node for node in model.graph if node.name == "logits")
    transpose = ir.Node("", "Transpose", [table], [ir.AttrInt64s("perm", [1, 0])])
    transpose.outputs[0].name = "tied"
    model.graph.insert_before(model.graph[0], transpose)
    head.replace_input_with(1, transpose.outputs[0])
    del model.graph.initializers["head"]
    summary = summarize(model)
    assert summary.parameters == BLOCK + VOCABULARY * HIDDEN
    assert summary.kinds["head"].bytes == 0
    assert summary.kinds["embedding"].bytes == 4 * VOCABULARY * HIDDEN


def test_json_has_the_keys_that_programs_rely_on() -> None:
    facts = json.loads(json.dumps(summarize(decoder()).to_json()))
    assert {"nodes", "operators", "parameters", "bytes", "blocks", "inputs", "outputs", "opset"} <= facts.keys()
    assert facts["blocks"][0]["bits_per_weight"] == 32
    assert facts["kinds"]["q"]["shape"] == [HIDDEN, HIDDEN]


def test_reads_a_file(tmp_path: Path) -> None:
    ir.save(decoder(), tmp_path / "m.onnx")
    assert summarize(tmp_path / "m.onnx") == summarize(decoder())


@pytest.mark.parametrize("shape, guess", [(["n", 3, 8, 8], "vision"), (["n", 4], "unknown")])
def test_guesses_what_it_is(shape: list[object], guess: str) -> None:
    x = ir.val("x", ir.DataType.FLOAT, shape)
    node = ir.Node("", "Relu", [x])
    node.outputs[0].name = "y"
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18}), ir_version=10)
    assert guess in summarize(model).architecture
    assert summarize(model).blocks == []
