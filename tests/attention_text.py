"""Attention with a cache as ONNX text, small enough to run in milliseconds; every part can be replaced by a case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import check
import graphs
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

HEADS, KV_HEADS, WIDTH, LENGTH = 4, 2, 16, 64  # query heads, key-value heads, width of a head, rows of the angle tables
PARTS = {
    "heads": "q4 = Reshape(q, split_q) k4 = Reshape(k, split_k) v4 = Reshape(v, split_k)"
    " q5 = Transpose<perm=[0,2,1,3]>(q4) k5 = Transpose<perm=[0,2,1,3]>(k4) v5 = Transpose<perm=[0,2,1,3]>(v4)",
    "rotary": "qr = Identity(q5) kr = Identity(k5)",
    "cache": "present_k = Concat<axis=2>(past_k, kr) present_v = Concat<axis=2>(past_v, v5)",
    "repeat": "bs = Shape<start=0,end=1>(present_k) ts = Shape<start=2,end=3>(present_k)"
    " wide = Concat<axis=0>(bs, n_k, repeats, ts, n_d) tall = Concat<axis=0>(bs, n_q, ts, n_d)"
    " ku = Unsqueeze(present_k, axes2) ke = Expand(ku, wide) kk = Reshape(ke, tall)"
    " vu = Unsqueeze(present_v, axes2) ve = Expand(vu, wide) vv = Reshape(ve, tall)",
    "mask": "msize = Shape(attention_mask) total = Gather(msize, i1) ksize = Shape(past_k) past = Gather(ksize, i2)"
    " cols = Range(i0, total, i1) places = Range(past, total, i1) rows = Unsqueeze(places, axes1)"
    " causal = LessOrEqual(cols, rows) bools = Cast<to=9>(attention_mask) seen = Unsqueeze(bools, axes12)"
    " visible = And(causal, seen)",
    "bias": "bias = Where(visible, zero, hidden)",
    "scores": "kt = Transpose<perm=[0,1,3,2]>(kk) s = MatMul(qr, kt) scaled = Mul(s, scale)",
    "masked": "m = Add(scaled, bias)",
    "values": "p = Softmax<axis=-1>(m) o = MatMul(p, vv)",
    "join": "ot = Transpose<perm=[0,2,1,3]>(o) joined = Reshape(ot, join)",
    "project": "y = MatMul(joined, w)",
}
ENCODER = {
    "heads": PARTS["heads"].replace("split_k", "split_q"),
    "keys": "kt = Transpose<perm=[0,1,3,2]>(k5)",
    "scores": "s = MatMul(q5, kt) scaled = Mul(s, scale)",
    "masked": PARTS["masked"],
    "values": "p = Softmax<axis=-1>(m) o = MatMul(p, v5)",
    "join": PARTS["join"],
    "project": PARTS["project"],
}
ROTARY = (
    "qr = com.microsoft.RotaryEmbedding<interleaved={kind}>(q5, position_ids, cos, sin)"
    " kr = com.microsoft.RotaryEmbedding<interleaved={kind}>(k5, position_ids, {cos}, sin)"
)
SOFTCAP = " divided = Div(scaled, cap) bent = Tanh(divided) capped = Mul(bent, cap) m = Add(capped, bias)"


def attention(scale: float = 0.3, outputs: str = "", inputs: str = "", window: int = 0, **parts: str) -> ir.Model:
    """Causal attention over a cache, padding hidden by `attention_mask`.

    Args:
        scale: of the scores; that of the operator without an attribute would be 0.25.
        outputs, inputs: more of the graph, ", float[...] name".
        window: tokens that a query sees, 0 for all.
        parts: text that takes the place of one of `PARTS`.
    """
    if window:
        parts["mask"] = (
            f"{PARTS['mask'].removesuffix('visible = And(causal, seen)')} far = Sub(rows, window)"
            " near = Greater(cols, far) local = And(causal, near) visible = And(local, seen)"
        )
    cache, whole = f"batch, {KV_HEADS}, past_len, {WIDTH}", f"batch, {KV_HEADS}, total_len, {WIDTH}"
    given = f"""int64[batch, seq] input_ids, int64[batch, total_len] attention_mask, int64[batch, seq] position_ids,
        float[batch, seq, {HEADS * WIDTH}] q, float[batch, seq, {KV_HEADS * WIDTH}] k,
        float[batch, seq, {KV_HEADS * WIDTH}] v, float[{cache}] past_k, float[{cache}] past_v{inputs}"""
    results = f"float[batch, seq, 32] y, float[{whole}] present_k, float[{whole}] present_v{outputs}"
    return _model(given, results, {**PARTS, **parts}, scale, window)


def encoder(scale: float = 0.3, outputs: str = "", inputs: str = "", **parts: str) -> ir.Model:
    """Attention without a cache, `bias` [batch, 1, 1, seq] being added to the scores; arguments as of `attention`."""
    streams = ", ".join(f"float[batch, seq, {HEADS * WIDTH}] {name}" for name in "qkv")
    given = f"{streams}, float[batch, 1, 1, seq] bias{inputs}"
    return _model(given, f"float[batch, seq, 32] y{outputs}", {**ENCODER, **parts}, scale, 0)


def _model(inputs: str, outputs: str, parts: Mapping[str, str], scale: float, window: int) -> ir.Model:
    angles = np.arange(LENGTH)[:, None] / 100.0 ** (np.arange(WIDTH // 2) / (WIDTH // 2))[None]
    rng = np.random.default_rng(1)
    arrays: dict[str, np.ndarray] = {
        **{f"i{number}": np.array(number, np.int64) for number in range(4)},
        "axes1": np.array([1]), "axes2": np.array([2]), "axes12": np.array([1, 2]),
        "n_q": np.array([HEADS]), "n_k": np.array([KV_HEADS]), "repeats": np.array([HEADS // KV_HEADS]),
        "n_d": np.array([WIDTH]), "window": np.array(window, np.int64),
        "split_q": np.array([0, 0, HEADS, WIDTH]), "split_k": np.array([0, 0, KV_HEADS, WIDTH]),
        "join": np.array([0, 0, HEADS * WIDTH]),
        "zero": np.array(0, np.float32), "hidden": np.array(-1e9, np.float32), "two": np.array(2, np.float32),
        "scale": np.array(scale, np.float32), "cap": np.array(1.5, np.float32),
        "cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32),
        "cos2": np.cos(angles / 2).astype(np.float32), "gain": rng.uniform(0.5, 2.0, WIDTH).astype(np.float32),
        "w": (rng.standard_normal((HEADS * WIDTH, 32)) / 8).astype(np.float32),
        "table": np.tril(np.ones((1, 1, 2 * LENGTH, 2 * LENGTH), bool)),
        "band": np.triu(np.tril(np.ones((1, 1, 2 * LENGTH, 2 * LENGTH), bool)), -5),  # six tokens wide
    }  # fmt: skip
    types = {np.dtype(np.int64): "int64", np.dtype(np.float32): "float", np.dtype(bool): "bool"}
    declared = ", ".join(f"{types[array.dtype]}{list(array.shape)} {name}" for name, array in arrays.items())
    model = ir.from_onnx_text(
        f"""<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
        g ({inputs}, {declared}) => ({outputs}) {{ {" ".join(parts.values())} }}"""
    )
    for value in [one for one in model.graph.inputs if one.name in arrays]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(arrays[value.name], name=value.name)
        model.graph.register_initializer(value)
    common.ShapeInferencePass()(model)
    for node in model.graph:
        if node.op_type in ("RotaryEmbedding", "SimplifiedLayerNormalization"):  # unknown to ONNX's inference
            source, result = node.inputs[0], node.outputs[0]
            assert source is not None
            result.shape, result.type = source.shape, source.type
            common.ShapeInferencePass()(model)
    return model


def conversation(*, padding: int = 0, batch: int = 2) -> Iterator[dict[str, np.ndarray]]:
    """A prompt of 30 tokens and a step of one on the cache that a caller hands back with `send`."""
    rng = np.random.default_rng(2)
    mask, caches = np.ones((batch, 0), np.int64), [np.zeros((batch, KV_HEADS, 0, WIDTH), np.float32)] * 2
    for length in (30, 1):
        new = np.ones((batch, length), np.int64)
        if length > 1:
            new[-1, :padding] = 0
        mask = np.concatenate([mask, new], axis=1)
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -length:]
        widths = {"q": HEADS * WIDTH, "k": KV_HEADS * WIDTH, "v": KV_HEADS * WIDTH}
        streams = {name: rng.standard_normal((batch, length, size)).astype(np.float32) for name, size in widths.items()}
        given = {"input_ids": new, "attention_mask": mask, "position_ids": positions, **streams}
        outputs = yield {**given, "past_k": caches[0], "past_v": caches[1]}
        caches = [outputs["present_k"], outputs["present_v"]]


def results(model: ir.Model, padding: int, more: Mapping[str, np.ndarray] | None = None) -> list[np.ndarray]:
    """y of each step, rows of padding blanked."""
    found, steps = [], conversation(padding=padding)
    feeds = next(steps)
    while True:
        outputs = graphs.run(model, {**feeds, **(more or {})})
        found.append(outputs["y"] * feeds["attention_mask"][:, -outputs["y"].shape[1] :, None])
        try:
            feeds = steps.send(outputs)
        except StopIteration:
            return found


def check_same(before: list[np.ndarray], model: ir.Model, padding: int) -> None:
    """Asserts that `model` gives `before`."""
    for want, got in zip(before, results(model, padding), strict=True):
        check.close(want, got, tolerance=1e-4)
