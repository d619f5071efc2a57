"""Generation is greedy as transformers is, the same alone and in a batch, and may be stopped anywhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxpress.compiler.errors import OptionError
from onnxpress.models.tiny import save_byte_tokenizer
from onnxpress.runtime.generate import Generator
from onnxpress.runtime.sampling import GenerationOptions
from onnxpress.runtime.tokenizer import Tokenizer

KINDS = ("growing", "fused", "lengths")
every_kind = pytest.mark.parametrize("kind", KINDS)
GREEDY = GenerationOptions(max_new_tokens=12, ignore_eos=True)
SAMPLED = GenerationOptions(max_new_tokens=12, ignore_eos=True, temperature=1.0, top_p=0.95, seed=7)


@pytest.fixture
def generator(decoder, tmp_path):
    save_byte_tokenizer(tmp_path)
    return lambda kind: Generator(decoder(kind), Tokenizer(tmp_path))


def prompts(session, *lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(5, min(250, session.vocab_size), length).tolist() for length in lengths]


def greedy_by_hand(session, prompt, count):
    """The definition: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(session.run_logits([ids])[0, -1].argmax()))
    return ids[len(prompt) :]


@every_kind
def test_greedy_is_the_definition(generator, kind):
    generator = generator(kind)
    (prompt,) = prompts(generator.session, 9)
    result = generator.generate(prompt, GREEDY)
    assert result.tokens == greedy_by_hand(generator.session, prompt, 12)
    assert (result.finish_reason, result.prompt_tokens) == ("length", 9)
    assert result.text == generator.tokenizer.decode(result.tokens)


def test_greedy_is_that_of_transformers(generator):
    import torch

    from onnxpress.models.tiny import tiny

    generator = generator("fused")
    model = tiny("llama").eval()
    for prompt in prompts(generator.session, 4, 11, 1):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert generator.generate(prompt, GREEDY).tokens == expected[0, len(prompt) :].tolist()


@every_kind
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_is_what_its_texts_are_alone(generator, kind, options):
    generator = generator(kind)
    texts = prompts(generator.session, 5, 9, 5, 2)
    together = generator.generate_batch(texts, GREEDY)
    assert [one.tokens for one in together] == [generator.generate(text, GREEDY).tokens for text in texts]
    assert [one.text for one in together] == [generator.generate(text, GREEDY).text for text in texts]
    first = generator.generate_batch(texts[:1], options)[0]
    assert first.tokens == generator.generate(texts[0], options).tokens


def test_rows_of_a_batch_end_on_their_own(generator):
    generator = generator("fused")
    texts = prompts(generator.session, 5, 9)
    alone = [generator.generate(text, GREEDY).tokens for text in texts]
    generator.eos_token_ids = frozenset([alone[0][3]])
    found = generator.generate_batch(texts, GenerationOptions(max_new_tokens=12))
    expected = [generator.generate(text, GenerationOptions(max_new_tokens=12)) for text in texts]
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
    assert found[0].finish_reason == "eos"
    assert len(found[0].tokens) <= 4


def test_any_of_several_tokens_ends_a_text(generator):
    generator = generator("fused")
    (prompt,) = prompts(generator.session, 6)
    tokens = generator.generate(prompt, GREEDY).tokens
    ends = {tokens[5], tokens[8]}
    generator.eos_token_ids = frozenset(ends)
    result = generator.generate(prompt, GenerationOptions(max_new_tokens=12))
    assert result.tokens == tokens[: next(i for i, token in enumerate(tokens) if token in ends) + 1]
    assert result.finish_reason == "eos"


