"""Takes channels out of feed-forward layers: rows of gate and up, columns of down; nothing else changes shape.

A channel is worth what the layer's outputs lose without it once the other channels have made up for it. Layers may end
up with different widths, which every runtime takes; all are multiples of what kernels and blocks of codes like.

Paper:   arXiv:2302.04089 (ZipLM)
Differs: fitted to the outputs of the uncompressed model; widths from one knapsack over measured losses
Axes:    N out features, K in features, I channels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.pruning._ffn import ffn_layers
from onnxpress.passes.pruning._layers import Structure
from onnxpress.passes.pruning._structured import Structured

_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_dim", "d_ff", "hidden_dim")


@dataclass(frozen=True, kw_only=True)
class PruneFfn(Structured):
    """Narrows feed-forward layers, by calibration text; give one of ratio, size and kl.

    Comes before quantizers, which then see what is left. Of matrices in codes, rows keep theirs bit for bit, and what
    is fitted anew is rounded to the nearest in the format that it had.
    """

    paper: ClassVar[str] = "arXiv:2302.04089"
    structure: ClassVar[str] = "channels"

    multiple: int | None = None  # what widths are a multiple of; None: 64, or 8 in layers below 512

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.multiple is None or self.multiple >= 1, "multiple", "at least 1")

    @classmethod
    def example(cls, model: ir.Model) -> PruneFfn:
        return cls(ratio=0.3, tokens=64, length=32, probe=16)

    def structures(self, model: ir.Model, linears: Sequence[Linear], report: Report) -> list[Structure]:
        return ffn_layers(linears, self.excluded, self.multiple, report)

    def finish(self, structures: Sequence[Structure], context: Context, report: Report) -> None:
        widths = {one.total if one.kept is None else len(one.kept) for one in structures}
        before = {one.total for one in structures}
        if widths == before:
            return
        stays = any(skip.site.endswith("ffn") for skip in report.skipped)
        if len(widths) > 1 or len(before) > 1 or stays:
            report.notes.append("layers have different widths: the config says the one they had")
        elif not _set_width(context.config, before.pop(), widths.pop()):
            report.notes.append("the config names no width of these layers that could follow")


def _set_width(config: dict[str, Any], before: int, after: int) -> bool:
    """Whether the config, or its part about text, had the width, and has the new one now."""
    done = False
    parts: list[dict[str, Any]] = [config]
    if isinstance(config.get("text_config"), dict):
        parts.append(config["text_config"])
    for part in parts:
        for key in _WIDTHS:
            # GPT-2 writes none for four times the width of the stream.
            if part.get(key) == before or (key in part and part[key] is None and 4 * part.get("n_embd", 0) == before):
                part[key], done = after, True
    return done
