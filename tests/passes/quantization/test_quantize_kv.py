"""Laws of a cache in 8 and 4 bits: what is stored, what attention sees of it, and what the runtime makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest
from decoders import HEAD_SIZE, HEADS, KV_HEADS, decoder, write_decoder

import onnxpress
from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import CalibrationError, OptionError, UnsupportedModelError
from onnxpress.compiler.genai import find_cache, settle_head_sizes
from onnxpress.compiler.inspect import summarize
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.quantization.quantize_kv import QuantizeKv, codes, fit_scale
from onnxpress.runtime.benchmark import benchmark
from onnxpress.runtime.evaluate import perplexity
from onnxpress.runtime.generate import Generator
from onnxpress.runtime.placement import audit
from onnxpress.runtime.sampling import GenerationOptions
from onnxpress.runtime.session import DecoderSession

Array = np.ndarray
FORMS = [(8, "channel"), (8, "tensor"), (4, "channel"), (4, "tensor")]
TEXT = CalibrationText(vocab_size=250)  # random ids
TOKENS = 64
LOSSLESS = GenerationOptions(max_new_tokens=12, ignore_eos=True)


def quantized(model: ir.Model, target: str = "cpu", **options: object) -> Report:
    return QuantizeKv(tokens=TOKENS, length=32, **options).run(model, Context(calibration=TEXT, target=TARGETS[target]))


def prompt(tokens: int = 32) -> Array:
    """The first window that the scales were fitted to."""
    return TEXT.windows(TOKENS, 32)[0][0, :tokens]


def feeds(model: ir.Model, ids: Array, past: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """One step of `decoders.decoder`: the tokens behind `past`, which is empty at first."""
    found = {}
    for value in model.graph.inputs:
        if "past" in str(value.name):
            heads, width = value.shape[1], value.shape[3]
            empty = np.zeros((1, heads, 0, width), value.dtype.numpy())
            found[value.name] = empty if past is None else past[value.name.replace("past_key_values", "present")]
            length = found[value.name].shape[2]
    return {**found, "input_ids": ids[None], "attention_mask": np.ones((1, length + len(ids)), np.int64)}


def stored(codes_BGTD: Array) -> Array:
    """Codes as numbers: int8 as they are, 4 bits from pairs, the lower half first, 8 added."""
    if codes_BGTD.dtype == np.int8:
        return codes_BGTD.astype(np.float32)
    pairs = np.stack([codes_BGTD & 15, codes_BGTD >> 4], axis=-1).astype(np.float32) - 8
    return pairs.reshape(*codes_BGTD.shape[:-1], -1)


def scale_of(model: ir.Model, name: str) -> Array:
    return model.graph.initializers[f"past_key_values.{name}.scale"].const_value.numpy()


def samples(seed: int = 0) -> list[Array]:
    """Windows [1, G, T, D] with an outlier channel and one that is never used."""
    rng = np.random.default_rng(seed)
    found = [rng.standard_t(4, (1, 2, 40, 8)).astype(np.float32) for _ in range(3)]
    for one in found:
        one[:, 1, :, 3] *= 20
        one[:, 0, :, 5] = 0
    return found


@pytest.mark.parametrize("per_channel", [True, False])
def test_law_eight_bits_cover_the_largest_value_and_a_quarter_more(per_channel: bool) -> None:
    windows = samples()
    scale = fit_scale(windows, 8, per_channel=per_channel).scale
    assert scale.shape == ((1, 2, 1, 8) if per_channel else (1,))
    assert scale.dtype == np.float32
    assert (scale > 0).all()
    for x in windows:
        assert (np.abs(x) <= 127 * scale * (1 + 1e-6)).all()
        assert (np.abs(codes(x, scale, 8) * scale - x) <= scale * (0.5 + 1e-5)).all()
    largest = np.max([np.abs(codes(x, scale, 8)).max(axis=(0, 2)) for x in windows], axis=0)
    used = largest[largest > 0]
    assert used.max() == 102, "a quarter of the range is kept for other texts"
    assert not per_channel or (used == 102).all()


@pytest.mark.parametrize("per_channel", [True, False])
def test_law_more_bits_and_more_scales_lose_less(per_channel: bool) -> None:
    windows = samples(1)
    by_bits = [fit_scale(windows, bits, per_channel=per_channel).error for bits in (8, 4)]
    # Beside an outlier four bits leave zeros for the rest.
    assert by_bits[0] < by_bits[1] / (8 if per_channel else 4)
    assert fit_scale(windows, 4, per_channel=True).error < fit_scale(windows, 4, per_channel=False).error


def test_law_four_bits_take_the_best_part_of_the_covering_scale() -> None:
    windows = samples(2)
    fit = fit_scale(windows, 4, per_channel=True)
    x = np.concatenate(windows, axis=2)
    covering = np.where(np.abs(x).max(axis=(0, 2), keepdims=True) > 0, np.abs(x).max(axis=(0, 2), keepdims=True), 1) / 7

    def loss(scale: Array) -> Array:
        return np.square(codes(x, scale, 4) * scale - x).sum(axis=(0, 2), keepdims=True)

    best = np.min([loss((covering * factor).astype(np.float32)) for factor in np.linspace(0.6, 1, 9)], axis=0)
    np.testing.assert_allclose(loss(fit.scale), best, rtol=1e-4, atol=1e-9)
    assert (loss(fit.scale) < 0.9 * loss(covering.astype(np.float32))).any(), "the search gains nothing"
    assert fit.error == pytest.approx(np.sqrt(best.sum() / np.square(x).sum()), rel=1e-3)


def test_a_channel_without_a_value_gets_a_scale_and_a_value_that_is_not_finite_does_not() -> None:
    assert (fit_scale([np.zeros((1, 2, 4, 8), np.float32)], 8, per_channel=True).scale > 0).all()
    assert fit_scale(samples(), 8, per_channel=True).scale[0, 0, 0, 5] == np.max(
        fit_scale(samples(), 8, per_channel=True).scale
    )
    broken = samples()
    broken[1][0, 0, 0, 0] = np.inf
    with pytest.raises(CalibrationError, match="not finite"):
        fit_scale(broken, 8, per_channel=True)


@pytest.mark.parametrize(("bits", "granularity"), FORMS)
def test_law_the_stored_cache_is_the_float_one_within_half_a_step(bits: int, granularity: str) -> None:
    """Of the first layer, whose keys and values no rounding reaches; bit for bit what `codes` says."""
    plain, model = decoder(), decoder()
    quantized(model, bits=bits, granularity=granularity)
    before, after = graphs.run(plain, feeds(plain, prompt())), graphs.run(model, feeds(model, prompt()))
    for kind in ("key", "value"):
        x, scale = before[f"present.0.{kind}"], scale_of(model, f"0.{kind}")
        found = stored(after[f"present.0.{kind}"])
        np.testing.assert_array_equal(found, codes(x, scale, bits))
        is_inside = np.abs(x) <= (127.5 if bits == 8 else 7.5) * scale
        assert is_inside.mean() > (0.999 if bits == 8 else 0.9)
        assert (np.abs(found * scale - x) <= scale * (0.5 + 1e-4))[is_inside].all()
        assert after[f"present.0.{kind}"].nbytes * 32 // bits == x.nbytes


@pytest.mark.parametrize(("bits", "granularity"), FORMS)
def test_law_a_step_attends_to_the_stored_cache(bits: int, granularity: str) -> None:
    """Equal to numpy's attention over codes times scales, the token's own key and value rounded as well."""
    model = decoder(layers=1)
    quantized(model, bits=bits, granularity=granularity)
    watched = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend([watched["l0.q"], watched["l0.attention"]])
    first = graphs.run(model, feeds(model, prompt(20)))
    steps = graphs.run(model, feeds(model, prompt(21)[20:], first))
    whole = graphs.run(model, feeds(model, prompt(21)))
    for outputs, rows in ((steps, slice(20, 21)), (whole, slice(0, 21))):
        k, v = (stored(outputs[f"present.0.{kind}"])[0] * scale_of(model, f"0.{kind}")[0] for kind in ("key", "value"))
        q_HSD = outputs["l0.q"][0].reshape(-1, HEADS, HEAD_SIZE).transpose(1, 0, 2)
        k_HTD, v_HTD = (np.repeat(one, HEADS // KV_HEADS, axis=0) for one in (k, v))
        score_HST = q_HSD @ k_HTD.transpose(0, 2, 1) / HEAD_SIZE**0.5
        score_HST = np.where(np.arange(21) <= np.arange(21)[rows, None], score_HST, -np.inf)
        weight_HST = np.exp(score_HST - score_HST.max(axis=-1, keepdims=True))
        expected = (weight_HST / weight_HST.sum(axis=-1, keepdims=True)) @ v_HTD
        check.close(expected.transpose(1, 0, 2).reshape(1, -1, HEADS * HEAD_SIZE), outputs["l0.attention"])


def test_law_eight_bits_are_near_and_four_are_worse() -> None:
    plain = decoder()
    want = graphs.run(plain, feeds(plain, prompt()))["logits"]
    distance = {}
    for bits, granularity in FORMS:
        model = decoder()
        report = quantized(model, bits=bits, granularity=granularity)
        got = graphs.run(model, feeds(model, prompt()))["logits"]
        distance[bits, granularity] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        assert report.metrics["key_error"] > 0
        assert [row["bits"] for row in report.ledger] == [bits, bits]
        assert report.calibration["windows"] == [2, 32]
    assert 0 < distance[8, "channel"] < 0.005
    assert 4 * distance[8, "channel"] < distance[4, "channel"] < 0.1


def test_the_graph_says_what_it_stores() -> None:
    model = decoder()
    before = summarize(model)
    report = quantized(model, bits=4)
    assert report.changed == ["l0.attention", "l1.attention"]
    after = summarize(model)
    assert before.cache_bytes_per_token == 8 * after.cache_bytes_per_token
    assert after.inputs["past_key_values.0.key"] == f"uint8 [batch, {KV_HEADS}, past, {HEAD_SIZE // 2}]"
    assert after.outputs["present.1.value"] == f"uint8 [batch, {KV_HEADS}, total, {HEAD_SIZE // 2}]"
    assert (after.cache["type"], after.cache["head_size"]) == ("int4", HEAD_SIZE)
    assert after.flops_per_cached_token == before.flops_per_cached_token
    model = decoder()
    quantized(model)
    after = summarize(model)
    assert before.cache_bytes_per_token == 4 * after.cache_bytes_per_token
    assert (before.cache["type"], after.cache["type"]) == ("float", "int8")
    names = [value.name for value in model.graph.inputs]
    assert names == [value.name for value in decoder().graph.inputs]


@pytest.fixture(scope="module")
def fused(tiny_export: Callable[..., Path]) -> Path:
    """A Llama with rotary embedding inside of GroupQueryAttention and a bias for padding."""
    return tiny_export("llama")


@pytest.fixture(scope="module")
def made(fused: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made(passes)`: an artifact."""
    found: dict[str, Path] = {}

    def make(passes: str) -> Path:
        if passes not in found:
            folder = tmp_path_factory.mktemp("made") / "out"
            found[passes] = onnxpress.optimize(fused, output=folder, passes=passes, measure=False).directory
        return found[passes]

    return make