def test_the_pieces_are_the_text_and_a_stop_string_is_not_shown(generator):
    generator = generator("fused")
    # Sampled from a seed whose text has no stray bytes at the place of the stop string.
    options = GenerationOptions(max_new_tokens=200, temperature=5.0, seed=0, ignore_eos=True)
    (prompt,) = prompts(generator.session, 6)
    stream = generator.stream(prompt, options)
    whole = "".join(stream)
    assert whole == stream.result.text == generator.tokenizer.decode(stream.result.tokens)
    start = next(i for i in range(20, len(whole)) if whole[i : i + 2].isascii() and whole[i : i + 2].isprintable())
    stop = whole[start : start + 2]
    stopped = generator.stream(prompt, GenerationOptions(**{**vars(options), "stop": (stop,)}))
    assert "".join(stopped) == whole[: whole.index(stop)]
    assert stopped.result.finish_reason == "stop"
    batch = generator.generate_batch([prompt], GenerationOptions(**{**vars(options), "stop": stop}))
    assert (batch[0].text, batch[0].finish_reason) == (whole[: whole.index(stop)], "stop")


@every_kind
def test_a_stream_may_be_left_at_any_point(generator, kind):
    generator = generator(kind)
    (prompt,) = prompts(generator.session, 6)
    expected = generator.generate(prompt, GREEDY).tokens
    for count in range(1, 5):
        stream = generator.stream(prompt, GREEDY)
        list(itertools.islice(stream, count))
        stream.close()
        ended = len(stream.result.tokens) == GREEDY.max_new_tokens
        assert stream.result.finish_reason == ("length" if ended else "cancelled")
        assert generator.generate(prompt, GREEDY).tokens == expected
    del stream
    abandoned = generator.stream(prompt, GREEDY)
    next(abandoned)
    assert generator.generate(prompt, GREEDY).tokens == expected
    list(abandoned)
    assert abandoned.result.tokens == expected


@every_kind
def test_a_chat_pays_only_for_what_is_new(generator, kind):
    generator = generator(kind)
    (prompt, more) = prompts(generator.session, 6, 5)
    first = generator.generate(prompt, GREEDY)
    longer = prompt + first.tokens + more
    second = generator.generate(longer, GREEDY)
    assert first.reused_tokens == 0
    assert second.reused_tokens == len(prompt) + len(first.tokens) - 1
    assert second.tokens == greedy_by_hand(generator.session, longer, 12)
    other = [*prompt[:3], *more]
    third = generator.generate(other, GREEDY)
    assert third.reused_tokens == 3
    assert third.tokens == greedy_by_hand(generator.session, other, 12)


def test_an_error_in_the_middle_leaves_no_warm_cache(generator, monkeypatch):
    generator = generator("fused")
    (prompt,) = prompts(generator.session, 6)
    expected = generator.generate(prompt, GREEDY).tokens
    stream = generator.tokens(prompt, GREEDY)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert generator._warm is None
    assert generator.generate(prompt, GREEDY).tokens == expected


def test_the_context_bounds_the_text(generator):
    generator = generator("fused")
    limit = generator.session.context_length
    (prompt,) = prompts(generator.session, limit - 3)
    result = generator.generate(prompt, GREEDY)
    assert (len(result.tokens), result.finish_reason) == (3, "length")
    (too_long,) = prompts(generator.session, limit)
    with pytest.raises(OptionError, match=f"fewer than {limit}"):
        generator.generate(too_long)


def test_prompts_are_checked_before_anything_runs(generator, decoder):
    generator = generator("fused")
    for wrong, message in (([], "at least one"), ([-1], "token ids"), ([10**6], "token ids")):
        with pytest.raises(OptionError, match=message):
            generator.stream(wrong)
    with pytest.raises(OptionError, match="tokenizer"):
        Generator(decoder("fused")).stream([1], GenerationOptions(stop=("x",)))


def test_tokens_alone_need_no_tokenizer(decoder):
    generator = Generator(decoder("fused"))
    (prompt,) = prompts(generator.session, 6)
    tokens = list(generator.tokens(prompt, GREEDY))
    assert tokens == greedy_by_hand(generator.session, prompt, 12)
    result = generator.generate(prompt, GREEDY)
    assert (result.tokens, result.text) == (tokens, "")
