"""A tokenizer.json as pruning sees it: which tokens must stay, what each of them needs, and the file without the rest.

Law: where the tokenizer gave only tokens that are kept, it gives the same ones afterwards.

BPE       Merges are applied by rank. All merges inside of a token happen as if its text stood alone, so the tokens on
          that way must stay; a merge goes with any of its three tokens. What was merged before is then still the
          lowest-ranked pair at every step, since merges only became fewer.
Unigram   The best segmentation stays the best of fewer. The token with the lowest score stays: the cost of an unknown
          character is computed from it.
WordPiece The longest match is still there, and longer ones only became fewer.

Any text stays encodable: bytes stay, or where there are none all single characters, and tokens with a character
that exists only inside of them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from onnxpress.compiler.errors import BadModelFileError, UnsupportedModelError

_KINDS = ("BPE", "Unigram", "WordPiece")
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_SPACE = "\u2581"  # what sentencepiece writes for a space; decoders turn it back before they join bytes
_NO_PLACE = 1 << 40  # rank of what cannot be merged


class Tokens:
    """The tokens of one tokenizer.

    Attributes:
        kind: "BPE", "Unigram" or "WordPiece".
        backend: the tokenizer itself, without truncation and padding.
        ids: token to id, added tokens included.
        words: id to token.
        order: ids from the one that training found most useful to the last: by score, or by id.
    """

    def __init__(self, path: Path) -> None:
        """Reads a `tokenizer.json`.

        Raises:
            BadModelFileError: it is no tokenizer.
            UnsupportedModelError: it cannot be pruned; the reason is said.
        """
        try:
            self._content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise BadModelFileError(f"{path}: not a tokenizer: {error}", hint="copy the file again") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self._model: dict[str, Any] = self._content["model"]
        self.kind = self._model.get("type") or _guessed(self._model)
        if self.kind not in _KINDS:
            raise UnsupportedModelError(
                f"the tokenizer is of type {self.kind}, in which a word that is taken out has no other spelling",
                hint=f"vocabularies of {', '.join(_KINDS)} can be pruned",
            )
        if self._model.get("dropout"):
            raise UnsupportedModelError(
                "the tokenizer leaves out merges at random (dropout), so no text has the same tokens twice",
                hint="set dropout to null in tokenizer.json",
            )
        self.ids: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        self.words = {index: word for word, index in self.ids.items()}
        self.added = {int(index) for index in self.backend.get_added_tokens_decoder()}
        known = self.backend.get_vocab(with_added_tokens=False)
        self._own = {int(index) for index in known.values()}  # in the model's own table, added or not
        self._prefix = self._model.get("continuing_subword_prefix") or ""
        self._suffix = self._model.get("end_of_word_suffix") or ""
        if self.kind == "Unigram":
            scores = [score for _, score in self._model["vocab"]]
            self.order = sorted(self._own, key=lambda index: (-scores[index], index))
        else:
            self.order = sorted(self._own)
        merges = self._model["merges"] if self.kind == "BPE" else []
        # Older files write a pair as one string.
        self._pairs = [tuple(one.split(" ") if isinstance(one, str) else one) for one in merges]
        self._ranks = {pair: rank for rank, pair in enumerate(self._pairs)}

    def _singles(self) -> dict[str, str]:
        """Tokens of one character, and that character; a prefix or suffix of parts of words does not count."""
        found = {}
        for word in self._texts():
            bare = word.removeprefix(self._prefix) if self._prefix and len(word) > len(self._prefix) else word
            bare = bare.removesuffix(self._suffix) if self._suffix and len(bare) > len(self._suffix) else bare
            if len(bare) == 1:
                found[word] = bare
        return found

    def _texts(self) -> list[str]:
        return [self.words[index] for index in self._own - self.added]

    def indispensable(self) -> set[int]:
        """Ids that must stay: added tokens, the unknown one, bytes or single characters, those that the file names."""
        singles = self._singles()
        has_bytes = bool(self._model.get("byte_fallback")) and self.ids.keys() >= _BYTES
        words: set[str] = set()
        if has_bytes:
            # A character beyond ASCII can be written as bytes; the space of sentencepiece would not become one again.
            words |= _BYTES | {word for word, one in singles.items() if one.isascii() or one == _SPACE}
        else:
            words |= singles.keys()
        if not has_bytes and self.kind != "BPE":
            words |= {word for word in self._texts() if self._is_only_place(word)}
        if isinstance(unknown := self._model.get("unk_token"), str):
            words.add(unknown)
        kept = self.added | {self.ids[word] for word in words if word in self.ids}
        if self.kind == "Unigram":
            table = self._model["vocab"]
            kept.add(min(range(len(table)), key=lambda index: table[index][1]))
            if self._model.get("unk_id") is not None:
                kept.add(self._model["unk_id"])
        kept |= set(_ids_in(self._content.get("post_processor")))
        if padding := self._content.get("padding"):
            kept.add(padding["pad_id"])
        return kept & self.words.keys()

    def _is_only_place(self, word: str) -> bool:
        """Whether a token has a character that is no token of its own where it stands."""
        if self.kind == "Unigram":
            return any(character not in self.ids for character in word)
        inside = word.removeprefix(self._prefix)
        start = 0 if inside != word else 1
        first = not start or inside[:1] in self.ids
        return not first or any(self._prefix + character not in self.ids for character in inside[start:])

    def needs(self, index: int) -> set[int]:
        """The token, and all that are made on the way to it from single characters; else itself alone.

        Args:
            index: id of a token.
        """
        if self.kind != "BPE" or index not in self._own or index in self.added:
            return {index}
        word = self.words[index]
        parts = self._symbols(word)
        if any(part not in self.ids for part in parts):
            return {index}
        met = set(parts)
        while len(parts) > 1:
            ranks = [self._ranks.get(pair, _NO_PLACE) for pair in itertools.pairwise(parts)]
            place = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[place] == _NO_PLACE:
                return {index}  # found whole (ignore_merges), or never
            parts[place : place + 2] = [self._joined(parts[place], parts[place + 1])]
            met.add(parts[place])
        return {self.ids[part] for part in met}

    def _symbols(self, word: str) -> list[str]:
        """What merging starts from."""
        tail = self._suffix if self._suffix and word.endswith(self._suffix) and word != self._suffix else ""
        bare = word.removesuffix(tail)
        is_inside = bool(self._prefix) and bare.startswith(self._prefix) and bare != self._prefix
        bare = bare.removeprefix(self._prefix) if is_inside else bare
        symbols = [self._prefix * (is_inside or place > 0) + one for place, one in enumerate(bare)]
        symbols[-1] += tail
        return symbols

    def _joined(self, left: str, right: str) -> str:
        return left + right[len(self._prefix) :]

    def numbering(self, kept: Iterable[int]) -> dict[int, int]:
        """Old id to new id, dense, in the old order; added tokens that are in no table of the model come last."""
        ordered = sorted(kept, key=lambda index: (index not in self._own, index))
        return {old: new for new, old in enumerate(ordered)}

    def rewritten(self, new: Mapping[int, int]) -> str:
        """The content of `tokenizer.json` with the tokens of `new` alone, under their new ids."""
        content = dict(self._content)
        model = dict(self._model)
        if self.kind == "Unigram":
            table = self._model["vocab"]
            model["vocab"] = [table[old] for old in new if old in self._own]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[model["unk_id"]]
        else:
            kept = {self.words[old]: index for old, index in new.items() if old in self._own}
            model["vocab"] = kept
        if self.kind == "BPE":
            model["merges"] = [
                written
                for written, (left, right) in zip(self._model["merges"], self._pairs, strict=True)
                if left in kept and right in kept and self._joined(left, right) in kept
            ]
        content["model"] = model
        added = [{**one, "id": new[one["id"]]} for one in content.get("added_tokens", ()) if one["id"] in new]
        content["added_tokens"] = sorted(added, key=lambda one: one["id"])
        content["post_processor"] = _renumbered_processor(content.get("post_processor"), new)
        if content.get("padding"):
            content["padding"] = {**content["padding"], "pad_id": new[content["padding"]["pad_id"]]}
        return json.dumps(content, ensure_ascii=False)

    def check(self, path: Path, new: Mapping[int, int], texts: Iterable[str]) -> None:
        """Raises UnsupportedModelError unless the tokenizer in `path` keeps the law, and the text, on `texts`."""
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise _unsafe(f"it does not load without the dropped tokens: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        found = backend.get_vocab(with_added_tokens=True)
        for old, index in new.items():
            if found.get(self.words[old]) != index:
                raise _unsafe(f"token {self.words[old]!r} would be {found.get(self.words[old])} instead of {index}")
        # A word is unknown as a whole, and with fewer tokens it may be spelled after all.
        unknown = self.ids.get(str(self._model.get("unk_token"))) if self.kind == "WordPiece" else None
        for text in texts:
            before, after = self.backend.encode(text).ids, backend.encode(text).ids
            if unknown in before:
                continue
            if all(one in new for one in before) and [new[one] for one in before] != after:
                raise _unsafe(f"{text[:60]!r} would have other tokens though all of its own are kept")
            if self.backend.decode(before) != backend.decode(after):
                raise _unsafe(f"{text[:60]!r} would become {backend.decode(after)[:60]!r}")


def _unsafe(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the tokenizer cannot be rewritten: {reason}", hint="keep the vocabulary as it is")


def _guessed(model: Mapping[str, Any]) -> str:
    """The type of a model in files that do not name it."""
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _ids_in(processor: Any) -> list[int]:
    """Ids that a post-processor puts around a text."""
    if not isinstance(processor, dict):
        return []
    found = [index for one in processor.get("processors", ()) for index in _ids_in(one)]
    if isinstance(special := processor.get("special_tokens"), dict):
        found += [index for one in special.values() for index in one["ids"]]
    return found + [processor[key][1] for key in ("sep", "cls") if key in processor]


def _renumbered_processor(processor: Any, new: Mapping[int, int]) -> Any:
    if not isinstance(processor, dict):
        return processor
    made = dict(processor)
    if "processors" in made:
        made["processors"] = [_renumbered_processor(one, new) for one in made["processors"]]
    if isinstance(special := made.get("special_tokens"), dict):
        made["special_tokens"] = {
            name: {**one, "ids": [new[index] for index in one["ids"]]} for name, one in special.items()
        }
    for key in ("sep", "cls"):
        if key in made:
            word, index = made[key]
            made[key] = [word, new[index]]
    return made
