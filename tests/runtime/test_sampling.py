"""The rules leave the tokens that transformers leaves; draws follow the probabilities; stop strings are never shown."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from onnxpress.compiler.errors import BadModelFileError, OptionError
from onnxpress.runtime.sampling import GenerationOptions, Sampler, StopMatcher, candidates, penalized

logits = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(0, 3, 300).astype(np.float32))


def oracle(scores, top_k, top_p, min_p):
    """The tokens that transformers leaves."""
    import torch
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    found = torch.tensor(scores, dtype=torch.float64)[None]
    if top_k:
        found = TopKLogitsWarper(top_k)(None, found)
    if top_p < 1:
        found = TopPLogitsWarper(top_p)(None, found)
    if min_p:
        found = MinPLogitsWarper(min_p)(None, found)
    return torch.softmax(found[0], -1).numpy()


@settings(max_examples=80, deadline=None)
@given(
    logits,
    st.sampled_from([0, 1, 4, 50, 299, 300, 1000]),
    st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_law_the_rules_are_those_of_transformers(scores, top_k, top_p, min_p):
    tokens, weights = candidates(scores, top_k, top_p, min_p)
    expected = oracle(scores, top_k, top_p, min_p)
    found = np.zeros(len(scores))
    found[tokens] = weights / weights.sum()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ties_at_the_border_of_top_k_all_stay():
    scores = np.zeros(500, np.float32)
    scores[[3, 200]] = 1
    assert set(candidates(scores, 1, 1.0, 0.0)[0]) == {3, 200}


def test_penalty_is_that_of_transformers():
    import torch
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    scores = np.random.default_rng(0).normal(size=20).astype(np.float32)
    seen = [1, 5, 5, 7]
    process = RepetitionPenaltyLogitsProcessor(1.3)
    expected = process(torch.tensor([seen]), torch.tensor(scores)[None])[0].numpy()
    before = scores.copy()
    np.testing.assert_allclose(penalized(scores, sorted(set(seen)), 1.3), expected, rtol=1e-6)
    np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize("rules", [{}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 2.0}])
def test_draws_follow_the_probabilities(rules):
    options = GenerationOptions(**{"temperature": 1.0, "seed": 1, **rules})
    scores = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05], np.float32))
    sampler = Sampler(options)
    draws = np.bincount([sampler.pick(scores) for _ in range(4000)], minlength=5) / 4000
    expected = oracle(scores / options.temperature, options.top_k, options.top_p, 0)
    np.testing.assert_allclose(draws, expected, atol=0.03)


def test_a_seed_repeats_and_rows_differ():
    scores = np.zeros(1000, np.float32)

    def draw(seed, stream=0):
        sampler = Sampler(GenerationOptions(temperature=1, seed=seed), stream=stream)
        return [sampler.pick(scores) for _ in range(8)]

    assert draw(3) == draw(3) != draw(4)
    assert draw(3, stream=1) != draw(3)
    assert draw(None) != draw(None)


def test_greedy_takes_the_first_of_equal_ones_and_refuses_nan():
    assert Sampler(GenerationOptions()).pick(np.array([1, 3, 3], np.float32)) == 1
    for options in (GenerationOptions(), GenerationOptions(temperature=1)):
        with pytest.raises(BadModelFileError, match="NaN"):
            Sampler(options).pick(np.array([1, np.nan], np.float32))


def test_a_penalty_counts_prompt_and_answer():
    sampler = Sampler(GenerationOptions(repetition_penalty=2.0), prompt=[0])
    scores = np.array([4, 3, 2.5], np.float32)
    assert [sampler.pick(scores) for _ in range(3)] == [1, 2, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
    ],
)
def test_options_are_checked(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        GenerationOptions(**wrong)


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_law_text_ends_before_the_first_stop_however_it_is_cut(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    matcher = StopMatcher(stops)
    shown = "".join(matcher.add(piece) for piece in pieces) + matcher.flush()
    # The stop that is complete first ends the text; before that, only whole pieces decide.
    starts = [text.find(stop) for stop in stops if stop in text]
    assert matcher.found == bool(starts)
    if not starts:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert len(shown) in {text.find(stop) for stop in stops if stop in text}


def test_text_that_cannot_be_a_stop_comes_at_once():
    matcher = StopMatcher(["END"])
    assert [matcher.add(piece) for piece in ("go ", "E", "N", "x", "EN", "D rest")] == ["go ", "", "", "ENx", "", ""]
    assert matcher.found
    assert matcher.flush() == ""
