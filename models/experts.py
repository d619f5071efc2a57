"""Mixtures of experts in a form that exporters can follow.

transformers loops over the experts that some token chose, which a trace freezes and torch.export refuses. The same
block that visits all experts is equal: one that nobody chose is given no rows. Each expert stays a few linears of its
own in the graph, which passes see as linears, and computes the tokens that chose it and no others.

transformers 4 keeps experts as a list of modules below their router, transformers 5 as two tensors of all experts
[experts, out, in], whose router is a module of its own; there only the experts change. Imports torch when called.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)

_NEEDED = ("gate", "experts", "top_k", "num_experts")
_PACKED = ("gate_up_proj", "down_proj", "act_fn", "num_experts")


@contextlib.contextmanager
def visiting_all(model: Any) -> Iterator[int]:
    """Within it, blocks of routed experts visit every expert; gives the number of blocks.

    A block is recognised by what it has, and replaced only if both forms agree on random tokens; any other is left to
    the exporter as it is.
    """
    changed = [block for block in model.modules() if _is_routed(block) and _agrees(block)]
    own = [vars(block).get("forward") for block in changed]
    packed = [
        (parent, name, experts, apart)
        for parent in model.modules()
        for name, experts in parent.named_children()
        if _is_packed(experts) and (apart := _taken_apart(experts)) is not None
    ]
    for block in changed:
        block.forward = types.MethodType(forward, block)
    for parent, name, _, apart in packed:
        setattr(parent, name, apart)
    try:
        yield len(changed) + len(packed)
    finally:
        for block, before in zip(changed, own, strict=True):
            del block.forward
            if before is not None:
                block.forward = before
        for parent, name, experts, _ in packed:
            setattr(parent, name, experts)


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
    result = _visit(block.experts, hidden, chosen, weights.to(hidden.dtype))
    if hasattr(block, "shared_expert"):
        result = result + torch.sigmoid(block.shared_expert_gate(hidden)) * block.shared_expert(hidden)
    return result.reshape(hidden_states.shape), logits


def _visit(experts: Any, hidden: Any, chosen: Any, weights: Any) -> Any:
    """The sum over `experts` of what each makes of the rows of `hidden` [rows, width] that chose it.

    `chosen` and `weights` are [rows, top k]: numbers of experts, and how much each counts.
    """
    import torch

    result = torch.zeros_like(hidden)
    for number, expert in enumerate(experts):
        tokens, places = torch.where(chosen == number)
        part = expert(hidden[tokens]) * weights[tokens, places, None]
        result = result.index_add(0, tokens, part)
    return result


def _is_packed(module: Any) -> bool:
    import torch

    if not all(hasattr(module, name) for name in _PACKED):
        return False
    weights = (module.gate_up_proj, module.down_proj)
    return all(isinstance(weight, torch.nn.Parameter) and weight.ndim == 3 for weight in weights)


def _taken_apart(packed: Any) -> Any:
    """The same experts as linears that share the memory of `packed`; None if they compute something else."""
    import torch

    def linear(weight: Any) -> Any:
        made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = torch.nn.Parameter(weight, requires_grad=False)
        return made

    class Expert(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, number: int) -> None:
            super().__init__()
            gate, up = packed.gate_up_proj.detach()[number].chunk(2)
            self.gate_proj, self.up_proj = linear(gate), linear(up)
            self.down_proj = linear(packed.down_proj.detach()[number])
            self.act_fn = packed.act_fn

        def forward(self, hidden: Any) -> Any:
            return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))

    class Experts(torch.nn.ModuleList):  # type: ignore[misc]
        def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            return _visit(self, hidden_states, top_k_index, top_k_weights.to(hidden_states.dtype))

    count = int(packed.num_experts)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, packed.gate_up_proj.shape[-1], generator=generator).to(packed.gate_up_proj.dtype)
    chosen = torch.rand(16, count, generator=generator).topk(min(2, count))[1]
    weights = torch.rand(chosen.shape, generator=generator).to(rows.dtype)
    try:
        apart = Experts(Expert(number) for number in range(count)).eval()
        with torch.no_grad():
            # Large rows too: experts that clamp what they compute do so far from 0.
            agrees = all(
                _is_close(packed(size * rows, chosen, weights), apart(size * rows, chosen, weights))
                for size in (1.0, 30.0, 1000.0)
            )
    # Experts of another kind (biases, turned matrices) fail in their own way; they are left to the exporter.
    except Exception:
        logger.debug("%s are no plain gated experts", type(packed).__name__, exc_info=True)
        return None
    return apart if agrees else None


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
    return bool(torch.allclose(one, two, rtol=1e-4, atol=1e-5 * max(1.0, float(one.abs().max()))))
