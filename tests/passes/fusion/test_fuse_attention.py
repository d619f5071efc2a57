"""FuseAttention on real exports: parameters carried over, padding honoured, naive fusions refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.models.source import Source
from onnxpress.passes.fusion import fuse_attention
from onnxpress.passes.fusion.fuse_attention import FuseAttention
from onnxpress.passes.fusion.pack_qkv import PackQkv

Export = Callable[[str, str], Path]
Feeds = dict[str, np.ndarray]
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]


def source_of(export: Export, architecture: str, tmp_path: Path, exporter: str = "optimum") -> Source:
    return models.load(export(architecture, exporter), work_dir=tmp_path)


def fuse(source: Source, text: str = "fuse") -> Report:
    done = pipeline.run(source.model, pipeline.parse(text), Context(config=source.config))
    return next(report for pass_, report in done if isinstance(pass_, FuseAttention))


def conversation(model: ir.Model, batch: int, padding: int) -> Iterator[Feeds]:
    """Prompt, then two decode steps; the caller hands the caches of the last step back with `send`."""
    rng = np.random.default_rng(5)
    caches: Feeds = {
        value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
        for value in model.graph.inputs
        if value.name is not None and value.shape is not None and len(value.shape) == 4
    }
    mask = np.ones((batch, 0), np.int64)
    for length in (11, 1, 1):
        new = np.ones((batch, length), np.int64)
        if length > 1:
            new[-1, :padding] = 0
        mask = np.concatenate([mask, new], axis=1)
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -length:]
        ids = rng.integers(3, 200, (batch, length))
        outputs = yield {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **caches}
        caches = {
            name.replace("present", "past_key_values"): array for name, array in outputs.items() if "present" in name
        }


def logits(model: ir.Model, batch: int, padding: int) -> list[np.ndarray]:
    steps: Any = conversation(model, batch, padding)
    feeds, found = next(steps), []
    while True:
        outputs = graphs.run(model, feeds)
        seen = feeds["attention_mask"][:, -outputs["logits"].shape[1] :, None]
        found.append(outputs["logits"] * seen)
        try:
            feeds = steps.send(outputs)
        except StopIteration:
            return found


@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (2, 4)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_fuses_and_a_conversation_stays_the_same(
    tiny_export: Export, tmp_path: Path, architecture: str, batch: int, padding: int
) -> None:
    source = source_of(tiny_export, architecture, tmp_path)
    before = logits(source.model, batch, padding)
    report = fuse(source)
    assert len(report.changed) == source.config["num_hidden_layers"], report.reasons()
    ops = Counter(node.op_type for node in source.model.graph)
    assert ops["Softmax"] == 0
    for want, got in zip(before, logits(source.model, batch, padding), strict=True):
        check.close(want, got)


def test_dynamo_export_fuses_alike(tiny_export: Export, tmp_path: Path) -> None:
    source = source_of(tiny_export, "llama", tmp_path, "dynamo")
    before = logits(source.model, 2, 3)
    report = fuse(source)
    assert len(report.changed) == source.config["num_hidden_layers"], report.reasons()
    for want, got in zip(before, logits(source.model, 2, 3), strict=True):
        check.close(want, got)


def attention_nodes(source: Source) -> list[ir.Node]:
    return [node for node in source.model.graph if node.op_type == "GroupQueryAttention"]


def test_sliding_window_is_read_off_the_mask(tiny_export: Export, tmp_path: Path) -> None:
    source = source_of(tiny_export, "mistral", tmp_path)
    source.config.pop("sliding_window_in_config_is_not_needed", None)
    fuse(source)
    windows = {node.attributes["local_window_size"].as_int() for node in attention_nodes(source)}
    assert windows == {source.config["sliding_window"]}


def test_softcap_and_query_scale_are_carried_over(tiny_export: Export, tmp_path: Path) -> None:
    source = source_of(tiny_export, "gemma2", tmp_path)
    fuse(source)
    for node in attention_nodes(source):
        assert node.attributes["softcap"].as_float() == source.config["attn_logit_softcapping"]
        scale = source.config["query_pre_attn_scalar"] ** -0.5
        assert node.attributes["scale"].as_float() == pytest.approx(scale, rel=1e-6)


def test_queries_keys_and_values_are_packed_with_their_biases(tiny_export: Export, tmp_path: Path) -> None:
    source = source_of(tiny_export, "qwen2", tmp_path)
    fuse(source)
    PackQkv().run(source.model, Context())
    assert all(node.inputs[1] is None and node.inputs[2] is None for node in attention_nodes(source))


# What the verifier is for: each of these breaks one thing that naive rules drop, and no layer may fuse.
MUTATIONS = {
    "scale dropped": ("llama", lambda found: setattr(found, "scale", found.scale * 1.5)),
    "softcap dropped": ("gemma2", lambda found: setattr(found, "softcap", 0.0)),
    "rotary dropped": ("llama", lambda found: setattr(found, "cos", None)),
    "operands swapped": (
        "llama",
        lambda found: (lambda k: (setattr(found, "k", found.v), setattr(found, "v", k)))(found.k),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_fusion_is_refused(
    tiny_export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    architecture, mutate = MUTATIONS[name]
    read = fuse_attention.read_cached

    def wrong(softmax: ir.Node, with_rotary: bool = True) -> Any:
        found = read(softmax, with_rotary)
        mutate(found)
        if name == "rotary dropped":
            found.sin = None
        return found

    monkeypatch.setattr(fuse_attention, "read_cached", wrong)
    source = source_of(tiny_export, architecture, tmp_path)
    report = fuse(source)
    assert not report.changed
    assert report.skipped


def test_a_dropped_window_is_refused(tiny_export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = fuse_attention._Builder._nodes
    monkeypatch.setattr(
        fuse_attention._Builder, "_nodes", lambda self, found, mask, window, more: build(self, found, mask, -1, more)
    )
    source = source_of(tiny_export, "mistral", tmp_path)
    assert not fuse(source).changed


def test_a_dropped_padding_mask_is_refused(
    tiny_export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse_attention._Builder, "_bias", lambda *_: None)
    source = source_of(tiny_export, "llama", tmp_path)
    assert not fuse(source).changed


def test_padding_right_has_no_bias(tiny_export: Export, tmp_path: Path) -> None:
    source = source_of(tiny_export, "llama", tmp_path)
    before = logits(source.model, 1, 0)
    text = "simplify, fuse_rmsnorm, fuse_rotary, fuse_attention(padding='right')"
    report = fuse(source, text)
    assert len(report.changed) == source.config["num_hidden_layers"]
    assert all(len(node.inputs) <= 9 for node in attention_nodes(source))
    for want, got in zip(before, logits(source.model, 1, 0), strict=True):
        check.close(want, got)


def test_encoders_are_not_its_business(tiny_export: Export, tmp_path: Path) -> None:
    source = source_of(tiny_export, "bert", tmp_path)
    report = fuse(source)
    assert not report.changed
    assert not report.skipped


# The operator of ai.onnx 23 that joins the cache itself: [B, S, heads D] in, the mask made of flags.
OPERATOR = """<ir_version: 10, opset_import: ["" : 23]>
g (int64[batch, seq] input_ids, int64[batch, total] attention_mask, float[batch, seq, 64] q, float[batch, seq, 32] k,
   float[batch, seq, 32] v, float[batch, 2, past, 16] past_k, float[batch, 2, past, 16] past_v)
