"""How good a model is: perplexity of a text, and how far its predictions are from another model's.

Perplexity here is exp of the mean negative log likelihood, in nats, of tokens 2 to N of each of several windows of N
tokens that do not overlap; nothing is put before a window. It compares only with numbers of the same text, window and
tokenizer. The divergence from a reference, mean KL(reference || model) per predicted token, compares more finely: it
sees every probability and not only that of the token that came. A model that lost tokens is compared over those that
it has, on its own reading of the text: the reference's probabilities are divided by their sum over these tokens.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxpress.compiler.errors import CalibrationError, OptionError, UnsupportedModelError
from onnxpress.runtime.config import read_json
from onnxpress.runtime.session import DecoderSession, Floats
from onnxpress.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:  # the compiler is imported by what compares two models alone
    from onnxpress.compiler.vocabulary import Vocabulary

Doubles = npt.NDArray[np.float64]

# Scratch of the log-softmax in bytes: rows are taken in pieces that fit the second-level cache and a large vocabulary.
_PIECE_BYTES = 8 << 20
# Logits of a window are computed in one run up to this size, else in pieces over the cache.
_WINDOW_LOGITS_BYTES = 1 << 30
_NUM_WORST = 10
_SNIPPET = 12  # tokens of context shown before a bad prediction


@dataclass(frozen=True)
class WorstToken:
    """One position where model and reference disagree most.

    `position` counts tokens from the beginning of the text; `kl` is in nats.
    """

    position: int
    kl: float
    context: str
    token: str


@dataclass(frozen=True)
class Evaluation:
    """What `perplexity` found. `nll` is the mean in nats; `kl`, `top1_agreement` and `worst` need a reference."""

    perplexity: float
    nll: float
    tokens: int
    context: int
    predicted: int
    kl: float | None = None
    top1_agreement: float | None = None
    reference_perplexity: float | None = None
    kept_probability: float | None = None  # of the model's tokens, by the reference; None where it has no others
    worst: tuple[WorstToken, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; the keys of a comparison only where there was one."""
        facts = asdict(self)
        if self.kl is None:
            for key in ("kl", "top1_agreement", "reference_perplexity", "worst"):
                del facts[key]
        if self.kept_probability is None:
            del facts["kept_probability"]
        return facts


