"""Watches a pipeline: what each LOSSY pass costs, and whether the others keep their promise.

`LossMeter` runs always (it costs about two forward passes over a few hundred tokens): the distribution over the next
token after each LOSSY pass is compared with the one before the first of them. `Verifier` runs with `--verify`: after
each EXACT or CLOSE pass the model is run before and after on a prompt, a step with a cache, and a padded batch.

Axes: T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxpress.compiler.errors import UnsupportedModelError, UserError, VerificationError
from onnxpress.compiler.linears import find_embeddings
from onnxpress.compiler.pass_ import Pass, Promise, Report, subgraphs
from onnxpress.compiler.probe import Array, Probe, Step, kl_divergence, log_softmax
from onnxpress.compiler.region import first_line
from onnxpress.compiler.threads import in_thread, workers

logger = logging.getLogger(__name__)

# Largest difference that a CLOSE pass may make, relative to the largest value of an output, by its float type.
# A chain of dozens of blocks amplifies what the order of additions changes in one of them.
TOLERANCE = {np.dtype(np.float32): 1e-3, np.dtype(np.float16): 5e-2, np.dtype(np.float64): 1e-6}

_INLINE = 256  # bytes up to which a weight is kept in the graph file
_IN_MEMORY = 64 << 20  # bytes of all weights in memory up to which they may travel inside a graph file
_LOG_P = "log_probabilities"  # beside the outputs of a model, derived from its logits
_FEWEST_TOKENS = 16  # on which a loss is measured

Ids = npt.NDArray[np.int64]
Outputs = dict[str, Array]


def snapshot(model: ir.Model, directory: Path, name: str) -> Path:
    """Saves `model` in its present state and lets its weights be read from the saved file from now on.

    So lazily computed weights are computed once, and each snapshot holds all the model needs.

    Returns:
        The graph file, `directory / name`.onnx.
    """
    path = directory / f"{name}.onnx"
    ir.save(model, path, external_data=f"{name}.onnx.data", size_threshold_bytes=_INLINE)
    saved = ir.load(path).graph.initializers
    for key, value in model.graph.initializers.items():
        value.const_value = saved[key].const_value
    return path


def in_place(model: ir.Model) -> tuple[bytes, Path] | None:
    """The graph file that `model` would make, and the folder in which all its large weights lie; None when they do not.

    Small weights are taken into the file: shape inference cannot read others.
    """
    folders, small, in_memory = set(), {}, 0
    if any(subgraphs(node) for node in model.graph):
        return None  # a branch or loop may hold weights of its own
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes > _INLINE:
            folders.add(Path(tensor.base_dir))
        elif isinstance(tensor, ir.LazyTensor) or tensor is None:
            return None
        else:
            in_memory += tensor.nbytes
            if isinstance(tensor, ir.ExternalTensor):
                small[value] = tensor
    if len(folders) != 1 or in_memory > _IN_MEMORY:
        return None
    for value, tensor in small.items():
        value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)
    return ir.to_proto(model).SerializeToString(), folders.pop()


def discard(path: Path) -> None:
    """Removes a snapshot and its weights."""
    for file in (path, path.with_name(path.name + ".data")):
        file.unlink(missing_ok=True)


class _ClosedError(Exception):
    """The run that wanted a measurement is over."""


@dataclass
class LossMeter:
    """Observer that adds to the report of each LOSSY pass what it cost.

    `kl` is the mean KL divergence per token (nats) of the next-token distribution, from the model before the first
    LOSSY pass to the one after this pass; `kl_added` is the part of this pass; `top1_agreement` the share of positions
    at which both find the same token most likely; what makes logits of something else has them too. Other models than
    decoders get `cosine_similarity`, the least of all outputs, and `output_error`, their relative root mean square
    error: text encoders on text, the rest on samples that the user gave, or random inputs.

    Attributes:
        passes: the pipeline that is about to run.
        work_dir: scratch folder for snapshots.
        ids: token ids [1, T] to measure on; None for models without text.
        about: where the ids come from, for the card.
        sample: gives both, when they are needed: it has a tokenizer to read.
        split: also run the finished model without rounding activations, to tell that error from the weights'.
        sizes: of symbolic dimensions, for models without text; see `Probe.run_random`, which adds to it.
        feeds: inputs of a model without text, when the user has given some; random ones otherwise.
        quality: filled by `finish`, for the card.
        kept: the id that each token had before the passes, None while that has not changed; once it has, the reference
            is measured anew on the new tokens, over those that were kept.
        resample: gives `ids` and `about` after such a change.
    """

    passes: Sequence[Pass]
    work_dir: Path
    ids: Ids | None = None
    about: str = ""
    split: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    feeds: Mapping[str, Array] | None = None
    sample: Callable[[], tuple[Ids, str]] | None = None
    quality: dict[str, Any] = field(default_factory=dict)
    _reference: Future[Outputs | None] | None = None
    _metrics: dict[str, float] = field(default_factory=dict)
    _pending: Report | None = None
    _position: int = 0
    _is_causal: bool = False
    _closed: threading.Event = field(default_factory=threading.Event)
    kept: Callable[[], Ids | None] = lambda: None
    resample: Callable[[], tuple[Ids, str]] | None = None
    _kept: Ids | None = None
    _open_reference: Callable[[], Probe] | None = None

    def close(self) -> None:
        """Nobody will ask any more: a measurement in the thread that has not begun is given up, and none is told of."""
        self._closed.set()

    def before(self, pass_: Pass, model: ir.Model) -> None:
        """Measures the reference before the first LOSSY pass, in a thread beside it."""
        if pass_.promise is not Promise.LOSSY or self._reference is not None:
            return
        content: Path | bytes
        found, folder = in_place(model), None
        if found is None or found[1] == self.work_dir:  # where a verifier removes what it is done with
            content = self._snapshot(model, "reference")
        else:
            content, folder = found
        # Packing copies float weights, which costs more than it saves in a single call; quantized ones crawl without.
        prepacked = any(node.op_type == "MatMulNBits" for node in model.graph)
        threads = max(1, workers() // 2)

        def opened() -> Probe:
            return Probe(content, optimized=True, prepacked=prepacked, threads=threads, folder=folder)

        def measure() -> Outputs:
            if self.sample is not None:
                self.ids, self.about = self.sample()
            if self._closed.is_set():
                raise _ClosedError
            return self._first_run(opened())

        self._open_reference = opened

        self._reference = in_thread(lambda: self._guarded(measure), "measure")

    def after(self, pass_: Pass, model: ir.Model, report: Report) -> None:
        """Measures a LOSSY pass; the last one waits for `finish`, which measures the file that is delivered."""
        self._position += 1
        if pass_.promise is not Promise.LOSSY or self._expected() is None:
            return
        self._follow_tokens()
        is_last = not any(later.promise is Promise.LOSSY for later in self.passes[self._position :])
        if report.modified and not is_last:
            path = self._snapshot(model, f"after{self._position}")
            outputs = self._guarded(lambda: self._run(Probe(path, optimized=True)))
            if outputs is not None:
                self._note(report, outputs)
        elif report.modified or (is_last and self._metrics):  # the loss of the file, though this pass adds none
            self._pending = report

    def _follow_tokens(self) -> None:
        """Measures the reference on the new tokens after a pass that has given them other ids."""
        kept, opened = self.kept(), self._open_reference
        if kept is None or kept is self._kept or self.resample is None or opened is None:
            return
        self._kept = kept
        self.ids, self.about = self.resample()
        self.about += f", over the {len(kept)} tokens that were kept"
        again: Future[Outputs | None] = Future()
        again.set_result(self._guarded(lambda: self._run(opened(), kept)))
        self._reference = again

    def _expected(self) -> Outputs | None:
        """What the reference gives; waits for it. None when it, or the model after a pass, does not run here."""
        if self._reference is None or "not_measured" in self.quality:
            return None
        return self._reference.result()

    def finish(self, path: Path) -> None:
        """Measures the finished model at `path`, and apart from it the part that quantized activations have in it."""
        reference = self._expected()
        if self._pending is None or reference is None:
            return
        outputs = self._guarded(lambda: self._run(Probe(path, optimized=True)))
        if outputs is None:
            return
        self._note(self._pending, outputs)
        self.quality |= {**self._metrics, "measured_on": self.about}
        if self.ids is not None:
            self.quality["tokens"] = self.ids.shape[1] - self._is_causal
        if self._is_causal:  # an encoder does not predict the next token
            self.quality["perplexity_before"] = self._perplexity(reference[_LOG_P])
            self.quality["perplexity_after"] = self._perplexity(outputs[_LOG_P])
        if self.split:
            self._split(path)

    def _split(self, path: Path) -> None:
        """Divides the error between rounded weights and rounded activations."""
        exact = write_with_exact_activations(path)
        if exact is None:
            return
        try:
            plain = self._guarded(lambda: self._run(Probe(exact, optimized=True)))
        finally:
            exact.unlink()
        reference = self._expected()
        if plain is None or reference is None or self._pending is None:
            return
        for name, value in _distance(reference, plain).items():
            if name in ("kl", "output_error"):
                parts = {f"{name}_weights": value, f"{name}_activations": self._metrics[name] - value}
                self.quality |= parts
                self._pending.metrics.update(parts)

    def _snapshot(self, model: ir.Model, name: str) -> Path:
        return snapshot(model, self.work_dir, name)

    def _first_run(self, probe: Probe) -> Outputs:
        """As `_run`, with fewer tokens when so many do not run: without a config nobody knows how many may be given."""
        whole = self.about
        while True:
            try:
                return self._run(probe)
            except Exception:  # ORT has one exception type per C++ code
                if self.ids is None or self.ids.shape[1] < 2 * _FEWEST_TOKENS:
                    raise
                fewer = self.ids.shape[1] // 2
                self.ids, self.about = self.ids[:, :fewer], f"the first {fewer} of {whole}"

    def _run(self, probe: Probe, kept: Ids | None = None) -> Outputs:
        """The outputs for `ids`; `kept` gives the model's ids of them, and the logits to look at."""
        if self.ids is None:
            return probe.run_random(0, self.sizes) if self.feeds is None else probe.run(self.feeds)
        ids = self.ids if kept is None else kept[self.ids]
        self._is_causal = probe.is_language_model and any("past" in name for name in probe.inputs)
        if self._is_causal:
            logits = probe.logits(ids)[0]
            return {_LOG_P: log_softmax(logits if kept is None else logits[:, kept])}
        outputs = probe.run(probe.decoder_feeds(Step(ids, np.ones_like(ids))))
        if "logits" in outputs:  # of each token, or of a class for the whole text
            logits = outputs["logits"].astype(np.float32, copy=False)
            if kept is not None and logits.shape[-1] > kept.max():
                outputs["logits"] = logits = logits[..., kept]
            outputs[_LOG_P] = log_softmax(logits.reshape(-1, logits.shape[-1]))
        return outputs

    def _note(self, report: Report, outputs: Outputs) -> None:
        reference = self._expected()
        assert reference is not None
        now = _distance(reference, outputs)
        for name in ("kl", "output_error"):
            if name in now:
                report.metrics[f"{name}_added"] = now[name] - self._metrics.get(name, 0.0)
        self._metrics = now
        report.metrics.update(now)

    def _perplexity(self, log_p_TV: Array) -> float:
        assert self.ids is not None
        chosen = np.take_along_axis(log_p_TV[:-1], self.ids[0, 1:, None], axis=1)
        return float(np.exp(-chosen.mean(dtype=np.float64)))

    def _guarded(self, measure: Callable[[], Outputs]) -> Outputs | None:
        """None, and a word in the card, when the model does not run here: a CUDA artifact may be built without one."""
        try:
            return measure()
        except (UserError, MemoryError, OSError, _ClosedError):
            raise
        except Exception as error:  # ORT has one exception type per C++ code
            reason = first_line(error)
            if not self._closed.is_set():
                logger.warning("the loss was not measured: %s", reason)
            self.quality["not_measured"] = reason
            return None