=> (float[batch, seq, 64] y, float[batch, 2, total, 16] present_k, float[batch, 2, total, 16] present_v)
{ zero = Constant <value_int = 0> () one = Constant <value_int = 1> () two = Constant <value_int = 2> ()
  first = Constant <value_ints = [1]> () middle = Constant <value_ints = [1, 2]> ()
  sizes = Shape(past_k) p = Gather <axis = 0> (sizes, two) whole = Shape(attention_mask)
  t = Gather <axis = 0> (whole, one) columns = Range(zero, t, one) rows = Range(p, t, one)
  row = Unsqueeze(rows, first) causal = LessOrEqual(columns, row)
  flags = Cast <to = 9> (attention_mask) seen = Unsqueeze(flags, middle) mask = And(causal, seen)
  y, present_k, present_v = Attention <q_num_heads = 4, kv_num_heads = 2 MORE> (q, k, v, mask, past_k, past_v) }"""


def operator_feeds(batch: int, seq: int, past: int, padding: int) -> Feeds:
    rng = np.random.default_rng(7)
    mask = np.ones((batch, past + seq), np.int64)
    mask[-1, :padding] = 0
    sizes = {"q": (seq, 64), "k": (seq, 32), "v": (seq, 32), "past_k": (2, past, 16), "past_v": (2, past, 16)}
    floats = {name: rng.standard_normal((batch, *size)).astype(np.float32) for name, size in sizes.items()}
    return {"input_ids": np.zeros((batch, seq), np.int64), "attention_mask": mask, **floats}


@pytest.mark.parametrize("more", ["", ", scale = 0.4", ", softcap = 2.0"])
def test_the_operator_of_ai_onnx_is_read(more: str) -> None:
    model = ir.from_onnx_text(OPERATOR.replace("MORE", more))
    feeds = [operator_feeds(1, 5, 0, 0), operator_feeds(1, 1, 9, 0), operator_feeds(2, 1, 6, 4)]
    before = [graphs.run(model, one) for one in feeds]
    done = pipeline.run(model, pipeline.parse("simplify(shapes=False), fuse_attention"), Context())
    ops = Counter(node.op_type for node in model.graph)
    assert (ops["GroupQueryAttention"], ops["Attention"]) == (1, 0), done[-1][1].reasons()
    for one, want in zip(feeds, before, strict=True):
        got = graphs.run(model, one)
        for name in want:
            check.close(want[name], got[name])


def test_an_operator_with_a_mask_of_its_own_is_left() -> None:
    model = ir.from_onnx_text(OPERATOR.replace("MORE", ", is_causal = 1"))
    done = pipeline.run(model, pipeline.parse("simplify(shapes=False), fuse_attention"), Context())
    assert done[-1][1].reasons() == {"the operator makes a causal mask of its own": 1}