def perplexity(
    session: DecoderSession,
    token_ids: Sequence[int] | npt.NDArray[np.int64],
    *,
    context: int = 1024,
    tokens: int = 8192,
    reference: DecoderSession | None = None,
    tokenizer: Tokenizer | None = None,
    adapter: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates a model on the first `tokens` of a text.

    Args:
        session: the model.
        token_ids: the text, without special tokens.
        context: length of a window; the last one may be shorter.
        tokens: how much of the text; a shorter text is taken whole.
        reference: the model to compare with, of the same vocabulary, or of the one that the model's was pruned from.
        tokenizer: makes the worst tokens readable.
        adapter: name of a loaded adapter that `session` uses; the reference uses its default, this very session none.
        progress: called with (windows done, windows in all) after each window.

    Raises:
        OptionError: `context` or `tokens` is too small, or `context` longer than the model was made for.
        CalibrationError: the text has fewer than two tokens, or tokens beyond the vocabulary.
        UnsupportedModelError: the models have different vocabularies, of which the model's is no known part.
    """
    ids = np.asarray(token_ids, dtype=np.int64)[:tokens]
    _check(session, ids, context, tokens)
    known = None if reference is None else _known_to(reference, session)
    others = "" if reference is session else None
    windows = [ids[start : start + context] for start in range(0, len(ids), context)]
    windows = [window for window in windows if len(window) > 1]
    nll = reference_nll = kl_sum = kept_sum = 0.0
    agreed = predicted = 0
    worst: list[tuple[float, int]] = []
    for number, window in enumerate(windows):
        targets = window[1:]
        logits = _window_logits(session, window, adapter)[:-1]
        predicted += len(targets)
        if reference is None:
            nll -= float(log_likelihoods(logits, targets).sum())
        else:
            if reference is session:  # whose buffer the second run overwrites
                logits = logits.copy()
            expected = _window_logits(reference, window if known is None else known[window], others)[:-1]
            if known is not None:
                kept_sum += _probability(expected, known)
                expected = expected[:, known]
            found = compare(expected, logits, targets)
            nll -= float(found.log_likelihood.sum())
            reference_nll -= float(found.reference_log_likelihood.sum())
            kl_sum += float(found.kl.sum())
            agreed += int(found.agrees.sum())
            for position in np.argsort(-found.kl)[:_NUM_WORST]:
                entry = (float(found.kl[position]), number * context + int(position) + 1)
                (heapq.heappush if len(worst) < _NUM_WORST else heapq.heappushpop)(worst, entry)
        if progress:
            progress(number + 1, len(windows))
    mean = nll / predicted
    facts: dict[str, Any] = {}
    if reference is not None:
        facts = {
            "kl": kl_sum / predicted,
            "top1_agreement": agreed / predicted,
            "reference_perplexity": float(np.exp(reference_nll / predicted)),
            "kept_probability": None if known is None else kept_sum / predicted,
            "worst": tuple(_describe(ids, position, kl, context, tokenizer) for kl, position in sorted(worst)[::-1]),
        }
    return Evaluation(float(np.exp(mean)), mean, len(ids), context, predicted, **facts)


def _known_to(reference: DecoderSession, session: DecoderSession) -> npt.NDArray[np.int64] | None:
    """The reference's id of each token of the model; None when all are the same."""
    from onnxpress.compiler.vocabulary import columns

    try:
        return columns(_vocabulary(session), session.vocab_size, _vocabulary(reference), reference.vocab_size)
    except ValueError as error:
        raise UnsupportedModelError(
            f"evaluation: {error}", hint="compare a model with the one it was made from, and not the other way round"
        ) from error


def _vocabulary(session: DecoderSession) -> Vocabulary | None:
    """The tokens that a pruned model was left with, as its card says."""
    from onnxpress.compiler.staging import MANIFEST
    from onnxpress.compiler.vocabulary import Vocabulary

    found = Vocabulary.from_card(read_json(session.path.parent / MANIFEST))
    return found if found is not None and len(found.ids_V) == session.vocab_size else None


def _probability(logits_TV: Floats, known: npt.NDArray[np.int64]) -> float:
    """The share of probability on some tokens, summed over all positions."""
    parts = (logits_TV[rows] for rows in _pieces(logits_TV))
    return float(sum(np.exp(_log_sum_exp(part[:, known]) - _log_sum_exp(part)).sum() for part in parts))


def _check(session: DecoderSession, ids: npt.NDArray[np.int64], context: int, tokens: int) -> None:
    if context < 2 or tokens < 2:
        raise OptionError(f"evaluation: expected a context and a number of tokens above 1, got {context} and {tokens}")
    limit = session.context_length
    if limit is not None and context > limit:
        raise OptionError(
            f"context: expected at most {limit}, the length this model was made for, got {context}",
            hint=f"use --context {limit}",
        )
    if len(ids) < 2:
        raise CalibrationError(
            f"evaluation: expected a text of at least 2 tokens, got {len(ids)}", hint="give a longer text"
        )
    if ids.min() < 0 or ids.max() >= session.vocab_size:
        raise CalibrationError(
            f"evaluation: expected token ids below {session.vocab_size}, got {ids.min()} to {ids.max()}",
            hint="use the tokenizer of this very model",
        )


def _window_logits(session: DecoderSession, window: npt.NDArray[np.int64], adapter: str | None) -> Floats:
    """Logits `[S, V]` of one window; views of a buffer of the session."""
    rows = max(1, _WINDOW_LOGITS_BYTES // (session.vocab_size * 4))
    starts = [*range(0, len(window), rows)]
    if session.device != "cpu" and session.interface.has_quantized_cache:
        # On CUDA a first prompt attends to its own keys before they are rounded, later pieces to the cache as it is
        # stored. On the CPU all do.
        starts = [0, *range(1, len(window), rows)]
    if len(starts) == 1:
        logits: Floats = session.run_logits(window[None], adapter=adapter)[0]
        return logits
    decoding = session.begin(1, len(window), adapter=adapter)
    pieces = [np.array(decoding.forward(piece[None])[0]) for piece in np.split(window, starts[1:])]
    return np.concatenate(pieces)


@dataclass(frozen=True)
class Comparison:
    """Per position `[T]`: log likelihood of the token that came, KL(reference || model), best one equal."""

    log_likelihood: Doubles
    reference_log_likelihood: Doubles
    kl: Doubles
    agrees: npt.NDArray[np.bool_]


def log_likelihoods(logits_TV: Floats, targets_T: npt.NDArray[np.int64]) -> Doubles:
    """log softmax(logits)[target] of each row, in nats; exponentials in float32, sums in float64."""
    result = np.empty(len(targets_T))
    for rows in _pieces(logits_TV):
        part = logits_TV[rows]
        result[rows] = part[np.arange(len(part)), targets_T[rows]] - _log_sum_exp(part)
    return result


def compare(reference_TV: Floats, logits_TV: Floats, targets_T: npt.NDArray[np.int64]) -> Comparison:
    """Compares two predictions of one text; see `Comparison`. Each KL is at least 0 up to rounding."""
    count = len(targets_T)
    own, other, kl, agrees = np.empty(count), np.empty(count), np.empty(count), np.empty(count, np.bool_)
    for rows in _pieces(logits_TV):
        p, q, target = reference_TV[rows], logits_TV[rows], targets_T[rows]
        index = np.arange(len(p))
        norm_p, norm_q = _log_sum_exp(p), _log_sum_exp(q)
        own[rows] = q[index, target] - norm_q
        other[rows] = p[index, target] - norm_p
        # KL = sum_v softmax(p)_v (p_v - q_v) - (norm_p - norm_q)
        weight = np.exp(p - norm_p[:, None].astype(np.float32))
        difference = p - q
        kl[rows] = np.einsum("tv,tv->t", weight, difference, dtype=np.float64) - (norm_p - norm_q)
        agrees[rows] = p.argmax(axis=1) == q.argmax(axis=1)
    return Comparison(own, other, kl, agrees)


def _pieces(logits_TV: Floats) -> list[slice]:
    rows = max(1, _PIECE_BYTES // (logits_TV.shape[1] * 4))
    return [slice(start, start + rows) for start in range(0, len(logits_TV), rows)]


def _log_sum_exp(logits_TV: Floats) -> Doubles:
    top = logits_TV.max(axis=1)
    sums: Doubles = np.exp(logits_TV - top[:, None]).sum(axis=1, dtype=np.float64)
    result: Doubles = np.log(sums) + top
    return result


def _describe(
    ids: npt.NDArray[np.int64], position: int, kl: float, context: int, tokenizer: Tokenizer | None
) -> WorstToken:
    start = max(position // context * context, position - _SNIPPET)
    before, token = ids[start:position].tolist(), int(ids[position])
    if tokenizer is None:
        return WorstToken(position, kl, " ".join(map(str, before)), str(token))
    text = tokenizer.decode(before, skip_special_tokens=False)
    whole = tokenizer.decode([*before, token], skip_special_tokens=False)
    return WorstToken(position, kl, text, whole[len(text) :])


def detokenize_wikitext(text: str) -> str:
    """Undoes the tokenisation of WikiText: ` @-@ `, blanks around punctuation, brackets, quotes and line ends.

    `<unk>` stays. Only for text that was tokenised so: in other text a blank before a stop may be meant.
    """
    for pattern, replacement in _DETOKENIZE:
        text = pattern.sub(replacement, text)
    return text


_DETOKENIZE = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r" @([-,.])@ ", r"\1"),
        (r" ([.,;:!?)\]])", r"\1"),
        (r"([(\[]) ", r"\1"),
        (r" (n't|'(?:s|t|re|ve|ll|d|m))\b", r"\1"),
        (r"s ' ", "s' "),
        (r'" ([^"]*?) "', r'"\1"'),
        (r"^ +| +$", ""),
    )
]
