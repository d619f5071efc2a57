"""Source, pipeline, artifact: the one function that runs them all.

load -> passes (watched by the loss meter and, on request, the verifier) -> write -> measure -> swap into place
"""

from __future__ import annotations

import atexit
import copy
import functools
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress import models
from onnxpress.compiler import pipeline as pipelines
from onnxpress.compiler import registry
from onnxpress.compiler import report as cards
from onnxpress.compiler import vocabulary as vocabularies
from onnxpress.compiler.artifact import Artifact, write_card, write_companions, write_graph
from onnxpress.compiler.calibration_arrays import read_arrays
from onnxpress.compiler.calibration_sources import Given, own_text, read_sources, split_sources
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import CalibrationError, OptionError, UnsupportedModelError
from onnxpress.compiler.explain_fusion import unfused_layers
from onnxpress.compiler.genai import context_length
from onnxpress.compiler.journal import Journal
from onnxpress.compiler.linears import find_embeddings
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report, Stopwatch, Tracker, build, subgraphs, weight_bytes
from onnxpress.compiler.pipeline import Observer, Pipeline
from onnxpress.compiler.probe import image_sizes
from onnxpress.compiler.report import Card
from onnxpress.compiler.sample_text import sample_tokens
from onnxpress.compiler.staging import Stage, staged
from onnxpress.compiler.target import Target
from onnxpress.compiler.target import target as find_target
from onnxpress.compiler.threads import limited
from onnxpress.compiler.verify import LossMeter, Verifier
from onnxpress.compiler.vocabulary import Vocabulary
from onnxpress.models import zoo

logger = logging.getLogger(__name__)

DEFAULT_RECIPE = "int4"
_MEASURED_TOKENS, _VERIFIED_TOKENS = 128, 512  # without and with `verify`; each costs two runs of the model
_SAVING_MEMORY = 256 << 20  # bytes of weights in memory at once while writing
_KEEP = "keep_quantization"
_RESUMES = "what is fitted so far is kept: the same command goes on from there"
_KINDS = {"huggingface": "a Hugging Face checkpoint", "onnx": "an ONNX graph", "artifact": "an artifact of onnxpress"}

Tell = Callable[[str], None]


