"""Perplexity and divergence against the textbook formulas in torch."""

from __future__ import annotations

import numpy as np
import pytest

from onnxpress.compiler.errors import CalibrationError, OptionError, UnsupportedModelError
from onnxpress.models.tiny import save_byte_tokenizer
from onnxpress.runtime import evaluate
from onnxpress.runtime.evaluate import compare, detokenize_wikitext, log_likelihoods, perplexity
from onnxpress.runtime.tokenizer import Tokenizer

KINDS = ("growing", "fused", "lengths")


def text(session, length=50, seed=0):
    return np.random.default_rng(seed).integers(5, min(250, session.vocab_size), length)


def oracle(session, ids, context):
    import torch

    losses = []
    for start in range(0, len(ids), context):
        window = ids[start : start + context]
        if len(window) > 1:
            logits = torch.tensor(session.run_logits(window[None])[0], dtype=torch.float64)
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(window[1:]), reduction="none"))
    losses = torch.cat(losses)
    return float(losses.mean().exp()), len(losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context, tokens", [(16, 48), (16, 40), (16, 33), (50, 50), (2, 8)])
def test_perplexity_is_the_formula(decoder, kind, context, tokens):
    session = decoder(kind)
    ids = text(session)
    seen = []
    found = perplexity(session, ids, context=context, tokens=tokens, progress=lambda *step: seen.append(step))
    expected, predicted = oracle(session, ids[:tokens], context)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert (found.tokens, found.context, found.predicted) == (tokens, context, predicted)
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_a_model_agrees_with_itself(decoder):
    session = decoder("fused")
    found = perplexity(session, text(session), context=16, reference=decoder("growing"))
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement > 0.95
    assert found.reference_perplexity == pytest.approx(found.perplexity, rel=1e-4)


def test_the_same_session_may_be_its_own_reference(decoder):
    session = decoder("fused")
    found = perplexity(session, text(session), context=16, reference=session)
    assert (found.kl, found.top1_agreement) == (pytest.approx(0, abs=1e-9), 1.0)


def test_windows_too_large_for_one_run_are_computed_over_the_cache(decoder, monkeypatch):
    session = decoder("fused")
    whole = perplexity(session, text(session), context=40)
    monkeypatch.setattr(evaluate, "_WINDOW_LOGITS_BYTES", session.vocab_size * 4 * 7)
    assert perplexity(session, text(session), context=40).perplexity == pytest.approx(whole.perplexity, rel=1e-5)


@pytest.mark.parametrize("piece", [1, 8 << 20])
def test_comparison_is_the_formula(piece, monkeypatch):
    import torch

    monkeypatch.setattr(evaluate, "_PIECE_BYTES", piece)
    rng = np.random.default_rng(0)
    p, q = (rng.normal(0, 5, (30, 70)).astype(np.float32) + shift for shift in (0, 100))
    q[::3] = p[::3] + rng.normal(0, 0.1, q[::3].shape).astype(np.float32)
    targets = rng.integers(0, 70, 30)
    log_p, log_q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in (p, q))
    found = compare(p, q, targets)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-4, atol=2e-5)
    index = torch.tensor(targets)[:, None]
    np.testing.assert_allclose(found.log_likelihood, log_q.gather(1, index)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found.reference_log_likelihood, log_p.gather(1, index)[:, 0], rtol=1e-5)
    np.testing.assert_array_equal(found.agrees, (log_p.argmax(-1) == log_q.argmax(-1)).numpy())
    np.testing.assert_allclose(log_likelihoods(q, targets), found.log_likelihood)


def test_the_worst_tokens_are_found_and_readable(decoder, tmp_path):
    save_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    session, reference = decoder("fused"), decoder("growing")
    ids = np.array(tokenizer.encode("The quick brown fox jumps over the lazy dog.", add_special_tokens=False))
    bad, run = 30, session.run_logits

    class Broken:
        """Wrong at one position of the text."""

        def __getattr__(self, name):
            return getattr(session, name)

        def run_logits(self, window_BS, adapter=None):
            logits = run(window_BS).copy()
            if window_BS[0, 0] == ids[16]:
                logits[0, bad - 16 - 1] = 0
                logits[0, bad - 16 - 1, 0] = 50
            return logits

    found = perplexity(Broken(), ids, context=16, reference=reference, tokenizer=tokenizer)
    worst = found.worst[0]
    assert (worst.position, worst.token) == (bad, tokenizer.decode([ids[bad]]))
    assert worst.context == tokenizer.decode(ids[18:30].tolist())
    assert [one.kl for one in found.worst] == sorted((one.kl for one in found.worst), reverse=True)
    facts = found.to_json()
    assert {"perplexity", "tokens", "context", "kl", "top1_agreement"} <= set(facts)
    assert "kl" not in perplexity(session, ids, context=16).to_json()


def test_wrong_requests_are_one_line(decoder):
    session = decoder("fused")
    with pytest.raises(CalibrationError, match="at least 2 tokens"):
        perplexity(session, [1], context=16)
    with pytest.raises(CalibrationError, match="token ids"):
        perplexity(session, [1, 10**7], context=16)
    with pytest.raises(OptionError, match="above 1"):
        perplexity(session, [1, 2, 3], context=1)
    with pytest.raises(OptionError, match="context"):
        perplexity(session, [1, 2, 3], context=session.context_length + 1)
    if decoder("lengths").vocab_size != session.vocab_size:
        with pytest.raises(UnsupportedModelError, match="logits"):
            perplexity(session, [1, 2, 3], context=2, reference=decoder("lengths"))


@pytest.mark.parametrize(
    "tokenised, plain",
    [
        ("a guest @-@ starring role", "a guest-starring role"),
        ("about 1 @,@ 500 m , or 4 @.@ 5 feet .", "about 1,500 m, or 4.5 feet."),
        (' " Craig " in the episode " Teddy \'s Story " ', ' "Craig" in the episode "Teddy\'s Story" '),
        ("( born 1970 ) ; [ sic ] : what ?", "(born 1970); [sic]: what?"),
        ("it did n't , they 're", "it didn't, they're"),
        (" \n = Robert <unk> = \n \n He is", "\n= Robert <unk> =\n\nHe is"),
        ("An ordinary (really) text, isn't it? Yes.", "An ordinary (really) text, isn't it? Yes."),
    ],
)
def test_detokenisation(tokenised, plain):
    found = detokenize_wikitext(tokenised)
    assert found.strip() == plain.strip()
