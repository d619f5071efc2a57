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
from onnxpress.models.export import choose

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
    if not hasattr(model.model.layers[0], "block_sparse_moe"):
        pytest.skip("this transformers keeps experts in one tensor")
    block = type(model.model.layers[0].block_sparse_moe)
    monkeypatch.setattr(block, "forward", other)
    with visiting_all(model) as count:
        assert count == 0


class Packed(torch.nn.Module):
    """Experts as transformers 5 keeps them: [experts, 2 * inner, width] and [experts, width, inner]."""

    WIDTH = 24

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.act_fn = 4, torch.nn.SiLU()
        self.gate_up_proj = torch.nn.Parameter(0.2 * torch.randn(4, 2 * 8, self.WIDTH))
        self.down_proj = torch.nn.Parameter(0.2 * torch.randn(4, self.WIDTH, 8))

    def gated(self, gate: Any, up: Any) -> Any:
        return self.act_fn(gate) * up

    def forward(self, rows: Any, chosen: Any, weights: Any) -> Any:
        result = torch.zeros_like(rows)
        for row in range(len(rows)):
            for number, weight in zip(chosen[row].tolist(), weights[row], strict=True):
                inner = self.gated(*(self.gate_up_proj[number] @ rows[row]).chunk(2))
                result[row] += weight * (self.down_proj[number] @ inner)
        return result


def test_packed_experts_are_taken_apart_without_a_copy() -> None:
    model = torch.nn.ModuleDict({"experts": Packed()})
    packed = model["experts"]
    rows, chosen, weights = torch.randn(5, Packed.WIDTH), torch.tensor([[0, 2]] * 5), torch.rand(5, 2)
    with visiting_all(model) as count, torch.no_grad():
        assert count == 1
        assert len(list(model["experts"])) == 4
        torch.testing.assert_close(model["experts"](rows, chosen, weights), packed(rows, chosen, weights))
        places = {one.untyped_storage().data_ptr() for one in model["experts"].parameters()}
        assert places == {one.untyped_storage().data_ptr() for one in packed.parameters()}
    assert model["experts"] is packed


class SwappedHalves(Packed):
    def gated(self, gate: Any, up: Any) -> Any:
        return self.act_fn(up) * gate


class Limited(Packed):
    def gated(self, gate: Any, up: Any) -> Any:
        return self.act_fn(gate) * up.clamp(-0.5, 0.5)


class Turned(Packed):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(0.2 * torch.randn(4, self.WIDTH, 2 * 8))


@pytest.mark.parametrize("kind", [SwappedHalves, Limited, Turned])
def test_packed_experts_of_another_kind_are_left_alone(kind: type[Packed]) -> None:
    model = torch.nn.ModuleDict({"experts": kind()})
    packed = model["experts"]
    with visiting_all(model) as count:
        assert count == 0
        assert model["experts"] is packed


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
    made = optimize(checkpoint, output=tmp_path / "made", recipe="int4-rtn")
    assert made.report["source"]["experts"] == "2 blocks, a few linears per expert"
    assert made.report["source"]["exporter"] == choose(None)[0]
    # Each of 4 experts in 2 layers: gate and up in one matrix or two, and down.
    assert made.report["operators"]["com.microsoft.MatMulNBits"] >= 2 * 4 * 2
    skipped = {one["reason"]: one["sites"] for row in made.report["passes"] for one in row["skipped"]}
    assert len(skipped["it picks the experts, and is small"]) == 2
    assert 0 < made.report["quality"]["kl"] < 0.1
