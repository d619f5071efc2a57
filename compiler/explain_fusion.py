"""Says, block by block, what fusion found, fused and left alone, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx_ir as ir

from onnxpress.compiler import pipeline as pipelines
from onnxpress.compiler.blocks import Block, find_blocks
from onnxpress.compiler.pass_ import Context, Pass, Report

# Operators that stand for a whole chain of the exporters' graphs.
FUSED = (
    *("GroupQueryAttention", "MultiHeadAttention", "Attention"),
    *("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization"),
    *("LayerNormalization", "SkipLayerNormalization"),
    *("RotaryEmbedding", "QuickGelu", "Gelu", "FastGelu"),
)
_ATTENTION = FUSED[:3]


@dataclass
class Left:
    """One place that a fusion looked at and left as it was."""

    fusion: str
    site: str
    reason: str


@dataclass
class BlockFusion:
    """Fusion of one block; `index` is None for what lies outside of all blocks.

    Attributes:
        operators: nodes before and after.
        fused: fused operators by type.
        left: what was found and not fused, with the first thing that differs.
        is_complete: nothing was left, and tokens see each other through a fused operator if they do at all.
    """

    index: int | None
    operators: tuple[int, int] = (0, 0)
    fused: dict[str, int] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    is_complete: bool = True

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def explain_fusion(model: ir.Model, context: Context) -> list[BlockFusion]:
    """Runs the recipe `fuse` on `model`, in place, and tells what became of each block.

    Args:
        model: a graph of any exporter, fused already or not.
        context: target and config.

    Returns:
        One entry for each block in order, then one for the rest.
    """
    before = find_blocks(model)
    home = _homes(before)
    sizes = [len(block.nodes) for block in before]
    total = len(model.graph)
    done = pipelines.run(model, pipelines.parse("fuse", context.target), context)
    after = find_blocks(model)
    found = [_block(index, sizes, after) for index in range(max(len(before), len(after)))]
    inside = {id(node) for block in after for node in block.nodes}
    rest = BlockFusion(None, (total - sum(sizes), len(model.graph) - len(inside)))
    rest.fused = _fused([node for node in model.graph if id(node) not in inside])
    for pass_, report in done:
        for site, left in _left(pass_, report):
            index = home.get(site)
            (rest if index is None else found[index]).left.append(left)
    for one in found:
        sees = one.index is not None and any(block.index == one.index and block.has_attention for block in before)
        one.is_complete = not one.left and (not sees or any(name in one.fused for name in _ATTENTION))
    return [*found, rest]


def unfused_layers(model: ir.Model) -> int:
    """Layers whose attention is still in its parts: a Softmax between two products, or a cache that is appended to by
    something else than a fused operator."""
    if not any("past" in (value.name or "") for value in model.graph.inputs):
        return sum(node.op_type == "Softmax" and _is_multiplied(node.outputs[0]) for node in model.graph)
    keys = [value for value in model.graph.outputs if "present" in (value.name or "") and "key" in (value.name or "")]
    makers = [value.producer() for value in keys]
    return sum(maker is not None and maker.op_type not in _ATTENTION for maker in makers)


def _is_multiplied(value: ir.Value) -> bool:
    """Whether a product reads the value as it is, or cast or masked."""
    return any(
        reader.op_type == "MatMul"
        or (reader.op_type in ("Cast", "Where", "Dropout", "Reshape", "Mul") and _is_multiplied(reader.outputs[0]))
        for reader in value.consumers()
    )


def _block(index: int, sizes: list[int], after: list[Block]) -> BlockFusion:
    nodes = after[index].nodes if index < len(after) else []
    return BlockFusion(index, (sizes[index] if index < len(sizes) else 0, len(nodes)), _fused(nodes))


def _fused(nodes: list[ir.Node]) -> dict[str, int]:
    counts = Counter(node.op_type for node in nodes)
    return {name: counts[name] for name in FUSED if counts[name]}


def _homes(blocks: list[Block]) -> dict[str, int]:
    """Block of each node and value, by name: passes name the place they mean by either."""
    homes: dict[str, int] = {}
    for block in blocks:
        for node in block.nodes:
            for name in (node.name, *(value.name for value in node.outputs)):
                if name:
                    homes[name] = block.index
    return homes


def _left(pass_: Pass, report: Report) -> list[tuple[str, Left]]:
    """What a fusion skipped; other passes do not count."""
    name = pass_.name()
    if not name.startswith("fuse_"):
        return []
    return [(skip.site, Left(name, skip.site, skip.reason)) for skip in report.skipped]
