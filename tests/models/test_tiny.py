"""The small random models are what the tests take them for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch

from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.models import tiny


@pytest.mark.parametrize("architecture", tiny.tiny_names())
def test_seeds_decide_the_weights(architecture: str) -> None:
    before = torch.random.get_rng_state()
    first, same, other = (
        torch.cat([parameter.ravel() for parameter in tiny.tiny(architecture, seed=seed).parameters()])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("architecture", ["gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3"])
def test_decoders_have_real_ratios(architecture: str) -> None:
    model = tiny.tiny(architecture, num_layers=3, hidden_size=128, tie_word_embeddings=True)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size) == (3, 128)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 23)[None]).logits
    assert 0.3 < float(logits.std()) < 3  # neither all alike nor saturated
    assert all(parameter.std() > 0.01 for parameter in model.parameters())


def test_unknown_name() -> None:
    with pytest.raises(UnsupportedModelError, match="did you mean 'llama'"):
        tiny.tiny("lama")


def test_the_tokenizer_round_trips(tmp_path: Path) -> None:
    tiny.save_byte_tokenizer(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "<|im_start|>user\nHi ▁ 你好 🙂\t 12 <|im_end|>"
    encoded = tokenizer.encode(text).ids
    assert tokenizer.decode(encoded, skip_special_tokens=False) == text
    assert encoded[0] == 1
    assert encoded[-1] == 2
    assert tokenizer.get_vocab_size() <= tiny.VOCABULARY
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == tiny.EOS
    assert "add_generation_prompt" in (tmp_path / "chat_template.jinja").read_text()
