"""Where calibration text comes from: files, folders, datasets of the Hugging Face hub, Python's own help, the model.

Axes: W windows, S tokens of a window, V vocabulary
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.compiler.calibration_arrays import SUFFIXES as ARRAYS
from onnxpress.compiler.errors import CalibrationError, StreamingError
from onnxpress.compiler.journal import Section
from onnxpress.compiler.pass_ import Tracker
from onnxpress.compiler.probe import Probe, Step
from onnxpress.compiler.region import first_line
from onnxpress.compiler.sample_text import TOPICS, default_text

Ids = npt.NDArray[np.int64]
Given = str | Path | Sequence[str | Path] | None

ENGLISH, SELF = "english", "self"
_SUFFIXES = (".txt", ".md", ".rst", ".text")
_DATASET = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>\w[\w\[\]:%+-]*))?")
_DATASET_CHARACTERS = 4_000_000  # of a dataset at most: far more than any pass reads
_FORMS = "give a text file, a folder of them, a dataset such as org/name:config@train, 'english' or 'self'"

_SELF_LENGTH = 256  # tokens of a text that the model writes: caches of plain graphs are copied at every step
_SELF_BATCH = 32


def split_sources(given: Given) -> tuple[list[Path], list[str | Path]]:
    """The sources that are arrays (files, or folders of them), and all others.

    Args:
        given: as for `read_sources`.

    Raises:
        CalibrationError: a folder holds both arrays and text.
    """
    names = [given] if isinstance(given, str | Path) else list(given or ())
    files: list[Path] = []
    others: list[str | Path] = []
    for name in names:
        path = Path(name).expanduser()
        inside = sorted(path.rglob("*")) if path.is_dir() else []
        arrays = [one for one in inside if one.suffix in ARRAYS]
        texts = [one for one in inside if one.suffix.lower() in _SUFFIXES]
        if arrays and texts:
            raise CalibrationError(
                f"{name}: expected arrays or text, found both: {arrays[0].name} and {texts[0].name}",
                hint="name the files, or give a folder of one kind",
            )
        if path.suffix in ARRAYS or arrays:
            files += arrays or [path]
        else:
            others.append(name)
    return files, others


def read_sources(given: Given) -> tuple[dict[str, str], bool]:
    """The texts of the sources that were named, and whether "self", text of the model's own, is among them.

    Args:
        given: a source or several. A file; a folder, of which all files named .txt, .md, .rst and .text count;
            "org/name:config@split", a dataset of the Hugging Face hub (needs the package `datasets`; its column
            "text" or else its first one of strings; split "train" by default); "english", that of Python's own
            help; "self".

    Raises:
        CalibrationError: no such source, not text, or empty.
    """
    names = [given] if isinstance(given, str | Path) else list(given or ())
    texts: dict[str, str] = {}
    for name in names:
        if str(name) == SELF:
            continue
        if str(name) == ENGLISH:
            texts[TOPICS] = default_text()
        else:
            texts[str(name)] = _read(name)
    return texts, SELF in map(str, names)


def _read(name: str | Path) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(one for one in path.rglob("*") if one.suffix.lower() in _SUFFIXES and one.is_file())
        if not files:
            raise CalibrationError(
                f"{name}: expected text, found no file named {', '.join('*' + one for one in _SUFFIXES)}", hint=_FORMS
            )
        text = "\n\n".join(_read_file(one) for one in files)
    elif not path.exists() and path.suffix.lower() not in _SUFFIXES and (found := _DATASET.fullmatch(str(name))):
        text = _read_dataset(str(name), found["id"], found["config"], found["split"] or "train")
    else:
        text = _read_file(path)
    if not text.strip():
        raise CalibrationError(f"{name}: expected text, found nothing", hint="give a few pages of plain text")
    return text


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}", hint=_FORMS) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: expected UTF-8 text: {error.reason}", hint=_FORMS) from error


def _read_dataset(name: str, identity: str, config: str | None, split: str) -> str:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{name}: there is no such file, and to read it as a dataset takes the package datasets",
            hint=f"pip install datasets, or {_FORMS}",
        ) from error
    try:
        rows = datasets.load_dataset(identity, config, split=split, streaming=True)
        return "\n\n".join(_until(_texts(name, rows), _DATASET_CHARACTERS))
    except CalibrationError:
        raise
    except Exception as error:  # of the hub, the network, a script: the package names no common type
        raise CalibrationError(
            f"{name}: there is no such file, and as a dataset it cannot be read: {first_line(error)}",
            hint=_FORMS,
        ) from error


def _texts(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    column = "text"
    for number, row in enumerate(rows):
        if number == 0 and not isinstance(row.get(column), str):
            strings = [key for key, value in row.items() if isinstance(value, str)]
            if not strings:
                raise CalibrationError(f"{name}: expected a column of text, found {', '.join(row)}", hint=_FORMS)
            column = strings[0]
        if isinstance(text := row.get(column), str):
            yield text


def _until(texts: Iterable[str], limit: int) -> Iterable[str]:
    count = 0
    for text in texts:
        yield text
        count += len(text)
        if count >= limit:
            return


def own_text(
    model_path: Path,
    *,
    first: int | None,
    vocab_size: int,
    seed: int,
    section: Section,
    track: Tracker,
    shapes: Mapping[str, Sequence[Any]] | None = None,
) -> Callable[[int, int], Ids]:
    """`write(num_tokens, length)`: token ids [W, S] of texts that the model itself makes up, S at most 256.

    Each begins with one token, and goes on by sampling from what the model predicts, as it is (temperature 1).

    Paper: arXiv:2305.17888 (LLM-QAT, section 3.1)

    Args:
        model_path: the graph as it came, a decoder.
        first: token that all texts begin with; a random one each without.
        vocab_size: V.
        seed: of the random numbers.
        section: keeps what was written, for a run that is killed.
        track: progress.
        shapes: of the graph's inputs by name, where more is known than the file declares.

    Raises:
        CalibrationError: by `write`, the model is no decoder; StreamingError, it does not run.
    """

    def write(num_tokens: int, length: int) -> Ids:
        length = min(length, _SELF_LENGTH)
        count = max(1, -(-num_tokens // length))
        unit, digest = f"{count}x{length}", f"{seed} {first} {vocab_size} {_beginnings(model_path)}"
        record = section.read(unit, digest)
        if record is None:
            try:
                probe = Probe(model_path, optimized=True, shapes=shapes)
                record = {"ids": _written(probe, count, length, first, vocab_size, seed, track)}
            except CalibrationError:
                raise
            except Exception as error:  # ORT has one exception type per C++ code
                raise StreamingError(
                    f"calibration: the model cannot write text of its own: {first_line(error)}",
                    hint="give a text file, or --calibration english",
                ) from error
            section.write(unit, digest, record)
        ids_WS: Ids = record["ids"]
        return ids_WS

    return write


def _beginnings(model_path: Path) -> str:
    """Digest of what the model's files begin with: another model's text is not taken for this one's."""
    digest = hashlib.sha256()
    for path in sorted(model_path.parent.glob(f"{model_path.stem}*")):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
    return digest.hexdigest()


