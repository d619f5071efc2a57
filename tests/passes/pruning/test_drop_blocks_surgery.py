"""DropBlocks: every kind of network without a part equals the same surgery in torch; caches, config, shapes follow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnxpress.compiler import pipeline
from onnxpress.compiler.genai import find_cache
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.probe import Probe, Step
from onnxpress.models.directory import find_graph
from onnxpress.models.tiny import tiny
from onnxpress.passes.pruning._parts import find_parts
from onnxpress.passes.pruning.drop_blocks import DropBlocks

Export = Callable[..., Path]

# By architecture: what is special, and the options of its tiny model.
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},  # norms before each sublayer
    "llama3": {},  # head and embedding are one matrix
    "gpt2": {},  # biases, packed projections
    "gemma2": {},  # norms before and behind each sublayer
    "gemma3": {"num_layers": 3},  # also layers of two kinds, named in the config
    "gpt_neox": {},  # attention and feed-forward side by side
    "falcon": {},  # the same with one norm
    "phi3": {},  # packed projections
    "qwen3_moe": {},  # experts
}


def _blocks(model: Any) -> Any:
    base = model.base_model
    base = next((one for one in (getattr(base, name, None) for name in ("encoder", "model")) if one is not None), base)
    return base, next(name for name in ("layers", "h", "layer") if hasattr(base, name))


def _without_block(architecture: str, index: int, **options: Any) -> Any:
    import torch

    model = tiny(architecture, **options)
    base, name = _blocks(model)
    setattr(base, name, torch.nn.ModuleList(one for i, one in enumerate(getattr(base, name)) if i != index))
    return model


def _without_sublayer(architecture: str, index: int, kind: str, **options: Any) -> Any:
    """What the sublayer adds is 0: it and its biases, before a norm behind it."""
    import torch

    model = tiny(architecture, **options)
    base, name = _blocks(model)
    layer = getattr(base, name)[index]
    names = ("self_attn", "attn", "attention", "self_attention") if kind == "attention" else ("mlp", "feed_forward")
    module = getattr(layer, next(one for one in names if hasattr(layer, one)))
    forward = module.forward

    def nothing(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        return (torch.zeros_like(result[0]), *result[1:]) if isinstance(result, tuple) else torch.zeros_like(result)

    module.forward = nothing
    return model


def _logits(model: Any, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    import torch

    with torch.no_grad():
        extra = {} if not getattr(model.config, "is_decoder", True) else {"use_cache": False}
        if model.config.model_type == "bert":
            extra = {}
        logits: npt.NDArray[Any] = model(torch.tensor(ids), **extra).logits.numpy()
    return logits


def _generated(path: Path, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Logits of a prompt and of one more token with the cache, joined."""
    probe = Probe(path)
    prompt, mask = ids[:, :-1], np.ones_like(ids)
    outputs = probe.run(probe.decoder_feeds(Step(prompt, mask[:, :-1])))
    last = probe.run(probe.decoder_feeds(Step(ids[:, -1:], mask, probe.next_cache(outputs))))
    return np.concatenate([outputs["logits"], last["logits"]], axis=1)


def _prepared(directory: Path, before: str) -> tuple[ir.Model, Context]:
    model = ir.load(find_graph(directory))
    context = Context(config=json.loads((directory / "config.json").read_text()))
    if before:
        pipeline.run(model, pipeline.parse(before), context)
    return model, context


def _layers(config: dict[str, Any]) -> int:
    return int(next(config[key] for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if key in config))


@pytest.mark.parametrize("before", ["", "fuse, pack"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_a_block_less_equals_torch(architecture: str, before: str, tiny_export: Export, tmp_path: Path) -> None:
    options = DECODERS[architecture]
    directory = tiny_export(architecture, "optimum", **options)
    for index in (0, 1):
        model, context = _prepared(directory, before)
        layers = _layers(context.config)
        DropBlocks(indices=(index,), compensate=False).run(model, context)
        assert _layers(context.config) == layers - 1
        cache = find_cache(model)
        assert cache is not None
        assert cache.num_layers == layers - 1
        ids = np.random.default_rng(index).integers(3, 250, (2, 9))
        path = tmp_path / f"{index}.onnx"
        ir.save(model, path)
        want = _logits(_without_block(architecture, index, **options), ids)
        check.close(want, _generated(path, ids), tolerance=1e-5)


@pytest.mark.parametrize("before", ["", "fuse, pack"])
@pytest.mark.parametrize("architecture", [one for one in DECODERS if one != "qwen3_moe"])
def test_a_sublayer_less_equals_torch(architecture: str, before: str, tiny_export: Export, tmp_path: Path) -> None:
    options = DECODERS[architecture]
    directory = tiny_export(architecture, "optimum", **options)
    names = [one.name for one in find_parts(_prepared(directory, before)[0], sublayers=True)]
    assert names[:4] == ["block0.attention", "block0.mlp", "block1.attention", "block1.mlp"]
    for index in (1, 2):
        model, context = _prepared(directory, before)
        layers = _layers(context.config)
        DropBlocks(indices=(index,), parts="sublayers", compensate=False).run(model, context)
        kind = "attention" if index == 2 else "mlp"
        assert _layers(context.config) == layers - (kind == "attention")
        cache = find_cache(model)
        assert cache is not None
        assert cache.num_layers == layers - (kind == "attention")
        ids = np.random.default_rng(index).integers(3, 250, (2, 9))
        path = tmp_path / f"{index}.onnx"
        ir.save(model, path)
        want = _logits(_without_sublayer(architecture, index // 2, kind, **options), ids)
        check.close(want, _generated(path, ids), tolerance=1e-5)


@pytest.mark.parametrize("before", ["", "fuse"])
@pytest.mark.parametrize("index", [0, 2])
def test_a_block_of_an_encoder_that_norms_its_sums(
    index: int, before: str, tiny_export: Export, tmp_path: Path
) -> None:
    directory = tiny_export("bert", "optimum", num_layers=3)
    model, context = _prepared(directory, before)
    DropBlocks(indices=(index,), compensate=False).run(model, context)
    assert context.config["num_hidden_layers"] == 2
    ids = np.random.default_rng(index).integers(3, 250, (2, 9))
    ir.save(model, tmp_path / "bert.onnx")
    got = Probe(tmp_path / "bert.onnx").logits(ids)
    check.close(_logits(_without_block("bert", index, num_layers=3), ids), got, tolerance=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_both_sublayers_are_the_block(architecture: str, tiny_export: Export) -> None:
    directory = tiny_export(architecture, "optimum")
    whole, _ = _prepared(directory, "fuse, pack")
    apart, _ = _prepared(directory, "fuse, pack")
    DropBlocks(indices=(1,), compensate=False).run(whole, Context())
    DropBlocks(indices=(2, 3), parts="sublayers", compensate=False).run(apart, Context())
    operators = [[(node.op_type, len(node.inputs)) for node in one.graph] for one in (whole, apart)]
    assert operators[0] == operators[1]
    assert [value.name for value in whole.graph.inputs] == [value.name for value in apart.graph.inputs]
