"""What is streamed through a model to calibrate it: windows of text as the model's inputs.

Axes: W windows, S tokens of a window
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.errors import CalibrationError, StreamingError
from onnxpress.compiler.sample_text import TOPICS, default_text

Array = npt.NDArray[Any]

OWN = "text that the model wrote"


@dataclass(frozen=True)
class CalibrationText:
    """Texts and the tokenizer that turns them into windows.

    Attributes:
        texts: name of a source to its text; English that comes with Python when there is no source at all.
        own: `own(num_tokens, length)` gives ids [W, S] of texts that the model itself writes, which are a source too.
        tokenizer: `tokenizer.json` of the model; without it windows are random token ids.
        vocab_size: ids stay below it.
        max_length: tokens that the model takes at once, None when that is not known.
        seed: of random ids.
        held_out: tokens at the beginning of a text that are left for measuring the loss, if it has twice as many.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    own: Callable[[int, int], npt.NDArray[np.int64]] | None = None
    tokenizer: Path | None = None
    vocab_size: int = 2
    max_length: int | None = None
    seed: int = 0
    held_out: int = 0

    @property
    def is_text(self) -> bool:
        """Whether windows are text, and not random tokens."""
        return self.tokenizer is not None or self.own is not None

    @property
    def text(self) -> str:
        """All texts, "" for the default."""
        return "\n\n".join(self.texts.values())

    def windows(self, num_tokens: int, length: int) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
        """Token ids [W, S] with about `num_tokens` in all, spread evenly over every text, and facts for the card.

        A text with less than one window is left out, and the facts say so, unless all are as short.

        Args:
            num_tokens: W times S is at most this, but at least one window is given.
            length: S; less where the model or the texts have no more.

        Raises:
            CalibrationError: a text has fewer than two tokens.
        """
        length = min(length, self.max_length or length, num_tokens)
        if self.tokenizer is None and self.own is None:
            rng = np.random.default_rng(self.seed)
            ids = rng.integers(0, max(self.vocab_size, 2), (max(1, num_tokens // length), length), dtype=np.int64)
            return ids, self._facts(ids, f"{ids.size} random tokens, since the model has no tokenizer.json")
        streams = self._streams()
        # What texts have too few of, the model writes.
        wanted = -(-num_tokens // length)
        given = [len(stream) // length for stream in streams.values() if len(stream) >= length]
        asked = min(_even([*given, wanted], wanted)[-1] * length, num_tokens)
        written = [] if self.own is None or not asked else [*self.own(asked, length)]
        length = min([length, *map(len, written)])
        # A note of a few words beside a book must not cut the book into windows of a few words.
        short = [name for name, stream in streams.items() if len(stream) < length]
        if len(short) < len(streams) + bool(written):
            streams = {name: stream for name, stream in streams.items() if name not in short}
        else:
            length, short = min([length, *map(len, streams.values())]), []
        count = max(1, num_tokens // length)
        available = [len(stream) // length for stream in streams.values()] + [len(written)] * bool(written)
        counts = _even(available, count)
        # In turn, so that a prefix of the windows is a mixture too.
        shares = [_spread(stream, length, one) for stream, one in zip(streams.values(), counts, strict=False)]
        shares += [[text[:length] for text in written[: counts[-1]]]] if written else []
        turns = itertools.zip_longest(*shares)
        ids = np.stack([window for turn in turns for window in turn if window is not None])
        about = f"{ids.size} tokens of {', '.join([*streams, *([OWN] if written else [])])}"
        if short:
            about += f"; shorter than a window of {length} tokens and left out: {', '.join(short)}"
        return ids, self._facts(ids, about)

    def _streams(self) -> dict[str, npt.NDArray[np.int64]]:
        """Token ids of each text."""
        if self.tokenizer is None or (self.own is not None and not self.texts):
            return {}
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.tokenizer))
        texts = dict(self.texts) or {TOPICS: default_text()}
        return {name: self._tokens(tokenizer, name, text) for name, text in texts.items()}

    def _tokens(self, tokenizer: Any, name: str, text: str) -> npt.NDArray[np.int64]:
        found = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        found = found[found < self.vocab_size]
        if len(found) < 2:
            raise CalibrationError(f"{name}: expected text, found {len(found)} tokens", hint="give a few pages of text")
        return found[self.held_out :] if len(found) > 2 * self.held_out else found

    def _facts(self, ids: npt.NDArray[np.int64], about: str) -> dict[str, Any]:
        return {"text": about, "windows": list(ids.shape), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}


def _even(available: list[int], count: int) -> list[int]:
    """How many of `count` windows each source gives: as evenly as what is `available` allows."""
    counts = [0] * len(available)
    left = count
    order = sorted(range(len(available)), key=available.__getitem__)
    for place, index in enumerate(order):
        counts[index] = min(available[index], -(-left // (len(order) - place)))
        left -= counts[index]
    return counts


def _spread(stream: npt.NDArray[np.int64], length: int, count: int) -> list[npt.NDArray[np.int64]]:
    """At most `count` windows that do not overlap, evenly over the stream."""
    available = len(stream) // length
    places = np.unique(np.linspace(0, available - 1, min(count, available)).round().astype(int))
    return [stream[place * length : (place + 1) * length] for place in places]


def feeds(graph: ir.Graph, ids_WS: npt.NDArray[np.int64]) -> list[dict[str, Array]]:
    """Inputs of a text model for each window: token ids, an empty cache, no padding.

    Args:
        graph: its inputs are looked at.
        ids_WS: token ids.

    Raises:
        StreamingError: it reads something else than text.
    """
    length = ids_WS.shape[1]
    known = {
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        "token_type_ids": np.zeros((1, length), np.int64),
    }
    shared: dict[str, Array] = {}
    for value in graph.inputs:
        name = value.name or ""
        if name in graph.initializers or name == "input_ids":
            continue  # has a default, or differs from window to window
        if name in known:
            array: Array = known[name]
        elif "past" in name and value.shape is not None and "encoder" not in str(value.shape):
            sizes = [dim if isinstance(dim, int) else 1 if axis == 0 else 0 for axis, dim in enumerate(value.shape)]
            array = np.zeros(sizes)
        else:
            raise StreamingError(
                f"calibration: the model reads {name!r}, and calibration text gives token ids only",
                hint="quantize it without data: rtn",
            )
        shared[name] = array.astype((value.dtype or ir.DataType.FLOAT).numpy())
    ids_type = next((value.dtype for value in graph.inputs if value.name == "input_ids"), None)
    if ids_type is None:
        raise StreamingError("calibration: the model reads no token ids", hint="quantize it without data: rtn")
    return [{**shared, "input_ids": ids_S[None].astype(ids_type.numpy())} for ids_S in ids_WS]
