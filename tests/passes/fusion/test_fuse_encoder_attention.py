"""FuseEncoderAttention: what naive rules drop is refused, and decoders are left to the other fusion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.fusion import fuse_encoder_attention
from onnxpress.passes.fusion.fuse_encoder_attention import FuseEncoderAttention

Export = Callable[..., Path]
MUTATIONS: dict[str, Callable[[Any], None]] = {
    "scale dropped": lambda found: setattr(found, "scale", found.scale * 1.5),
    "mask dropped": lambda found: setattr(found, "mask", None),
    "operands swapped": lambda found: (lambda q: (setattr(found, "q", found.k), setattr(found, "k", q)))(found.q),
    "fewer heads": lambda found: (setattr(found, "num_heads", 2), setattr(found, "head_size", found.head_size * 2)),
}


def encoder(export: Export, architecture: str, tmp_path: Path) -> ir.Model:
    source = models.load(export(architecture), work_dir=tmp_path)
    pipeline.run(source.model, pipeline.parse("simplify"), Context(config=source.config))
    return source.model


def test_every_layer(tiny_export: Export, tmp_path: Path) -> None:
    model = encoder(tiny_export, "bert", tmp_path)
    assert len(FuseEncoderAttention().run(model, Context()).changed) == 2
    assert Counter(node.op_type for node in model.graph)["MultiHeadAttention"] == 2


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_fusion_is_refused(
    tiny_export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    read = fuse_encoder_attention._read

    def wrong(softmax: ir.Node) -> Any:
        found = read(softmax)
        MUTATIONS[name](found)
        return found

    monkeypatch.setattr(fuse_encoder_attention, "_read", wrong)
    model = encoder(tiny_export, "bert", tmp_path)
    report = FuseEncoderAttention().run(model, Context())
    assert not report.changed
    assert len(report.skipped) == 2


def test_attention_with_a_cache_is_not_its_business(tiny_export: Export, tmp_path: Path) -> None:
    model = encoder(tiny_export, "llama", tmp_path)
    report = FuseEncoderAttention().run(model, Context())
    assert not report.changed
    assert [skip.reason for skip in report.skipped] == ["the keys meet a cache, which `fuse_attention` is for"] * 2


def test_replaced_probabilities_are_not_dropped(tiny_export: Export, tmp_path: Path) -> None:
    model = encoder(tiny_export, "bert", tmp_path)
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    zero = ir.val("zero", const_value=ir.tensor(np.zeros(1, np.float32), name="zero"))
    model.graph.register_initializer(zero)
    drop = ir.val("drop", ir.DataType.BOOL, [1])
    model.graph.inputs.append(drop)
    where = ir.Node("", "Where", [drop, zero, softmax.outputs[0]], name="where")
    where.outputs[0].name = "dropped"
    for node, index in list(softmax.outputs[0].uses()):
        if node is not where:
            node.replace_input_with(index, where.outputs[0])
    model.graph.insert_after(softmax, where)
    report = FuseEncoderAttention().run(model, Context())
    assert report.reasons() == {"some probabilities are replaced": 1}


def test_probabilities_that_are_an_output_stay(tiny_export: Export, tmp_path: Path) -> None:
    model = encoder(tiny_export, "bert", tmp_path)
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    model.graph.outputs.append(softmax.outputs[0])
    assert FuseEncoderAttention().run(model, Context()).reasons() == {"the probabilities are an output of the graph": 1}


def test_names_of_the_graph_are_not_taken(tiny_export: Export, tmp_path: Path) -> None:
    model = encoder(tiny_export, "bert", tmp_path)
    name = "attention/ones_1"
    other = ir.val(name, const_value=ir.tensor(np.array([7], np.int64), name=name))
    model.graph.register_initializer(other)
    assert len(FuseEncoderAttention().run(model, Context()).changed) == 2
    held = [model.graph.initializers.get(one) for one in (name, f"{name}_")]
    assert held[0] in (other, None)
    assert held[1] is not None
    assert held[1].const_value is not None
    assert held[1].const_value.numpy().tolist() == [1]


# The operator of ai.onnx 23, with heads in front and with heads side by side.
HEAD = """<ir_version: 10, opset_import: ["" : 23]> g (float[batch, seq, 64] q, float[batch, seq, 64] k,
float[batch, seq, 64] v, float[batch, 1, seq, seq] mask) => (float[batch, seq, 64] y)"""
OPERATORS = {
    "heads apart": """ {
  split = Constant <value_ints = [0, 0, 4, 16]> () join = Constant <value_ints = [0, 0, 64]> ()
  qs = Reshape(q, split) ks = Reshape(k, split) vs = Reshape(v, split)
  qt = Transpose <perm = [0, 2, 1, 3]> (qs) kt = Transpose <perm = [0, 2, 1, 3]> (ks)
  vt = Transpose <perm = [0, 2, 1, 3]> (vs) o = Attention MORE (qt, kt, vt, mask)
  ot = Transpose <perm = [0, 2, 1, 3]> (o) y = Reshape(ot, join) }""",
    "heads side by side": " { y = Attention MORE (q, k, v, mask) }",
}


@pytest.mark.parametrize("more", ["", ", scale = 0.4", ", is_causal = 1"])
@pytest.mark.parametrize("form", OPERATORS)
def test_the_operator_of_ai_onnx_is_read(form: str, more: str) -> None:
    heads = "q_num_heads = 4, kv_num_heads = 4" if "side" in form else "softcap = 0.0"
    model = ir.from_onnx_text(HEAD + OPERATORS[form].replace("MORE", f"<{heads}{more}>"))
    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal((2, 5, 64)).astype(np.float32) for name in "qkv"}
    feeds["mask"] = np.zeros((2, 1, 5, 5), np.float32)
    feeds["mask"][1, ..., 3:] = -1e9
    before = graphs.run(model, feeds)
    done = pipeline.run(model, pipeline.parse("simplify, fuse_encoder_attention"), Context())
    ops = Counter(node.op_type for node in model.graph)
    if "causal" in more:
        assert done[-1][1].reasons() == {"the operator makes a causal mask of its own": 1}
        return
    assert (ops["MultiHeadAttention"], ops["Attention"]) == (1, 0), done[-1][1].reasons()
    check.close(before["y"], graphs.run(model, feeds)["y"])
