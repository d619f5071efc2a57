"""Takes key-value heads out of attention, each with the query heads that read it; the cache shrinks with them.

A head is worth what the outputs of the projection behind attention lose without it once the columns of the other heads
have made up for it. All layers keep the same number unless `allocation` says otherwise: onnxruntime-genai takes only
models whose layers are alike, this project's own runtime takes any.

Paper:   arXiv:2302.04089 (ZipLM)
Differs: whole groups of heads that share keys and values; fitted to the outputs of the uncompressed model
Axes:    N out features, K in features, G key-value heads, H query heads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.pruning._coded import obstacle
from onnxpress.passes.pruning._heads import is_attention, read_heads
from onnxpress.passes.pruning._layers import Structure
from onnxpress.passes.pruning._structured import Structured

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_SIZES = ("head_dim", "d_kv")


@dataclass(frozen=True, kw_only=True)
class PruneHeads(Structured):
    """Fewer key-value heads, by calibration text; give one of ratio, size and kl.

    Attention has to be fused. Comes before quantizers, as `prune_ffn` does, and before quantize_kv.
    """

    paper: ClassVar[str] = "arXiv:2302.04089"
    structure: ClassVar[str] = "key-value heads"

    # uniform leaves as many heads in every layer, which onnxruntime-genai needs; kl and loss give sizes by what layers
    # lose, of the model's predictions or of their own outputs
    allocation: Literal["kl", "loss", "uniform"] = "uniform"

    @classmethod
    def example(cls, model: ir.Model) -> PruneHeads:
        return cls(ratio=0.3, tokens=64, length=32, probe=16)

    def structures(self, model: ir.Model, linears: Sequence[Linear], report: Report) -> list[Structure]:
        names = {id(one.activation): _layer(one.name) for one in linears}
        nodes = [node for node in model.graph if is_attention(node)]
        sites = [names.get(id(node.outputs[0])) or node.name or str(node.outputs[0].name) for node in nodes]
        unfused = [one for one in linears if one.kind == "o" and not is_attention(one.activation.producer())]
        is_excluded = self.excluded([*sites, *(_layer(one.name) for one in unfused)])
        for one in unfused:
            name = _layer(one.name)
            report.skip(name, "excluded" if is_excluded(name) else "its attention is not fused: fuse before")
        found = []
        for name, node in zip(sites, nodes, strict=True):
            if is_excluded(name):
                report.skip(name, "excluded")
                continue
            heads = read_heads(node, linears, model.opset_imports.get("", 18))
            if isinstance(heads, str):
                report.skip(name, f"its heads are not its own: {heads}")
            elif (reason := obstacle([heads.reader, *(maker for maker, _ in heads.makers)])) is not None:
                report.skip(name, reason)
            elif heads.total == 1:
                report.skip(name, "has one key-value head, and keeps it")
            else:
                unit, nbytes = heads.reader.num_in // heads.total, heads.nbytes / heads.total
                found.append(Structure(name, heads.reader, unit, heads.total, 1, heads.numbers, nbytes, heads.cut))
        return found

    def finish(self, structures: Sequence[Structure], context: Context, report: Report) -> None:
        if all(one.kept is None or len(one.kept) == one.total for one in structures):
            return
        before = {one.total for one in structures}
        after = {one.total if one.kept is None else len(one.kept) for one in structures}
        stays = {skip.site for skip in report.skipped}
        if len(before) > 1 or len(after) > 1 or any(site.endswith(".attention") for site in stays):
            report.notes.append(
                "layers have different numbers of heads: the config says the ones they had, and onnxruntime-genai "
                "takes only equal ones"
            )
            return
        node = structures[0].reader.activation.producer()
        assert node is not None
        (total,), (left,), heads = before, after, node.attributes["num_heads"].as_int()
        counts = _Counts(heads // left * total, heads, total, left, structures[0].reader.num_in // heads)
        is_decoder = node.op_type == "GroupQueryAttention"
        texts = [one for one in (context.config, context.config.get("text_config")) if isinstance(one, dict)]
        if context.config and not [one for one in texts if _edit(one, counts, report, is_decoder=is_decoder)]:
            report.notes.append(f"the config says nothing of {counts.heads} heads: it stays as it is")


@dataclass(frozen=True)
class _Counts:
    """Heads of every layer before and after, and the size of one."""

    heads: int
    heads_left: int
    kv_heads: int
    kv_heads_left: int
    size: int


def _layer(name: str) -> str:
    """ "block3.attention" for "block3.o"."""
    return name.removesuffix("o") + "attention" if name.endswith(".o") else f"{name}.attention"


def _edit(config: dict[str, Any], counts: _Counts, report: Report, *, is_decoder: bool) -> bool:
    """Writes the new numbers of heads, and the size of a head where the width of the model no longer tells it."""
    hidden = next((config[key] for key in _HIDDEN if isinstance(config.get(key), int)), None)
    usual = None if hidden is None else hidden / counts.size  # heads of such a model before any were taken out
    keys = [key for key in _HEADS if config.get(key) in (counts.heads, usual)]
    if not keys:
        return False
    kv_keys = [key for key in _KV_HEADS if config.get(key) == counts.kv_heads]
    config |= dict.fromkeys(kv_keys, counts.kv_heads_left)
    if hidden != counts.heads_left * counts.size and not any(config.get(key) for key in _SIZES):
        config["head_dim"] = counts.size
    if kv_keys and all(config[key] == usual for key in keys):
        # optimum divides by it for the size of a head, whatever head_dim says; nothing else that runs graphs reads it.
        report.notes.append(
            f"the config keeps {keys[0]}={config[keys[0]]}, which optimum takes the size of a head from; "
            f"the graph and genai_config.json have {counts.heads_left}"
        )
    else:
        config |= dict.fromkeys(keys, counts.heads_left)
        if is_decoder and hidden is not None and hidden != counts.heads_left * counts.size:
            report.notes.append(
                "optimum takes the size of a head as width / heads for most architectures, and cannot run such a model;"
                " onnxpress and onnxruntime-genai can"
            )
    return True
