"""From logits to a token, and from pieces of text to the place where a stop string begins.

Order of the rules, as in transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxpress.compiler.errors import BadModelFileError, OptionError

_BLOCK = 64  # logits per block of which only the largest is looked at first


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a text is continued.

    Attributes:
        max_new_tokens: at most so many tokens.
        temperature: 0 takes the most probable token; above, logits are divided by it.
        top_k: only the k most probable tokens; 0 is all.
        top_p: only the fewest tokens that together reach this probability.
        min_p: only tokens at least this share as probable as the most probable one.
        repetition_penalty: above 1 makes tokens that have occurred, in the prompt too, less probable.
        seed: of the random numbers; None takes a new one each time.
        stop: the text ends before the first of these strings.
        ignore_eos: go on after the token that ends a text; for benchmarks.
        adapter: name of a loaded adapter; None is the session's default, which is none at first.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        _check("temperature", self.temperature, self.temperature >= 0, "0 or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        _check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "more than 0")
        _check("stop", self.stop, all(self.stop), "no empty string")


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise OptionError(f"{name}: expected {expected}, got {value!r}")


class Sampler:
    """Picks the next token of one text.

    Args:
        options: the rules.
        prompt: tokens that count as having occurred.
        stream: number of the text in its batch; each has its own random numbers, the first those of a lone text.
    """

    def __init__(self, options: GenerationOptions, prompt: Iterable[int] = (), stream: int = 0) -> None:
        self._options = options
        self._random = np.random.default_rng(None if options.seed is None else options.seed + stream)
        self._is_plain = options.temperature == 0 and options.repetition_penalty == 1
        self._seen = set(prompt) if options.repetition_penalty != 1 else set()

    def pick(self, logits_V: npt.NDArray[np.float32]) -> int:
        """The next token, given its logits. Of equal ones the first is the most probable.

        Raises:
            BadModelFileError: the logits are not numbers.
        """
        if not self._is_plain:
            return self._pick_by_rules(logits_V)
        token = int(logits_V.argmax())
        if logits_V[token] != logits_V[token]:
            raise _not_numbers()
        return token

    def _pick_by_rules(self, logits_V: npt.NDArray[np.float32]) -> int:
        options = self._options
        scores_V = logits_V
        if self._seen:
            scores_V = penalized(logits_V, sorted(self._seen), options.repetition_penalty)
        best = int(scores_V.argmax())
        if scores_V[best] != scores_V[best]:
            raise _not_numbers()
        token = best
        if options.temperature > 0:
            tokens, weights = candidates(
                scores_V / np.float32(options.temperature), options.top_k, options.top_p, options.min_p
            )
            sums = np.cumsum(weights)
            token = int(tokens[np.searchsorted(sums, self._random.random() * sums[-1], side="right")])
        if options.repetition_penalty != 1:
            self._seen.add(token)
        return token


def _not_numbers() -> BadModelFileError:
    return BadModelFileError(
        "generation: expected finite logits, got NaN", hint="the model is broken: check it with `onnxpress eval`"
    )


def penalized(logits_V: npt.NDArray[np.float32], seen: Sequence[int], penalty: float) -> npt.NDArray[np.float32]:
    """A copy of the logits in which those of `seen` tokens are divided by the penalty, or multiplied if negative."""
    scores_V = logits_V.copy()
    index = np.fromiter(seen, np.int64, len(seen))
    index = index[index < scores_V.size]
    old = scores_V[index]
    scores_V[index] = np.where(old < 0, old * np.float32(penalty), old / np.float32(penalty))
    return scores_V


def candidates(
    scores_V: npt.NDArray[np.float32], top_k: int, top_p: float, min_p: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that the rules leave, and their probabilities up to a common factor.

    The most probable token always stays. Ties at the border of top-k all stay.
    """
    total = 0.0
    if 0 < top_k < scores_V.size:
        tokens = _largest(scores_V, top_k)
        scores_V = scores_V[tokens]
        weights = np.exp((scores_V - scores_V.max()).astype(np.float64))
        total = float(weights.sum())
    else:
        weights32 = np.exp(scores_V - scores_V.max())
        # All tokens below this border together weigh less than 1 - top_p, so none of them is needed.
        total = float(weights32.sum(dtype=np.float64))
        border = (1 - top_p) / weights32.size * total
        tokens = np.flatnonzero(weights32 >= border)
        weights = weights32[tokens].astype(np.float64)
    if top_p < 1:
        order = np.argsort(-weights, kind="stable")
        tokens, weights = tokens[order], weights[order]
        before = np.cumsum(weights) - weights
        kept = max(1, int(np.searchsorted(before, top_p * total, side="left")))
        tokens, weights = tokens[:kept], weights[:kept]
    if min_p > 0:
        large = weights >= min_p * weights.max()
        tokens, weights = tokens[large], weights[large]
    return tokens, weights


def _largest(scores_V: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Indices of the `count` largest scores, and of all that equal the least of them."""
    blocks = scores_V.size // _BLOCK
    if blocks > count:
        # The maxima of `count` blocks are `count` scores, so the border is at least the least of these.
        tops = scores_V[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        tokens = np.flatnonzero(scores_V >= np.partition(tops, -count)[-count])
    else:
        tokens = np.arange(scores_V.size)
    scores = scores_V[tokens]
    largest: npt.NDArray[np.int64] = tokens[scores >= np.partition(scores, -count)[-count]]
    return largest


class StopMatcher:
    """Passes text on, up to the first stop string; keeps back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What of the text so far may be shown."""
        if not self._stops:
            return text
        if self.found:
            return ""
        self._held += text
        starts = [start for start in map(self._held.find, self._stops) if start >= 0]
        if starts:
            shown, self._held, self.found = self._held[: min(starts)], "", True
            return shown
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was kept back, now that no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
