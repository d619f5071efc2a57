"""find_cache: names that make a cache, and when past and present may be one buffer."""

from __future__ import annotations

import decoders
import onnx_ir as ir
import pytest

from onnxpress.compiler.genai import find_cache


def renamed(model: ir.Model, old: str, new: str | None) -> None:
    """Lets the input or output `old` be called `new`, or not be one."""
    for values in (model.graph.inputs, model.graph.outputs):
        for value in [one for one in values if one.name == old]:
            if new is None:
                values.remove(value)
            else:
                value.name = new


def test_a_cache_is_described_as_the_graph_declares_it() -> None:
    cache = find_cache(decoders.decoder(layers=2))
    assert cache is not None
    assert (cache.num_layers, cache.num_heads, cache.head_size) == (2, decoders.KV_HEADS, decoders.HEAD_SIZE)
    assert (cache.past_key, cache.present_value) == ("past_key_values.%d.key", "present.%d.value")
    assert cache.is_shareable


NAMES: dict[str, dict[str, str | None]] = {
    "a layer is not given out": {"present.1.key": None, "present.1.value": None},
    "keys without values": {"past_key_values.1.value": None, "present.1.value": None},
    "a gap": {
        **{f"past_key_values.1.{kind}": f"past_key_values.2.{kind}" for kind in ("key", "value")},
        **{f"present.1.{kind}": f"present.2.{kind}" for kind in ("key", "value")},
    },
    "two families": {"past_key_values.1.key": "past_self.1.key"},
    "a past without a number": {"past_key_values.1.key": "past_key"},
}


@pytest.mark.parametrize("case", NAMES)
def test_names_that_make_no_cache(case: str) -> None:
    model = decoders.decoder(layers=2)
    for old, new in NAMES[case].items():
        renamed(model, old, new)
    assert find_cache(model) is None


@pytest.mark.parametrize("place", [3, 4])
@pytest.mark.parametrize("case", ["copied", "measured"])
def test_a_past_that_others_need_is_not_shared(case: str, place: int) -> None:
    """Whoever asks for the size of the past would be told that of the whole buffer."""
    model = decoders.decoder(layers=1)
    (node,) = (node for node in model.graph if node.op_type == "GroupQueryAttention")
    new = ir.node("Identity" if case == "copied" else "Shape", [node.inputs[place]], name="other")
    model.graph.insert_before(node, new)
    if case == "copied":
        node.replace_input_with(place, new.outputs[0])
    cache = find_cache(model)
    assert cache is not None
    assert not cache.is_shareable
