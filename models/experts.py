"""Mixtures of experts in a form that exporters can follow.

transformers loops over the experts that some token chose, which a trace freezes and torch.export refuses. The same
block that visits all experts is equal: one that nobody chose is given no rows. Each expert stays a few linears of its
own in the graph, which passes see as linears, and computes the tokens that chose it and no others.
Imports torch when called.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)

_NEEDED = ("gate", "experts", "top_k", "num_experts")


@contextlib.contextmanager
def visiting_all(model: Any) -> Iterator[int]:
    """Within it, blocks of routed experts visit every expert; gives the number of blocks.

    A block is recognised by what it has, and replaced only if both forms agree on random tokens; any other is left to
    the exporter as it is.
    """
    changed = [block for block in model.modules() if _is_routed(block) and _agrees(block)]
    own = [vars(block).get("forward") for block in changed]
    for block in changed:
        block.forward = types.MethodType(forward, block)
    try:
        yield len(changed)
    finally:
        for block, before in zip(changed, own, strict=True):
            del block.forward
            if before is not None:
                block.forward = before


def forward(block: Any, hidden_states: Any) -> tuple[Any, Any]:
    """A block of `num_experts` experts of which a router picks `top_k` per token, with or without a shared one.

    Args:
        block: has `gate`, `experts`, `top_k`, `num_experts`; `norm_topk_prob` (without it: true), `shared_expert`.
        hidden_states: [B, S, width].

    Returns:
        The sum of the chosen experts [B, S, width], and the logits of the router [B S, num_experts].
    """
    import torch

    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = block.gate(hidden)
    weights, chosen = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float), block.top_k, dim=-1)
    if getattr(block, "norm_topk_prob", True):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    weights = weights.to(hidden.dtype)
    result = torch.zeros_like(hidden)
    for number in range(block.num_experts):
        tokens, places = torch.where(chosen == number)
        part = block.experts[number](hidden[tokens]) * weights[tokens, places, None]
        result = result.index_add(0, tokens, part)
    if hasattr(block, "shared_expert"):
        result = result + torch.sigmoid(block.shared_expert_gate(hidden)) * block.shared_expert(hidden)
    return result.reshape(hidden_states.shape), logits


def _is_routed(module: Any) -> bool:
    import torch

    return all(hasattr(module, name) for name in _NEEDED) and isinstance(module.experts, torch.nn.ModuleList)


def _agrees(block: Any) -> bool:
    """Whether `forward` gives what the block's own gives."""
    import torch

    weight = next(block.parameters())
    width = block.gate.in_features if isinstance(block.gate, torch.nn.Linear) else 0
    if not width:
        return False
    tokens = torch.randn(1, 16, width, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.no_grad():
        try:
            wanted, got = block(tokens), forward(block, tokens)
        # A block of another kind fails in its own way; it is left to the exporter.
        except Exception:
            logger.debug("%s is no block of routed experts", type(block).__name__, exc_info=True)
            return False
    if not isinstance(wanted, tuple) or len(wanted) != 2:
        return False
    return all(_is_close(one, two) for one, two in zip(wanted, got, strict=True))


def _is_close(one: Any, two: Any) -> bool:
    """Whether both are tensors of one shape and type with the same numbers."""
    import torch

    if not isinstance(one, torch.Tensor) or one.shape != two.shape or one.dtype != two.dtype:
        return False
    return bool(torch.allclose(one, two, rtol=1e-4, atol=1e-5))
