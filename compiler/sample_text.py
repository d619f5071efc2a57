"""A short text to measure on when the user gave none, and its tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

TOPICS = "English text of Python's own help (pydoc_data.topics)"


@functools.cache
def default_text() -> str:
    """English prose that every Python installation has: the language reference behind `help()`."""
    from pydoc_data.topics import topics

    prose = ("customization", "exceptions", "naming", "objects", "truth", "typesseq", "with", "yield")
    return "\n\n".join(topics[name] for name in (*prose, *sorted(set(topics) - set(prose))) if name in topics)


def sample_tokens(
    files: Mapping[str, Path], text: str, *, count: int, vocab_size: int, seed: int
) -> tuple[npt.NDArray[np.int64], str]:
    """Token ids [1, count] to measure on, and where they come from.

    Args:
        files: companion files of the model; `tokenizer.json` is used when it is there.
        text: the user's text, "" for the default one.
        count: tokens wanted; fewer when the text is shorter.
        vocab_size: ids stay below it.
        seed: of the random ids when there is no tokenizer.
    """
    if "tokenizer.json" in files:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
        # A token is rarely longer than 12 characters; encoding a whole book to keep its first lines would take seconds.
        excerpt = (text or default_text())[: count * 12]
        ids = [one for one in tokenizer.encode(excerpt, add_special_tokens=False).ids if one < vocab_size][:count]
        if len(ids) >= 2:
            about = f"{len(ids)} tokens of {'the calibration text' if text else TOPICS}"
            return np.array([ids], dtype=np.int64), about
    rng = np.random.default_rng(seed)
    ids_1T = rng.integers(0, max(vocab_size, 2), (1, count), dtype=np.int64)
    return ids_1T, f"{count} random tokens, since the model has no tokenizer.json: not comparable with text"
