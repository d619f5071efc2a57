"""PackQkv: one matrix, rows in the order the operator wants, and the guards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import check
import decoders
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.fusion.pack_qkv import PackQkv

UNPACKED = "simplify, fuse_rmsnorm, fuse_rotary, fuse_attention"


PLAIN = "queries, keys or values do not come straight from a projection"
CASES = {
    "as it is": None,
    "packed already": None,
    "keys of another input": "the projections do not share their input",
    "keys are an output": PLAIN,
    "keys are read elsewhere": PLAIN,
    "keys with a norm": PLAIN,
    "a cache that was turned": "the cache is no graph input",
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_packed_and_what_is_not(case: str) -> None:
    model = decoders.decoder(layers=1)
    (node,) = (node for node in model.graph if node.op_type == "GroupQueryAttention")
    query, keys, past = node.inputs[0], node.inputs[1], node.inputs[3]
    assert query is not None
    assert keys is not None
    assert past is not None
    product, more = keys.producer(), None
    assert product is not None
    if case == "packed already":
        PackQkv().run(model, Context())
    elif case == "keys of another input":
        more = ir.node("Neg", [product.inputs[0]], name="other")
        product.replace_input_with(0, more.outputs[0])
    elif case == "keys are an output":
        keys.shape = ir.Shape(["batch", "sequence", 16])
        model.graph.outputs.append(keys)
    elif case == "keys are read elsewhere":
        more = ir.node("Neg", [keys], name="other")
        more.outputs[0].shape, more.outputs[0].dtype = ir.Shape(["batch", "sequence", 16]), ir.DataType.FLOAT
        model.graph.outputs.append(more.outputs[0])
    elif case == "keys with a norm":
        more = ir.node("Neg", [keys], name="other")
        node.replace_input_with(1, more.outputs[0])
    elif case == "a cache that was turned":
        more = ir.node("Transpose", [past], {"perm": [0, 1, 2, 3]}, name="other")
        node.replace_input_with(3, more.outputs[0])
    if more is not None:
        more.outputs[0].name = "other"
        model.graph.append(more)
        model.graph.sort()
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((1, decoders.KV_HEADS, 2, decoders.HEAD_SIZE)).astype(np.float32)
    feeds = {"input_ids": np.array([[5]]), "attention_mask": np.ones((1, 3), np.int64)}
    feeds |= {f"past_key_values.0.{name}": cache for name in ("key", "value")}
    before = graphs.run(model, feeds)["logits"]
    report = PackQkv().run(model, Context())
    assert len(report.changed) == (case == "as it is")
    assert [skip.reason for skip in report.skipped] == ([] if CASES[case] is None else [CASES[case]])
    check.close(before, graphs.run(model, feeds)["logits"], tolerance=1e-5)


def test_rows_are_queries_keys_values(tiny_export: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = models.load(tiny_export("llama", "optimum"), work_dir=tmp_path)
    context = Context(config=source.config)
    pipeline.run(source.model, pipeline.parse(UNPACKED), context)
    parts = {linear.kind: linear.w_NK().copy() for linear in find_linears(source.model) if linear.block == 0}
    report = PackQkv().run(source.model, context)
    assert len(report.changed) == source.config["num_hidden_layers"]
    assert report.bytes_after == report.bytes_before
    packed = next(linear for linear in find_linears(source.model) if linear.name == "block0.qkv")
    assert np.array_equal(packed.w_NK(), np.concatenate([parts["q"], parts["k"], parts["v"]]))


def test_normalized_heads_cannot_be_packed(tiny_export: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = models.load(tiny_export("qwen3", "optimum"), work_dir=tmp_path)
    context = Context(config=source.config)
    pipeline.run(source.model, pipeline.parse(UNPACKED), context)
    report = PackQkv().run(source.model, context)
    assert not report.changed
    assert set(report.reasons()) == {"queries, keys or values do not come straight from a projection"}
