"""The facade: text, conversations and tokens in, text and numbers out."""

from __future__ import annotations

import subprocess
import sys

import pytest

import onnxpress.runtime as runtime
from onnxpress.compiler.errors import OptionError
from onnxpress.runtime import load


@pytest.fixture(scope="module")
def model(decoder_path):
    return load(decoder_path("fused"), provider="cpu", threads=1)


def test_text_conversations_and_tokens_are_prompts(model):
    tokens = model.encode("Hello")
    assert model.encode(tokens) == tokens
    said = [{"role": "user", "content": "Hello"}]
    assert model.encode(said) == model.tokenizer.encode_chat(said)
    settings = {"max_new_tokens": 5, "ignore_eos": True}
    result = model.generate("Hello", **settings)
    assert len(result.tokens) == 5
    assert "".join(model.stream("Hello", **settings)) == result.text
    assert [one.tokens for one in model.generate_batch(["Hello", said], **settings)] == [
        result.tokens,
        model.generate(said, **settings).tokens,
    ]


def test_text_is_evaluated_as_its_tokens_are(model):
    text = "Text of a certain length , tokenised . " * 4
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    found = model.evaluate(text, context=32, tokens=100)
    assert found == model.evaluate(ids, context=32, tokens=100)
    assert model.evaluate(text, context=32, tokens=100, wikitext=True) != found
    assert model.evaluate(text, context=32, tokens=100, reference=model).kl == pytest.approx(0, abs=1e-9)


def test_settings_are_checked(model):
    with pytest.raises(OptionError, match="temprature"):
        model.generate("x", temprature=1)
    with pytest.raises(OptionError, match="both"):
        model.generate("x", runtime.GenerationOptions(), top_k=1)


def test_a_model_without_tokenizer_takes_tokens(tmp_path):
    from decoders import write_decoder

    model = load(write_decoder(tmp_path / "bare", tokenizer=False), provider="cpu")
    assert not model.has_tokenizer
    assert len(model.generate([5, 6], max_new_tokens=3, ignore_eos=True).tokens) == 3
    with pytest.raises(OptionError, match=r"tokenizer\.json"):
        model.generate("text")


def test_every_public_name_is_there_and_sorted():
    assert list(runtime.__all__) == sorted(runtime.__all__)
    assert all(hasattr(runtime, name) for name in runtime.__all__)
    assert set(runtime.__all__) == set(runtime._HOMES)


def test_running_a_model_needs_no_torch_transformers_or_compiler():
    code = (
        "import sys, onnxpress.runtime as r; [getattr(r, n) for n in r.__all__]; "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers') or "
        "m.startswith(('onnxpress.passes', 'onnxpress.models')) or "
        "(m.startswith('onnxpress.compiler.') and m != 'onnxpress.compiler.errors')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
