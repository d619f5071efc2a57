"""Continues texts: token by token as a stream, or whole, one or many together."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxpress.compiler.errors import OptionError
from onnxpress.runtime.sampling import GenerationOptions, Sampler, StopMatcher
from onnxpress.runtime.session import DecoderSession, Decoding
from onnxpress.runtime.tokenizer import Tokenizer

_CACHE_STEP = 1024  # a cache has room for a multiple of so many tokens, so that a chat seldom outgrows it


@dataclass
class Generation:
    """A finished text.

    Attributes:
        tokens: those generated, the one that ended the text included.
        text: of these tokens, without special ones and without the stop string; "" without a tokenizer.
        finish_reason: `eos`, `stop` (a stop string), `length`, or `cancelled`.
        prompt_tokens: number of tokens of the prompt.
        reused_tokens: how many of these the cache still held.
        prefill_s, decode_s: seconds until the first token was known, and after it.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "cancelled"
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class Stream:
    """The pieces of a text as they become certain. Iterate, or `close` to stop early; `result` grows along.

    A stream owns its cache: abandoning it at any point harms nobody.
    """

    def __init__(self, pieces: Iterator[str], result: Generation) -> None:
        self._pieces = pieces
        self.result = result

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the text here."""
        close = getattr(self._pieces, "close", None)
        if close:
            close()


class Generator:
    """Generates with one session; remembers the last text, so that a chat pays only for what is new.

    Args:
        session: the model.
        tokenizer: turns tokens into text; None works on tokens alone.
    """

    def __init__(self, session: DecoderSession, tokenizer: Tokenizer | None = None) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self._warm: tuple[Decoding, list[int]] | None = None
        self.eos_token_ids = session.config.eos_token_ids
        if not self.eos_token_ids and tokenizer is not None and tokenizer.eos_token_id is not None:
            self.eos_token_ids = frozenset([tokenizer.eos_token_id])

    def stream(self, prompt: Sequence[int], options: GenerationOptions | None = None) -> Stream:
        """Continues `prompt`, text by piece.

        Raises:
            OptionError: the prompt is empty, does not fit, or stop strings are given without a tokenizer.
        """
        options = options or GenerationOptions()
        prompt = self._check(prompt, options)
        result = Generation(prompt_tokens=len(prompt))
        return Stream(self._pieces(prompt, options, result), result)

    def generate(self, prompt: Sequence[int], options: GenerationOptions | None = None) -> Generation:
        """Continues `prompt` to the end; errors as `stream`."""
        stream = self.stream(prompt, options)
        for _ in stream:
            pass
        return stream.result

    def tokens(self, prompt: Sequence[int], options: GenerationOptions | None = None) -> Iterator[int]:
        """Continues `prompt`, token by token, without text; errors as `stream`."""
        options = options or GenerationOptions()
        prompt = self._check(prompt, options)
        return self._tokens(prompt, options, Generation(prompt_tokens=len(prompt)))

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], options: GenerationOptions | None = None
    ) -> list[Generation]:
        """Continues several prompts together, each as it would be alone.

        Where the graph honours padding on the left, all run together; else prompts of one length do. A graph that
        derives lengths from the sum of its mask takes padding on the left for text on the right, and says nothing.
        """
        options = options or GenerationOptions()
        checked = [self._check(prompt, options) for prompt in prompts]
        groups: dict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(checked):
            groups[0 if self.session.interface.pads_left else len(prompt)].append(index)
        limit = self.session.interface.max_batch
        results: dict[int, Generation] = {}
        for members in groups.values():
            size = limit or len(members)
            for start in range(0, len(members), size):
                part = members[start : start + size]
                results.update(zip(part, self._run_batch([checked[i] for i in part], part, options), strict=True))
        return [results[index] for index in range(len(checked))]

    def _check(self, prompt: Sequence[int], options: GenerationOptions) -> list[int]:
        ids = [int(token) for token in prompt]
        if not ids:
            raise OptionError("prompt: expected at least one token, got none", hint="give some text")
        if min(ids) < 0 or max(ids) >= self.session.vocab_size:
            raise OptionError(
                f"prompt: expected token ids below {self.session.vocab_size}, got {min(ids)} to {max(ids)}",
                hint="use the tokenizer of this very model",
            )
        limit = self.session.context_length
        if limit is not None and len(ids) >= limit:
            raise OptionError(f"prompt: expected fewer than {limit} tokens, got {len(ids)}", hint="shorten the prompt")
        self.session.adapters.find(options.adapter)  # an unknown one is told before anything runs
        if options.stop and self.tokenizer is None:
            raise OptionError("stop: stop strings need a tokenizer, the model directory has none")
        return ids

    def _room(self, prompt: int, new: int) -> tuple[int, int]:
        """(tokens that may be generated, length of the cache)."""
        limit = self.session.context_length
        new = new if limit is None else min(new, limit - prompt)
        length = -(-(prompt + new) // _CACHE_STEP) * _CACHE_STEP
        return new, max(prompt + new, length if limit is None else min(length, limit))

    def _begin(self, prompt: list[int], length: int, adapter: str | None) -> tuple[Decoding, int]:
        """A text whose cache holds a beginning of `prompt`, and how long that is (one token is always left to run)."""
        warm, self._warm = self._warm, None
        if warm is not None:
            decoding, held = warm
            common = next((i for i, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b), None)
            common = min(len(held), len(prompt)) if common is None else common
            common = min(common, len(prompt) - 1)
            # Keys and values that another adapter made say something else.
            is_same = decoding.adapter is self.session.adapters.find(adapter)
            if common and decoding.max_length >= length and is_same:
                decoding.truncate(common)
                return decoding, common
        return self.session.begin(1, length, adapter), 0

    def _tokens(self, prompt: list[int], options: GenerationOptions, result: Generation) -> Iterator[int]:
        new, length = self._room(len(prompt), options.max_new_tokens)
        sampler = Sampler(options, prompt)
        eos = frozenset() if options.ignore_eos else self.eos_token_ids
        started = time.perf_counter()
        decoding, reused = self._begin(prompt, length, options.adapter)
        result.reused_tokens = reused
        held = prompt.copy()
        logits_BV = decoding.prefill([prompt[reused:]])
        pick, step, tokens = sampler.pick, decoding.step, result.tokens
        token = pick(logits_BV[0])
        first = time.perf_counter()
        result.prefill_s = first - started
        try:
            while True:
                tokens.append(token)
                if token in eos:
                    result.finish_reason = "eos"
                elif len(tokens) == new:
                    result.finish_reason = "length"
                yield token
                if token in eos or len(tokens) == new:
                    break
                logits_BV = step(token)
                held.append(token)
                token = pick(logits_BV[0])
            self._warm = decoding, held
        except GeneratorExit:
            self._warm = decoding, held  # the cache is whole between two steps
            raise
        finally:
            result.decode_s = time.perf_counter() - first

    def _pieces(self, prompt: list[int], options: GenerationOptions, result: Generation) -> Iterator[str]:
        tokens = self._tokens(prompt, options, result)
        if self.tokenizer is None:
            for _ in tokens:
                yield ""
            return
        detokenizer, matcher = self.tokenizer.detokenizer(), StopMatcher(options.stop)
        try:
            for token in tokens:
                shown = matcher.add(detokenizer.add(token))
                if matcher.found:
                    result.finish_reason = "stop"
                if shown:
                    result.text += shown
                    yield shown
                if matcher.found:
                    return
            shown = matcher.add(detokenizer.flush())
            if matcher.found:
                result.finish_reason = "stop"
            shown += matcher.flush()
            if shown:
                result.text += shown
                yield shown
        finally:
            tokens.close()  # type: ignore[attr-defined]

    def _run_batch(self, prompts: list[list[int]], numbers: list[int], options: GenerationOptions) -> list[Generation]:
        batch, longest = len(prompts), max(map(len, prompts))
        new, length = self._room(longest, options.max_new_tokens)
        pad = self.session.config.pad_token_id or 0
        ids_BS = np.full((batch, longest), pad, np.int64)
        mask_BS = np.zeros((batch, longest), np.int64)
        for row, prompt in enumerate(prompts):
            ids_BS[row, longest - len(prompt) :] = prompt
            mask_BS[row, longest - len(prompt) :] = 1
        results = [Generation(prompt_tokens=len(prompt)) for prompt in prompts]
        writers = [_Writer(self.tokenizer, options) for _ in prompts]
        samplers = [Sampler(options, prompt, n) for prompt, n in zip(prompts, numbers, strict=True)]
        eos = frozenset() if options.ignore_eos else self.eos_token_ids

        started = time.perf_counter()
        decoding = self.session.begin(batch, length, options.adapter)
        logits_BV = decoding.prefill(ids_BS, None if mask_BS.all() else mask_BS)
        first = time.perf_counter()
        next_B = np.full(batch, pad, np.int64)
        running = list(range(batch))
        for count in range(1, new + 1):
            for row in tuple(running):
                result, writer = results[row], writers[row]
                token = samplers[row].pick(logits_BV[row])
                next_B[row] = token
                result.tokens.append(token)
                writer.add(token)
                if token in eos:
                    result.finish_reason = "eos"
                elif writer.stopped:
                    result.finish_reason = "stop"
                elif count == new:
                    result.finish_reason = "length"
                else:
                    continue
                running.remove(row)
                next_B[row] = pad
            if not running:
                break
            logits_BV = decoding.step(next_B)
        for result, writer in zip(results, writers, strict=True):
            result.text = writer.end()
            result.finish_reason = "stop" if writer.stopped else result.finish_reason
            result.prefill_s, result.decode_s = first - started, time.perf_counter() - first
        return results


class _Writer:
    """Collects the text of one row of a batch."""

    def __init__(self, tokenizer: Tokenizer | None, options: GenerationOptions) -> None:
        self._detokenizer = tokenizer.detokenizer() if tokenizer else None
        self._matcher = StopMatcher(options.stop)
        self._text: list[str] = []

    @property
    def stopped(self) -> bool:
        return self._matcher.found

    def add(self, token: int) -> None:
        if self._detokenizer:
            self._text.append(self._matcher.add(self._detokenizer.add(token)))

    def end(self) -> str:
        if self._detokenizer:
            self._text.append(self._matcher.add(self._detokenizer.flush()) + self._matcher.flush())
        return "".join(self._text)