def optimize(
    model: str | Path,
    *,
    output: str | Path | None = None,
    recipe: str | None = None,
    passes: str | Pipeline | Sequence[Pass] | None = None,
    target: str = "cpu",
    calibration: Given = None,
    verify: bool = False,
    measure: bool = True,
    seed: int = 0,
    workers: int | None = None,
    strict: bool = False,
    keep_quantization: bool = False,
    exporter: str | None = None,
    opset: int = 18,
    track: Tracker | None = None,
    tell: Tell | None = None,
) -> Artifact:
    """Makes an artifact of `model`.

    Args:
        model: Hugging Face id or directory, `.gguf` file, ONNX file or a directory with one, or a zoo name.
        output: directory to write. One that onnxpress wrote is replaced, in one step and only when the new one is
            complete; any other that is not empty is an error. None writes to a temporary directory that lasts as long
            as the process.
        recipe: name of a pipeline, see `onnxpress recipes`; "int4" when `passes` is not given either.
        passes: the pipeline, as text, as passes, or as a `Pipeline`; instead of a recipe.
        target: "cpu", "cuda" (float16) or "cuda-bf16".
        calibration: text for passes that look at activations, one source or several; see `read_sources`. The loss is
            measured on the first that is a text. For models that read no text `.npz` or `.npy` files, or folders of
            them, with samples for each input; see `read_arrays`: an eighth of them is left for measuring the loss.
            By default "self", what the model writes; where it cannot write (no cache, no tokenizer.json) "english",
            that of Python's own help.
        verify: compare outputs before and after every EXACT and CLOSE pass.
        measure: measure what each LOSSY pass costs; takes about two runs of the model over a few hundred tokens.
        strict: refuse a model of which a layer's attention stays unfused though the pipeline fuses attention.
        seed: of everything random; the same seed gives the same bytes (fitted weights: on as many threads).
        workers: threads that work at a time while passes run and the loss is measured; by default one for each core.
            Memory grows by about the largest matrix with each.
        keep_quantization: store the weights of a GGUF file that MatMulNBits can hold as they are, bit for bit (of Q4_1
            and Q4_K the levels; offsets nearly); the pipeline quantizes only the others.
        exporter: "optimum" or "dynamo", for checkpoints; by default optimum where it is installed, else dynamo.
        opset: of `ai.onnx`, for checkpoints.
        track: draws progress, `for item in track(items, label)`.
        tell: told in a few words what takes time.

    Raises:
        UserError: the model, an option or the output directory is at fault.
        PassError: a pass broke its contract; nothing was written.
    """
    if workers is not None and workers < 1:
        raise OptionError(f"workers: expected at least 1, got {workers}", hint="leave it out for one thread per core")
    chosen_target = find_target(target)
    pipeline = _pipeline(recipe, passes, chosen_target)
    if keep_quantization:
        pipeline = _keeping(pipeline)
    journal = Journal(lambda: zoo.cache_dir() / "journal")
    context = Context(target=chosen_target, seed=seed, journal=journal)
    files, sources = split_sources(calibration)
    texts, is_self = read_sources(sources)
    context.arrays = read_arrays(files)
    if track is not None:
        context.track = track
    clock = _Clock()
    tell = tell or _log
    directory = _temporary() if output is None else Path(output).expanduser()
    with limited(workers), staged(directory) as stage, ExitStack() as ending:
        context.work_dir = stage.work
        with clock.timed("load"):
            source = models.load(
                model,
                work_dir=stage.work,
                exporter=exporter,  # type: ignore[arg-type]  # checked by `load`
                opset=opset,
                progress=tell,
            )
        if keep_quantization and source.kind != "gguf":
            raise OptionError(
                f"keep_quantization: expected a GGUF file, {source.name} is {_KINDS.get(source.kind, source.kind)}",
                hint="leave it out: weights of MatMulNBits are kept anyway; for floats on a grid name the pass"
                " keep_quantization in `passes`",
            )
        context.config, context.stored_types = copy.deepcopy(source.config), source.stored_types
        context.generation_config, context.files = copy.deepcopy(source.generation_config), dict(source.files)
        context.history, context.original = artifact_history(source), source.model_path
        if context.arrays:
            _check_arrays(source, context, sources)
        if not calibration and _can_write(source):
            is_self = True
        elif texts and "tokenizer.json" not in source.files:
            reads = [str(value.name) for value in source.model.graph.inputs]
            if "input_ids" in reads:
                hint = "put it beside the model; or leave the calibration text out, with a recipe such as int4-rtn"
            else:
                hint = f"this model reads {', '.join(reads[:3])}: give a .npz file with an array for each input"
            raise CalibrationError(
                f"{', '.join(texts)}: the model has no tokenizer.json, which turns text into tokens", hint=hint
            )
        context.calibration = CalibrationText(
            texts=texts,
            own=_own_text(source, context) if is_self else None,
            tokenizer=source.files.get("tokenizer.json"),
            vocab_size=_vocab_size(source),
            max_length=context_length(source.config),
            seed=seed,
            held_out=_VERIFIED_TOKENS,
        )
        context.stopwatch = functools.partial(_stopwatch, stage)
        before = {
            "nodes": len(source.model.graph),
            "bytes": weight_bytes(source.model),
            "tokens": _vocab_size(source),
        }
        meter = _meter(source, pipeline, context, stage, verify) if measure else None
        verifier = _verifier(source, context, stage) if verify else None
        watching: list[Observer] = [_Narrator(tell, len(pipeline))]
        watching += [observer for observer in (verifier, meter) if observer is not None]
        if meter is not None:
            ending.callback(meter.close)
        with clock.timed("passes"):
            try:
                done = pipelines.run(source.model, pipeline, context, watching)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(_RESUMES if journal.is_used else "") from None
        warnings = _warnings(source.model, pipeline, strict)
        tell("writing the artifact")
        with clock.timed("write"):
            path = write_graph(source.model, stage.path, pipeline=str(pipeline), max_in_flight_bytes=_SAVING_MEMORY)
            write_companions(source.model, stage.path, source=context, config=context.config, target=chosen_target)
            for _, report in done:
                for name, write in report.files.items():
                    write(stage.path / name)
        if meter is not None:
            tell("measuring the loss")
            with clock.timed("measure"):
                meter.finish(path)
        card = _card(source, pipeline, context, done, before)
        card["recipe"] = recipe or (DEFAULT_RECIPE if passes is None else None)
        why = "no pass is lossy" if measure else "switched off"
        card["quality"] = meter.quality if meter is not None else {"not_measured": why}
        if verifier is not None:
            card["verified"] = verifier.results
        card["warnings"] = warnings
        card["seconds"] = clock.seconds
        card["peak_memory_bytes"] = cards.peak_memory_bytes()
        write_card(card, stage.path)
    journal.clear()
    return Artifact(directory, card)


