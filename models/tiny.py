"""Small random models of every architecture, for tests and for trying a pass in a second. Imports torch when called.

They are small, not degenerate: real ratios of query to key-value heads, sizes that every kernel accepts (head size a
multiple of 8, widths a multiple of 32), norm weights and biases that are not all ones and zeros, logits that differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxpress.compiler.errors import UnsupportedModelError, near_miss

BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
_SPECIAL = (PAD, BOS, EOS)  # ids 0, 1, 2; then one token per byte
VOCABULARY = 320  # 3 special tokens, 256 bytes, the rest unused, as real vocabularies are padded
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_names() -> list[str]:
    """The architectures that `tiny` builds, sorted."""
    return sorted(_BUILDERS)


def tiny(architecture: str, *, seed: int = 0, num_layers: int = 2, hidden_size: int = 64, **overrides: Any) -> Any:
    """A random transformers model in float32, in evaluation mode.

    Args:
        architecture: one of `tiny_names()`.
        seed: of the weights; the caller's random state is left as it was.
        num_layers: blocks of a transformer; layers per stage of a ResNet.
        hidden_size: width, a multiple of 32; decoders have 4 query heads and 2 key-value heads of hidden_size / 4.
        overrides: fields of the architecture's config, e.g. `tie_word_embeddings=True`.

    Raises:
        UnsupportedModelError: no such architecture.
    """
    if architecture not in _BUILDERS:
        raise UnsupportedModelError(
            f"there is no tiny model of {architecture!r}", hint=near_miss(architecture, _BUILDERS)
        )
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[architecture](num_layers, hidden_size, overrides)
        with torch.no_grad():
            # Norm weights of exactly one and biases of exactly zero would hide a pass that loses them.
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
                assert torch.isfinite(parameter).all(), name
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer += 0.1 * torch.rand_like(buffer)
    return model.eval()


def save_tiny(architecture: str, directory: Path, **options: Any) -> Path:
    """Writes `tiny(architecture, **options)` as a Hugging Face directory, text models with a byte-level tokenizer.

    Args:
        architecture: one of `tiny_names()`.
        directory: made if need be.
        options: those of `tiny`.

    Returns:
        The directory.
    """
    model = tiny(architecture, **options)
    model.save_pretrained(directory, safe_serialization=True)
    if architecture not in _VISION:
        save_byte_tokenizer(directory)
    return directory


def save_byte_tokenizer(directory: Path) -> None:
    """Writes a tokenizer of one token per byte, with the special tokens and chat template of ChatML."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token=None))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(directory)