@dataclass
class Verifier:
    """Observer that fails when a pass changes outputs by more than it promised.

    Attributes:
        work_dir: scratch folder for snapshots.
        vocab_size: bound of the sample token ids.
        seed: of the sample inputs.
        sizes: of symbolic dimensions, for models without text; see `Probe.run_random`, which adds to it.
        results: one row per verified pass, for the card.
    """

    work_dir: Path
    vocab_size: int = 0
    seed: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    _outputs: Outputs | None = None
    _path: Path | None = None
    _count: int = 0

    def before(self, pass_: Pass, model: ir.Model) -> None:
        """Runs the model as it came, before the first pass.

        Raises:
            UnsupportedModelError: it does not run on inputs made from what the graph declares.
        """
        if self._path is None:
            self._path = snapshot(model, self.work_dir, "verify0")
            try:
                self._outputs = self._run(self._path, model)
            except Exception as error:  # ORT has one exception type per C++ code
                raise UnsupportedModelError(
                    f"verify: the model does not run on sample inputs, even before any pass: {first_line(error)}",
                    hint="run without --verify",
                ) from error

    def after(self, pass_: Pass, model: ir.Model, report: Report) -> None:
        """Compares outputs with those before the pass.

        Raises:
            VerificationError: an EXACT pass changed a bit, or a CLOSE pass more than rounding explains.
        """
        if not report.modified or self._outputs is None:
            return
        assert self._path is not None
        self._count += 1
        path = snapshot(model, self.work_dir, f"verify{self._count}")
        try:
            outputs = self._run(path, model)
        except Exception as error:  # ORT has one exception type per C++ code
            if pass_.promise is not Promise.LOSSY:
                raise
            # Built for another device: bfloat16 has no kernels on the CPU.
            reason = f"does not run here any more: {first_line(error)}"
            self.results.append({"pass": str(pass_), "promise": pass_.promise.value, "not_verified": reason})
            self._outputs = None
            return
        if pass_.promise is not Promise.LOSSY:
            fault, worst = compare(self._outputs, outputs, is_exact=pass_.promise is Promise.EXACT)
            row: dict[str, Any] = {"pass": str(pass_), "promise": pass_.promise.value, "largest_difference": worst}
            if fault is not None:
                if pass_.promise is Promise.EXACT or worst > _ROUNDED or not _rounds(model):
                    raise self._failure(pass_, report, fault, path)
                row["note"] = f"not verified: {fault}, but {_ROUNDING}"
            report.metrics["verified_difference"] = worst
            self.results.append(row)
        discard(self._path)
        self._path, self._outputs = path, outputs

    def _failure(self, pass_: Pass, report: Report, fault: str, path: Path) -> VerificationError:
        assert self._path is not None
        folder = Path(tempfile.mkdtemp(prefix="onnxpress-verify-"))
        for name, old in (("before", self._path), ("after", path)):
            saved = ir.load(old)
            ir.save(saved, folder / f"{name}.onnx", external_data=f"{name}.onnx.data")
        sites = ", ".join(report.changed[:5]) + (", ..." if len(report.changed) > 5 else "")
        return VerificationError(
            f"{pass_}: promised {pass_.promise.value} outputs, but {fault}; "
            f"it changed {len(report.changed)} sites: {sites}",
            hint=f"compare before.onnx and after.onnx in {folder} (inputs: seed {self.seed}), and please report it",
        )

    def _run(self, path: Path, model: ir.Model) -> Outputs:
        # Where activations are rounded, the last bit of a sum can decide on a whole step.
        exact = write_with_exact_activations(path)
        # ONNX Runtime packs constants only, and sums packed ones in another order: a weight that is transposed once
        # and for all would seem to be another. Codes crawl without, and nothing folds them.
        prepacked = any(node.op_type == "MatMulNBits" for node in model.graph)
        probe = Probe(exact or path, threads=1, prepacked=prepacked)
        if exact is not None:
            exact.unlink()
        if not probe.is_language_model:
            return probe.run_random(self.seed, self.sizes)
        # Fewer than the sample was made for once a pass has dropped tokens.
        tables = [one.num_rows for one in find_embeddings(model, [])]
        bound = min(self.vocab_size or 100, max(tables, default=self.vocab_size or 100))
        return dict(_decoder_outputs(probe, bound, self.seed))


