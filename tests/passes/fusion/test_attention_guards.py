"""FuseAttention on small text graphs: what is carried over, what the run of both forms refuses, what stays and why."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import attention_text as text
import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.canonicalize.simplify import Simplify
from onnxpress.passes.fusion import fuse_attention
from onnxpress.passes.fusion.fuse_attention import FuseAttention

P = text.PARTS
TURNED = text.ROTARY.format(kind=0, cos="cos")
NORM = "SimplifiedLayerNormalization<axis=-1, epsilon=0.01, stash_type=1>"


def fuse(model: ir.Model, **options: Any) -> Report:
    return FuseAttention(**options).run(model, Context())


def fused(model: ir.Model) -> ir.Node:
    (node,) = (node for node in model.graph if node.op_type == "GroupQueryAttention")
    return node


CARRIED: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "scale": ({}, {"scale": 0.3, "local_window_size": -1, "num_heads": text.HEADS, "kv_num_heads": text.KV_HEADS}),
    "scale of the queries": (
        {"rotary": "qr = Mul(q5, two) kr = Identity(k5)"}, {"scale": 0.6},
    ),
    "scale of the keys": ({"scores": P["scores"].replace("kk)", "kk2)").replace("kt =", "kk2 = Div(kk, two) kt =")},
                          {"scale": 0.15}),
    "window": ({"window": 20}, {"local_window_size": 20}),
    "wide window": ({"window": 29}, {"local_window_size": 29}),
    "soft cap": ({"masked": text.SOFTCAP}, {"softcap": 1.5, "scale": 0.3}),
    "rotary": ({"rotary": TURNED}, {"do_rotary": 1, "rotary_interleaved": 0}),
    "interleaved rotary": ({"rotary": text.ROTARY.format(kind=1, cos="cos")}, {"rotary_interleaved": 1}),
    "norm of heads": (
        {"heads": P["heads"].replace("q5 = Transpose<perm=[0,2,1,3]>(q4)",
                                     f"qn = {NORM}(q4, gain) q5 = Transpose<perm=[0,2,1,3]>(qn)")},
        {},
    ),
    "norm of turned heads": ({"rotary": f"qr = {NORM}(q5, gain) kr = {NORM}(k5, gain)"}, {}),
    "selecting mask": ({"bias": "", "masked": "m = Where(visible, scaled, hidden)"}, {}),
    "guard for rows without keys": (
        {"values": "p = Softmax<axis=-1>(m) nan = IsNaN(p) g = Where(nan, zero, p) o = MatMul(g, vv)"}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CARRIED)
def test_parameters_are_carried_over(case: str) -> None:
    parts, attributes = CARRIED[case]
    model = text.attention(**parts)
    before = {padding: text.results(model, padding) for padding in (0, 3)}
    report = fuse(model)
    assert len(report.changed) == 1, report.reasons()
    assert not report.skipped
    found = {name: fused(model).attributes[name].value for name in attributes}
    assert found == pytest.approx(attributes, rel=1e-6)
    assert "Softmax" not in {node.op_type for node in model.graph}
    for padding, want in before.items():
        text.check_same(want, model, padding)


def test_layers_whose_masks_lie_in_tables_have_their_own_windows() -> None:
    """Both layers are the same but for the contents of one large constant (GPT-Neo)."""
    reads = "lines = Gather<axis=2>({}, places) cut = Gather<axis=3>(lines, cols) visible = And(cut, seen)"
    mask = P["mask"].replace("visible = And(causal, seen)", reads.format("table"))
    layer = " ".join({**P, "mask": mask.replace("table", "band")}.values())
    names = "|".join([*re.findall(r"(\w+) =", layer), "past_k", "past_v"])
    second = re.sub(rf"\b({names})\b", r"\g<1>_2", layer)
    cache = f"float[batch, {text.KV_HEADS}, {{}}, {text.WIDTH}]"
    model = text.attention(
        mask=mask,
        project=f"first = MatMul(joined, w) {second} y = Add(first, y_2)",
        inputs="".join(f", {cache.format('past_len')} past_{name}_2" for name in "kv"),
        outputs="".join(f", {cache.format('total_len')} present_{name}_2" for name in "kv"),
    )
    empty = np.zeros((2, text.KV_HEADS, 0, text.WIDTH), np.float32)
    feeds = {**next(text.conversation()), "past_k_2": empty, "past_v_2": empty}
    before = graphs.run(model, feeds)["y"]
    report = fuse(model)
    assert [row["window"] for row in report.ledger] == [-1, 6], report.reasons()
    check.close(before, graphs.run(model, feeds)["y"], tolerance=1e-4)


# What other tools drop in silence: each gives other numbers, so running both forms must refuse it.
def _lengths_by_count(self: Any, mask: ir.Value) -> Any:
    _, total, bias = _LENGTHS(self, mask)
    made = fuse_attention._Chain(self.graph, "naive")
    count = made.node("ReduceSum", [mask, made.const(np.array([1]), "axes")], keepdims=0)
    last = made.node("Cast", [made.node("Sub", [count, made.const(np.array(1), "one")])], to=ir.DataType.INT32)
    self.pending += made.nodes
    return last, total, bias


_NODES, _LENGTHS = fuse_attention._Builder._nodes, fuse_attention._Builder._lengths
NAIVE: dict[str, tuple[dict[str, Any], str, Callable[..., Any]]] = {
    "dropped scale": ({}, "_nodes", lambda s, f, m, w, b: _NODES(s, dataclasses.replace(f, scale=0.0), m, w, b)),
    "dropped window": ({"window": 20}, "_nodes", lambda s, f, m, w, b: _NODES(s, f, m, -1, b)),
    "ignored mask": ({}, "_bias", lambda *_: None),
    "wrong lengths": ({}, "_lengths", _lengths_by_count),
    "dropped soft cap": (
        {"masked": text.SOFTCAP}, "_nodes",
        lambda s, f, m, w, b: _NODES(s, dataclasses.replace(f, softcap=0.0), m, w, b),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAIVE)
def test_what_naive_rules_drop_is_refused(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    parts, method, wrong = NAIVE[case]
    monkeypatch.setattr(fuse_attention._Builder, method, wrong)
    model = text.attention(**parts)
    report = fuse(model)
    assert not report.changed
    assert ["differs by" in skip.reason for skip in report.skipped] == [True]


STAYS: dict[str, tuple[dict[str, Any], str]] = {
    "probabilities are an output": (
        {"outputs": f", float[batch, {text.HEADS}, seq, total_len] p"}, "the probabilities are an output of the graph",
    ),
    "product is an output": (
        {"outputs": f", float[batch, {text.HEADS}, seq, {text.WIDTH}] o"},
        "the product with the values is an output of the graph",
    ),
    "scaled values": (
        {"values": P["values"].replace("vv)", "v2)").replace("o =", "v2 = Mul(vv, two) o =")}, "the values are scaled",
    ),
    "unknown scale": (
        {"masked": "n = Add(scaled, bias) m = Mul(n, step)", "inputs": ", float[1] step"},
        "the scores are multiplied by something that is not one number at ",
    ),
    "replaced probabilities": (
        {"values": "p = Softmax<axis=-1>(m) g = Where(drop, zero, p) o = MatMul(g, vv)", "inputs": ", bool[1] drop"},
        "some probabilities are replaced",
    ),
    "guard for other rows": (
        {"values": "p = Softmax<axis=-1>(m) nan = IsNaN(scaled) g = Where(nan, zero, p) o = MatMul(g, vv)"},
        "some probabilities are replaced",
    ),
    "shifted scores": ({"masked": "t = Add(scaled, bias) m = Sub(t, two)"},
                       "Sub between the scores and the Softmax"),
    "no mask": (
        {"masked": "m = Identity(scaled)", "mask": "", "bias": ""}, "Identity between the scores and the Softmax",
    ),
    "not causal": ({"masked": "m = Mul(scaled, two)", "mask": "", "bias": ""}, "no mask: the attention is not causal"),
    "every third token": (
        {"mask": P["mask"].replace("visible =", "third = Mod(cols, i3) is = Equal(third, i0) some = And(causal, is)"
                                   " visible =").replace("And(causal, seen)", "And(some, seen)")},
        "the mask is neither causal nor a sliding window",
    ),
    "no mask of tokens": ({"mask": P["mask"].replace("visible = And(causal, seen)", "visible = Identity(causal)")
                           .replace("Shape(attention_mask)", "Shape(all)"), "inputs": ", int64[batch, t, 1] all"},
                          "the mask does not come from one input of shape [batch, total]"),
    "keys without a cache": ({"cache": "present_k = Identity(kr) present_v = Concat<axis=2>(past_v, v5)"},
                             "the keys meet no cache"),
    "cache before the new keys": (
        {"cache": "present_k = Concat<axis=2>(kr, past_k) present_v = Concat<axis=2>(past_v, v5)"},
        "the keys meet no cache",
    ),
    "heads stay apart": (
        {"join": "joined = Transpose<perm=[0,2,1,3]>(o)", "project": "y = ReduceSum(joined, axes1)"},
        "the heads are not joined by Transpose and Reshape",
    ),
    "size of the product is asked": (
        {"join": P["join"] + " asked = Shape(o)", "outputs": ", int64[4] asked"},
        "somebody else asks for the size of the attention's product",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_what_stays_and_why(case: str) -> None:
    parts, reason = STAYS[case]
    model = text.attention(**parts)
    report = fuse(model)
    assert report.reasons() == {reason: 1}
    assert "GroupQueryAttention" not in {node.op_type for node in model.graph}


def test_a_rotary_of_other_angles_for_the_keys_stays_outside() -> None:
    model = text.attention(rotary=text.ROTARY.format(kind=0, cos="cos2"))
    before = text.results(model, 3)
    report = fuse(model)
    assert len(report.changed) == 1, report.reasons()
    assert "do_rotary" not in fused(model).attributes
    assert "rotary" not in report.ledger[0], "nobody tried to take it in"
    assert [node.op_type for node in model.graph].count("RotaryEmbedding") == 2
    text.check_same(before, model, 3)


@pytest.mark.parametrize("width", [12, 24])
def test_heads_that_the_kernel_cannot_take(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Heads must be a multiple of 8 wide, and tables of angles, of half that width, too."""
    monkeypatch.setattr(text, "WIDTH", width)
    model = text.attention(rotary=TURNED)
    before = text.results(model, 3)
    report = fuse(model)
    if width % 8:
        assert report.reasons() == {f"the kernel wants a head size that is a multiple of 8, got {width}": 1}
    else:
        assert [row["rotary"].partition(":")[0] for row in report.ledger] == ["stays outside"]
        assert [node.op_type for node in model.graph].count("RotaryEmbedding") == 2
    text.check_same(before, model, 3)


