#!/usr/bin/env python
"""Compares onnxpress with onnxruntime-genai and llama.cpp on the same weights: speed, quality, cost of conversion.

    python benchmarks/peers.py --text FILE --convert --json peers.json

Run it with the Python that has onnxpress. The peers get environments of their own (see --env-dir), their models are
made by their own tools, and each engine runs in a process of its own. README.md beside this file says what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import conversion
import environments
import perplexities
import psutil
import speed
from checkpoints import Checkpoint, genai_builder, model_bytes, onnxpress, read_through, run
from client import HERE, Worker
from rich.console import Console
from rich.table import Table
from terminal import BenchmarkError, say
from tokenizers import Tokenizer

PARTS = ("speed", "quality", "convert")
ZOO_NAME = "smollm2-135m"
RECIPE = "int4-rtn"
LLAMA_KIND = "Q4_0"
# Perplexity protocol: the first tokens of the text, in windows, without a token for its beginning.
EVAL_TOKENS, EVAL_CONTEXT = 8192, 1024

# Prompts need text, not noise: random ids would make the greedy continuations unreadable as a check.
PROMPT = (
    "A harbour town wakes before its people do. The tide lifts the boats a hand's breadth, the ropes take the strain, "
    "and somewhere behind the fish market a shutter goes up. By the time the first ferry has turned in the basin, the "
    "baker on the corner has sold out of the small loaves, and the harbour master has written the height of the water "
    "into a book that his grandfather began. Nobody has ever asked what the numbers are for. They are written down "
    "because they were written down yesterday, and because a line without a number would be a day that did not happen. "
)


@dataclass
class Systems:
    """Everything that a part of the comparison may need, made when first asked for."""

    options: argparse.Namespace
    checkpoint: Checkpoint
    pythons: dict[str, Path]

    @cached_property
    def hugging_face(self) -> Path:
        given: Path | None = self.options.hf
        return given or self.checkpoint.hugging_face()

    @cached_property
    def genai(self) -> Path:
        return self.checkpoint.genai_int4(self.pythons["genai"], self.hugging_face)

    @cached_property
    def ours(self) -> dict[str, Path]:
        """The artifacts under test by the name the tables give them."""
        given: list[Path] = self.options.ours
        if given:
            return {"onnxpress" if len(given) == 1 else f"onnxpress {path.name}": path for path in given}
        return {"onnxpress": self.checkpoint.optimized(str(self.options.gguf or ZOO_NAME), RECIPE)}

    @cached_property
    def models(self) -> dict[str, Path]:
        """Model file or directory by the name the tables give it, ours first."""
        table = dict(self.ours)
        if "genai" in self.pythons:
            table[environments.GENAI.title] = self.genai
        if "llama" in self.pythons:
            table[environments.LLAMA.title] = self.gguf(LLAMA_KIND)
        return table

    def gguf(self, kind: str) -> Path:
        return self.checkpoint.requantized(self.pythons["llama"], kind)

    def worker(self, name: str, model: Path, context: int) -> Worker:
        threads = str(self.options.threads)
        if name == environments.GENAI.title:
            command = [str(self.pythons["genai"]), str(HERE / "worker_genai.py"), str(model), threads]
        elif model.suffix == ".gguf":
            command = [str(self.pythons["llama"]), str(HERE / "worker_llama.py"), str(model), threads, str(context)]
        else:
            command = [sys.executable, str(HERE / "worker_onnxpress.py"), str(model), threads]
        return Worker(name, command, self.checkpoint.folder / f"worker-{name.replace(' ', '-')}.log")

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.hugging_face / "tokenizer.json"))


def run_speed(systems: Systems) -> dict[str, Any]:
    options = systems.options
    tokenizer = systems.tokenizer()
    longest = max(options.prompt_tokens, options.prefill_tokens)
    ids = tokenizer.encode(PROMPT * (longest // 100 + 1), add_special_tokens=False).ids
    load = speed.Load(ids[: options.prompt_tokens], options.new_tokens, ids[: options.prefill_tokens])
    context = max(1024, longest + options.new_tokens)
    models = systems.models
    with ExitStack() as stack:
        workers, described = [], {}
        for name, path in models.items():
            read_through(path)
            worker = stack.enter_context(systems.worker(name, path, context))
            # The answer means that the model is loaded: one engine loads at a time.
            described[name] = worker.ask("describe")
            workers.append(worker)
        table = speed.compare(workers, load, options.rounds)
    for name, path in models.items():
        table[name].update(described[name], bytes=model_bytes(path))
        table[name]["continuation"] = tokenizer.decode(table[name]["first_tokens"])
    peers = [name for name in models if name not in systems.ours]
    ratios = {f"{mine} / {peer}": speed.ratios(table, mine, peer) for mine in systems.ours for peer in peers}
    return {"systems": table, "ratios": ratios, "warning": speed.noise(table)}


def run_quality(systems: Systems) -> dict[str, Any]:
    options = systems.options
    table: dict[str, Any] = {}
    ids: list[int] = []
    for name, path in systems.models.items():
        if path.suffix == ".gguf":
            continue
        table[name] = perplexities.of_onnx(name, path, options.text, tokens=options.eval_tokens, context=EVAL_CONTEXT)
        detokenized = table[name]["detokenized"]
        seen = perplexities.token_ids(path, options.text, detokenized=detokenized, tokens=options.eval_tokens)
        if ids and seen != ids:
            raise BenchmarkError(
                f"{name}: expected the token ids that {next(iter(table))} has for the text, got others",
                hint=f"the tokenizer in {path} splits text differently; perplexities would not compare",
            )
        ids = seen
    if "llama" in systems.pythons:
        # The F16 file is the source itself: its perplexity shows that both sides measure the same thing.
        for kind in (LLAMA_KIND, "F16"):
            path = systems.gguf(kind)
            with systems.worker(f"{environments.LLAMA.title} {kind}", path, EVAL_CONTEXT) as worker:
                table[worker.name] = perplexities.of_gguf(worker, path, ids, context=EVAL_CONTEXT)
    return table


def run_convert(systems: Systems) -> dict[str, Any]:
    if "genai" not in systems.pythons:
        raise BenchmarkError("convert: expected the peer genai, got --peers llama", hint="add genai to --peers")
    python, checkpoint = systems.pythons["genai"], systems.hugging_face
    graph = systems.options.onnx or systems.checkpoint.exported(checkpoint)
    ours = onnxpress("optimize", graph, "--recipe", RECIPE, "--quiet")
    with tempfile.TemporaryDirectory(prefix="convert-", dir=systems.checkpoint.folder) as scratch:
        return conversion.compare(
            converters={
                "onnxpress": lambda output: [*ours, "-o", str(output)],
                "onnxpress --no-measure": lambda output: [*ours, "-o", str(output), "--no-measure"],
                environments.GENAI.title: lambda output: genai_builder(python, checkpoint, output),
            },
            starts={
                "onnxpress": onnxpress("--help"),
                environments.GENAI.title: [str(python), "-c", "import onnxruntime_genai.models.builder"],
            },
            baseline=environments.GENAI.title,
            inputs=[graph, checkpoint],
            scratch=Path(scratch),
            rounds=systems.options.convert_rounds,
        )


def show_speed(console: Console, result: dict[str, Any], options: argparse.Namespace) -> None:
    table = Table(
        title=f"Speed: {options.threads} threads, medians of {options.rounds} interleaved rounds",
        caption=(
            f"first: {options.prompt_tokens} tokens of prompt and one token chosen; decode: tokens per second "
            f"of the {options.new_tokens - 1} after it; prefill: {options.prefill_tokens} tokens of prompt per second"
        ),
    )
    _columns(table, "system", "model MB", "load s", "peak MB", "first ms", "prefill", "decode")
    for name, entry in result["systems"].items():
        middle = entry["median"]
        table.add_row(
            name,
            f"{entry['bytes'] / 1e6:.1f}",
            f"{entry['load_s']:.2f}",
            f"{entry['peak_rss_bytes'] / 1e6:.0f}",
            f"{middle['time_to_first_token_s'] * 1e3:.0f}",
            f"{middle['prefill_tokens_per_s']:.0f}",
            f"{middle['decode_tokens_per_s']:.1f}",
        )
    console.print(table)
    for pair, by_measure in result["ratios"].items():
        table = Table(title=f"{pair}, times faster within a round")
        _columns(table, "", "median", "least", "greatest")
        for title, measure in (
            ("first token", "time_to_first_token_s"),
            ("prefill", "prefill_tokens_per_s"),
            ("decode", "decode_tokens_per_s"),
        ):
            ratio = by_measure[measure]
            table.add_row(title, *(f"{ratio[key]:.2f}" for key in ("median", "least", "greatest")))
        console.print(table)
    for name, entry in result["systems"].items():
        console.print(f"{name} goes on: {entry['continuation']!r}", highlight=False, markup=False)
    if result["warning"]:
        console.print(f"warning: {result['warning']}", style="yellow", markup=False)


def show_quality(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"Quality: perplexity, windows of {EVAL_CONTEXT:,}")
    _columns(table, "system", "model MB", "perplexity", "tokens")
    for name, entry in result.items():
        table.add_row(name, f"{entry['bytes'] / 1e6:.1f}", f"{entry['perplexity']:.2f}", f"{entry['tokens']:,}")
    console.print(table)


def show_convert(console: Console, result: dict[str, Any], options: argparse.Namespace) -> None:
    table = Table(
        title=f"Conversion to int4: whole process, medians of {options.convert_rounds} runs in turns",
        caption=(
            f"ratio: wall time to {environments.GENAI.title}'s, median within a round; start: the program started for "
            "nothing; MB: what it wrote"
        ),
    )
    _columns(table, "program", "wall s", "ratio", "CPU s", "peak MB", "start s", "MB")
    for name, entry in result.items():
        middle, start = entry["median"], entry["start"]
        table.add_row(
            name,
            f"{middle['wall_s']:.1f}",
            f"{entry['ratio']['wall_s']:.2f}",
            f"{middle['cpu_s']:.1f}",
            f"{middle['peak_rss_bytes'] / 1e6:.0f}",
            f"{start['wall_s']:.1f}",
            f"{entry['bytes'] / 1e6:.1f}",
        )
    console.print(table)


def _columns(table: Table, first: str, *others: str) -> None:
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right")


def find_gguf(options: argparse.Namespace) -> Path:
    """The GGUF to compare on: the one given, or the zoo's, fetched by onnxpress into its own cache."""
    if options.gguf:
        return Path(options.gguf)
    code = f"from onnxpress.models import zoo; print(zoo.fetch({ZOO_NAME!r}))"
    return Path(run([sys.executable, "-c", code], "onnxpress fetches the zoo model").strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers: processor, cores, memory, system."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {
        "processor": name,
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions(pythons: dict[str, Path]) -> dict[str, dict[str, str]]:
    """The versions that matter in each environment."""
    watched = {"onnxpress", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "llama-cpp-python", "numpy"}
    found = {"onnxpress": environments.installed(Path(sys.executable))}
    found.update({name: environments.installed(python) for name, python in pythons.items()})
    return {name: {key: have[key] for key in sorted(watched & have.keys())} for name, have in found.items()}


@contextmanager
def complete_file(path: Path | None) -> Iterator[Path | None]:
    """Fails early when `path` cannot be written, and leaves it complete or as it was."""
    if path is None:
        yield None
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.touch()
    except OSError as error:
        raise BenchmarkError(f"--json: cannot write {path}: {error.strerror}") from error
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def compare(options: argparse.Namespace) -> None:
    console = Console()
    parts = parts_of(options)
    pythons = {name: environments.provide(environments.PEERS[name], options.env_dir) for name in options.peers}
    work = options.work_dir or options.env_dir / "models"
    checkpoint = Checkpoint.of(find_gguf(options), work)
    systems = Systems(options, checkpoint, pythons)
    with complete_file(options.json) as target:
        report: dict[str, Any] = {
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(pythons),
            "settings": {key: _plain(value) for key, value in vars(options).items()},
        }
        if "speed" in parts:
            report["speed"] = run_speed(systems)
            show_speed(console, report["speed"], options)
        if "quality" in parts:
            report["quality"] = run_quality(systems)
            show_quality(console, report["quality"])
        if "convert" in parts:
            report["convert"] = run_convert(systems)
            show_convert(console, report["convert"], options)
        if target is not None:
            target.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.json:
        say(f"wrote {options.json}")


def parts_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Which parts to run; quality asks for a text, conversion for its flag or for being the only part."""
    if options.only:
        if options.only == "quality" and not options.text:
            raise BenchmarkError("--only quality: expected --text FILE, got none", hint="give a plain text to predict")
        return (options.only,)
    parts = ["speed"]
    if options.text:
        parts.append("quality")
    else:
        say("quality is left out: it needs --text FILE")
    if options.convert:
        parts.append("convert")
    return tuple(parts)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _default_root() -> Path:
    # Where onnxpress itself keeps what it fetches.
    if chosen := os.environ.get("ONNXPRESS_CACHE"):
        return Path(chosen) / "peers"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "onnxpress" / "peers"


def _count(least: int) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return parse


def _existing(text: str) -> Path:
    path = Path(text).resolve()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return path


def parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").splitlines()[0]
    made = argparse.ArgumentParser(description=summary)
    add = made.add_argument
    add("--only", choices=PARTS, help="run one part")
    add("--convert", action="store_true", help="also time the conversion")
    add("--text", type=_existing, metavar="FILE", help="text for the perplexities")
    add("--rounds", type=_count(1), default=5, help="measured speed rounds (%(default)s)")
    add("--convert-rounds", type=_count(1), default=3, help="measured conversions of each program (%(default)s)")
    add("--threads", type=_count(1), default=2, help="threads of every engine (%(default)s)")
    add("--prompt-tokens", type=_count(1), default=128, help="prompt before decoding (%(default)s)")
    add("--new-tokens", type=_count(2), default=128, help="tokens to decode (%(default)s)")
    add("--prefill-tokens", type=_count(1), default=512, help="prompt of the prefill measurement (%(default)s)")
    add(
        "--eval-tokens", type=_count(2), default=EVAL_TOKENS, help="tokens of the text that are predicted (%(default)s)"
    )
    add(
        "--peers",
        nargs="+",
        choices=sorted(environments.PEERS),
        default=list(environments.PEERS),
        help="whom to compare with (both)",
    )
    add("--ours", type=_existing, action="append", default=[], metavar="DIR", help="artifact to test instead of a new "
        f"one of {ZOO_NAME} with the recipe {RECIPE}; may be given more than once")  # fmt: skip
    add("--gguf", type=_existing, metavar="FILE", help=f"the weights, if not those of {ZOO_NAME}")
    add("--hf", type=_existing, metavar="DIR", help="the same weights as a Hugging Face directory, if there is one")
    add("--onnx", type=_existing, metavar="DIR", help="the same weights as an ONNX export, if there is one")
    add(
        "--env-dir",
        type=Path,
        default=_default_root(),
        metavar="DIR",
        help="where the peers' environments lie (%(default)s)",
    )
    add("--work-dir", type=Path, metavar="DIR", help="where models are made; by default a folder of --env-dir")
    add("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    # Resolved at once: tools run in another working directory.
    options.env_dir = options.env_dir.expanduser().resolve()
    if options.work_dir:
        options.work_dir = options.work_dir.expanduser().resolve()
    try:
        compare(options)
    except BenchmarkError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("peers: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