def export(
    model: str | Path,
    output: str | Path,
    *,
    exporter: str | None = None,
    opset: int = 18,
    tell: Tell | None = None,
) -> Artifact:
    """Makes an ONNX directory of `model` without changing it; see `optimize` for the arguments and errors."""
    return optimize(model, output=output, passes=Pipeline(()), exporter=exporter, opset=opset, measure=False, tell=tell)


class _Clock:
    """Wall seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


class _Narrator:
    """Says which pass runs."""

    def __init__(self, tell: Tell, total: int) -> None:
        self.tell, self.total, self.number = tell, total, 0

    def before(self, pass_: Pass, model: Any) -> None:
        self.number += 1
        self.tell(f"pass {self.number} of {self.total}: {pass_}")

    def after(self, pass_: Pass, model: Any, report: Report) -> None:
        pass


def _pipeline(recipe: str | None, passes: str | Pipeline | Sequence[Pass] | None, target: Target) -> Pipeline:
    if recipe is not None and passes is not None:
        raise OptionError("expected a recipe or passes, got both", hint="leave one of them out")
    if passes is None:
        return pipelines.recipe(recipe or DEFAULT_RECIPE, target)
    if isinstance(passes, str):
        return pipelines.parse(passes, target) if passes.strip() else Pipeline(())
    return passes if isinstance(passes, Pipeline) else Pipeline(tuple(passes))


def _keeping(pipeline: Pipeline) -> Pipeline:
    """The pipeline with `keep_quantization` in front of whatever rounds weights or joins matrices."""
    passes = list(pipeline)
    if any(one.name() == _KEEP for one in passes):
        return pipeline
    first = (n for n, one in enumerate(passes) if one.promise is Promise.LOSSY or one.name().startswith("pack_"))
    passes.insert(next(first, len(passes)), build(registry.find(_KEEP), {}))
    return Pipeline(tuple(passes))


def _check_arrays(source: models.Source, context: Context, others: Sequence[object]) -> None:
    """Raises CalibrationError unless the model reads just the arrays that were given."""
    if any(value.name == "input_ids" for value in source.model.graph.inputs):
        raise CalibrationError(
            f"{context.arrays.about}: expected text, since the model reads input_ids; found arrays",
            hint="give a text file, a folder of them, a dataset, 'english' or 'self'",
        )
    if others:
        beside = ", ".join(map(str, others))
        raise CalibrationError(
            f"{context.arrays.about}: arrays are for models that read no text, found {beside} beside them",
            hint="leave the text out",
        )
    context.arrays.held_out(source.model.graph)


def _can_write(source: models.Source) -> bool:
    """Whether the model is a decoder with a cache and a tokenizer: it writes text of the kind that it reads."""
    graph = source.model.graph
    inputs = {value.name or "" for value in graph.inputs if value.name not in graph.initializers}
    others = inputs - {"input_ids", "attention_mask", "position_ids"}
    is_decoder = "input_ids" in inputs and bool(others) and all("past" in name for name in others)
    return is_decoder and "tokenizer.json" in source.files


def _own_text(source: models.Source, context: Context) -> Callable[[int, int], npt.NDArray[np.int64]]:
    first = source.config.get("bos_token_id")
    return own_text(
        source.model_path,
        first=first if isinstance(first, int) else None,
        vocab_size=_vocab_size(source),
        seed=context.seed,
        section=context.journal.section("own text", source.name),
        track=context.track,
        shapes={
            value.name: [size if isinstance(size, int) else None for size in value.shape]
            for value in source.model.graph.inputs
            if value.name is not None and value.shape is not None
        },
    )


def _stopwatch(stage: Stage, model: ir.Model, context: Context, phase: str) -> Stopwatch:
    """A decoder, open on the target; its files are gone again. For the arguments see `Context`."""
    from onnxpress.runtime.stopwatch import Stopwatch as Timed

    with tempfile.TemporaryDirectory(dir=stage.work) as folder:
        directory = Path(folder)
        write_graph(model, directory, max_in_flight_bytes=_SAVING_MEMORY)
        write_companions(model, directory, source=context, config=context.config, target=context.target)
        return Timed(directory, phase, context.target.provider)


def _temporary() -> Path:
    """A directory that is removed when the process ends."""
    directory = tempfile.mkdtemp(prefix="onnxpress-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory) / "artifact"


def _meter(source: models.Source, pipeline: Pipeline, context: Context, stage: Stage, verify: bool) -> LossMeter | None:
    passes = tuple(pipeline)
    if not any(one.promise is Promise.LOSSY for one in passes):
        return None
    if "input_ids" not in {value.name for value in source.model.graph.inputs}:
        feeds, about = context.arrays.held_out(source.model.graph) if context.arrays else (None, "random inputs")
        return LossMeter(passes, stage.work, about=about, sizes=image_sizes(source.config), feeds=feeds)
    count = min(_VERIFIED_TOKENS if verify else _MEASURED_TOKENS, context_length(source.config) or _VERIFIED_TOKENS)

    def sample(files: dict[str, Path], vocab_size: int) -> tuple[npt.NDArray[np.int64], str]:
        text = context.calibration.text
        return sample_tokens(files, text, count=count, vocab_size=vocab_size, seed=context.seed)

    return LossMeter(
        passes,
        stage.work,
        sample=functools.partial(sample, source.files, _vocab_size(source)),
        resample=lambda: sample(context.files, _vocab_size(source)),
        kept=lambda: context.kept_ids,
        split=verify,
    )


def _warnings(model: ir.Model, pipeline: Pipeline, strict: bool) -> list[str]:
    """What the user should know about a graph that is about to be written.

    Raises:
        UnsupportedModelError: attention is left unfused, and `strict`.
    """
    warnings = []
    nested = [node.op_type for node in model.graph if subgraphs(node)]
    if nested and len(pipeline):
        inside = ", ".join(sorted(set(nested)))
        warnings.append(f"what lies inside {inside} was left as it is; a merged decoder is better given in its parts")
    count = unfused_layers(model)
    if not count or not any(one.name() == "fuse_attention" for one in pipeline):
        return warnings
    warning = f"the attention of {count} layers was not fused"
    if strict:
        raise UnsupportedModelError(
            warning, hint="`onnxpress explain-fusion` says why; without `strict` it is a warning"
        )
    return [*warnings, warning]


def _verifier(source: models.Source, context: Context, stage: Stage) -> Verifier:
    sizes = image_sizes(source.config)
    return Verifier(stage.work, vocab_size=_vocab_size(source), seed=context.seed, sizes=sizes)


def _vocab_size(source: models.Source) -> int:
    """Token ids that the model knows: rows of its token table, else what its config or the width of its logits says."""
    tables = find_embeddings(source.model, [])
    if tables:
        return max(tables, key=lambda one: one.num_rows * one.width).num_rows
    size = (source.config.get("text_config") or source.config).get("vocab_size")
    if isinstance(size, int):
        return size
    for value in source.model.graph.outputs:
        if value.name == "logits" and value.shape is not None and isinstance(value.shape[-1], int):
            return value.shape[-1]
    return 100


def artifact_history(source: models.Source) -> list[str]:
    """Texts of what has changed an artifact before: earlier pipelines, and the passes of the last that found work."""
    card = source.facts.get("artifact") or {}
    rows, history = card.get("passes"), card.get("history")
    found = [str(one) for one in history] if isinstance(history, list) else [str(history or "")]
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and row.get("changed"):
            found.append(str(row.get("pass")))
    return found


def _card(
    source: models.Source,
    pipeline: Pipeline,
    context: Context,
    done: Sequence[tuple[Pass, Report]],
    before: dict[str, int],
) -> Card:
    provenance = dict(source.provenance)
    earlier = provenance.pop("artifact", None) or {}
    known = earlier.get("history")
    history = [*(known if isinstance(known, list) else []), earlier["pipeline"]] if earlier.get("pipeline") else []
    vocabulary = Vocabulary.from_card(earlier)
    if (kept := context.kept_ids) is not None:
        vocabulary = Vocabulary(before["tokens"], kept) if vocabulary is None else vocabulary.after(kept)
    return {
        "format": cards.CARD_FORMAT,
        "name": source.name,
        "architecture": (context.config.get("architectures") or [context.config.get("model_type")])[0],
        "target": context.target.name,
        "pipeline": str(pipeline),
        "history": history,
        "recipe": None,
        "seed": context.seed,
        "passes": [cards.pass_row(pass_, report) for pass_, report in done],
        "size": {
            "nodes_before": before["nodes"],
            "nodes_after": len(source.model.graph),
            "bytes_before": before["bytes"],
            "bytes_after": weight_bytes(source.model),
        },
        **({} if vocabulary is None else {vocabularies.KEY: vocabulary.to_card()}),
        "operators": cards.operators(source.model),
        "quality": {},
        "source": {"kind": source.kind, **provenance, **({"source": earlier["source"]} if "source" in earlier else {})},
        "requires": cards.requirements(source.model),
        "versions": cards.versions(),
        "machine": cards.machine(),
        "created": cards.now(),
    }


def _log(message: str) -> None:
    logger.info("%s", message)
