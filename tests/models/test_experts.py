"""Mixtures of experts: a form that exports, equal to the model's own, and linears that quantize."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from onnxpress.compiler.optimize import optimize
from onnxpress.models import tiny
from onnxpress.models.experts import forward as visited
from onnxpress.models.experts import visiting_all

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe"]
IDS = torch.arange(3, 23)[None]


@pytest.mark.parametrize("architecture", MIXTURES)
@torch.no_grad()
def test_both_forms_agree_and_the_model_is_given_back(architecture: str) -> None:
    model = tiny.tiny(architecture)
    own = [type(module).forward for module in model.modules()]
    want = model(input_ids=IDS).logits
    with visiting_all(model) as count:
        assert count == 2  # layers
        torch.testing.assert_close(model(input_ids=IDS[:, :1]).logits, want[:, :1])  # some experts get no token
        torch.testing.assert_close(model(input_ids=IDS).logits, want)
    assert not any("forward" in vars(module) for module in model.modules())
    assert own == [type(module).forward for module in model.modules()]


@pytest.mark.parametrize(
    "other",
    [
        lambda block, x: (block.experts[0](x), block.gate(x)),
        lambda block, x: (visited(block, x)[0], None),
        lambda block, x: (visited(block, x)[0], visited(block, x)[1].topk(2)[1]),
        lambda block, x: (visited(block, x)[0], visited(block, x)[1][None]),
    ],
    ids=["another sum", "no logits", "indices", "another shape"],
)
def test_a_block_that_routes_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    model = tiny.tiny("mixtral")
    block = type(model.model.layers[0].block_sparse_moe)
    monkeypatch.setattr(block, "forward", other)
    with visiting_all(model) as count:
        assert count == 0


def test_experts_through_dynamo(tiny_export: Callable[..., Path]) -> None:
    graph = ir.load(next(tiny_export("mixtral", "dynamo").rglob("model.onnx"))).graph
    products = [
        node for node in graph if node.op_type in ("MatMul", "Gemm") and "experts" in (node.inputs[1].name or "")
    ]
    assert len(products) == 2 * 4 * 3  # layers, experts, matrices of each


def test_a_model_without_experts_is_left_alone() -> None:
    with visiting_all(tiny.tiny("llama")) as count:
        assert count == 0


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_experts_in_four_bits(tmp_path: Path, architecture: str) -> None:
    checkpoint = tiny.save_tiny(architecture, tmp_path / "checkpoint")
    made = optimize(checkpoint, output=tmp_path / "made", recipe="int4")
    assert made.report["source"]["experts"] == "2 blocks, a few linears per expert"
    # Each of 4 experts in 2 layers: gate and up in one matrix or two, and down.
    assert made.report["operators"]["com.microsoft.MatMulNBits"] >= 2 * 4 * 2
    skipped = {one["reason"]: one["sites"] for row in made.report["passes"] for one in row["skipped"]}
    assert len(skipped["it picks the experts, and is small"]) == 2
    assert 0 < made.report["quality"]["kl"] < 0.1
