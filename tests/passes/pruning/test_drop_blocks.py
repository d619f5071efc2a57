"""DropBlocks: what is left equals the model without those layers; caches, config and shapes follow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnxpress.compiler import pipeline
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.probe import Probe, Step
from onnxpress.models.directory import find_graph
from onnxpress.models.tiny import tiny
from onnxpress.passes.pruning.drop_blocks import DropBlocks, block_influence

Export = Callable[[str, str], Path]


def network(num_blocks: int = 6, weak: int | None = 3) -> ir.Model:
    """Residual blocks of one gated sublayer each; that with number `weak` adds next to nothing."""
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table", scale=1.0)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    for index in range(num_blocks):
        first = len(builder.weights)
        y = builder.step("gated", builder.norm(x), x)
        if index == weak:
            down = builder.weights[-1]
            down.const_value = ir.tensor(down.const_value.numpy() * 1e-3, name=down.name)  # type: ignore[union-attr]
        assert len(builder.weights) > first
        x = builder.op("Add", x, y, width=32)
    return builder.finish(builder.norm(x), False, table)


def test_law_influence_is_one_minus_the_cosine() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 8))
    assert block_influence(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert block_influence(x, -x) == pytest.approx(2)
    y = np.zeros_like(x)
    y[..., 0], x[..., 0] = 1, 0
    assert block_influence(x, y) == pytest.approx(1)


def test_the_block_that_does_least_is_dropped() -> None:
    model = network()
    before = graphs.run(model)["logits"]
    report = DropBlocks(count=1).run(model, Context())
    assert report.changed == ["block3"]
    no_text = "there is no text, of which the model's tokenizer.json makes tokens"
    assert report.reasons() == {"protected": 3, "costs more than those dropped": 2, no_text: 1}
    assert report.metrics["kl"] < 1e-3
    assert report.metrics["blocks_after"] == 5
    assert report.bytes_after < report.bytes_before
    check.close(before, graphs.run(model)["logits"], tolerance=2e-2)
    assert [value.name for value in model.graph.outputs] == ["logits"]


def test_the_choice_leaves_nothing_behind_when_the_count_is_too_large() -> None:
    model = network()
    before = graphs.text(model)
    with pytest.raises(OptionError, match="at most 3 of 6 blocks"):
        DropBlocks(count=4).run(model, Context())
    with pytest.raises(OptionError, match="some, not all, of 6"):
        DropBlocks(indices=(1, 6)).run(model, Context())
    assert graphs.text(model) == before


@pytest.mark.parametrize("options", [{}, {"count": 1, "indices": (1,)}, {"count": 0}, {"indices": (1, 1)}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="drop_blocks: "):
        DropBlocks(**options)


def test_text_round_trips() -> None:
    for pass_ in (DropBlocks(count=2), DropBlocks(indices=(3, 1))):
        assert pipeline.parse(str(pass_)).passes == (pass_,)


@pytest.mark.parametrize("before", ["", "simplify", "fuse"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_equals_the_model_without_the_layer(
    architecture: str, before: str, tiny_export: Export, tmp_path: Path
) -> None:
    directory = tiny_export(architecture, "optimum")
    for index in (0, 1):
        model = ir.load(find_graph(directory))
        context = Context(config=json.loads((directory / "config.json").read_text()))
        if before:
            pipeline.run(model, pipeline.parse(before), context)
        total = sum(str(value.name).endswith(".key") for value in model.graph.inputs)
        report = DropBlocks(indices=(index,)).run(model, context)
        assert report.changed == [f"block{index}"]
        names = [str(value.name) for value in model.graph.inputs if "past" in str(value.name)]
        assert names == [f"past_key_values.{i}.{end}" for i in range(total - 1) for end in ("key", "value")]
        presents = [str(value.name) for value in model.graph.outputs if "present" in str(value.name)]
        assert presents == [name.replace("past_key_values", "present") for name in names]
        assert context.config["n_layer" if architecture == "gpt2" else "num_hidden_layers"] == total - 1
        ids = np.random.default_rng(index).integers(3, 250, (2, 9))
        path = tmp_path / f"{index}.onnx"
        ir.save(model, path)
        want, got = _reference(architecture, index, ids), _generate(path, ids)
        check.close(want, got, tolerance=1e-5)


def _reference(architecture: str, index: int, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Logits [B, S, V] of transformers' own model with one layer deleted."""
    import torch

    model = tiny(architecture)
    layers = "layers" if hasattr(model.base_model, "layers") else "h"
    kept = [layer for number, layer in enumerate(getattr(model.base_model, layers)) if number != index]
    setattr(model.base_model, layers, torch.nn.ModuleList(kept))
    with torch.no_grad():
        logits: npt.NDArray[Any] = model(torch.tensor(ids), use_cache=False).logits.numpy()
    return logits


def _generate(path: Path, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Logits of a prompt and of one more token with the cache, joined."""
    probe = Probe(path)
    prompt, mask = ids[:, :-1], np.ones_like(ids)
    outputs = probe.run(probe.decoder_feeds(Step(prompt, mask[:, :-1])))
    last = probe.run(probe.decoder_feeds(Step(ids[:, -1:], mask, probe.next_cache(outputs))))
    return np.concatenate([outputs["logits"], last["logits"]], axis=1)


def test_a_list_per_layer_in_the_config_loses_its_entry() -> None:
    model = network()
    types = ["a", "b", "c", "d", "e", "f"]
    context = Context(config={"num_hidden_layers": 6, "layer_types": types, "text_config": {"num_layers": 6}})
    DropBlocks(indices=(1, 4)).run(model, context)
    assert context.config["num_hidden_layers"] == 4
    assert context.config["layer_types"] == ["a", "c", "d", "f"]
    assert context.config["text_config"]["num_layers"] == 4


def test_a_config_that_counts_otherwise_is_left_alone() -> None:
    context = Context(config={"num_hidden_layers": 3})
    report = DropBlocks(indices=(1,)).run(network(), context)
    assert context.config == {"num_hidden_layers": 3}
    assert report.reasons()["says 3, but the graph has 6 blocks"] == 1
