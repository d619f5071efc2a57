"""Gives linears a slot each: two inputs of low rank, empty by default, that a request fills with its adapter.

y = x W^T + (x A) B with inputs `NAME.lora_A` [K, R] and `NAME.lora_B` [R, N]. Their defaults have R = 0, so a caller
who knows nothing of them gets what it got before, and one session serves any number of adapters, each of any rank. A
packed matrix (`qkv`, `gate_up`) gets a slot for each part, so the same adapter file fits packed and unpacked graphs.

Paper:   Hu et al., arXiv:2106.09685
Axes:    N out features, K in features, R rank
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxpress.compiler.errors import OptionError, near_miss
from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.lora_graph import Site, add_slots, find_sites, note_slots, refuse_transformed
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.roles import KINDS

_KINDS = (*KINDS, "embedding", "table")
_LATER = ("head", "router", "embedding", "table")  # only when asked for


@dataclass(frozen=True, kw_only=True)
class LoraSlots(Pass):
    """Adds slots for adapters. Comes last: passes before it see, fuse and pack the products as they were."""

    promise: ClassVar[Promise] = Promise.EXACT
    paper: ClassVar[str] = "arXiv:2106.09685"

    kinds: tuple[str, ...] = ()  # roles that get one: "q", "v", "head", ...; () for all but head, router, embedding
    also: tuple[str, ...] = ()  # roles beside these: ("head", "embedding")
    exclude: tuple[str, ...] = ()  # patterns of names that get none: "block0.*", "*.down"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("kinds", "also"):
            self.check(set(getattr(self, option)) <= set(_KINDS), option, f"among {', '.join(_KINDS)}")

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        refuse_transformed(model, context.history)
        linears = find_linears(model)
        sites = find_sites(linears, find_embeddings(model, linears))
        self._check(sites)
        together: dict[int, list[Site]] = {}
        for site in sites:
            together.setdefault(id(site.holder), []).append(site)
        added: list[Site] = []
        for parts in context.track(list(together.values()), "lora_slots"):
            wanted = [part for part in parts if self._wants(part, report)]
            if not wanted:
                continue
            if any(f"{part.target.name}.lora_A" in model.graph.initializers for part in parts):
                report.skip(parts[0].target.name, "has a slot already")
                continue
            add_slots(model.graph, parts)
            for part in parts:  # all of a packed matrix: what is added to its output is as wide as that
                report.change(part.target.name, kind=part.target.kind, shape=list(part.target.shape))
                added.append(part)
        note_slots(model, added)
        return report

    def _check(self, sites: Sequence[Site]) -> None:
        """Raises OptionError for an option that has no effect on this model."""
        names, kinds = [site.target.name for site in sites], {site.target.kind for site in sites}
        for kind in (*self.kinds, *self.also):
            if kind not in kinds:
                known = ", ".join(sorted(kinds))
                raise OptionError(f"lora_slots: this model has no linear of kind {kind!r}", hint=f"it has: {known}")
        for pattern in self.exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                hint = near_miss(pattern, names) or "see their names with inspect"
                raise OptionError(f"lora_slots: exclude={pattern!r} matches no linear", hint=hint)

    def _wants(self, site: Site, report: Report) -> bool:
        target = site.target
        if any(fnmatch.fnmatchcase(target.name, pattern) for pattern in self.exclude):
            report.skip(target.name, "excluded")
        elif target.kind not in self.also and (target.kind not in self.kinds if self.kinds else target.kind in _LATER):
            report.skip(target.name, "not among the kinds asked for")
        else:
            return True
        return False
