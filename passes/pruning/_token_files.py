"""Token ids in the files beside a model: which ones they name, and the same files with others in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jinja2

# Files of tokenizers that tokenizer.json stands for, and that would contradict it now.
OBSOLETE = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model")
ROLES = ("system", "user", "assistant", "tool")

_NAMES_ONE = ("token_id", "token_ids", "token_index")  # how keys end whose value is an id or a list of them
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_SEQUENCES = ("bad_words_ids", "force_words_ids")  # lists of lists
_PLACED = "forced_decoder_ids"  # pairs of a position and an id


def named_ids(content: Any) -> Iterator[int]:
    """Ids that a config gives a meaning: bos_token_id and the like, and what is forced. Not what it forbids."""
    if isinstance(content, list):
        for one in content:
            yield from named_ids(one)
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if str(key).endswith(_NAMES_ONE):
            yield from (one for one in (value if isinstance(value, list) else [value]) if _is_id(one))
        elif key == _PLACED and isinstance(value, list):
            yield from (pair[1] for pair in value if isinstance(pair, list) and len(pair) == 2 and _is_id(pair[1]))
        else:
            yield from named_ids(value)


def renumbered(content: Any, new: Mapping[int, int]) -> Any:
    """A config with the ids of `new` in place of the old ones; what forbids a token that is gone goes with it.

    Args:
        content: anything out of a JSON file. Not changed.
        new: old id to new id.
    """
    if isinstance(content, list):
        return [renumbered(one, new) for one in content]
    if not isinstance(content, dict):
        return content
    made: dict[Any, Any] = {}
    for key, value in content.items():
        if str(key).endswith(_NAMES_ONE):
            made[key] = [_one(one, new) for one in value] if isinstance(value, list) else _one(value, new)
        elif key in _LISTS and isinstance(value, list):
            made[key] = [new[one] for one in value if _is_id(one) and one in new]
        elif key in _SEQUENCES and isinstance(value, list):
            rows = [row for row in value if isinstance(row, list) and all(_is_id(one) and one in new for one in row)]
            made[key] = [[new[one] for one in row] for row in rows]
        elif key == _PLACED and isinstance(value, list):
            made[key] = [
                [pair[0], _one(pair[1], new)] if isinstance(pair, list) and len(pair) == 2 else pair for pair in value
            ]
        elif key == "added_tokens_decoder" and isinstance(value, dict):
            made[key] = {str(new[int(index)]): one for index, one in value.items() if int(index) in new}
        else:
            made[key] = renumbered(value, new)
    return made


def resized(config: dict[str, Any], size: int) -> None:
    """Writes the number of tokens into `config.json`, where it stands there, also for the text part of it."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("vocab_size"), int):
            part["vocab_size"] = size


def template_texts(template: str) -> list[str]:
    """What a chat template writes itself, piece by piece: text between its tags, and strings inside of them."""
    try:
        parts = list(jinja2.Environment().lex(template))  # only read, never run
    except jinja2.TemplateError:
        return []
    texts = [text for _, kind, text in parts if kind == "data"]
    texts += [text[1:-1].replace("\\n", "\n").replace("\\t", "\t") for _, kind, text in parts if kind == "string"]
    return [text for text in texts if text]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _one(value: Any, new: Mapping[int, int]) -> Any:
    return new.get(value, value) if _is_id(value) else value
