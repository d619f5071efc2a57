"""Tokenizers without some of their tokens: text of kept tokens has the same ones, and any text stays what it is."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from pathlib import Path

import pytest
import tokenizer_kinds
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.passes.pruning._token_files import named_ids, renumbered, template_texts
from onnxpress.passes.pruning._tokenizers import Tokens
from onnxpress.passes.pruning.prune_vocab import choose

every_kind = pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)
WORDS = sorted(set(tokenizer_kinds.TEXT.split()))
texts = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), max_size=12).map(" ".join)
many = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@functools.cache
def tokens(kind: str) -> Tokens:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(tokenizer_kinds.content(kind), encoding="utf-8")
        return Tokens(path)


@functools.cache
def pruned(kind: str, seed: int) -> tuple[dict[int, int], tokenizers.Tokenizer]:
    """Old id to new id and the tokenizer with a random half of what may go."""
    whole = tokens(kind)
    kept = whole.indispensable()
    rest = sorted(whole.words.keys() - kept)
    for index in random.Random(seed).sample(rest, len(rest) // 3):
        kept = kept | whole.needs(index)
    new = whole.numbering(kept)
    made = tokenizers.Tokenizer.from_str(whole.rewritten(new))
    made.no_padding()
    return new, made


@every_kind
@many
@given(text=texts, seed=st.integers(0, 3))
def test_law_text_of_kept_tokens_has_the_same_tokens(kind: str, text: str, seed: int) -> None:
    new, made = pruned(kind, seed)
    before = tokens(kind).backend.encode(text).ids
    # What an unknown word begins with decides whether it is unknown: with fewer tokens it may be spelled after all.
    if all(one in new for one in before) and not (kind == "wordpiece" and tokens(kind).ids["[UNK]"] in before):
        assert made.encode(text).ids == [new[one] for one in before]


@every_kind
def test_the_law_is_about_most_words(kind: str) -> None:
    new, made = pruned(kind, 0)
    same = [word for word in WORDS if all(one in new for one in tokens(kind).backend.encode(word).ids)]
    assert len(same) > 30
    assert len(new) < 0.8 * len(tokens(kind).words)
    for word in same:
        assert made.encode(word).ids == [new[one] for one in tokens(kind).backend.encode(word).ids], word


@every_kind
@many
@given(text=texts, seed=st.integers(0, 3))
def test_law_any_text_is_decoded_as_before(kind: str, text: str, seed: int) -> None:
    _, made = pruned(kind, seed)
    before = tokens(kind).backend
    for skip in (True, False):
        assert made.decode(made.encode(text).ids, skip_special_tokens=skip) == before.decode(
            before.encode(text).ids, skip_special_tokens=skip
        )


@every_kind
def test_every_token_has_the_id_it_was_given(kind: str) -> None:
    new, made = pruned(kind, 1)
    assert {tokens(kind).words[old]: index for old, index in new.items()} == made.get_vocab()
    assert sorted(new.values()) == list(range(len(new)))
    assert [*new] == sorted(new)


@every_kind
def test_the_check_finds_a_lost_token_on_the_way(kind: str, tmp_path: Path) -> None:
    whole = tokens(kind)
    long = max((word for word in WORDS if len(whole.backend.encode(word, add_special_tokens=False).ids) == 1), key=len)
    index = whole.backend.encode(long, add_special_tokens=False).ids[0]
    way = whole.needs(index)
    assert index in way
    new = whole.numbering(whole.indispensable() | way)
    (tmp_path / "good.json").write_text(whole.rewritten(new), encoding="utf-8")
    whole.check(tmp_path / "good.json", new, [long])
    lost = sorted(way - whole.indispensable() - {index})
    if kind in ("unigram", "unigram_bytes", "wordpiece"):
        assert not lost
        return
    assert lost
    new = whole.numbering((whole.indispensable() | way) - {lost[-1]})
    (tmp_path / "bad.json").write_text(whole.rewritten(new), encoding="utf-8")
    if kind == "ignore_merges":  # a whole word is found without merges; its way is needed inside of longer ones
        whole.check(tmp_path / "bad.json", new, [long])
        return
    with pytest.raises(UnsupportedModelError, match="other tokens"):
        whole.check(tmp_path / "bad.json", new, [long])


def test_merges_of_older_files_are_strings(tmp_path: Path) -> None:
    content = json.loads(tokenizer_kinds.content("byte_level"))
    content["model"]["merges"] = [" ".join(one) for one in content["model"]["merges"]]
    del content["model"]["type"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    old = Tokens(path)
    new, made = pruned("byte_level", 0)
    assert tokenizers.Tokenizer.from_str(old.rewritten(new)).to_str() == made.to_str()


def test_a_vocabulary_of_words_is_refused(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModelError, match="WordLevel"):
        Tokens(tmp_path / "tokenizer.json")


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=40, max_size=40), st.integers(1, 40), st.integers(1, 8), st.booleans())
def test_laws_of_the_choice(seen: list[int], size: int, multiple: int, by_size: bool) -> None:
    def needs(token: int) -> set[int]:
        return {token, token // 2}

    counts = {token: count for token, count in enumerate(seen) if count}
    kept = choose(
        counts,
        range(40),
        lambda token: {token} if token < 2 else needs(token) | {token // 4, token // 8, token // 16, token // 32},
        {0, 1},
        min_count=2,
        size=size if by_size else None,
        multiple_of=multiple,
    )
    assert {0, 1} <= kept
    assert all(needs(token) <= kept for token in kept)
    if by_size:
        assert len(kept) == min(40, -(-max(size, 2) // multiple) * multiple) or size < 2
    else:
        assert {token for token, count in counts.items() if count >= 2} <= kept
        assert len(kept) % multiple == 0 or len(kept) == 40


def test_ids_in_configs() -> None:
    config = {
        "bos_token_id": 5,
        "eos_token_id": [7, 9],
        "pad_token_id": None,
        "text_config": {"image_token_index": 9, "other": 5},
        "suppress_tokens": [5, 8],
        "bad_words_ids": [[5, 7], [8]],
        "forced_decoder_ids": [[1, 7]],
        "sep_token_id": -1,
        "added_tokens_decoder": {"5": {"content": "a"}, "9": {"content": "b"}},
    }
    assert set(named_ids(config)) == {5, 7, 9}
    assert renumbered(config, {5: 0, 7: 1, 9: 2}) == {
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "pad_token_id": None,
        "text_config": {"image_token_index": 2, "other": 5},
        "suppress_tokens": [0],
        "bad_words_ids": [[0, 1]],
        "forced_decoder_ids": [[1, 1]],
        "sep_token_id": -1,
        "added_tokens_decoder": {"0": {"content": "a"}, "2": {"content": "b"}},
    }


def test_what_a_chat_template_writes() -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}Be kind.{% generation %}{% endfor %}"
    assert {"<|im_start|>", "\n", "Be kind."} <= set(template_texts(template))
    assert template_texts("{{ unclosed") is not None


def test_an_unknown_character_costs_what_it_did(tmp_path: Path) -> None:
    """Of Unigram: it is as bad as the worst token and ten more, so a text would change when that token goes."""
    scores = {"<unk>": 0, "c": -20, "d": -20, "z": -5, "cd": -1, "Xc": -20, "zz": -50}
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([*scores.items()], unk_id=0))
    backend.save(str(tmp_path / "tokenizer.json"))
    whole = Tokens(tmp_path / "tokenizer.json")
    kept = whole.indispensable()
    assert {whole.words[index] for index in kept} == {"<unk>", "c", "d", "z", "Xc", "zz"}
    new = whole.numbering(kept | {backend.token_to_id("cd")})
    assert backend.encode("Xcd").tokens == ["Xc", "d"]
    assert tokenizers.Tokenizer.from_str(whole.rewritten(new)).encode("Xcd").tokens == ["Xc", "d"]