# A step of 8 bits is 0.8 % of the largest activation; a few of them in a row stay below this, a lost scale does not.
_ROUNDED = 0.1
_ROUNDING = "the graph rounds its activations, where a last bit can become a whole step"


def _rounds(model: ir.Model) -> bool:
    """Whether operators of the graph round activations to integers, other than MatMulNBits."""
    kinds = ("DynamicQuantizeLinear", "QuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
    return any(node.op_type in kinds for node in ir.traversal.RecursiveGraphIterator(model.graph))


def compare(old: Mapping[str, Array], new: Mapping[str, Array], *, is_exact: bool) -> tuple[str | None, float]:
    """(what differs first or None, the largest difference relative to the largest value of its output)."""
    worst = 0.0
    for name, before in old.items():
        after = new.get(name)
        if after is None:
            return f"output {name} is gone", float("inf")
        if before.shape != after.shape:
            return f"{name}: shape {before.shape} became {after.shape}", float("inf")
        if np.array_equal(before, after):
            continue
        scale = max(float(np.abs(before.astype(np.float64)).max(initial=0.0)), 1e-6)
        difference = float(np.abs(before.astype(np.float64) - after.astype(np.float64)).max()) / scale
        worst = max(worst, difference)
        tolerance = 0.0 if is_exact else TOLERANCE.get(after.dtype, 0.0)
        if not difference <= tolerance:
            return f"{name} differs by {difference:.1e} of its largest value (allowed {tolerance:.0e})", difference
    return None, worst


def write_with_exact_activations(path: Path) -> Path | None:
    """A copy of the graph at `path` in which no MatMulNBits rounds its activations; it shares the weights.

    Returns:
        The copy, beside `path`; None when the graph has no node that rounds activations.
    """
    proto = onnx.load(path, load_external_data=False)
    found = 0
    for node in proto.graph.node:
        for attribute in node.attribute if node.op_type == "MatMulNBits" else ():
            if attribute.name == "accuracy_level" and attribute.i == 4:
                attribute.i, found = 1, found + 1
    if not found:
        return None
    copy = path.with_name(f"{path.stem}-exact-activations.onnx")
    copy.write_bytes(proto.SerializeToString())
    return copy


def _distance(reference: Outputs, outputs: Outputs) -> dict[str, float]:
    found: dict[str, float] = {}
    if _LOG_P in reference:
        p_TV, q_TV = reference[_LOG_P], outputs[_LOG_P]
        same = p_TV.argmax(axis=-1) == q_TV.argmax(axis=-1)
        found |= {"kl": float(kl_divergence(p_TV, q_TV).mean()), "top1_agreement": float(same.mean())}
    errors, norms, cosines = 0.0, 0.0, []
    for name, before in reference.items():
        after = outputs.get(name)
        if (
            name == _LOG_P
            or after is None
            or after.shape != before.shape
            or not np.issubdtype(before.dtype, np.floating)
        ):
            continue
        old, new = before.astype(np.float64).ravel(), after.astype(np.float64).ravel()
        errors += float(((old - new) ** 2).sum())
        norms += float((old**2).sum())
        cosines.append(_cosine(old, new))
    if cosines:
        found |= {"cosine_similarity": min(cosines), "output_error": float(np.sqrt(errors / norms)) if norms else 0.0}
    return found


def _cosine(old: Array, new: Array) -> float:
    """Cosine of the angle between two outputs seen as vectors; 1 when both are zero."""
    norms = float(np.linalg.norm(old) * np.linalg.norm(new))
    return float(old @ new) / norms if norms else float(np.array_equal(old, new))


def _decoder_outputs(probe: Probe, vocab_size: int, seed: int) -> Iterable[tuple[str, Array]]:
    """Outputs that must stay: a prompt, a step on its cache, and the same for two rows padded on the left.

    Of the padded batch only logits at real tokens are looked at: what a model computes at padding is nobody's business.
    """
    rng = np.random.default_rng(seed)
    for batch, pad in ((1, 0), (2, 3)):
        ids = rng.integers(0, vocab_size, (batch, 12))
        mask = np.ones_like(ids)
        mask[1:, :pad] = 0
        prompt = probe.run(probe.decoder_feeds(Step(ids, mask)))
        place = f"batch of {batch}, prompt" if pad else "prompt"
        yield from _visible(place, prompt, mask.astype(bool), with_cache=pad == 0)
        cache = probe.next_cache(prompt)
        if not cache:
            continue
        step = Step(rng.integers(0, vocab_size, (batch, 1)), np.concatenate([mask, np.ones((batch, 1), int)], 1), cache)
        outputs = probe.run(probe.decoder_feeds(step))
        place = f"batch of {batch}, decode step" if pad else "decode step"
        yield from _visible(place, outputs, np.ones((batch, 1), bool), with_cache=pad == 0)


def _visible(
    place: str, outputs: Outputs, mask_BS: npt.NDArray[np.bool_], *, with_cache: bool
) -> Iterable[tuple[str, Array]]:
    for name, array in outputs.items():
        if name == "logits":
            yield f"{name} of the {place}", array[mask_BS] if array.shape[:2] == mask_BS.shape else array
        elif with_cache:
            yield f"{name} of the {place}", array
