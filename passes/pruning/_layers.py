"""Layers that structures may be taken out of, and what each number of them costs the model.

Axes:    N out features, K in features, G structures of U columns each
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from onnxpress.compiler import allocation, calibration, inner_features, obs, stats
from onnxpress.compiler import sensitivity as sensitivities
from onnxpress.compiler.calibration import Calibration
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.obs import eliminate
from onnxpress.compiler.pass_ import Context, Pass, Report
from onnxpress.compiler.sensitivity import Sensitivity, digest_of
from onnxpress.compiler.stats import Stats, shrunk
from onnxpress.compiler.threads import workers
from onnxpress.passes.pruning import _coded
from onnxpress.passes.pruning._coded import FLOATS, Codes, Index, set_matrix, to_codes, to_floats

Floats = npt.NDArray[Any]

PROBED = 0.25  # share of the structures that is gone while the cost of a layer is measured, unless a ratio says

_RUINED = 1e6  # cost of a layer without which the outputs are not finite
_LEAST = 1e-6  # of the energy at the outputs of a layer
TOKENS_PER_SAMPLE = 64  # an image counts as so many of the tokens that options ask for
_PRICED_TOKENS = 4096  # of text that tell what sizes lose; fitting reads all that was asked for


@dataclass
class Structure:
    """One layer, what may be taken out of it, and what became of it.

    Attributes:
        name: of the layer: "block3.ffn".
        reader: the linear whose columns are structures.
        unit: U.
        total: G.
        step: counts that are left are multiples of it.
        parameters: of one structure in all matrices of the layer.
        nbytes: of the same, as stored.
        cut: takes all but these structures out of what makes them; gets refitted matrices by id of a linear's output.
        losses: at counts `counts`, relative to the energy at the outputs.
        cost: of the model, per unit of loss.
    """

    name: str
    reader: Linear
    unit: int
    total: int
    step: int
    parameters: int
    nbytes: float
    cut: Callable[[Index, dict[int, Floats]], None]
    losses: Floats = field(default_factory=lambda: np.zeros(0))
    cost: float = 0.0
    count: int = 0
    expected: float = 0.0
    kept: Index | None = None
    error: float = 0.0
    codes: Codes | None = None  # what the reader is stored as, while it is a MatMul

    @property
    def counts(self) -> list[int]:
        """Numbers of structures that may be left, from all of them to the fewest."""
        multiples = range((self.total - 1) // self.step * self.step, 0, -self.step)
        return [self.total, *multiples]

    def nearest(self, ratio: float) -> int:
        """The largest count that removes this share; the fewest there can be where none does."""
        return next((one for one in self.counts if one <= (1 - ratio) * self.total * (1 + 1e-12)), self.counts[-1])


def prepared(
    model: ir.Model, found: list[Structure], context: Context, report: Report, tokens: int, length: int
) -> list[dict[str, Any]]:
    """Samples that the user gave (images, sound) or windows of text, once readers in codes have become floats.

    Args:
        model: changed where readers are in codes.
        found: its layers.
        context: text.
        report: told which text.
        tokens, length: of all windows together, of each.

    Raises:
        UnsupportedModelError: the model is bfloat16.
        CalibrationError: there is no text.
    """
    if any(one.reader.weight.dtype == ir.DataType.BFLOAT16 for one in found):
        raise UnsupportedModelError(
            "text is streamed on the CPU, which has no kernels for bfloat16",
            hint="use --target cuda (float16)",
        )
    for one in found:
        one.codes = to_floats(one.reader) if one.reader.holder not in FLOATS else None
    if context.arrays:
        windows, report.calibration = context.arrays.windows(model.graph, max(1, tokens // TOKENS_PER_SAMPLE))
        return windows
    ids_WS, report.calibration = context.calibration.windows(tokens, length)
    return feeds(model.graph, ids_WS)


def price(
    pass_: Pass,
    model: ir.Model,
    found: list[Structure],
    windows: list[dict[str, Any]],
    context: Context,
    report: Report,
    *,
    cut: float,
    probe: int | None,
) -> list[Structure]:
    """Fills in losses and costs; layers of which the activation is not finite are left out, and said to be.

    Args:
        pass_: whose name, options and files tell results that may be resumed from others.
        model: readers are floats.
        found: its layers.
        windows: of text.
        context: journal, progress.
        report: told what costs were measured on.
        cut: share of the structures that is gone while the cost of a layer is measured.
        probe: tokens on which the loss of the model's predictions is measured; None: costs are losses of the layers.
    """
    wanted = [one.reader for one in found]
    sensitivity: Sensitivity | None = None
    probed = ""
    if probe is not None:
        if context.arrays:
            sensitivity, facts = Sensitivity(model, windows[0], wanted), report.calibration
        else:
            sensitivity, _, facts = Sensitivity.on_text(model, context.calibration, probe, wanted)
        report.calibration.setdefault("costs", f"{sensitivity.measure} on {facts['text']}")
        probed = str(facts["sha256"])
    # A cost is told by the whole model, of which a stage's digest has what comes before it.
    state = digest_of(model) if sensitivity is not None else ""
    section = context.journal.section(
        pass_.name(), "costs", str(pass_), context.target.name, identity(type(pass_)), state, probed
    )
    of_reader = {id(one.reader): one for one in found}
    each = TOKENS_PER_SAMPLE * len(next(iter(windows[0].values())))
    count = max(1, _PRICED_TOKENS // (each if context.arrays else windows[0]["input_ids"].size))
    # Costs are probed on the beginning of the text: what was fitted to it would seem to cost half as much.
    few = windows[1 : 1 + count] or windows
    with Calibration(model, few, wanted, context.work_dir) as run:
        for number, stage in enumerate(context.track(run.stages, f"{pass_.name()}: what each size costs")):
            digest = run.digest(stage)
            record = section.read(str(number), digest)
            group = run.observe(stage, with_stats=record is None)
            if record is None:
                record = {}
                for index, linear in enumerate(group.linears):
                    losses, cost = curve(of_reader[id(linear)], group.stats, sensitivity, cut)
                    record |= {f"{index}.losses": losses, f"{index}.cost": np.array(cost)}
                section.write(str(number), digest, record)
            for index, linear in enumerate(group.linears):
                one = of_reader[id(linear)]
                one.losses, one.cost = record[f"{index}.losses"], float(record[f"{index}.cost"])
    for one in found:
        if not one.losses.size:
            if one.codes is not None:
                to_codes(one.reader, one.codes.matrix, one.codes.level)
            report.skip(one.name, "its weights or its activation are not finite on the calibration text")
    return [one for one in found if one.losses.size]


def curve(one: Structure, seen: Stats, sensitivity: Sensitivity | None, cut: float) -> tuple[Floats, float]:
    """Losses at all counts, relative, and what a unit of them costs the model."""
    w_NK, hessian_KK = one.reader.w_NK(), shrunk(seen.hessian_KK, seen.count)
    if not (np.isfinite(hessian_KK).all() and np.isfinite(w_NK).all()):
        return np.zeros(0), 0.0
    whole = float(np.einsum("nk,nk->", w_NK @ hessian_KK, w_NK)) or 1.0
    probed = one.nearest(cut)
    losses: list[float] = []
    cost = 1.0
    for step in eliminate(w_NK, hessian_KK, one.unit, one.counts):
        losses.append(step.loss / whole)
        if sensitivity is not None and len(step.kept) == probed and probed < one.total:
            new = one.reader.stored_form(step.w_NK.astype(np.float32))
            lost = sensitivity.distance({id(one.reader.weight): new})
            # Below this what is lost is rounding, and so would be its price.
            cost = (lost if np.isfinite(lost) else _RUINED) / max(losses[-1], _LEAST)
    return np.array(losses), cost


def put(one: Structure, kept: Index, new_NK: Floats, results: dict[int, Floats]) -> None:
    """Cuts a layer in the graph.

    Args:
        one: its reader is in codes, or was and has become floats.
        kept: structures, in order.
        new_NK: the reader's matrix over their columns.
        results: refitted matrices of those that make the structures, by id of a linear's output.
    """
    one.cut(kept, results)
    if one.codes is None:
        set_matrix(one.reader, new_NK, "pruned")
    else:
        one.reader.num_in = new_NK.shape[1]
        to_codes(one.reader, one.codes.nearest(new_NK), one.codes.level)


def spread(w_NK: Floats, one: Structure) -> Floats:
    """Columns that are kept, where they were; zeros between."""
    assert one.kept is not None
    whole = np.zeros((len(w_NK), one.reader.num_in), np.float32)
    whole[:, columns_of(one, one.kept)] = w_NK
    return whole


def columns_of(one: Structure, kept: Index) -> Index:
    """Columns of structures."""
    found: Index = (kept[:, None] * one.unit + np.arange(one.unit)).reshape(-1)
    return found


def identity(kind: type[Pass], *others: ModuleType) -> str:
    """Of everything that may change a last bit: results of another state are not resumed."""
    names = [one.__module__ for one in kind.__mro__ if one.__module__.startswith("onnxpress.passes.")]
    modules = (
        allocation,
        calibration,
        sensitivities,
        stats,
        obs,
        inner_features,
        _coded,
        *others,
        *(sys.modules[name] for name in names),
    )
    sources = [__file__, *(one.__file__ for one in modules)]
    digest = hashlib.sha256(b"".join(Path(one).read_bytes() for one in sources if one is not None))
    return f"{digest.hexdigest()} onnxruntime {ort.__version__} numpy {np.__version__} {workers()} threads"