def _written(
    probe: Probe, count: int, length: int, first: int | None, vocab_size: int, seed: int, track: Tracker
) -> Ids:
    if not probe.is_language_model or not any("past" in name for name in probe.inputs):
        raise CalibrationError(
            "calibration: expected a decoder with a cache, which can write text itself; found another model",
            hint="give a text file",
        )
    rng = np.random.default_rng(seed)
    ids_WS = np.zeros((count, length), np.int64)
    ids_WS[:, 0] = rng.integers(0, vocab_size, count) if first is None else first
    steps = [(start, place) for start in range(0, count, _SELF_BATCH) for place in range(1, length)]
    cache: dict[str, Any] = {}
    for start, place in track(steps, "the model writes its calibration text"):
        ids_BS = ids_WS[start : start + _SELF_BATCH]
        cache = {} if place == 1 else cache
        step = Step(ids_BS[:, place - 1 : place], np.ones((len(ids_BS), place), np.int64), cache)
        outputs = probe.run(probe.decoder_feeds(step))
        cache = probe.next_cache(outputs)
        logits_BV = outputs["logits"][:, -1, :vocab_size].astype(np.float32, copy=False)
        # The largest of logits with Gumbel noise is a sample of their softmax.
        ids_BS[:, place] = np.argmax(logits_BV + rng.gumbel(size=logits_BV.shape).astype(np.float32), axis=1)
    return ids_WS
