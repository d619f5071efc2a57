"""What is done with LoRA adapters outside of a run: merge, make slots, convert, extract.

merge     PEFT -> into the weights of an artifact          slots     a graph that takes adapters as inputs
convert   PEFT -> `.onnx_adapter` for the slots of a graph  extract   two models -> the adapter between them
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from onnxpress import models
from onnxpress.compiler import pipeline as pipelines
from onnxpress.compiler import registry
from onnxpress.compiler.artifact import Artifact
from onnxpress.compiler.errors import OptionError, OutputError, UnsupportedModelError
from onnxpress.compiler.linears import Embedding, find_embeddings, find_linears
from onnxpress.compiler.lora_graph import Site, find_sites, find_slots, refuse_transformed
from onnxpress.compiler.lora_slots import fill, write_adapter
from onnxpress.compiler.lora_targets import TABLE_KINDS, TURNED, modules, place
from onnxpress.compiler.optimize import Tell, artifact_history, optimize
from onnxpress.compiler.pass_ import Context, Tracker, build
from onnxpress.compiler.peft import Update, read_peft, write_peft
from onnxpress.compiler.pipeline import Pipeline
from onnxpress.compiler.report import installed
from onnxpress.compiler.truncated_svd import truncated_svd

Floats = npt.NDArray[np.float32]

SUFFIX = ".onnx_adapter"
_ROUNDING = 2.0**-22  # of a weight: a difference below it is none


def merge_adapters(
    model: str | Path,
    adapters: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    passes: str = "",
    max_loss: float = 0.5,
    target: str = "cpu",
    track: Tracker | None = None,
    tell: Tell | None = None,
) -> Artifact:
    """Makes an artifact of `model` with adapters in its weights.

    Args:
        model: anything that `optimize` takes.
        adapters: PEFT directories, added one after the other.
        output: directory to write, see `optimize`.
        passes: pipeline that runs after the merge: "int4", "fuse, rtn(bits=8), pack".
        max_loss: share of the update that rounding quantized matrices may swallow, over all of them.
        target, track, tell: see `optimize`.

    Raises:
        UserError: an adapter is damaged, of a kind that cannot be merged, or belongs to another model.
    """
    chosen = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    merges = [build(registry.find("merge_lora"), {"path": str(one), "max_loss": max_loss}) for one in chosen]
    rest = pipelines.parse(passes).passes if passes.strip() else ()
    pipeline = Pipeline((*merges, *rest))
    return optimize(model, output=output, passes=pipeline, target=target, measure=False, track=track, tell=tell)


def add_slots(
    model: str | Path,
    output: str | Path,
    *,
    passes: str = "",
    kinds: Sequence[str] = (),
    also: Sequence[str] = (),
    exclude: Sequence[str] = (),
    target: str = "cpu",
    track: Tracker | None = None,
    tell: Tell | None = None,
) -> Artifact:
    """Makes an artifact of `model` that takes adapters as inputs.

    Args:
        model: anything that `optimize` takes.
        output: directory to write, see `optimize`.
        passes: pipeline that runs before: "int4-rtn"; nothing leaves an artifact as it is.
        kinds, also, exclude: which linears get a slot, see the pass `lora_slots`.
        target, track, tell: see `optimize`.
    """
    options = {"kinds": tuple(kinds), "also": tuple(also), "exclude": tuple(exclude)}
    last = build(registry.find("lora_slots"), options)
    first = pipelines.parse(passes).passes if passes.strip() else ()
    return optimize(
        model, output=output, passes=Pipeline((*first, last)), target=target, measure=False, track=track, tell=tell
    )


@dataclass(frozen=True)
class Conversion:
    """An adapter file that was written.

    Attributes:
        path: of the file.
        modules: of the PEFT adapter.
        slots: that it fills.
        rank: the largest.
        nbytes: of the file.
    """

    path: str
    modules: int
    slots: int
    rank: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of the attributes."""
        return asdict(self)


def convert_adapter(adapter: str | Path, model: str | Path, output: str | Path) -> Conversion:
    """Writes a PEFT adapter as the `.onnx_adapter` file of a graph with slots.

    Args:
        adapter: PEFT directory.
        model: what `add_slots` made.
        output: the file.

    Raises:
        UserError: an adapter is damaged, the graph has no slots, or none for a module.
    """
    path = _file(output)
    source_adapter = read_peft(adapter)
    with tempfile.TemporaryDirectory(prefix="onnxpress-") as work:
        source = models.load(model, work_dir=Path(work))
        found = find_slots(source.model)
        if not found:
            raise UnsupportedModelError(
                f"{model}: expected a graph with slots for adapters, found none",
                hint=f"make one: onnxpress lora slots {model} -o DIR",
            )
        arrays = fill(source_adapter, found, source.config)
    with _complete(path) as unfinished:
        write_adapter(unfinished, arrays)
    return Conversion(
        str(path), len(source_adapter.updates), len(arrays) // 2, source_adapter.rank, path.stat().st_size
    )


