"""Streams of tokens give the text that decoding them whole gives, and templates render as transformers renders them."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
import tokenizers
from hypothesis import given, settings
from tokenizers import decoders, models, normalizers, pre_tokenizers

from onnxpress.compiler.errors import BadModelFileError, OptionError
from onnxpress.models.tiny import save_byte_tokenizer
from onnxpress.runtime.tokenizer import Detokenizer, Tokenizer

TEXTS = (
    "plain words, and more.",
    "  two blanks in front\n\n\tand tabs ",
    "日本語と中文 한국어",
    "👩‍👩‍👧 family, 🇫🇷 flag, 👍🏽 hand",
    "naïve café — “quotes” …",
    "",
)


def byte_level():
    """One token per byte: every character beyond ASCII is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(["<s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("<s>", special=True)])
    return backend


def metaspace():
    """Sentencepiece as Llama 2 has it: a dropped leading space, unknown characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz,."]
    merges = [("▁", "a"), ("a", "n"), ("▁a", "n"), ("o", "r")]
    pieces += ["".join(pair) for pair in merges]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in ("<s>", "</s>")])
    return backend


def wordpiece():
    pieces = ["[UNK]", "un", "##aff", "##able", "word", "##s", "."]
    backend = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


BACKENDS = {"bytes": byte_level, "metaspace": metaspace}


def streamed(backend, ids):
    stream = Detokenizer(backend)
    pieces = [stream.add(token) for token in ids]
    return [*pieces, stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_gives_the_whole_text_without_broken_characters(backend, text):
    backend = BACKENDS[backend]()
    ids = backend.encode(text).ids
    pieces = streamed(backend, ids)
    assert "".join(pieces) == backend.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.sampled_from(sorted(BACKENDS)))
def test_law_stream_equals_whole(text, name):
    backend = BACKENDS[name]()
    ids = backend.encode(text).ids
    assert "".join(streamed(backend, ids)) == backend.decode(ids)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 256), max_size=40))
def test_law_bytes_that_are_no_text_give_what_the_whole_gives(ids):
    backend = byte_level()
    assert "".join(streamed(backend, ids)) == backend.decode(ids)


def test_text_comes_as_soon_as_it_is_whole():
    backend = byte_level()
    pieces = streamed(backend, backend.encode("aé😀b").ids)
    assert pieces == ["a", "", "é", "", "", "", "😀", "b", ""]


def test_what_never_becomes_a_character_is_let_go():
    backend = byte_level()
    lone = backend.encode("é").ids[:1] * 100
    pieces = streamed(backend, lone)
    assert any(pieces[:-1]), "nothing came before the end"
    assert "".join(pieces) == "\ufffd" * 100


def test_spaces_between_words_survive_wordpiece():
    backend = wordpiece()
    ids = backend.encode("unaffable words .").ids
    assert "".join(streamed(backend, ids)) == backend.decode(ids) == "unaffable words ."


def test_special_tokens_are_skipped_or_shown():
    backend = byte_level()
    ids = [0, *backend.encode("hi").ids, 0]
    assert "".join(streamed(backend, ids)) == "hi"
    stream = Detokenizer(backend, skip_special_tokens=False)
    assert "".join([*(stream.add(token) for token in ids), stream.flush()]) == "<s>hi<s>"


@pytest.fixture
def directory(tmp_path):
    save_byte_tokenizer(tmp_path)
    return tmp_path


def reconfigure(directory, **changes):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CONVERSATIONS = (
    [{"role": "user", "content": 'Hello <there> & "you" é'}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "1 < 2\n"},
    ],
)
TEMPLATES = (
    None,
    "{{ bos_token }}{% for m in messages %}\n    {%- if m.role == 'user' %}\n[INST] {{ m.content }} [/INST]\n    "
    "{%- else %}\n{{ m['content'] | tojson }}{{ eos_token }}\n    {% endif %}\n{% endfor %}\n",
    "{%- set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m | tojson(indent=2) }}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}->{% endif %}{{ strftime_now('%Y') }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content.strip() }}{% endif %}{% endfor %}",
)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("prompted", [True, False])
def test_templates_render_as_transformers_renders_them(directory, template, conversation, prompted):
    from transformers import AutoTokenizer

    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    expected = theirs.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompted)
    assert ours.chat(conversation, add_generation_prompt=prompted) == expected
    ids = theirs.apply_chat_template(conversation, add_generation_prompt=prompted)
    assert ours.encode_chat(conversation, add_generation_prompt=prompted) == ids


def test_a_template_may_refuse_and_cannot_escape(directory):
    file = directory / "chat_template.jinja"
    file.write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(OptionError, match="roles must alternate"):
        Tokenizer(directory).chat(CONVERSATIONS[0])
    file.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(OptionError, match="unsafe"):
        Tokenizer(directory).chat(CONVERSATIONS[0])
    file.write_text("{{ messages.append(1) }}")
    with pytest.raises(OptionError, match="unsafe"):
        Tokenizer(directory).chat(CONVERSATIONS[0])


def test_several_templates_and_none(directory):
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}]
    reconfigure(directory, chat_template=named)
    tokenizer = Tokenizer(directory)
    assert tokenizer.chat([]) == "plain"
    assert tokenizer.chat([], tools=[{}]) == "tools 1"
    reconfigure(directory, chat_template=None)
    with pytest.raises(OptionError, match="no chat template"):
        Tokenizer(directory).chat([])


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_transformers_does(directory, text):
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_the_configuration_decides_about_the_first_and_last_token(directory):
    reconfigure(directory, add_bos_token=True, add_eos_token=True)
    tokenizer = Tokenizer(directory)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.encode("a")[0] == bos
    assert tokenizer.encode("a")[-1] == eos
    assert bos not in tokenizer.encode("a", add_special_tokens=False)
    reconfigure(directory, add_bos_token=False, add_eos_token=False)
    assert Tokenizer(directory).encode("a") == tokenizer.encode("a", add_special_tokens=False)


def test_missing_and_broken_files_are_one_line(tmp_path):
    with pytest.raises(BadModelFileError, match=r"expected tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadModelFileError, match="not a tokenizer"):
        Tokenizer(tmp_path)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(tokenizer of transformers, ours of the same files)"""
    from transformers import AutoTokenizer

    from onnxpress.models import zoo

    file, folder = zoo.fetch("smollm2-135m"), tmp_path_factory.mktemp("smollm2")
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    theirs.save_pretrained(folder)
    return theirs, Tokenizer(folder)


@pytest.mark.model
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_smollm2_encodes_as_in_transformers(conversation, smollm2):
    theirs, ours = smollm2
    assert ours.encode_chat(conversation) == theirs.apply_chat_template(conversation, add_generation_prompt=True)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert "".join(streamed(ours.backend, ours.encode(text))) == ours.decode(ours.encode(text))
