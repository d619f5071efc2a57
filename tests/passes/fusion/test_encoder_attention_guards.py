"""FuseEncoderAttention on small text graphs: what is carried over, and what stays and why."""

from __future__ import annotations

import re
from typing import Any

import attention_text as text
import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.fusion import fuse_encoder_attention
from onnxpress.passes.fusion.fuse_encoder_attention import FuseEncoderAttention

P = text.ENCODER
WIDE = text.HEADS * text.WIDTH


def fuse(model: ir.Model) -> Report:
    return FuseEncoderAttention().run(model, Context())


def feeds(batch: int, tokens: int, **more: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    streams = {name: rng.standard_normal((batch, tokens, WIDE)).astype(np.float32) for name in "qkv"}
    bias = np.zeros((batch, 1, 1, tokens), np.float32)
    bias[-1, ..., -2:] = -1e4  # padding
    return {**streams, "bias": bias, **more}


CARRIED: dict[str, tuple[dict[str, Any], float]] = {
    "scale": ({}, 0.3),
    "scale of queries and keys": (
        {"scores": "qs = Mul(q5, two) s = MatMul(qs, kt) scaled = Mul(s, scale)",
         "keys": "ks = Div(k5, scale) kt = Transpose<perm=[0,1,3,2]>(ks)"},
        2.0,
    ),
    "keys turned at once": ({"keys": "kt = Transpose<perm=[0,2,3,1]>(k4)"}, 0.3),
    "operands in heads": ({"heads": P["heads"] + " q6 = Tanh(q5)", "scores": P["scores"].replace("q5", "q6")}, 0.3),
    "no mask": ({"masked": "m = Mul(scaled, two)"}, 0.6),
}  # fmt: skip


@pytest.mark.parametrize("case", CARRIED)
def test_scale_and_mask_are_carried_over(case: str) -> None:
    parts, scale = CARRIED[case]
    model = text.encoder(**parts)
    given = [feeds(2, 5), feeds(1, 7)]
    before = [graphs.run(model, one)["y"] for one in given]
    report = fuse(model)
    assert len(report.changed) == 1, report.reasons()
    (node,) = (node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert node.attributes["scale"].as_float() == pytest.approx(scale)
    assert node.attributes["num_heads"].as_int() == text.HEADS
    for want, one in zip(before, given, strict=True):
        check.close(want, graphs.run(model, one)["y"], tolerance=1e-4)


def layer(number: int, mask: str) -> str:
    """Another attention over the same operands, its values called by `number`."""
    body = " ".join(P[name] for name in ("scores", "masked", "values", "join")).replace("bias", mask)
    return re.sub(r"\b(s|scaled|m|p|o|ot|joined)\b", rf"\g<1>_{number}", body)


def test_layers_with_one_mask_write_it_out_once_and_others_have_their_own() -> None:
    sum_ = "a = Add(joined, joined_2) b = Add(a, joined_3) y = MatMul(b, w)"
    inputs = ", float[batch, heads, 1, seq] bias2"
    model = text.encoder(inputs=inputs, project=f"{layer(2, 'bias')} {layer(3, 'bias2')} {sum_}")
    per_head = np.random.default_rng(5).standard_normal((2, text.HEADS, 1, 5)).astype(np.float32)
    given = feeds(2, 5, bias2=per_head)
    before = graphs.run(model, given)["y"]
    report = fuse(model)
    assert len(report.changed) == 3, report.reasons()
    assert [node.op_type for node in model.graph].count("Expand") == 2
    check.close(before, graphs.run(model, given)["y"], tolerance=1e-4)


def test_a_mask_that_was_refused_once_is_written_out_by_the_next() -> None:
    """The first layer joins its heads in another order: only running both forms tells."""
    model = text.encoder(
        join="ot = Transpose<perm=[0,2,3,1]>(o) joined = Reshape(ot, join)",
        project=f"{layer(2, 'bias')} a = Add(joined, joined_2) y = MatMul(a, w)",
    )
    given = feeds(2, 5)
    before = graphs.run(model, given)["y"]
    report = fuse(model)
    assert len(report.changed) == 1
    assert "differs by" in report.skipped[0].reason
    check.close(before, graphs.run(model, given)["y"], tolerance=1e-4)


STAYS: dict[str, tuple[dict[str, Any], str]] = {
    "Softmax over queries": ({"values": P["values"].replace("-1", "2")}, "the Softmax is not over the last"),
    "soft cap": ({"masked": text.SOFTCAP}, "the operator has no soft cap"),
    "selecting mask": (
        {"masked": "m = Where(seen, scaled, zero)", "inputs": ", bool[batch, 1, 1, seq] seen"},
        "the mask selects scores instead of being added to them",
    ),
    "scaled values": ({"values": "p = Softmax<axis=-1>(m) v6 = Mul(v5, two) o = MatMul(p, v6)"},
                      "the values are scaled"),
    "guard for rows without keys": (
        {"values": "p = Softmax<axis=-1>(m) nan = IsNaN(p) g = Where(nan, zero, p) o = MatMul(g, v5)"},
        "some probabilities are replaced",
    ),
    "keys turned otherwise": ({"keys": "kt = Transpose<perm=[0,1,2,3]>(k5)"}, "the keys are not turned by a Transpose"),
    "mask of rank 2": ({"masked": "m = Add(scaled, flat)", "inputs": ", float[seq, seq] flat"},
                       "the mask is not of rank 4"),
    "two readers of the probabilities": (
        {"values": P["values"] + " again = ReduceSum(p)", "outputs": ", float[1, 1, 1, 1] again"},
        "no product of probabilities and values below the Softmax",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_what_stays_and_why(case: str) -> None:
    parts, reason = STAYS[case]
    model = text.encoder(**parts)
    report = fuse(model)
    assert not report.changed
    assert [reason in skip.reason for skip in report.skipped] == [True], report.reasons()


def test_a_mask_that_may_have_one_row_must_be_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an unknown number of rows: a rule that hands the mask on as it is agrees until there is one."""
    build = fuse_encoder_attention._nodes

    def naive(graph: ir.Graph, found: Any, biases: dict[int, ir.Value], are_turned: bool) -> list[ir.Node]:
        nodes = build(graph, found, biases, are_turned)
        nodes[-1].replace_input_with(5, found.mask)
        return nodes

    monkeypatch.setattr(fuse_encoder_attention, "_nodes", naive)
    model = text.encoder(masked="m = Add(scaled, own)", inputs=", float[batch, 1, rows, seq] own")
    assert not fuse(model).changed


def test_attention_with_a_cache_is_for_the_other_rule() -> None:
    reason = "the keys meet a cache, which `fuse_attention` is for"
    assert fuse(text.attention()).reasons() == {reason: 1}


def _apart(prefix: str, queries: str, keys: str) -> str:
    """Attention of `queries` to `keys`, both [B, tokens, 64]."""
    return f"""{prefix}q4 = Reshape({queries}, apart) {prefix}q5 = Transpose <perm = [0, 2, 1, 3]> ({prefix}q4)
    {prefix}k4 = Reshape({keys}, apart) {prefix}k5 = Transpose <perm = [0, 2, 1, 3]> ({prefix}k4)
    {prefix}kt = Transpose <perm = [0, 2, 3, 1]> ({prefix}k4) {prefix}s = MatMul({prefix}q5, {prefix}kt)
    {prefix}m = Add({prefix}s, bias) {prefix}p = Softmax <axis = -1> ({prefix}m)
    {prefix}o = MatMul({prefix}p, {prefix}k5)
    {prefix}ot = Transpose <perm = [0, 2, 1, 3]> ({prefix}o) {prefix}y = Reshape({prefix}ot, joined)"""


def test_one_mask_for_queries_of_two_lengths_is_written_out_twice() -> None:
    """Self-attention of an encoder and the attention of a decoder to it, in one graph."""
    model = ir.from_onnx_text(f"""<ir_version: 9, opset_import: ["" : 18]>
    g (float[batch, long, 64] x, float[batch, short, 64] q, float[batch, 1, 1, long] bias)
    => (float[batch, short, 64] by) <int64[4] apart = {{0, 0, 4, 16}}, int64[3] joined = {{0, 0, 64}}>
    {{ {_apart("a", "x", "x")} {_apart("b", "q", "ay")} }}""")
    common.ShapeInferencePass()(model)
    rng = np.random.default_rng(0)
    given = {"x": (2, 7, 64), "q": (2, 3, 64), "bias": (2, 1, 1, 7)}
    feeds = {name: rng.standard_normal(sizes).astype(np.float32) for name, sizes in given.items()}
    before = graphs.run(model, feeds)["by"]
    assert len(fuse(model).changed) == 2
    check.close(before, graphs.run(model, feeds)["by"])


CACHED = """<ir_version: 9, opset_import: ["" : 18]>
g (float[batch, seq, 64] q, float[batch, seq, 64] k, float[batch, seq, 64] v, float[batch, 4, past, 16] past_k,
   float[batch, 4, past, 16] past_v)
=> (float[batch, seq, 64] y, float[batch, 4, total, 16] present_k, float[batch, 4, total, 16] present_v)
<int64[4] apart = {0, 0, 4, 16}, int64[3] join = {0, 0, 64}, int64 i0 = {0}, int64 i1 = {1}, int64[1] one = {1},
 int64[1] on0 = {0}, int64[1] axis = {AXIS}, int64[2] on01 = {0, 1}, float zero = {0}, float hidden = {-1e9}>
{ q4 = Reshape(q, apart) q5 = Transpose <perm = [0, 2, 1, 3]> (q4)
  k4 = Reshape(k, apart) k5 = Transpose <perm = [0, 2, 1, 3]> (k4)
  v4 = Reshape(v, apart) v5 = Transpose <perm = [0, 2, 1, 3]> (v4)
  present_k = Concat <axis = 2> (past_k, k5) present_v = Concat <axis = 2> (past_v, v5)
  turned = Transpose <perm = [0, 1, 3, 2]> (present_k) scores = MatMul(q5, turned)
  sizes = Shape(SOURCE) t1 = Gather <axis = 0> (sizes, axis) t = Squeeze(t1, on0)
  shape = Shape(q) s1 = Gather <axis = 0> (shape, one) s = Squeeze(s1, on0) p = Sub(t, s)
  cols = Range(i0, t, i1) places = Range(p, t, i1) rows = Unsqueeze(places, one) seen = LessOrEqual(cols, rows)
  plain = Where(seen, zero, hidden) bias = Unsqueeze(plain, on01)
  masked = Add(scores, bias) weights = Softmax <axis = -1> (masked) o = MatMul(weights, present_v)
  back = Transpose <perm = [0, 2, 1, 3]> (o) y = Reshape(back, join) }"""


@pytest.mark.parametrize(("source", "axis", "changed"), [("present_k", 2, 1), ("turned", 3, 0), ("scores", 3, 0)])
def test_a_mask_may_ask_the_cache_itself_for_its_size_and_nothing_behind_it(
    source: str, axis: int, changed: int
) -> None:
    """The size of the whole cache is known before; what else is made of it would make the operator wait for itself."""
    model = ir.from_onnx_text(CACHED.replace("SOURCE", source).replace("AXIS", str(axis)))
    common.ShapeInferencePass()(model)
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal((2, 3, 64)).astype(np.float32) for name in "qkv"}
    given |= {name: rng.standard_normal((2, 4, 5, 16)).astype(np.float32) for name in ("past_k", "past_v")}
    before = graphs.run(model, given)["y"]
    report = fuse(model)
    assert len(report.changed) == changed, report.reasons()
    check.close(before, graphs.run(model, given)["y"])