def test_rows_padded_on_the_right_need_no_bias() -> None:
    model = text.attention()
    before = text.results(model, 0)
    assert len(fuse(model, padding="right").changed) == 1
    assert len(fused(model).inputs) == 7
    text.check_same(before, model, 0)


def _with_mask(more: str) -> str:
    return P["mask"].removesuffix("visible = And(causal, seen)") + more


def _set_window(model: ir.Model, count: int) -> None:
    """For masks that read `window` themselves."""
    model.graph.initializers["window"].const_value = ir.tensor(np.array(count, np.int64), name="window")


def _windows(model: ir.Model) -> list[int]:
    fused = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    return [node.attributes["local_window_size"].as_int() for node in fused]


def test_keys_and_mask_cut_to_the_last_tokens_are_no_bias() -> None:
    """The mask has fewer entries than the prompt has tokens: it is not added as it was before it was cut."""
    ends = "from = Constant <value_ints = [-20]> () to = Constant <value_ints = [9223372036854775807]> ()"
    axes = "on2 = Constant <value_ints = [2]> () on3 = Constant <value_ints = [3]> ()"
    cuts = "pk = Slice(present_k, from, to, on2) pv = Slice(present_v, from, to, on2)"
    model = text.attention(
        heads=f"{ends} {axes} {P['heads']}",
        cache=f"{P['cache']} {cuts}",
        repeat=P["repeat"].replace("present_k", "pk").replace("present_v", "pv"),
        bias="whole = Where(visible, zero, hidden) bias = Slice(whole, from, to, on3)",
    )
    Simplify(shapes=False).run(model, Context())
    assert fuse(model).reasons() == {"the mask has not one entry for each key": 1}


