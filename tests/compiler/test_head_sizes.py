"""Caches that leave the size of a head symbolic, as onnxruntime-genai's builder writes them."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from decoders import decoder

from onnxpress.compiler import pipeline
from onnxpress.compiler.genai import find_cache, settle_head_sizes
from onnxpress.compiler.pass_ import Context


def caches(model: ir.Model) -> list[ir.Value]:
    return [
        value for value in (*model.graph.inputs, *model.graph.outputs) if "key" in value.name or "value" in value.name
    ]


@pytest.fixture
def symbolic() -> tuple[ir.Model, int]:
    """A fused decoder without head sizes, and what they were."""
    model = decoder()
    pipeline.run(model, pipeline.parse("fuse"), Context())
    size = find_cache(model).head_size
    for value in caches(model):
        value.shape = ir.Shape([*value.shape[:3], "kv_cache_dim"])
    return model, size


def test_the_attention_knows_it(symbolic: tuple[ir.Model, int]) -> None:
    model, size = symbolic
    settle_head_sizes(model, {})
    assert {value.shape[3] for value in caches(model)} == {size}


def test_else_the_config_does(symbolic: tuple[ir.Model, int]) -> None:
    model, _ = symbolic
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.inputs[0].shape = None
    settle_head_sizes(model, {})
    assert {str(value.shape[3]) for value in caches(model)} == {"kv_cache_dim"}
    settle_head_sizes(model, {"head_dim": 48})
    assert {value.shape[3] for value in caches(model)} == {48}