KV8, KV4 = "fuse, quantize_kv(tokens=256, length=64)", "fuse, quantize_kv(bits=4, tokens=256, length=64)"


@pytest.mark.parametrize("passes", [KV8, KV4, f"{KV8}, rtn(bits=8, block_size=16), pack", "fuse, rtn, quantize_kv"])
def test_one_piece_chunks_and_single_tokens_give_equal_logits(made: Callable[[str], Path], passes: str) -> None:
    """So a perplexity over whole windows is that of the cache: nothing attends to keys that were not rounded."""
    session = DecoderSession(made(passes), provider="cpu", threads=1)
    assert session.interface.shares_cache
    assert session.interface.has_quantized_cache
    ids = np.random.default_rng(0).integers(3, 200, (1, 24))
    whole = np.array(session.run_logits(ids)[0])
    for sizes in ([24], [9, 1, 14], [1] * 24):
        decoding, found = session.begin(1, 24), []
        for piece in np.split(ids, np.cumsum(sizes)[:-1], axis=1):
            found.append(np.array(decoding.forward(piece)[0]))
        check.close(whole, np.concatenate(found))
    plain = np.array(DecoderSession(made("fuse"), provider="cpu", threads=1).run_logits(ids)[0])
    assert np.abs(whole - plain).max() > 1e-5 * np.abs(plain).max(), "the cache is not quantized"