def _text_fields(layers: int, hidden: int) -> dict[str, Any]:
    """Config fields that all transformers of text share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 128,
        "initializer_range": 1.0 / hidden**0.5,  # keeps the size of activations, so that errors travel to the logits
        "bos_token_id": _SPECIAL.index(BOS),
        "eos_token_id": _SPECIAL.index(EOS),
        "pad_token_id": _SPECIAL.index(PAD),
    }


def _decoder(prefix: str, **own: Any) -> Callable[[int, int, dict[str, Any]], Any]:
    """A builder for `<prefix>ForCausalLM` with grouped-query attention and the config fields in `own`."""

    def build(layers: int, hidden: int, overrides: dict[str, Any]) -> Any:
        import transformers

        fields = {**_text_fields(layers, hidden), "num_key_value_heads": 2, "head_dim": hidden // 4, **own, **overrides}
        name = f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
        config = getattr(transformers, name)(**fields)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        if getattr(config, "attn_logit_softcapping", None):
            model.set_attn_implementation("eager")  # the default one drops the soft cap
        return model

    return build


def _renamed(prefix: str, head: str, names: dict[str, str], **own: Any) -> Callable[[int, int, dict[str, Any]], Any]:
    """A builder for `<prefix><head>` whose config calls common fields by other `names`; "" leaves a field out."""

    def build(layers: int, hidden: int, overrides: dict[str, Any]) -> Any:
        import transformers

        text = _text_fields(layers, hidden)
        fields = {names.get(key, key): value for key, value in text.items() if names.get(key, key)}
        config = getattr(transformers, f"{prefix}Config")(**{**fields, **own, **overrides})
        return getattr(transformers, f"{prefix}{head}")(config)

    return build


_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}
_FALCON_NAMES = {"intermediate_size": "ffn_hidden_size"}
_DISTILBERT_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}


def _opt(layers: int, hidden: int, overrides: dict[str, Any]) -> Any:
    fields = {"word_embed_proj_dim": hidden, "init_std": 1.0 / hidden**0.5}
    names = {"intermediate_size": "ffn_dim", "initializer_range": ""}
    return _renamed("OPT", "ForCausalLM", names, **fields)(layers, hidden, overrides)


def _modernbert(layers: int, hidden: int, overrides: dict[str, Any]) -> Any:
    special = {"cls_token_id": _SPECIAL.index(BOS), "sep_token_id": _SPECIAL.index(EOS), "reference_compile": False}
    fields = {"local_attention": 16, "attn_implementation": "sdpa", **special}
    return _renamed("ModernBert", "ForMaskedLM", {}, **fields)(layers, hidden, overrides)


_T5_NAMES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "",
    "initializer_range": "",
    "bos_token_id": "",
}


def _t5(layers: int, hidden: int, overrides: dict[str, Any]) -> Any:
    fields = {"d_kv": hidden // 4, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": _SPECIAL.index(PAD)}
    return _renamed("T5", "ForConditionalGeneration", _T5_NAMES, **fields)(layers, hidden, overrides)


def _whisper(layers: int, hidden: int, overrides: dict[str, Any]) -> Any:
    import transformers

    text = _text_fields(layers, hidden)
    sides = {
        f"{side}_{key}": text[value]
        for side in ("encoder", "decoder")
        for key, value in (
            ("layers", "num_hidden_layers"),
            ("attention_heads", "num_attention_heads"),
            ("ffn_dim", "intermediate_size"),
        )
    }
    tokens = {key: text[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    tokens |= {"decoder_start_token_id": tokens["bos_token_id"], "suppress_tokens": None, "begin_suppress_tokens": None}
    sizes = {"d_model": hidden, "max_target_positions": 64, "init_std": 1.0 / hidden**0.5}
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**sides | tokens | sizes | overrides)
    )


def _vit(layers: int, hidden: int, overrides: dict[str, Any]) -> Any:
    import transformers

    text = _text_fields(layers, hidden)
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "initializer_range")
    fields = {**{key: text[key] for key in shared}, "image_size": 32, "patch_size": 8, "num_labels": 10}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**fields | overrides))


def _resnet(layers: int, hidden: int, overrides: dict[str, Any]) -> Any:
    import transformers

    fields = {
        "embedding_size": hidden // 2,
        "hidden_sizes": [hidden // 2, hidden],
        "depths": [layers, layers],
        "layer_type": "basic",
        "num_labels": 10,
    }
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**fields | overrides))


_VISION = ("resnet", "vit")
# Multipliers that are all different and none of them the default.
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.11,
    "logits_scaling": 2.5,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_BUILDERS: dict[str, Callable[[int, int, dict[str, Any]], Any]] = {
    "bert": _renamed("Bert", "ForMaskedLM", {}),
    "bert_classifier": _renamed("Bert", "ForSequenceClassification", {}, num_labels=10),
    "bloom": _renamed("Bloom", "ForCausalLM", {"intermediate_size": "", "max_position_embeddings": ""}),
    "distilbert": _renamed("DistilBert", "ForMaskedLM", _DISTILBERT_NAMES),
    "falcon": _renamed("Falcon", "ForCausalLM", _FALCON_NAMES),
    "falcon_alibi": _renamed("Falcon", "ForCausalLM", _FALCON_NAMES, alibi=True, multi_query=False),
    "gemma": _decoder("Gemma"),
    # The scale is no power of the head size, as in Gemma 2 27B: a fusion that drops it is caught.
    "gemma2": _decoder("Gemma2", query_pre_attn_scalar=24, sliding_window=16),
    "gemma3": _decoder("Gemma3", query_pre_attn_scalar=24, sliding_window=16, sliding_window_pattern=2),
    "gpt2": _renamed("GPT2", "LMHeadModel", _GPT2_NAMES),
    "gpt_neox": _renamed("GPTNeoX", "ForCausalLM", {}, rotary_pct=0.5),
    "granite": _decoder("Granite", **_GRANITE),
    "llama": _decoder("Llama"),
    "llama3": _decoder("Llama", rope_scaling=_LLAMA3_ROPE, tie_word_embeddings=True),
    # A window longer than the test sequences would be the same as none.
    "mistral": _decoder("Mistral", sliding_window=16),
    "mixtral": _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "modernbert": _modernbert,
    "olmo2": _decoder("Olmo2"),
    "opt": _opt,
    "phi3": _decoder("Phi3"),
    "phi4": _decoder("Phi3", partial_rotary_factor=0.5),
    "qwen2": _decoder("Qwen2"),
    "qwen2_moe": _decoder(
        "Qwen2Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        shared_expert_intermediate_size=96,
    ),
    "qwen3": _decoder("Qwen3"),
    "qwen3_moe": _decoder(
        "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1
    ),
    "resnet": _resnet,
    "roberta": _renamed("Roberta", "ForMaskedLM", {}),
    "smollm3": _decoder("SmolLM3", no_rope_layers=[1, 0, 1, 1, 0, 1, 1, 0], use_sliding_window=False),
    "stablelm": _decoder("StableLm", partial_rotary_factor=0.5),
    "t5": _t5,
    "vit": _vit,
    "whisper": _whisper,
}
