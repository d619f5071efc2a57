"""Drops tokens that the user's own text never has: rows of embedding and head, and the tokenizer with them.

Text of kept tokens keeps its tokens and its logits, bit for bit; other text is written with more, shorter tokens.

Paper:   vocabulary trimming, Abdaoui et al., arXiv:2010.05609; TextPruner, arXiv:2203.15996
Differs: tokens that lead to a kept one by merges stay, so byte-pair tokenizers give the same tokens as before; a size
         that is asked for is filled with tokens, not with rows that nobody uses.
Axes:    V tokens
"""

from __future__ import annotations

import collections
import dataclasses
import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import BadModelFileError, CalibrationError, OptionError, UnsupportedModelError
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report, weight_bytes
from onnxpress.passes.pruning._token_files import (
    OBSOLETE,
    ROLES,
    named_ids,
    renumbered,
    resized,
    template_texts,
)
from onnxpress.passes.pruning._tokenizers import Tokens
from onnxpress.passes.pruning._vocabulary import Places, cut, find_places

Ids = npt.NDArray[np.int64]

_TOKENIZER = "tokenizer.json"
_PIECE, _BATCH = 1 << 16, 16  # characters that are encoded at once, and how many of these together
_CHECKED = 2000  # lines of the text on which the new tokenizer is compared with the old one


