"""GGUF files: every tensor dequantized, config and tokenizer as the file says, damaged files refused in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxpress import models
from onnxpress.compiler import optimize as optimizing
from onnxpress.compiler.artifact import Artifact
from onnxpress.compiler.errors import BadModelFileError, UnsupportedModelError
from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.pipeline import parse
from onnxpress.models import gguf, gguf_file, tiny, zoo

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd")
    return name.replace("model.norm", "output_norm").replace("lm_head", "output")


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's rotary order: the two halves of each head interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_llama(
    path: Path,
    *,
    kind: str = "Q8_0",
    kinds: dict[str, str] | None = None,
    pre: str = "smollm",
    extra: dict[str, Any] | None = None,
    **tensors: np.ndarray,
) -> Any:
    """Writes the tiny llama as GGUF, matrices as `kind`, or by a part of their name as `kinds` says.

    Returns the torch model with the same rounded weights.
    """
    model = tiny.tiny("llama")
    config = model.config
    writer = gguf_package.GGUFWriter(path, "llama")
    writer.add_name("a tiny llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    # transformers 4 and 5 say it in different places.
    parameters = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", None)}
    writer.add_rope_freq_base(parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    specials = [tiny.PAD, tiny.BOS, tiny.EOS]
    tokens = [*specials, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "Ġt", "12"]
    tokens += [f"<unused{index}>" for index in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for key, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = parameter.numpy()
            if weight.ndim == 1:
                writer.add_tensor(gguf_name(name), weight)
                continue
            own = next((one for part, one in (kinds or {}).items() if part in f".{gguf_name(name)}"), kind)
            quantized = gguf_package.GGMLQuantizationType[own]
            packed = gguf_package.quants.quantize(weight, quantized)
            rounded = gguf_package.quants.dequantize(packed, quantized)
            parameter.copy_(torch.from_numpy(rounded))
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                packed = gguf_package.quants.quantize(interleaved(rounded, heads), quantized)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=quantized)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def logits(source: models.Source, tokens: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(source.model_path, providers=["CPUExecutionProvider"])
    feeds = {
        value.name: np.zeros((len(tokens), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    positions = np.arange(tokens.shape[1])[None].repeat(len(tokens), 0)
    feeds |= {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": positions}
    return np.asarray(session.run(["logits"], feeds)[0])


TOKENS = np.random.default_rng(0).integers(3, 259, (2, 12))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q5_1"])
def test_every_type_is_dequantized(tmp_path: Path, kind: str) -> None:
    model = write_llama(tmp_path / "tiny.gguf", kind=kind)
    source = models.load(tmp_path / "tiny.gguf", work_dir=tmp_path)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(source, TOKENS), expected, atol=2e-5)
    assert source.provenance["tensor_types"] == ({kind: 21} if kind == "F32" else {"F32": 5, kind: 16})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> models.Source:
    work = tmp_path_factory.mktemp("gguf")
    write_llama(work / "tiny.gguf")
    return models.load(work / "tiny.gguf", work_dir=work)


def test_what_a_source_brings(loaded: models.Source) -> None:
    assert loaded.kind == "gguf"
    assert loaded.config["model_type"] == "llama"
    assert (loaded.config["num_attention_heads"], loaded.config["num_key_value_heads"]) == (4, 2)
    for config in (loaded.config, loaded.generation_config):
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    assert loaded.provenance["general_name"] == "a tiny llama"
    assert loaded.provenance["gguf_architecture"] == "llama"
    assert len(loaded.provenance["files"]["tiny.gguf"]["sha256"]) == 64
    assert loaded.files["chat_template.jinja"].read_text() == TEMPLATE
    tensors = [value.const_value for value in loaded.model.graph.initializers.values() if value.const_value is not None]
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in tensors if tensor.nbytes > 4096)


TEXTS = ["the tt 12, 1212 ½", "<|im_start|>user\n 你好 🙂 ▁ <|im_end|>", "  two\t\ttabs\n\n", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_is_that_of_the_file(loaded: models.Source, text: str) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(loaded.files["tokenizer.json"]))
    encoded = tokenizer.encode(text).ids
    assert tokenizer.decode(encoded, skip_special_tokens=False) == text
    assert encoded == tokenizer.encode(text, add_special_tokens=False).ids  # add_bos_token is false
    assert tokenizer.token_to_id("12") not in encoded  # smollm splits numbers into digits, whatever the merges


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_reads_the_tokenizer_alike(loaded: models.Source, text: str) -> None:
    import transformers

    reread = transformers.AutoTokenizer.from_pretrained(loaded.directory)
    assert (reread.bos_token, reread.eos_token, reread.pad_token) == (tiny.BOS, tiny.EOS, tiny.PAD)
    plain = tokenizers.Tokenizer.from_file(str(loaded.files["tokenizer.json"]))
    assert reread(text).input_ids == plain.encode(text).ids
    assert reread.decode(reread(text).input_ids) == text
    assert reread.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == f"{tiny.BOS}x{tiny.EOS}"


def test_llama3_vocabularies(tmp_path: Path) -> None:
    write_llama(tmp_path / "tiny.gguf", pre="llama-bpe")
    source = models.load(tmp_path / "tiny.gguf", work_dir=tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(source.files["tokenizer.json"]))
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 x")
    assert [piece for piece, _ in pieces] == ["It", "'s", "Ġ", "123", "45", "Ġx"]
    assert tokenizer.token_to_id("12") in tokenizer.encode("12").ids


@pytest.mark.parametrize("how", ["frequencies", "linear"])
def test_stretched_rotary_frequencies_are_applied(tmp_path: Path, how: str) -> None:
    factors = np.array([1, 1, 1, 1.5, 2, 4, 8, 8] if how == "frequencies" else [4] * 8, np.float32)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    if how == "frequencies":
        model = write_llama(tmp_path / "tiny.gguf", **{"rope_freqs.weight": factors})
    else:
        model = write_llama(tmp_path / "tiny.gguf", extra=linear)
    with torch.no_grad():
        plain = model(input_ids=torch.from_numpy(TOKENS)).logits.numpy()
        model.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
        expected = model(input_ids=torch.from_numpy(TOKENS)).logits.numpy()
    assert np.abs(expected - plain).max() > 0.01
    found = logits(models.load(tmp_path / "tiny.gguf", work_dir=tmp_path), TOKENS)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_directory_with_one_gguf_file(tmp_path: Path) -> None:
    write_llama(tmp_path / "tiny.gguf")
    assert models.load(tmp_path, work_dir=tmp_path).kind == "gguf"


# --- weights kept as they are --------------------------------------------------------------------------------------


def kept(path: Path, out: Path, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """Card, linears and embedding of what `keep_quantization` makes of a file, and by which operator they are held."""
    artifact = optimizing.optimize(
        path, output=out, passes="fuse, rtn(bits=4)", keep_quantization=True, measure=False, **options
    )
    model = models.load(out, work_dir=out).model
    linears = find_linears(model)
    weights = {one.name: one.w_NK() for one in linears}
    (table,) = find_embeddings(model, linears)
    return artifact.report, weights | {"embedding": table.table_VH()}, {one.name: one.holder for one in linears}


ROLES = {"q": "self_attn.q", "k": "self_attn.k", "v": "self_attn.v", "o": "self_attn.o"}
ROLES |= {role: f"mlp.{role}" for role in ("gate", "up", "down")}


def in_torch(model: Any) -> dict[str, np.ndarray]:
    """The matrices of the model by the names that they have in the graph."""
    named = dict(model.named_parameters())
    found = {"embedding": "model.embed_tokens", "head": "lm_head"}
    for layer in range(model.config.num_hidden_layers):
        found |= {f"block{layer}.{role}": f"model.layers.{layer}.{name}_proj" for role, name in ROLES.items()}
    return {name: named[f"{parameter}.weight"].detach().numpy() for name, parameter in found.items()}


@pytest.mark.parametrize("kind, bits", [("Q8_0", 8), ("Q4_0", 4), ("Q5_0", 8)])
def test_an_artifact_holds_the_very_weights_of_the_file(tmp_path: Path, kind: str, bits: int) -> None:
    model = write_llama(tmp_path / "tiny.gguf", kind=kind)
    card, weights, holders = kept(tmp_path / "tiny.gguf", tmp_path / "out")
    want = in_torch(model)
    assert set(weights) == set(want)
    assert set(holders.values()) == {"MatMulNBits"}
    for name, matrix in want.items():
        np.testing.assert_array_equal(weights[name], matrix, err_msg=name)
    keep, rtn = card["passes"][-2:]
    assert (keep["pass"], keep["changed"], rtn["changed"]) == ("keep_quantization", len(want), 0)
    rows = {row["site"]: row for row in keep["ledger"]}
    assert {(row["bits"], row["block_size"], row["source_type"]) for row in rows.values()} == {(bits, 32, kind)}
    assert rows["block1.gate"]["source_tensor"] == "blk.1.ffn_gate.weight"
    assert rows["head"]["source_tensor"] == "output.weight"


def test_what_has_no_exact_form_is_named_and_rounded(tmp_path: Path) -> None:
    write_llama(tmp_path / "tiny.gguf", kind="Q8_0", kinds={"ffn_up": "Q5_1", ".output.weight": "F16"})
    card, _, holders = kept(tmp_path / "tiny.gguf", tmp_path / "out")
    keep, rtn = card["passes"][-2:]
    skipped = {row["reason"].partition(":")[0]: row["sites"] for row in keep["skipped"]}
    assert skipped["blk.*.ffn_up.weight is Q5_1"] == ["block0.up", "block1.up"]
    assert skipped["output.weight is F16"] == ["head"]
    assert sorted(row["site"] for row in rtn["ledger"]) == ["block0.up", "block1.up", "head"]
    assert set(holders.values()) == {"MatMulNBits"}


def test_levels_with_offsets_are_kept(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "tiny.gguf", kind="Q4_1", kinds={"token_embd": "Q8_0", ".output.weight": "Q8_0"})
    card, weights, holders = kept(tmp_path / "tiny.gguf", tmp_path / "out")
    keep, rtn = card["passes"][-2:]
    assert not rtn["changed"]
    assert set(holders.values()) == {"MatMulNBits"}
    rows = {row["site"]: row for row in keep["ledger"]}
    for name, want in in_torch(model).items():
        kind = "Q8_0" if name in ("head", "embedding") else "Q4_1"
        assert rows[name]["source_type"] == kind
        assert (rows[name]["weight_error"] == 0) == (kind == "Q8_0")
        width = want.shape[1]
        got, offsets = np.split(weights[name], [width], axis=1)
        if kind == "Q4_1":
            got = got + np.repeat(offsets, 32, axis=1)[:, :width]
        assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want), name


def test_tensors_by_the_names_of_the_graph() -> None:
    table, packed, up = (
        ("token_embd.weight", "Q6_K"),
        ("blk.7.attn_qkv.weight", "Q4_K"),
        ("blk.7.ffn_up.weight", "Q8_0"),
    )
    tied = gguf._by_site(dict([table, packed, up, ("blk.7.attn_norm.weight", "F32"), ("output_norm.weight", "F32")]))
    assert tied == {
        **dict.fromkeys(("embedding", "head"), table),
        **{f"block7.{role}": packed for role in ("q", "k", "v", "qkv")},
        **{f"block7.{role}": up for role in ("up", "gate", "gate_up")},
    }
    gate, head = ("blk.7.ffn_gate.weight", "F16"), ("output.weight", "Q8_0")
    untied = gguf._by_site(dict([up, gate, table, head]))
    assert (untied["block7.gate"], untied["head"], untied["embedding"]) == (gate, head, table)


@pytest.mark.parametrize(
    "passes, place",
    [
        ("fuse, rtn, pack", "trim_logits"),
        ("fuse, pack", "trim_logits"),
        ("fuse", "trim_logits"),
        ("svd(ratio=0.5)", ""),
    ],
)
def test_nothing_rounds_or_joins_before(passes: str, place: str) -> None:
    names = [one.name() for one in optimizing._keeping(parse(passes))]
    index = names.index("keep_quantization")
    assert names[:index][-1:] == [place] * bool(place)
    assert [one.name() for one in parse(passes)] == names[:index] + names[index + 1 :]
    once = optimizing._keeping(parse(passes))
    assert str(optimizing._keeping(once)) == str(once)


def test_on_cuda_weights_are_kept_before_they_are_cast(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "tiny.gguf", kind="Q4_0")
    card, weights, _ = kept(tmp_path / "tiny.gguf", tmp_path / "out", target="cuda")
    assert [row["pass"].partition("(")[0] for row in card["passes"][-3:]] == [
        "keep_quantization",
        "cast_float16",
        "rtn",
    ]
    for name, matrix in in_torch(model).items():
        np.testing.assert_array_equal(weights[name], matrix, err_msg=name)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "tiny.gguf"
    write_llama(path)
    return path.read_bytes()


def refuse(path: Path, kind: type[BadModelFileError | UnsupportedModelError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        models.load(path, work_dir=path.parent)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.hint
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.1, 0.5, 0.99999])
def test_truncated(tmp_path: Path, whole: bytes, share: float) -> None:
    (tmp_path / "x.gguf").write_bytes(whole[: int(len(whole) * share)])
    refuse(tmp_path / "x.gguf", BadModelFileError, "x.gguf")


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "begins with b''"),
        (b"PK\x03\x04" + bytes(60), "begins with"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 1, 1), "version"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 1, 1), "little-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 0), "tensors, found none"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 2**60), "truncated"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, 2**62), "truncated"),
    ],
)
def test_not_gguf(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    refuse(tmp_path / "x.gguf", BadModelFileError, word)


def test_an_unknown_architecture(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(whole.replace(b"llama", b"lhama"))
    refuse(tmp_path / "x.gguf", UnsupportedModelError, "'lhama'", "supported: bloom")


def test_a_missing_tensor(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(whole.replace(b"blk.1.ffn_up", b"blk.1.ffn_UP"))
    refuse(tmp_path / "x.gguf", BadModelFileError, "weights are missing", "layers.1.mlp.up_proj")


def test_rotary_scaling_that_depends_on_length(tmp_path: Path) -> None:
    write_llama(tmp_path / "x.gguf", extra={"llama.rope.scaling.type": "yarn"})
    refuse(tmp_path / "x.gguf", UnsupportedModelError, "'yarn'")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_header_is_walked_or_refused(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    content = bytearray(whole)
    header = whole.index(b"tokenizer.ggml.tokens") + 200
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, header))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.gguf").write_bytes(content)
    try:
        gguf_file.read(tmp_path / "x.gguf")
    except (BadModelFileError, UnsupportedModelError) as error:
        assert "x.gguf" in str(error)  # noqa: PT017 (refusing is one of two right outcomes)


@pytest.mark.model
def test_the_real_model(real_model: Artifact, tmp_path: Path) -> None:
    origin = real_model.report["source"]
    assert origin["kind"] == "gguf"
    assert origin["tensor_types"] == {"F32": 61, "Q4_1": 210, "Q8_0": 1}
    assert next(iter(origin["files"].values()))["sha256"] == zoo._ZOO["smollm2-135m"].sha256
    source = models.load(real_model.directory, work_dir=tmp_path)
    assert source.config["num_hidden_layers"] == 30
    assert source.generation_config["eos_token_id"] == 2
    config = json.loads(source.files["tokenizer_config.json"].read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    tokenizer = tokenizers.Tokenizer.from_file(str(source.files["tokenizer.json"]))
    text = "<|im_start|>user\nBorn in 1984: 你好 🙂 ▁ 4 ½ months<|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    prompt = np.array([tokenizer.encode("The capital of France is").ids])
    assert tokenizer.decode([int(logits(source, prompt)[0, -1].argmax())]).strip() == "Paris"
