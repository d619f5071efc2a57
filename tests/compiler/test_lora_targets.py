"""Which matrix a module is: by name, by block and role, packed and taken apart."""

from __future__ import annotations

import numpy as np
import pytest

from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.compiler.lora_targets import TAILS, Target, locate, modules, place


def target(name: str, rows: int = 8, columns: int = 8, *paths: str) -> Target:
    block, _, kind = name.rpartition(".")
    number = int(block.removeprefix("block")) if block else None
    return Target(name, kind, number, (rows, columns), paths)


@pytest.mark.parametrize(
    "module, found",
    [
        ("model.layers.3.self_attn.q_proj", (3, "q")),
        ("transformer.h.0.attn.c_attn", (0, "qkv")),
        ("transformer.h.0.attn.c_proj", (0, "o")),
        ("transformer.h.0.mlp.c_proj", (0, "down")),
        ("bert.encoder.layer.1.attention.output.dense", (1, "o")),
        ("bert.encoder.layer.1.output.dense", (1, "down")),
        ("gpt_neox.layers.2.attention.dense", (2, "o")),
        ("model.decoder.layers.2.fc1", (2, "up")),
        ("lm_head", (None, "head")),
        ("model.embed_tokens", (None, "embedding")),
        ("model.layers.0.block_sparse_moe.experts.1.up_proj", (None, None)),
        ("model.layers.0.mlp.strange", (0, None)),
        ("strange", (None, None)),
    ],
)
def test_locate(module: str, found: tuple[int | None, str | None]) -> None:
    assert locate(module) == found


def test_law_the_first_tail_that_fits_is_the_longest() -> None:
    for tail in TAILS:
        assert locate(f"model.layers.0.{tail}") == (0, TAILS[tail])


def test_a_name_in_the_graph_comes_before_a_role() -> None:
    right = target("block0.k", 8, 8, "/model/layers.0/self_attn/q_proj/MatMul")
    (found,) = place("model.layers.0.self_attn.q_proj", (8, 8), [target("block0.q"), right], {})
    assert found.target is right
    assert found.rows is None


def test_a_name_of_another_shape_is_none() -> None:
    # Taken apart, the queries keep the name of the packed node.
    parts = [target("block0.q", 8, 8, "/h.0/attn/c_attn/MatMul"), target("block0.k"), target("block0.v")]
    assert [one.target.name for one in place("h.0.attn.c_attn", (24, 8), parts, {})] == [
        "block0.q",
        "block0.k",
        "block0.v",
    ]


def test_a_name_is_a_whole_one() -> None:
    other = target(
        "block0.v", 8, 8, "/model/layers.0/self_attn/q_proj_norm/MatMul", "x.model.layers.0.self_attn.q_projx"
    )
    (found,) = place("model.layers.0.self_attn.q_proj", (8, 8), [other, target("block0.q")], {})
    assert found.target.name == "block0.q"


CONFIG = {"num_attention_heads": 4}
QKV = [target("block0.q", 8), target("block0.k", 4), target("block0.v", 4)]


@pytest.mark.parametrize(
    "family, parts, rows",
    [
        ("phi3", QKV, [range(8), range(8, 12), range(12, 16)]),
        # Two key-value heads of width 2: queries 0 and 1, key, value; queries 2 and 3, key, value.
        ("falcon", QKV, [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]),
        (
            "gpt_neox",
            [target(f"block0.{kind}", 4) for kind in "qkv"],
            [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]],
        ),
    ],
)
def test_a_packed_module_is_spread(family: str, parts: list[Target], rows: list[list[int]]) -> None:
    module = "gpt_neox.layers.0.attention.query_key_value"
    total = sum(one.shape[0] for one in parts)
    found = place(module, (total, 8), parts, {"model_type": family, **CONFIG})
    assert [one.target.name for one in found] == ["block0.q", "block0.k", "block0.v"]
    for one, wanted in zip(found, rows, strict=True):
        assert one.rows is not None
        assert np.array_equal(one.rows, list(wanted))


def test_a_whole_packed_matrix_stays_whole() -> None:
    (found,) = place("h.0.attn.c_attn", (24, 8), [target("block0.qkv", 24)], {})
    assert found.rows is None


@pytest.mark.parametrize(
    "module, shape, targets, text",
    [
        (
            "h.0.q_proj",
            (8, 4),
            [target("block0.q")],
            r"an update of block0.q \[8, 8\] \[out, in\], found one of \[8, 4\]",
        ),
        ("h.1.q_proj", (8, 8), [target("block0.q")], r"found none \(block1.q\)"),
        ("h.0.strange", (8, 8), [target("block0.q")], "found none"),
        ("h.0.q_proj", (8, 8), [], "found none"),
        ("lm_head", (8, 8), [target("head"), target("head")], "expected one matrix of the graph, found head, head"),
        ("h.0.c_attn.qkv_proj", (20, 8), QKV, "block0.k"),
    ],
)
def test_what_does_not_fit_is_told(module: str, shape: tuple[int, int], targets: list[Target], text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=text):
        place(module, shape, targets, {})


def test_grouped_rows_need_the_number_of_heads() -> None:
    with pytest.raises(UnsupportedModelError, match=r"num_attention_heads in .* that divides 8, found 3"):
        place("h.0.query_key_value", (16, 8), QKV, {"model_type": "bloom", "num_attention_heads": 3})


def test_tables_and_linears_are_kept_apart() -> None:
    table, head = target("embedding", 8, 20), target("head", 20, 8)
    assert place("model.embed_tokens", (8, 20), [table, head], {}, is_table=True)[0].target is table
    with pytest.raises(UnsupportedModelError, match="found none"):
        place("model.embed_tokens", (8, 20), [head], {}, is_table=True)


def test_a_tied_head_that_is_called_after_the_table_is_no_table() -> None:
    table, head = target("embedding", 8, 8), target("head", 8, 8, "model.embed_tokens.weight")
    assert place("model.embed_tokens", (8, 8), [table, head], {}, is_table=True)[0].target is table


def test_modules_are_called_as_in_the_checkpoint() -> None:
    found = modules([*QKV, target("block0.o"), target("head"), target("block0.router")], {"model_type": "gpt2"})
    assert {name: [one.name for one in group] for name, group in found.items()} == {
        "transformer.h.0.attn.c_attn": ["block0.q", "block0.k", "block0.v"],
        "transformer.h.0.attn.c_proj": ["block0.o"],
        "lm_head": ["head"],
        "block0.router": ["block0.router"],
    }
    assert list(modules(QKV, {})) == [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"]