@dataclass(frozen=True)
class Extraction:
    """An adapter between two models, and how well it says the difference.

    Attributes:
        path: of what was written.
        rank: asked for.
        error: ||difference - B A|| / ||difference|| over all matrices.
        modules: rows with `module`, `shape`, `rank`, `norm` of the difference, relative `error`.
        unchanged: modules without a difference.
        left_out: what differs and is no matrix that an adapter can change: norms, biases, other sizes.
    """

    path: str
    rank: int
    error: float
    modules: list[dict[str, Any]]
    unchanged: int
    left_out: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of the attributes."""
        return asdict(self)


def extract_adapter(
    tuned: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    rank: int = 16,
    track: Tracker | None = None,
    tell: Tell | None = None,
) -> Extraction:
    """Writes the difference of two models as an adapter: the best one of that rank, matrix by matrix.

    Args:
        tuned, base: anything that `optimize` takes; of one architecture. Quantized ones are read as what they stand
            for, so that rounding is part of the difference.
        output: a directory for a PEFT adapter, or a file that ends in `.onnx_adapter`, with the names of slots.
        rank: of every matrix, unless it is smaller.
        track, tell: see `optimize`.

    Raises:
        OptionError: the rank is below 1, or the models do not differ.
        UnsupportedModelError: the models are not of one architecture, or a pass has moved their numbers about.
    """
    if rank < 1:
        raise OptionError(f"rank: expected at least 1, got {rank}", hint="16 is usual")
    is_file = str(output).endswith(SUFFIX)
    path = _file(output) if is_file else _directory(output)
    tell = tell or (lambda _: None)
    with tempfile.TemporaryDirectory(prefix="onnxpress-") as work:
        opened = []
        for name, spec in (("tuned", tuned), ("base", base)):
            tell(f"opening {spec}")
            (Path(work) / name).mkdir()
            opened.append(_Opened(spec, Path(work) / name, tell))
        new, old = opened
        groups = _groups(new, old, whole_modules=not is_file)
        tell("comparing")
        updates, rows, unchanged = [], [], 0
        lost = total = 0.0
        for module in track(list(groups), "extract") if track else groups:
            delta = _difference(module, groups[module], new, old)
            if delta is None:
                unchanged += 1
                continue
            # Threads of the linear algebra library wait in a loop for each other: on a busy machine ten times the work.
            with threadpool_limits(1, user_api="blas"):
                b_NR, a_RK, error = truncated_svd(delta, rank)
            norm = float(np.linalg.norm(delta.astype(np.float64)))
            lost, total = lost + (error * norm) ** 2, total + norm**2
            rows.append({"module": module, "shape": list(delta.shape), "rank": len(a_RK), "norm": norm, "error": error})
            updates.append(Update(module, a_RK, b_NR, is_table=groups[module][0].target.kind in TABLE_KINDS))
        if not updates:
            raise OptionError(
                f"{tuned}: expected a model that differs from {base}, found the same matrices",
                hint="give the tuned model first, then the one it was made of",
            )
        left_out = _others(new, old)
        turned = str(old.config.get("model_type")) in TURNED
    with _complete(path) as unfinished:
        if is_file:
            pairs = {one.module: (one.a_RK.T, one.b_NR.T) for one in updates}
            arrays = {f"{name}.lora_{side}": pair[side == "B"] for name, pair in pairs.items() for side in "AB"}
            write_adapter(unfinished, {name: np.ascontiguousarray(array) for name, array in arrays.items()})
        else:
            unfinished.mkdir()
            version = installed("onnxpress") or ""
            write_peft(unfinished, updates, base=str(base), rank=rank, turned=turned, notes=f"onnxpress {version}")
    error = math.sqrt(lost / total)
    return Extraction(str(path), rank, error, rows, unchanged, left_out)


class _Opened:
    """A model with its targets, fused in memory: only then roles are sure."""

    def __init__(self, spec: str | Path, work: Path, tell: Tell) -> None:
        self.spec = spec
        source = models.load(spec, work_dir=work, progress=tell)
        self.model, self.config = source.model, source.config
        refuse_transformed(self.model, artifact_history(source))
        pipelines.run(self.model, pipelines.parse("fuse"), Context(config=dict(source.config)))
        linears = find_linears(self.model)
        embeddings = find_embeddings(self.model, linears)
        self.sites = {site.target.name: site for site in find_sites(linears, embeddings)}
        self.holders = {id(value) for one in linears for value in one.weights} | {id(one.table) for one in embeddings}
        self._held: tuple[int, Floats] = (0, np.empty((0, 0), np.float32))

    def matrix(self, name: str) -> Floats:
        """float32 [N, K] of a target; the last whole matrix is kept, for the other parts of a packed one."""
        site: Site = self.sites[name]
        if self._held[0] != id(site.holder):
            holder = site.holder
            whole = holder.table_VH().T if isinstance(holder, Embedding) else holder.w_NK()
            self._held = id(holder), whole
        rows, columns = site.target.shape
        return self._held[1][site.start : site.start + rows, :columns]


def _groups(new: _Opened, old: _Opened, *, whole_modules: bool) -> dict[str, list[Site]]:
    """Modules of the checkpoint with the targets that they are, in both models."""
    missing = sorted(set(new.sites) ^ set(old.sites))
    if missing:
        place_ = new.spec if missing[0] in new.sites else old.spec
        raise UnsupportedModelError(
            f"expected two models of one architecture, found {missing[0]} in {place_} only",
            hint="give a model and the one that it was made of, in the same form",
        )
    for name, site in new.sites.items():
        if site.target.shape != old.sites[name].target.shape:
            raise UnsupportedModelError(
                f"{name}: expected {list(old.sites[name].target.shape)} as in {old.spec}, "
                f"found {list(site.target.shape)} in {new.spec}",
                hint="the models have different sizes",
            )
    targets = [site.target for site in old.sites.values()]
    named = modules(targets, old.config) if whole_modules else {one.name: [one] for one in targets}
    return {module: [old.sites[one.name] for one in group] for module, group in named.items()}


def _difference(module: str, sites: Sequence[Site], new: _Opened, old: _Opened) -> Floats | None:
    """tuned - base, float32 [N, K]; None where rounding alone explains it."""
    shape = sum(one.target.shape[0] for one in sites), sites[0].target.shape[1]
    targets = [one.target for one in sites]
    is_table = targets[0].kind in TABLE_KINDS
    places = (
        [(targets[0].name, None)]
        if len(targets) == 1
        else [(one.target.name, one.rows) for one in place(module, shape, targets, old.config, is_table=is_table)]
    )
    delta = np.empty(shape, np.float32)
    squares = 0.0
    for name, rows in places:
        before = old.matrix(name)
        delta[slice(None) if rows is None else rows] = new.matrix(name) - before
        squares += float(np.square(before, dtype=np.float64).sum())
    if not np.isfinite(delta).all():
        raise UnsupportedModelError(
            f"{module}: expected finite weights in {new.spec} and {old.spec}, found NaN or infinity",
            hint="one of the models is damaged",
        )
    size = float(np.linalg.norm(delta.astype(np.float64)))
    return None if size <= _ROUNDING * math.sqrt(squares) else delta


def _others(new: _Opened, old: _Opened) -> list[str]:
    """Names of float weights that differ, and are no matrix of an adapter."""
    found = []
    for name, value in old.model.graph.initializers.items():
        other = new.model.graph.initializers.get(name)
        if id(value) in old.holders or other is None or value.const_value is None or other.const_value is None:
            continue
        tensors = value.const_value, other.const_value
        if not tensors[0].dtype.is_floating_point():
            continue
        one, two = (np.asarray(tensor.numpy(), np.float32) for tensor in tensors)
        if one.shape != two.shape or not np.allclose(one, two, rtol=1e-6, atol=1e-7):
            found.append(name)
    return found


def _file(output: str | Path) -> Path:
    path = Path(output).expanduser()
    if path.is_dir():
        raise OutputError(f"{path}: expected a file to write, found a directory", hint=f"name it: {path}/NAME{SUFFIX}")
    if path.suffix != SUFFIX:
        raise OptionError(
            f"{path}: expected a name that ends in {SUFFIX}, got {path.name!r}", hint=f"write {path.stem}{SUFFIX}"
        )
    return path


def _directory(output: str | Path) -> Path:
    path = Path(output).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path}: expected a new or empty directory, found files", hint="choose another output")
    return path


@contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A place beside `path` that is renamed to it when the block ends well, and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        if path.is_dir():
            path.rmdir()
        (folder / path.name).replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
