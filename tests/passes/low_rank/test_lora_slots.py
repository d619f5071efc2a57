"""lora_slots: empty slots change nothing, filled ones add x A B, and views see the graph as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from decoders import HEAD_SIZE, KV_HEADS, decoder

from onnxpress.compiler import pipeline
from onnxpress.compiler.errors import OptionError, UnsupportedModelError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.lora_graph import find_slots
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.low_rank.lora_slots import LoraSlots

IDS = np.random.default_rng(0).integers(3, 200, (2, 5))
ALL = ("head", "embedding")


def feeds() -> dict[str, np.ndarray]:
    given = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    for layer in range(2):
        for kind in ("key", "value"):
            given[f"past_key_values.{layer}.{kind}"] = np.zeros((2, KV_HEADS, 0, HEAD_SIZE), np.float32)
    return given


def logits(model: ir.Model, **filled: np.ndarray) -> np.ndarray:
    running = graphs.session(model)
    given = {**feeds(), **{name.replace("__", "."): array for name, array in filled.items()}}
    (found,) = running.run(["logits"], given)
    return np.asarray(found)


def add(model: ir.Model, **options: Any) -> Report:
    return LoraSlots(**options).run(model, Context())


def filled(model: ir.Model, rank: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    found = {}
    for name, slot in find_slots(model).items():
        found[f"{name}.lora_A"] = (0.2 * rng.standard_normal((slot.num_in, rank))).astype(np.float32)
        found[f"{name}.lora_B"] = (0.2 * rng.standard_normal((rank, slot.num_out))).astype(np.float32)
    return found


@pytest.mark.parametrize("passes", ["", "pack_qkv", "rtn(bits=8, block_size=16), pack_qkv", "svd(rank=4)"])
def test_law_empty_slots_change_no_bit(passes: str) -> None:
    model = decoder()
    if passes:
        pipeline.run(model, pipeline.parse(passes), Context())
    before = logits(model)
    names = [(one.name, one.kind, one.shape) for one in find_linears(model)]
    report = add(model, also=ALL)
    assert len(report.changed) == 2 * 6 + 2
    assert np.array_equal(logits(model), before)
    assert [(one.name, one.kind, one.shape) for one in find_linears(model)] == names
    again = add(model, also=ALL)
    assert not again.modified
    assert set(again.reasons()) == {"has a slot already"}


@pytest.mark.parametrize("passes", ["", "pack_qkv"])
def test_law_a_filled_slot_is_a_changed_weight(passes: str) -> None:
    model, changed = decoder(), decoder()
    if passes:
        pipeline.run(model, pipeline.parse(passes), Context())
    add(model, also=ALL)
    given = filled(model)
    for linear in find_linears(changed):
        a, b = given[f"{linear.name}.lora_A"], given[f"{linear.name}.lora_B"]
        w = linear.w_NK() + (a @ b).T
        linear.set_weight(lambda w=w: w, f"{linear.name}.changed")  # type: ignore[misc]
    table = changed.graph.initializers["embed"]
    assert table.const_value is not None
    delta = given["embedding.lora_A"] @ given["embedding.lora_B"]
    table.const_value = ir.tensor(table.const_value.numpy() + delta, name="embed")
    found = logits(model, **given)
    wanted = logits(changed)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(found - logits(model)).max() > 0.1 * np.abs(wanted).max()


def test_ranks_may_differ_from_slot_to_slot() -> None:
    model = decoder()
    add(model, kinds=("q", "v"))
    one, two = filled(model, 1), filled(model, 7)
    mixed = {**one, **{name: array for name, array in two.items() if ".v." in name}}
    assert np.isfinite(logits(model, **mixed)).all()


def test_a_packed_matrix_has_a_slot_for_each_part() -> None:
    model = decoder()
    pipeline.run(model, pipeline.parse("pack_qkv"), Context())
    report = add(model, kinds=("q",))
    assert report.changed == [f"block{block}.{kind}" for block in range(2) for kind in "qkv"]


def test_kinds_also_and_exclude() -> None:
    model = decoder()
    report = add(model, kinds=("q", "up"), also=("head",), exclude=("block1.*",))
    assert report.changed == ["block0.q", "block0.up", "head"]
    assert set(report.reasons()) == {"excluded", "not among the kinds asked for"}
    assert sorted(find_slots(model)) == ["block0.q", "block0.up", "head"]


def test_the_head_keeps_the_name_of_the_output() -> None:
    model = decoder()
    add(model, kinds=("head",))
    assert model.graph.outputs[0].name == "logits"


def test_slots_survive_simplification_and_later_passes() -> None:
    model = decoder()
    add(model)
    slots = find_slots(model)
    pipeline.run(model, pipeline.parse("simplify, rtn(bits=8, block_size=16)"), Context())
    assert find_slots(model) == slots
    assert any(one.holder == "MatMulNBits" for one in find_linears(model))


def test_float16_slots_are_float16() -> None:
    model = decoder()
    pipeline.run(model, pipeline.parse("cast_float16(tokens=0)"), Context())
    add(model)
    assert {np.dtype(slot.dtype).name for slot in find_slots(model).values()} == {"float16"}


def test_slots_are_found_again_in_a_file(tmp_path: Path) -> None:
    model = decoder()
    add(model)
    ir.save(model, tmp_path / "model.onnx")
    assert find_slots(ir.load(tmp_path / "model.onnx")) == find_slots(model)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"kinds": ("gate",)}, "no linear of kind 'gate'"),
        ({"also": ("router",)}, "no linear of kind 'router'"),
        ({"exclude": ("block9.*",)}, "exclude='block9.*' matches no linear"),
        ({"kinds": ("quer",)}, "kinds must be among"),
    ],
)
def test_options_without_effect_are_told(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text) as caught:
        add(decoder(), **options)
    assert caught.value.hint or "must be" in caught.value.message


def test_numbers_that_were_moved_about_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="awq has changed"):
        LoraSlots().run(decoder(), Context(history=["awq(bits=4)"]))
