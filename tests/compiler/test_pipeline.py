"""Pipeline text: parses, prints, and names what is wrong."""

from __future__ import annotations

import pytest

from onnxpress.compiler import pipeline, registry
from onnxpress.compiler.errors import OptionError, UnknownPassError
from onnxpress.compiler.target import TARGETS, target


def test_text_round_trip() -> None:
    text = "simplify, fuse_rotary(max_positions=128), fuse_attention(padding='right')"
    assert str(pipeline.parse(text)) == text


def test_defaults_are_not_printed() -> None:
    assert str(pipeline.parse("fuse_attention(padding='any')")) == "fuse_attention"


def test_a_recipe_in_a_text_is_replaced_by_its_passes() -> None:
    parsed = pipeline.parse("fuse, rtn(bits=8)")
    assert [one.name() for one in parsed][:2] == ["simplify", "fuse_rmsnorm"]
    assert str(parsed.passes[-1]) == "rtn(bits=8)"


@pytest.mark.parametrize("name", pipeline.recipe_names())
@pytest.mark.parametrize("provider", TARGETS)
def test_every_recipe_round_trips(name: str, provider: str) -> None:
    recipe = pipeline.recipe(name, target(provider))
    assert pipeline.parse(str(recipe), target(provider)) == recipe
    assert pipeline.recipe_summary(name)


def test_a_recipe_name_with_a_dash_is_understood() -> None:
    assert pipeline.parse("int4-small") == pipeline.recipe("int4-small")


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("fuse, rnt(bits=4)", UnknownPassError, ["'rnt'", "did you mean 'rtn'"]),
        ("rtn(bit=4)", OptionError, ["'bit'", "did you mean 'bits'"]),
        ("rtn(bits='4')", OptionError, ["bits must be int", "'4'"]),
        ("rtn(4)", OptionError, ["by name"]),
        ("rtn(bits=", OptionError, ["cannot read"]),
        ("rtn(bits=int)", OptionError, ["plain numbers"]),
        ("int4(bits=3)", OptionError, ["a recipe has no options"]),
        ("'rtn'", OptionError, ["expected a name"]),
        ("fuse_attention(padding='left')", OptionError, ["padding must be"]),
    ],
)
def test_errors_name_the_place_and_the_way_out(text: str, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        pipeline.parse(text)
    for word in words:
        assert word in str(caught.value)


def test_listing_the_registry_imports_no_pass() -> None:
    assert "fuse_attention" in registry.families()["fusion"]
    assert registry.family("rtn") == "quantization"
