"""GPTQ with teacher targets, coordinate descent and refitted scales: `_calibrated` says how.

With `sparsity` or `pattern` weights become zero in the same sweep (SparseGPT): what stays makes up for both errors.

Paper: arXiv:2210.17323, arXiv:2301.00774 (section 3.5)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler import zeros
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.zeros import NO_SPEED, Pattern
from onnxpress.passes.quantization._calibrated import Calibrated
from onnxpress.passes.quantization._weight_only import Coded, Site


@dataclass(frozen=True, kw_only=True)
class Gptq(Calibrated):
    """Rounds weights to 2, 4 or 8 bits with the help of calibration text; options as in every weight-only pass."""

    paper: ClassVar[str] = "arXiv:2210.17323"

    # Share of each row of a linear that becomes zero, chosen together with the codes; no faster in ONNX Runtime. Head,
    # routers and embedding keep all their weights.
    sparsity: float | None = None
    pattern: str | None = None  # "2:4": two of every four neighbours of a row stay; instead of sparsity

    def __post_init__(self) -> None:
        super().__post_init__()
        zeros.read(self.name(), self.sparsity, self.pattern)

    @classmethod
    def example(cls, model: ir.Model) -> Gptq:
        return cls(block_size=16, tokens=32, length=16)

    def pattern_of(self, site: Site) -> Pattern | None:
        keeps_all = bool(site.embeddings) or any(linear.kind in ("head", "router") for linear in site.linears)
        return None if keeps_all else zeros.read(self.name(), self.sparsity, self.pattern)

    def code(
        self, model: ir.Model, sites: list[Site], linears: list[Linear], context: Context, report: Report
    ) -> Iterator[tuple[Site, Coded]]:
        total, count = 0, 0
        for site in sites:
            reason = (pattern := self.pattern_of(site)) and pattern.refuses(site.shape[1])
            if reason:
                raise OptionError(
                    f"gptq: {site.name} cannot have these zeros: {reason.partition('; ')[0]}",
                    hint=f"{reason.partition('; ')[2]}, or exclude=({site.name!r},)",
                )
        for site, coded in super().code(model, sites, linears, context, report):
            if self.pattern_of(site) is None:
                yield site, coded
                continue
            w_NK = coded.w_NK()
            found = w_NK.size - int(np.count_nonzero(w_NK))
            total, count = total + w_NK.size, count + found
            yield site, coded._replace(facts={**coded.facts, "sparsity": found / w_NK.size})
        if total:
            report.metrics["sparsity"] = count / total
            report.notes.append(NO_SPEED)