@pytest.mark.parametrize("passes", [KV8, KV4])
def test_texts_go_on_the_same_however_they_came_in(
    made: Callable[[str], Path], passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = DecoderSession(made(passes), provider="cpu", threads=1)
    prompts = [np.random.default_rng(1).integers(3, 200, size).tolist() for size in (17, 9, 17)]
    alone = [Generator(session).generate(one, LOSSLESS).tokens for one in prompts]
    monkeypatch.setattr("onnxpress.runtime.session.PREFILL_TOKENS", 5)
    assert [Generator(session).generate(one, LOSSLESS).tokens for one in prompts] == alone
    batch = Generator(session).generate_batch([prompts[0], prompts[2]], LOSSLESS)
    assert [one.tokens for one in batch] == [alone[0], alone[2]]
    warm = Generator(session)
    warm.generate(prompts[0], LOSSLESS)
    again = warm.generate([*prompts[0], *alone[0][:4]], LOSSLESS)
    assert again.reused_tokens > 16
    assert again.tokens[:8] == alone[0][4:]


def test_behind_padding_a_text_differs_by_rounding_alone(made: Callable[[str], Path]) -> None:
    """Keys behind padding are turned by another constant angle, which scores do not see, and so rounded elsewhere."""
    ids = np.random.default_rng(2).integers(3, 200, 9)
    padded, mask = np.concatenate([np.zeros(8, np.int64), ids])[None], (np.arange(17) >= 8).astype(np.int64)[None]
    logits = {}
    for passes in ("fuse", KV8):
        session = DecoderSession(made(passes), provider="cpu", threads=1)
        assert session.interface.pads_left
        logits[passes] = np.array(session.run_logits(padded, mask)[0, 8:]), np.array(session.run_logits(ids[None])[0])
    check.close(*logits["fuse"])
    plain, (behind, alone) = logits["fuse"][1], logits[KV8]
    rounding = np.linalg.norm(alone - plain)
    assert 0 < np.linalg.norm(behind - alone) < 2 * rounding
    assert np.linalg.norm(behind - plain) < 2 * rounding


def test_bytes_of_the_cache_are_measured_as_they_are_stored(tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "source")
    onnxpress.optimize(source, output=tmp_path / "kv4", passes="quantize_kv(bits=4)", measure=False)
    sizes = [
        benchmark(path, prompt_tokens=4, new_tokens=2, rounds=1, threads=1).cache_bytes_per_token
        for path in (source, tmp_path / "kv4")
    ]
    assert sizes == [2 * 2 * KV_HEADS * HEAD_SIZE * 4, 2 * 2 * KV_HEADS * HEAD_SIZE // 2]


def test_an_artifact_is_loaded_as_it_was_saved(made: Callable[[str], Path], tmp_path: Path) -> None:
    for passes, kind, head_size in ((KV8, "INT8", 1), (KV4, "UINT8", 2)):
        directory = made(passes)
        again = ir.load(directory / "model.onnx")
        cache = find_cache(again)
        assert cache is not None
        values = [value for value in (*again.graph.inputs, *again.graph.outputs) if "key_values" in str(value.name)]
        assert {value.dtype.name for value in values} == {kind}
        assert {value.shape[3] * head_size for value in values} == {cache.head_size}
        nodes = [node for node in again.graph if node.op_type == "GroupQueryAttention"]
        assert {node.inputs[12].const_value.numpy().shape for node in nodes} == {
            (1, cache.num_heads, 1, cache.head_size)
        }
        # genai 0.18 takes the width of the cache from the graph, and `head_size` as its own builder writes it.
        genai = json.loads((directory / "genai_config.json").read_text())
        assert genai["model"]["decoder"]["head_size"] == cache.head_size
        assert genai["search"]["past_present_share_buffer"] is True
        assert audit(directory / "model.onnx", "cpu").to_json()["stray"] == []
    card = onnxpress.optimize(made(KV8), output=tmp_path / "again", passes="simplify", measure=False)
    ids = np.arange(3, 20)[None]
    first, second = (DecoderSession(path, provider="cpu", threads=1) for path in (made(KV8), card.directory))
    np.testing.assert_array_equal(np.array(first.run_logits(ids)), second.run_logits(ids))


def test_a_symbolic_width_is_settled_as_it_is_packed(tmp_path: Path) -> None:
    """onnxruntime-genai's builder leaves the width of every cache symbolic."""
    source = write_decoder(tmp_path / "source")
    model = ir.load(source / "model.onnx")
    quantized(model, bits=4)
    caches = [value for value in (*model.graph.inputs, *model.graph.outputs) if "value" in str(value.name)]
    caches += [value for value in (*model.graph.inputs, *model.graph.outputs) if ".key" in str(value.name)]
    for value in caches:
        value.shape = ir.Shape([*value.shape[:3], "width"])
    shutil.copytree(source, tmp_path / "symbolic", ignore=shutil.ignore_patterns("*.onnx*"))
    ir.save(model, tmp_path / "symbolic" / "model.onnx", external_data="model.onnx.data")
    session = DecoderSession(tmp_path / "symbolic", provider="cpu", threads=1)
    assert {one.head_dim for one in session.interface.cache} == {HEAD_SIZE // 2}
    assert len(Generator(session).generate([5, 6, 7], LOSSLESS).tokens) == 12
    settle_head_sizes(model, json.loads((source / "config.json").read_text()))
    assert {value.shape[3] for value in caches} == {HEAD_SIZE // 2}


def test_a_first_prompt_on_cuda_is_kept_apart() -> None:
    """There it attends to keys that are not rounded yet; a single token has no other to attend to."""
    pieces = []

    class Stub:
        device, vocab_size, context_length, interface = "cuda", 8, None, type("", (), {"has_quantized_cache": True})

        def begin(self, batch: int, length: int, adapter: str | None = None) -> Stub:
            return self

        def forward(self, ids: Array) -> Array:
            pieces.append(ids.shape)
            return np.zeros((*ids.shape, 8), np.float32)

        def run_logits(self, ids: Array, adapter: str | None = None) -> Array:
            raise AssertionError("a whole window in one piece")

    assert perplexity(Stub(), np.arange(24) % 8, context=12).perplexity == pytest.approx(8)  # type: ignore[arg-type]
    assert pieces == [(1, 1), (1, 11)] * 2


def attention(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "GroupQueryAttention")


def test_a_second_run_does_nothing_and_other_bits_are_refused() -> None:
    model = decoder()
    quantized(model)
    text = graphs.text(model)
    report = quantized(model)
    assert not report.modified
    assert report.reasons() == {"its cache has 8 bits already": 2}
    with pytest.raises(UnsupportedModelError, match="8 bits already"):
        quantized(model, bits=4)
    assert graphs.text(model) == text


def bias(model: ir.Model) -> None:
    node = attention(model)
    node.resize_inputs(11)
    node.replace_input_with(10, ir.val("bias", ir.DataType.FLOAT, [1, 1, "sequence", "total"]))


def reader(model: ir.Model) -> None:
    node = attention(model)
    model.graph.append(ir.node("Identity", [node.outputs[1]], name="reader"))


def odd(model: ir.Model) -> None:
    for value in attention(model).inputs[3:5]:
        value.shape = ir.Shape([*value.shape[:3], 7])


def integers(model: ir.Model) -> None:
    for value in attention(model).inputs[3:5]:
        value.dtype = ir.DataType.INT8


def hidden(model: ir.Model) -> None:
    model.graph.outputs.remove(attention(model).outputs[2])


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (bias, {"target": "cuda"}, "padding='right'"),
        (reader, {}, "codes for numbers"),
        (odd, {"bits": 4}, "odd width 7"),
        (integers, {}, "not of floats"),
        (hidden, {}, "no input and output"),
    ],
)
def test_what_cannot_be_quantized_is_left_with_a_reason(
    spoil: Callable[[ir.Model], None], options: dict[str, object], words: str
) -> None:
    model = decoder(layers=1)
    spoil(model)
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        quantized(model, **options)
    assert caught.value.hint
    # One layer of two: the other is quantized, and the reason is in the report.
    if spoil in (reader, hidden):
        model = decoder(layers=2)
        spoil(model)
        report = quantized(model)
        assert report.changed == ["l1.attention"]
        assert [skip.site for skip in report.skipped] == ["l0.attention"]


def test_other_models_are_refused(fused: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="Concat reads the cache"):
        quantized(ir.load(fused / "model.onnx"))
    with pytest.raises(OptionError, match="no key-value cache"):
        quantized(graphs.branching())
    model = decoder()
    for value in attention(model).outputs[1:3]:
        value.dtype = ir.DataType.BFLOAT16
    with pytest.raises(UnsupportedModelError, match="bfloat16"):
        quantized(model)
    with pytest.raises(OptionError, match="bits must be 4 or 8"):
        QuantizeKv(bits=2)
    with pytest.raises(OptionError, match="tokens must be positive"):
        QuantizeKv(tokens=0)
    with pytest.raises(OptionError, match="length must be positive"):
        QuantizeKv(length=0)


def test_a_pass_that_would_change_the_cache_comes_before() -> None:
    """What the scales were fitted to must be what is cached."""
    model = decoder()
    (_, report), *_ = pipeline.run(model, pipeline.parse("rotate"), Context(calibration=TEXT))
    assert report.modified, "nothing to rotate even without a quantized cache"
    model = decoder()
    quantized(model)
    (_, report), *_ = pipeline.run(model, pipeline.parse("rotate"), Context(calibration=TEXT))
    assert not report.modified
    assert "its cache has fixed scales: comes before quantize_kv" in report.reasons()


def test_the_recipe_leaves_out_what_cuda_cannot_do() -> None:
    names = [one.name() for one in pipeline.recipe("kv8")]
    assert names.index("quantize_kv") < names.index("rtn")
    on_cuda = str(pipeline.recipe("kv8", TARGETS["cuda"]))
    assert "fuse_attention(padding='right')" in on_cuda
    assert on_cuda.index("quantize_kv") < on_cuda.index("cast_float16")
