"""Differentiable: what ONNX Runtime computes, with the gradients of finite differences and of transformers' model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import numpy as np
import onnx_ir as ir
import pytest
import torch
from decoders import decoder

from onnxpress import models
from onnxpress.compiler import differentiable, pipeline
from onnxpress.compiler import differentiable_ops as ops
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.differentiable import Differentiable
from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.models.tiny import tiny

LENGTH = 40  # longer than the windows of attention
IDS = np.random.default_rng(0).integers(3, 200, (1, LENGTH))
FORMS = {
    "as exported": "",
    "packed": "fuse, pack",
    "int4": "fuse, pack, rtn(bits=4, block_size=32)",
    "int4 with zero points": "fuse, pack, rtn(bits=4, block_size=32, symmetric=False)",
    "int8": "int8",
    "nf4": "fuse, nf4",
}
CASES = [
    *((name, "as exported") for name in ("bloom", "falcon", "gemma2", "gemma3", "gpt2", "gpt_neox", "llama", "opt")),
    *((name, "packed") for name in ("gemma2", "gemma3", "gpt2", "gpt_neox", "mistral", "opt", "phi3")),
    *((name, "packed") for name in ("olmo2", "qwen2", "qwen3", "smollm3", "stablelm")),
    *((name, "int4") for name in ("gemma2", "gpt2", "llama3", "opt")),
    ("llama", "int4 with zero points"),
    ("llama3", "int8"),
    ("qwen2", "nf4"),
]


def load(architecture: str, form: str, tiny_export: Callable[..., Path], tmp_path: Path) -> ir.Model:
    source = models.load(tiny_export(architecture), work_dir=tmp_path)
    if FORMS[form]:
        pipeline.run(source.model, pipeline.parse(FORMS[form]), Context(config=source.config))
    return source.model


def built(model: ir.Model, tmp_path: Path, trained: Any = (), **options: Any) -> Differentiable:
    return Differentiable(model, feeds(model.graph, IDS)[0], trained, tmp_path, **options)


@pytest.mark.parametrize(("architecture", "form"), CASES)
def test_logits_are_those_of_onnx_runtime(
    architecture: str, form: str, tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    # It is refused beyond 1e-4; float32 sums of another order leave far less.
    assert built(load(architecture, form, tiny_export, tmp_path), tmp_path).difference < 1e-5


def test_another_window_is_another_window(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    """Nothing of the first window is taken for a constant."""
    import graphs

    model = load("gemma2", "as exported", tiny_export, tmp_path)
    graph, other = built(model, tmp_path), IDS[:, ::-1].copy()
    with torch.no_grad():
        found = graph.logits(graph.hidden(torch.from_numpy(other), {}), {}).numpy()
    check.close(graphs.logits(model, other), found)


def test_float16_is_computed_in_float32(tmp_path: Path) -> None:
    model = decoder()
    pipeline.run(model, pipeline.parse("cast_float16"), Context())
    assert built(model, tmp_path).difference < 2e-2


def _loss(graph: Differentiable, given: Any) -> Any:
    logits = graph.logits(graph.hidden(torch.from_numpy(IDS), given), given)
    return torch.log_softmax(logits, -1)[0, :-1].gather(1, torch.from_numpy(IDS[0, 1:, None])).mean()


@pytest.mark.parametrize(("architecture", "form"), [("gemma2", "packed"), ("llama", "as exported")])
def test_gradients_are_those_of_transformers(
    architecture: str, form: str, tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(architecture, form, tiny_export, tmp_path)
    theirs = tiny(architecture)
    shift = 1.0 if architecture == "gemma2" else 0.0
    wanted = theirs.model.layers[0].input_layernorm.weight
    (value,) = (
        one
        for one in model.graph.initializers.values()
        if one.const_value is not None
        and one.const_value.shape.numpy() == tuple(wanted.shape)
        and min(np.abs(one.const_value.numpy() - wanted.detach().numpy() - move).max() for move in (0.0, shift)) < 1e-6
    )
    assert value.const_value is not None
    weight = torch.from_numpy(np.array(value.const_value.numpy())).requires_grad_()
    _loss(built(model, tmp_path, [value]), {id(value): weight}).backward()
    logits = theirs(torch.from_numpy(IDS)).logits
    loss = torch.log_softmax(logits, -1)[0, :-1].gather(1, torch.from_numpy(IDS[0, 1:, None])).mean()
    loss.backward()
    assert weight.grad is not None
    check.close(wanted.grad.numpy(), weight.grad.numpy(), tolerance=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_scales_are_finite_differences(symmetric: bool, tmp_path: Path) -> None:
    model = decoder(layers=1)
    pipeline.run(model, pipeline.parse(f"rtn(bits=4, block_size=16, symmetric={symmetric})"), Context())
    (linear,) = (one for one in find_linears(model) if one.kind == "down")
    value = linear.node.inputs[2]
    assert value is not None
    assert value.const_value is not None
    graph = built(model, tmp_path, [value])
    scales = torch.from_numpy(np.array(value.const_value.numpy())).requires_grad_()
    _loss(graph, {id(value): scales}).backward()
    assert scales.grad is not None
    direction = scales.grad / scales.grad.norm()
    step = 2e-3
    with torch.no_grad():
        ends = [float(_loss(graph, {id(value): scales + sign * step * direction})) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(scales.grad.norm()), rel=2e-2)


def test_computing_twice_gives_the_same_bits(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    model = load("llama", "packed", tiny_export, tmp_path)
    value = next(one for one in model.graph.initializers.values() if one.const_value.shape.numpy() == (64,))  # type: ignore[union-attr]
    found = []
    for recompute in (False, True):
        weight = torch.from_numpy(np.array(value.const_value.numpy())).requires_grad_()  # type: ignore[union-attr]
        graph = built(model, tmp_path, [value], recompute=recompute)
        assert len(graph._parts) > 1
        _loss(graph, {id(value): weight}).backward()
        found.append(weight.grad)
    assert found[0] is not None
    assert torch.equal(found[0], found[1])


def test_weights_are_views(tmp_path: Path) -> None:
    model = decoder()
    graph = built(model, tmp_path)
    value = model.graph.initializers["l0.up.weight"]
    assert value.const_value is not None
    assert np.shares_memory(graph._constants[id(value)].numpy(), value.const_value.numpy())


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("static_int8", "DequantizeLinear|QuantizeLinear|rounds its activations"),
        ("dynamic_int8", "DynamicQuantizeMatMul .*: it rounds its activations"),
        ("quantize_kv", "GroupQueryAttention 'l.*: there are no gradients"),
    ],
)
def test_what_has_no_gradient_is_refused_by_name(passes: str, message: str, tmp_path: Path) -> None:
    model = decoder()
    pipeline.run(model, pipeline.parse(passes), Context())
    with pytest.raises(UnsupportedModelError, match=message):
        built(model, tmp_path)


def test_an_unknown_operator_and_an_unknown_attribute_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"NonZero 'chosen': there are no gradients for this operator"):
        ops.find(ir.node("NonZero", [ir.val("x")], name="chosen"))
    node = ir.node("Softmax", [ir.val("x")], attributes={"strange": 2}, name="odd")
    with pytest.raises(UnsupportedModelError, match=r"Softmax 'odd': .* with strange=2"):
        ops.find(node)


def test_logits_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.OPERATORS, ("", "Tanh"), lambda node, operands: torch.sigmoid(operands[0]))
    with pytest.raises(UnsupportedModelError, match=r"differ from those of ONNX Runtime by .* at most 1e-04"):
        built(decoder(), tmp_path)


def test_chunks_of_tokens_make_the_same_logits(tmp_path: Path) -> None:
    graph = built(decoder(), tmp_path)
    assert graph.is_chunked
    with torch.no_grad():
        hidden = graph.hidden(torch.from_numpy(IDS), {})
        whole = graph.logits(hidden, {})
        parts = [graph.logits(hidden[:, start : start + 7], {}) for start in range(0, LENGTH, 7)]
    check.close(whole.numpy(), torch.cat(parts, 1).numpy())


def test_the_tail_ends_at_the_head() -> None:
    model = decoder()
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    assert [node.op_type for node in differentiable._tail(logits, set())] == ["MatMul"]