@pytest.mark.parametrize("number", ["int32[1] {90}", "float[1] {90}"])
def test_a_window_of_any_type_longer_than_the_samples(number: str) -> None:
    kind = 6 if number.startswith("int32") else 1
    more = f"c = Cast <to = {kind}> (cols) r = Cast <to = {kind}> (rows) span = Constant <value = {number}> ()"
    mask = _with_mask(f"{more} far = Sub(r, span) near = Greater(c, far) local = And(causal, near)")
    model = text.attention(mask=f"{mask} visible = And(local, seen)")
    Simplify(shapes=False).run(model, Context())
    fuse(model)
    assert _windows(model) == [90]


def test_a_small_square_in_the_mask_does_not_hide_the_window() -> None:
    square = "sq = Constant <value = float[2, 2] {0, 0, 0, 0}> () top = ReduceMax <keepdims = 0> (sq)"
    flag = f"{square} some = Cast <to = 9> (top) none = Not(some)"
    mask = _with_mask(f"{flag} far = Sub(rows, window) near = Greater(cols, far) local = And(causal, near)")
    model = text.attention(mask=f"{mask} both = And(local, none) visible = And(both, seen)")
    _set_window(model, 20)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    fuse(model)
    assert _windows(model) == [20]


def test_outputs_of_one_split_are_masks_of_their_own() -> None:
    mask = _with_mask("far = Sub(rows, window) near = Greater(cols, far) local = And(causal, near)")
    mask += " fullv = And(causal, seen) localv = And(local, seen) all = Concat <axis = 1> (fullv, localv)"
    layer = " ".join(P[name] for name in ("heads", "rotary", "cache", "repeat", "scores", "masked", "values", "join"))
    names = "|".join([*re.findall(r"(\w+) =", layer), "past_k", "past_v"])
    second = re.sub(rf"\b({names})\b", r"\g<1>_2", layer.replace("bias", "bias_w"))
    cache = f"float[batch, {text.KV_HEADS}, {{}}, {text.WIDTH}]"
    model = text.attention(
        mask=mask,
        bias="both = Where(all, zero, hidden) bias, bias_w = Split <axis = 1, num_outputs = 2> (both)",
        project=f"{second} sum = Add(joined, joined_2) y = MatMul(sum, w)",
        inputs="".join(f", {cache.format('past_len')} past_{name}_2" for name in "kv"),
        outputs="".join(f", {cache.format('total_len')} present_{name}_2" for name in "kv"),
    )
    _set_window(model, 20)
    report = fuse(model)
    assert sorted(_windows(model)) == [-1, 20], report.reasons()


def test_queries_that_ask_the_new_cache_for_its_size_stay() -> None:
    asked = "ps = Shape <start = 2, end = 3> (present_k) pf = Cast <to = 1> (ps) lg = Log(pf)"
    model = text.attention(rotary=f"kr = Identity(k5) {asked} qr = Mul(q5, lg)")
    assert fuse(model).reasons() == {"qr depends on the keys that the operator makes": 1}