def choose(
    counts: Mapping[int, int],
    order: Sequence[int],
    needs: Callable[[int], Collection[int]],
    always: Collection[int],
    *,
    min_count: int,
    size: int | None,
    multiple_of: int,
) -> set[int]:
    """The tokens to keep.

    Args:
        counts: how often the text has each token, 0 left out.
        order: all tokens, the most useful first; decides where counts are equal.
        needs: a token and what it cannot be without.
        always: tokens that stay in any case.
        min_count: without `size`, every token that the text has as often stays.
        size: tokens to keep, the most frequent first.
        multiple_of: their number is rounded up to a multiple of this, as long as there are tokens.
    Returns:
        Closed under `needs`, a superset of `always`.
    """
    kept = set(always)
    place = {token: number for number, token in enumerate(order)}
    if size is None:
        for token in order:
            if counts.get(token, 0) >= min_count:
                kept.update(needs(token))
    target = -(-(len(kept) if size is None else size) // multiple_of) * multiple_of
    for token in sorted(place, key=lambda one: (-counts.get(one, 0), place[one])):
        if len(kept) >= target:
            break
        if token not in kept and len(kept) + len(more := set(needs(token)) - kept) <= target:
            kept |= more
    return kept


@dataclass(frozen=True, kw_only=True)
class PruneVocab(Pass):
    """Keeps the tokens that the text given as `--calibration` has, and those without which they cannot be made.

    Bytes (or single characters), special and added tokens, and what the chat template writes stay in any case, so any
    text can still be written. Embedding, head, tokenizer and all token ids in configs change together. A table that is
    quantized already is cut as it is.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    paper: ClassVar[str] = "arXiv:2010.05609"

    min_count: int | None = None  # keep tokens that the text has at least this often; 1 unless `size` is given
    size: int | None = None  # or: keep this many tokens, the most frequent first, then those learned first
    keep: tuple[str, ...] = ()  # texts whose tokens stay too, such as words of other subjects
    multiple_of: int = 32  # round the number of tokens up to a multiple of this, with further tokens: kernels like it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_count is not None and self.size is not None:
            raise OptionError("prune_vocab: expected min_count or size, got both", hint="leave one of them out")
        for option in ("min_count", "size", "multiple_of"):
            value = getattr(self, option)
            self.check(value is None or value >= 1, option, "at least 1")

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        tokens = self._tokens(context)
        places = find_places(model)
        rows = {index for index in tokens.words if index < places.num_rows}
        counts = self._counts(tokens, context)
        always = self._always(tokens, places, context) & rows
        needs = {token: tokens.needs(token) & rows for token in always}
        always = always.union(*needs.values())
        self._check_size(len(always), places.num_rows)
        kept = choose(
            counts,
            [token for token in tokens.order if token in rows],
            lambda token: tokens.needs(token) & rows,
            always,
            min_count=self.min_count or 1,
            size=self.size,
            multiple_of=self.multiple_of,
        )
        if len(kept) >= places.num_rows:
            report.skip("vocabulary", f"all of its {places.num_rows} tokens are needed")
            return report
        new = tokens.numbering(kept | (tokens.words.keys() - rows))  # tokens without a row have none afterwards
        ids_V = np.array([old for old in new if old in kept], np.int64)
        if any(new[old] != index for index, old in enumerate(ids_V.tolist())):
            raise UnsupportedModelError("prune_vocab: the tokenizer has tokens beyond the model's among its own")
        path = self._write_tokenizer(tokens, new, context)
        before = weight_bytes(model)
        _edit_files(new, len(kept), path, context, report)
        cut(model, places, ids_V, new)
        _renumber_context(tokens, new, ids_V, path, context)
        self._tell(model, tokens, path, places, ids_V, counts, before, report, context)
        return report

    def _tokens(self, context: Context) -> Tokens:
        """The tokenizer; refuses where tokens cannot be dropped or there is no text to go by."""
        if _TOKENIZER not in context.files:
            others = [name for name in OBSOLETE if name in context.files]
            found = f"found {', '.join(others)}" if others else "found none"
            raise OptionError(
                f"prune_vocab: expected {_TOKENIZER} beside the model, {found}",
                hint="save the tokenizer with transformers' AutoTokenizer first, which writes it",
            )
        if context.config.get("is_encoder_decoder") or "encoder" in context.config:
            raise UnsupportedModelError(
                "prune_vocab: encoder and decoder are two graphs that share a tokenizer, and a pass sees one of them",
                hint="keep the vocabulary as it is",
            )
        if not context.calibration.texts:
            raise CalibrationError(
                "prune_vocab: expected text of the kind that the model will be used on, got none",
                hint="give it: --calibration FILE (several are fine), or --calibration english",
            )
        return Tokens(context.files[_TOKENIZER])

    def _counts(self, tokens: Tokens, context: Context) -> dict[int, int]:
        """How often each token occurs in all texts."""
        counts: collections.Counter[int] = collections.Counter()
        for ids in _encoded(tokens.backend, context.calibration.texts.values(), context, "counting tokens"):
            counts.update(ids)
        return counts

    def _always(self, tokens: Tokens, places: Places, context: Context) -> set[int]:
        """Tokens that stay whatever the text has."""
        texts = [*self.keep, *ROLES]
        configs: list[Any] = [context.config, context.generation_config]
        for name, path in context.files.items():
            if name.endswith(".jinja"):
                texts += template_texts(path.read_text(encoding="utf-8"))
            elif name.endswith(".json") and name not in (_TOKENIZER, *OBSOLETE):
                configs.append(content := _read(path))
                texts += _templates(content)
        found = tokens.indispensable() | places.named_ids() | set(named_ids(configs))
        for text in texts:
            found |= set(tokens.backend.encode(text, add_special_tokens=False).ids)
        return found

    def _check_size(self, least: int, num_rows: int) -> None:
        if self.size is None:
            return
        nearest = -(-least // self.multiple_of) * self.multiple_of
        if self.size < least:
            raise OptionError(
                f"prune_vocab: size must be at least {least}, got {self.size}: bytes, special tokens and those of the "
                "chat template stay",
                hint=f"the smallest is size={nearest}",
            )
        if self.size > num_rows:
            raise OptionError(
                f"prune_vocab: size must be below the {num_rows} tokens that the model has, got {self.size}",
                hint=f"the largest with an effect is size={(num_rows - 1) // self.multiple_of * self.multiple_of}",
            )

    def _write_tokenizer(self, tokens: Tokens, new: Mapping[int, int], context: Context) -> Path:
        """Writes the new tokenizer and compares it with the old one."""
        path = Path(tempfile.mkdtemp(prefix="vocabulary-", dir=context.work_dir)) / _TOKENIZER
        path.write_text(tokens.rewritten(new), encoding="utf-8")
        lines = [line for text in context.calibration.texts.values() for line in text.splitlines() if line.strip()]
        tokens.check(path, new, lines[:: max(1, len(lines) // _CHECKED)])
        return path

    def _tell(
        self,
        model: ir.Model,
        tokens: Tokens,
        path: Path,
        places: Places,
        ids_V: Ids,
        counts: Mapping[int, int],
        before: int,
        report: Report,
        context: Context,
    ) -> None:
        kept, total = set(ids_V.tolist()), sum(counts.values())
        now = 0
        for ids in _encoded(Tokens(path).backend, context.calibration.texts.values(), context, "writing text anew"):
            now += len(ids)
        saved = before - weight_bytes(model)
        report.metrics |= {
            "tokens_before": places.num_rows,
            "tokens_after": len(kept),
            "text_kept": sum(count for token, count in counts.items() if token in kept) / max(total, 1),
            "text_growth": now / max(total, 1) - 1,
            "bytes_saved": saved,
        }
        report.calibration = {"text": f"{total} tokens of {', '.join(context.calibration.texts)}"}
        report.change(
            "vocabulary",
            seen=sum(token in kept for token in counts),
            heads=[one.name for one in places.heads],
            tables=[node.name for node in places.gathers],
            bytes_saved=saved,
        )
        if places.classes:
            report.skip("logits", f"{places.classes} classes, not tokens")
        report.notes.insert(
            0,
            f"{len(kept):,} of {places.num_rows:,} tokens stay, {report.metrics['text_kept']:.2%} of the text; "
            f"it takes {report.metrics['text_growth']:.2%} more tokens now",
        )


def _encoded(backend: Any, texts: Iterable[str], context: Context, label: str) -> Iterator[list[int]]:
    """Token ids of all texts, piece by piece: a book at once would take a hundred times its size."""
    pieces = [piece for text in texts for piece in _pieces(text)]
    batches = [pieces[start : start + _BATCH] for start in range(0, len(pieces), _BATCH)]
    for batch in context.track(batches, label):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            yield encoding.ids


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end with a line, or anywhere when lines are very long."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + _PIECE) + 1
        end = end if end > start else start + _PIECE
        yield text[start:end]
        start = end


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadModelFileError(f"{path}: expected JSON: {error}", hint="fetch or write the file again") from error


def _templates(content: Any) -> list[str]:
    """What the chat templates in a config write."""
    found = content.get("chat_template") if isinstance(content, dict) else None
    entries = found if isinstance(found, list) else [{"template": found}]
    texts = [one.get("template") for one in entries if isinstance(one, dict)]
    return [part for text in texts if isinstance(text, str) for part in template_texts(text)]


def _edit_files(new: Mapping[int, int], size: int, tokenizer: Path, context: Context, report: Report) -> None:
    """The configs and files in the context with the new ids; those that only an old tokenizer reads are left out."""
    config = renumbered(context.config, new)
    resized(config, size)
    context.config.clear()
    context.config.update(config)
    context.generation_config = renumbered(context.generation_config, new)
    files = {}
    for name, path in context.files.items():
        if name in OBSOLETE:
            report.notes.append(f"{name} is left out: {_TOKENIZER} says the same, with the new ids")
        elif name == _TOKENIZER:
            files[name] = tokenizer
        elif name.endswith(".json"):
            content = _read(path)
            if name == "added_tokens.json":
                content = {word: new[index] for word, index in content.items() if index in new}
            files[name] = tokenizer.with_name(name)
            files[name].write_text(
                json.dumps(renumbered(content, new), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        else:
            files[name] = path
    context.files = files


def _renumber_context(
    tokens: Tokens,
    new: Mapping[int, int],
    ids_V: Ids,
    path: Path,
    context: Context,
) -> None:
    """Lets later passes read text with the new tokenizer, and remembers where each token came from."""
    old = context.calibration
    context.kept_ids = ids_V if context.kept_ids is None else context.kept_ids[ids_V]
    context.calibration = dataclasses.replace(
        old, tokenizer=path, vocab_size=len(ids_V), own=None if old.own is None else _rewritten(old, tokens, path)
    )


def _rewritten(old: CalibrationText, tokens: Tokens, path: Path) -> Callable[[int, int], Ids]:
    """The model's own texts in the new tokens."""
    write, backend = old.own, Tokens(path).backend
    assert write is not None

    def own(num_tokens: int, length: int) -> Ids:
        texts = [tokens.backend.decode(ids, skip_special_tokens=False) for ids in write(num_tokens, length).tolist()]
        rows = [backend.encode(text, add_special_tokens=False).ids for text in texts]
        shortest = min(map(len, rows))
        return np.array([row[:shortest] for row in rows], np.int64)

    return own
