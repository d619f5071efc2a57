"""PruneHeads: what is left is the model with those heads silenced; caches, counts, config, codes, refusals."""

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
from decoders import HEAD_SIZE, HEADS, HIDDEN, KV_HEADS, decoder, write_decoder

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration_arrays import CalibrationArrays
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.genai import find_cache
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.probe import Probe, Step
from onnxpress.models.tiny import tiny
from onnxpress.passes.pruning._heads import Heads

Array = npt.NDArray[Any]
TEXT = "tokens=128, length=32, probe=16"
HALF = f"prune_heads(ratio=0.25, {TEXT})"


def run(model: ir.Model, passes: str, **context: Any) -> Report:
    made = Context(calibration=CalibrationText(vocab_size=200, seed=1), **context)
    return pipeline.run(model, pipeline.parse(passes), made)[-1][1]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, Array]:
    """Columns of each reader that the pass leaves, by its name."""
    found: dict[str, Array] = {}
    cut = Heads.cut

    def watched(self: Heads, kept: Array, results: dict[int, Array]) -> None:
        unit = self.reader.num_in // self.total
        found[self.reader.name] = (kept[:, None] * unit + np.arange(unit)).reshape(-1)
        cut(self, kept, results)

    monkeypatch.setattr(Heads, "cut", watched)
    return found


def spread(model: ir.Model, kept: dict[str, Array]) -> dict[str, Array]:
    """The matrices behind attention with zeros in the columns that are gone."""
    found = {}
    for one in find_linears(model):
        if one.name in kept:
            w_NK = one.w_NK()
            assert w_NK.shape[1] == len(kept[one.name])
            found[one.name] = np.zeros((len(w_NK), kept[one.name].max() + 1), np.float32)
            found[one.name][:, kept[one.name]] = w_NK
    return found


# Where transformers keeps the projection behind attention, and the layers.
READERS = {
    "llama": ("layers", "self_attn.o_proj"),
    "gemma2": ("layers", "self_attn.o_proj"),
    "phi3": ("layers", "self_attn.o_proj"),
    "gpt_neox": ("layers", "attention.dense"),
    "gpt2": ("h", "attn.c_proj"),
    "bert": ("encoder.layer", "attention.output.dense"),
    "vit": ("encoder.layer", "attention.output.dense"),
}
ENCODERS = ("bert", "vit")
IMAGES = np.random.default_rng(2).standard_normal((24, 3, 32, 32)).astype(np.float32)


def silenced(architecture: str, matrices: dict[str, Array], ids: Array) -> Array:
    """Logits of transformers' model that hears nothing of the heads that are gone."""
    import torch

    model = tiny(architecture)
    path, reader = READERS[architecture]
    with torch.no_grad():
        for name, w_NK in matrices.items():
            layer = model.base_model.get_submodule(path)[int(name.removeprefix("block").partition(".")[0])]
            weight = layer.get_submodule(reader).weight
            if (
                architecture in ENCODERS
            ):  # `fold_attention_bias` came before: the values' bias no longer meets the weight
                inner = layer.attention
                bias = (inner.self if architecture == "bert" else inner.attention).value.bias
                layer.attention.output.dense.bias += weight @ bias
                bias.zero_()
            is_turned = type(layer.get_submodule(reader)).__name__ == "Conv1D"
            whole = torch.zeros_like(weight)
            columns = w_NK.shape[1]
            (whole.T if is_turned else whole)[:, :columns] = torch.from_numpy(w_NK)
            weight.copy_(whole)
        more = {} if architecture in ENCODERS else {"use_cache": False}
        found: Array = model(torch.from_numpy(ids), **more).logits.numpy()
    return found


def generate(path: Path, ids: Array) -> Array:
    """Logits of a prompt and of one more token with the cache, joined."""
    probe = Probe(path)
    prompt, mask = ids[:, :-1], np.ones_like(ids)
    outputs = probe.run(probe.decoder_feeds(Step(prompt, mask[:, :-1])))
    last = probe.run(probe.decoder_feeds(Step(ids[:, -1:], mask, probe.next_cache(outputs))))
    return np.concatenate([outputs["logits"], last["logits"]], axis=1)


@pytest.mark.parametrize(
    ("architecture", "before"),
    [*((name, "fuse, pack") for name in READERS), ("llama", "fuse"), ("bert", "fuse"), ("phi3", "fuse")],
)
def test_equals_the_same_surgery_in_torch(
    architecture: str, before: str, tiny_export: Callable[..., Path], kept: dict[str, Array], tmp_path: Path
) -> None:
    source = models.load(tiny_export(architecture), work_dir=tmp_path)
    model = source.model
    run(model, before, config=source.config)
    # Images take the place of text where the model reads them.
    arrays = CalibrationArrays({"pixel_values": IMAGES} if architecture == "vit" else {}, "images")
    report = run(model, HALF, config=source.config, arrays=arrays)
    assert len(kept) == 2, report.skipped
    ids = IMAGES[:2] if architecture == "vit" else np.random.default_rng(0).integers(3, 200, (2, 9))
    want = silenced(architecture, spread(model, kept), ids)
    if architecture == "vit":
        got = graphs.run(model, {"pixel_values": ids})["logits"]
    elif architecture == "bert":
        got = graphs.logits(model, ids)
    else:
        ir.save(model, tmp_path / "pruned.onnx", external_data="pruned.data")
        got = generate(tmp_path / "pruned.onnx", ids)
    check.close(want, got, tolerance=1e-5)
    heads = {key: value for key, value in source.config.items() if key in ("n_head", "num_attention_heads")}
    grouped = architecture in ("llama", "gemma2", "phi3")
    divides = grouped and source.config["hidden_size"] == 16 * heads["num_attention_heads"]
    assert divides or set(heads.values()) == {2 if grouped else 3}
    assert source.config["head_dim"] == 16
    is_told = any("cannot run such a model" in note for note in report.notes)
    assert is_told == (architecture in ("gpt2", "gpt_neox"))
    if grouped:
        assert source.config["num_key_value_heads"] == 1


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == "com.microsoft" and node.op_type.endswith("Attention")]


class Dresser:
    """Puts more around the attention of `decoder()`."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph, self.rng = model, model.graph, np.random.default_rng(5)
        self.count = 0

    def const(self, array: Array) -> ir.Value:
        self.count += 1
        tensor = ir.Tensor(array, name=f"extra{self.count}")
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def floats(self, *shape: int) -> ir.Value:
        return self.const(self.rng.standard_normal(shape).astype(np.float32))

    def op(self, kind: str, *inputs: ir.Value, shape: list[Any] | None = None, **attributes: Any) -> ir.Value:
        self.count += 1
        node = ir.node(kind, inputs, attributes=attributes or None, name=f"more{self.count}")
        node.outputs[0].name, node.outputs[0].dtype = f"more{self.count}", ir.DataType.FLOAT
        node.outputs[0].shape = None if shape is None else ir.Shape(shape)
        self.graph.append(node)
        return node.outputs[0]

    def operands(self, node: ir.Node, **places: ir.Value) -> None:
        """Gives a node more inputs: `at10=value`."""
        for name, value in places.items():
            slot = int(name.removeprefix("at"))
            node.resize_inputs(max(len(node.inputs), slot + 1))
            node.replace_input_with(slot, value)

    def score_bias(self, heads: int, *, is_known: bool) -> ir.Value:
        """[B, heads, S, T] of token ids and the mask."""
        ids, mask = self.graph.inputs[:2]
        rows, columns = (self.op("Cast", one, to=1) for one in (ids, mask))
        rows = self.op("Unsqueeze", rows, self.const(np.array([1, 3])))
        columns = self.op(
            "Unsqueeze", self.op("CumSum", columns, self.const(np.array(1))), self.const(np.array([1, 2]))
        )
        whole = self.op("Add", self.op("Mul", rows, self.const(np.array(0.01, np.float32))), columns)
        shape = ["batch", heads, "sequence", "total"] if is_known else None
        return self.op("Mul", whole, self.floats(1, heads, 1, 1), shape=shape)

    def normed(self, value: ir.Value, heads: int, told: int) -> ir.Value:
        """Each head divided by its root mean square, and rotated."""
        leading = ["batch", "sequence"]
        apart = self.const(np.array([0, 0, told, HEAD_SIZE]))
        x = self.op("Reshape", value, apart, shape=[*leading, heads, HEAD_SIZE])
        x = self.op("SimplifiedLayerNormalization", x, self.floats(HEAD_SIZE), axis=-1, epsilon=1e-5, shape=[*x.shape])
        return self.op(
            "Reshape", x, self.const(np.array([0, 0, heads * HEAD_SIZE])), shape=[*leading, heads * HEAD_SIZE]
        )

    def many(self, node: ir.Node) -> ir.Node:
        """A MultiHeadAttention with as many key-value heads as query heads, and biases of its own."""
        makers = [value.producer() for value in node.inputs[1:3]]
        for maker in makers:
            maker.replace_input_with(1, self.floats(HIDDEN, HIDDEN))
        caches = [*node.inputs[3:5], *node.outputs[1:3]]
        for value in caches:
            value.shape = ir.Shape([value.shape[0], HEADS, *value.shape[2:]])
        inputs = [*node.inputs[:3], self.floats(3 * HIDDEN), None, None, *node.inputs[3:5]]
        attributes = {"num_heads": HEADS, "unidirectional": 1}
        new = ir.node("MultiHeadAttention", inputs, attributes, domain="com.microsoft", num_outputs=3, name=node.name)
        for old, value in zip(node.outputs, new.outputs, strict=True):
            value.name, value.type, value.shape = old.name, old.type, old.shape
            old.name = f"{old.name}/old"
            old.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.insert_before(node, new)
        self.graph.remove(node, safe=True)
        return new


def dressed(case: str) -> ir.Model:
    model = decoder()
    dresser = Dresser(model)
    for node in attentions(model):
        if case == "biases":
            for slot, width in ((0, HIDDEN), (1, KV_HEADS * HEAD_SIZE), (2, KV_HEADS * HEAD_SIZE)):
                node.replace_input_with(slot, dresser.op("Add", node.inputs[slot], dresser.floats(width)))
        elif case == "norms":
            for slot, heads, told in ((0, HEADS, HEADS), (1, KV_HEADS, -1)):
                node.replace_input_with(slot, dresser.normed(node.inputs[slot], heads, told))
        elif case == "sinks":
            dresser.operands(node, at11=dresser.floats(HEADS))
        elif case.startswith("bias of"):
            heads = 1 if "all" in case else HEADS
            dresser.operands(node, at10=dresser.score_bias(heads, is_known="unknown" not in case))
        elif case == "many heads":
            dresser.many(node)
    model.graph.sort()
    return model


@pytest.mark.parametrize(
    "case",
    [
        *("plain", "biases", "norms", "sinks", "bias of each head", "bias of unknown shape, each head"),
        *("bias of unknown shape, all heads", "many heads"),
    ],
)
def test_equals_the_model_that_hears_nothing_of_those_heads(case: str, kept: dict[str, Array]) -> None:
    model = dressed(case)
    whole = model.clone()
    run(model, HALF)
    (total,) = {node.inputs[6 if case == "many heads" else 3].shape[1] for node in attentions(whole)}
    left = total * 3 // 4
    assert {name: len(columns) for name, columns in kept.items()} == dict.fromkeys(kept, HIDDEN * left // total)
    matrices = spread(model, kept)
    for one in find_linears(whole):
        if one.name in matrices:
            w_NK = np.zeros((HIDDEN, HIDDEN), np.float32)
            w_NK[:, : matrices[one.name].shape[1]] = matrices[one.name]
            one.set_weight(lambda w_NK=w_NK: w_NK, f"{one.name}.silenced")
    rng = np.random.default_rng(3)
    feeds: dict[str, Array] = {"input_ids": rng.integers(3, 200, (1, 3)), "attention_mask": np.ones((1, 5), np.int64)}
    groups = {name: np.unique(columns // (HIDDEN // total)) for name, columns in kept.items()}
    pasts, cut = {}, {}
    for layer in range(2):
        for kind in ("key", "value"):
            name = f"past_key_values.{layer}.{kind}"
            pasts[name] = rng.standard_normal((1, total, 2, HEAD_SIZE)).astype(np.float32)
            cut[name] = pasts[name][:, groups[f"block{layer}.o"]]
    want, got = graphs.run(whole, feeds | pasts), graphs.run(model, feeds | cut)
    check.close(want["logits"], got["logits"], tolerance=1e-5)
    for name in got:
        if name.startswith("present.0"):
            assert np.allclose(got[name], want[name][:, groups["block0.o"]], atol=1e-6)
    shapes = [value.shape for value in (*model.graph.inputs, *model.graph.outputs) if "key_values" in str(value.name)]
    assert {shape[1] for shape in shapes} == {left}


def test_the_ratio_is_met_and_layers_are_alike() -> None:
    model = decoder(layers=3)
    config = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    report = run(model, f"prune_heads(ratio=0.25, {TEXT})", config=config)
    assert [row["structures_after"] for row in report.ledger if "structures_after" in row] == [1, 1, 1]
    # optimum takes the size of a head from the width and this number of heads, which stays for it.
    left = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": 1, "head_dim": HEAD_SIZE}
    assert config == left
    assert any("optimum takes the size" in note for note in report.notes)
    stored = sum(one.num_in * one.num_out for one in find_linears(model) if one.kind in ("q", "k", "v", "o"))
    assert report.metrics["parameters_after"] == stored
    assert find_cache(model).num_heads == 1


def test_layers_that_differ_run_here_and_are_told(tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "source", layers=2)
    for name, options in (("even", ""), ("uneven", ", exclude=('block1.*',)")):
        passes = f"prune_heads(ratio=0.25, {TEXT}{options})"
        artifact = optimize(source, output=tmp_path / name, passes=passes, measure=False)
        assert artifact.generate("hello", max_new_tokens=4) is not None
        is_even = name == "even"
        assert (artifact.directory / "genai_config.json").exists() == is_even
        told = json.loads((artifact.directory / "config.json").read_text())
        assert told["num_key_value_heads"] == (1 if is_even else 2)
        if is_even:
            genai = json.loads((artifact.directory / "genai_config.json").read_text())["model"]["decoder"]
            want = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_size": HEAD_SIZE}
            assert want.items() <= genai.items()
    model = decoder()
    report = run(model, f"prune_heads(ratio=0.25, exclude=('block1.*',), {TEXT})")
    assert any("onnxruntime-genai takes only equal ones" in note for note in report.notes)


def test_layers_get_sizes_by_what_they_lose() -> None:
    model = decoder(layers=4)
    report = run(model, f"prune_heads(ratio=0.2, allocation='kl', {TEXT})")
    left = [node.attributes["kv_num_heads"].as_int() for node in attentions(model)]
    assert sorted(left) == [1, 1, 2, 2] or sorted(left) == [1, 2, 2, 2]
    assert len(set(left)) == 2
    assert any("takes only equal ones" in note for note in report.notes)
    graphs.logits(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_of_codes_rows_stay_bit_for_bit_and_columns_keep_their_format(bits: int, kept: dict[str, Array]) -> None:
    model = decoder()
    run(model, f"rtn(bits={bits}, block_size=16)")
    old = {one.name: one for one in find_linears(model.clone())}
    run(model, HALF)
    new = {one.name: one for one in find_linears(model)}
    group = kept["block0.o"][0] // (HIDDEN // KV_HEADS)
    for name, size in (("q", HIDDEN // KV_HEADS), ("k", HEAD_SIZE), ("v", HEAD_SIZE)):
        rows = slice(group * size, (group + 1) * size)
        assert np.array_equal(new[f"block0.{name}"].w_NK(), old[f"block0.{name}"].w_NK()[rows])
    for name in ("q", "k", "v", "o"):
        assert new[f"block0.{name}"].holder == "MatMulNBits"
        assert new[f"block0.{name}"].node.attributes["bits"].as_int() == bits
        assert new[f"block0.{name}"].output.shape is None or new[f"block0.{name}"].output.shape[-1] != 0
    assert new["block0.o"].shape == (HIDDEN, HIDDEN // KV_HEADS)
    graphs.logits(model)


def test_it_can_be_pruned_again_and_quantized() -> None:
    model = dressed("many heads")
    for left in (3, 2):
        run(model, f"prune_heads(ratio={1 / (left + 1)}, {TEXT})")
        assert {node.attributes["num_heads"].as_int() for node in attentions(model)} == {left}
    want = graphs.logits(model)
    run(model, "gptq(bits=8, block_size=16, tokens=128, length=32)")
    assert np.abs(graphs.logits(model) - want).max() < 0.1 * np.abs(want).max()
    model = dressed("bias of each head")
    run(model, f"prune_heads(ratio=0.25, {TEXT})")
    report = run(model, f"prune_heads(ratio=0.25, {TEXT})")
    assert not report.modified
    assert set(report.reasons()) == {"has one key-value head, and keeps it"}


REFUSED = {
    "its scores are read": "its heads are not its own: somebody reads its scores",
    "queries are read": "its heads are not its own: ReduceSum reads them too",
    "a norm of all heads": "its heads are not its own: SimplifiedLayerNormalization takes all heads together",
    "the cache is copied": "its heads are not its own: its cache is no input of the model",
    "the past is measured": "its heads are not its own: Shape reads them too",
    "the output is read": "its heads are not its own: what it gives is not read by one projection alone, but by "
    "MatMul, ReduceSum",
    "scales of a cache": "its heads are not its own: its cache has fixed scales: comes before quantize_kv",
    "a gate": "its heads are not its own: Mul joins two activations",
    "a bias of other heads": "its heads are not its own: more13, added to its scores, has 2 heads",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_head_of_its_own_is_left_and_said(case: str) -> None:
    model = decoder()
    dresser = Dresser(model)
    node = attentions(model)[0]
    read: ir.Value | None = None
    if case == "its scores are read":
        node.resize_outputs(4)
        read = node.outputs[3]
        read.name, read.dtype = "scores", ir.DataType.FLOAT
        node.attributes["qk_output"] = ir.AttrInt64("qk_output", 1)
    elif case == "queries are read":
        read = dresser.op("ReduceSum", node.inputs[0])
    elif case == "a norm of all heads":
        more = dresser.op("SimplifiedLayerNormalization", node.inputs[0], dresser.floats(HIDDEN), axis=-1, epsilon=1e-5)
        node.replace_input_with(0, more)
    elif case == "the cache is copied":
        node.replace_input_with(3, dresser.op("Identity", node.inputs[3]))
    elif case == "the past is measured":
        read = dresser.op("Shape", node.inputs[3])
        read.dtype = ir.DataType.INT64
    elif case == "the output is read":
        read = dresser.op("ReduceSum", node.outputs[0])
    elif case == "scales of a cache":
        dresser.operands(node, at12=dresser.floats(1), at13=dresser.floats(1))
    elif case == "a gate":
        node.replace_input_with(2, dresser.op("Mul", node.inputs[2], dresser.op("Sigmoid", node.inputs[2])))
    else:
        dresser.operands(node, at10=dresser.score_bias(2, is_known=True))
    if read is not None:
        model.graph.outputs.append(read)
    model.graph.sort()
    before = graphs.text(model)
    report = run(model, f"prune_heads(ratio=0.25, exclude=('block1.*',), {TEXT})")
    assert {skip.site: skip.reason for skip in report.skipped} == {
        "block0.attention": REFUSED[case],
        "block1.attention": "excluded",
    }
    assert graphs.text(model) == before


def test_attention_that_is_not_fused_is_said(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    model = models.load(tiny_export("llama"), work_dir=tmp_path).model
    report = run(model, f"prune_heads(ratio=0.25, {TEXT})")
    assert not report.modified
    assert report.reasons() == {"its attention is not fused: fuse before": 2}


def test_what_cannot_be_met_is_refused_with_the_nearest() -> None:
    model = decoder()
    before = graphs.text(model)
    for options, message in (
        ("ratio=0.9, allocation='kl'", r"cannot be met, all layers at the smallest size take ratio=0\.5"),
        ("ratio=0.2, exclude=('nothing',)", "exclude='nothing' matches no layer"),
    ):
        with pytest.raises(OptionError, match=message) as caught:
            run(model, f"prune_heads({options}, {TEXT})")
        assert caught.value.hint
    assert graphs.text(model) == before


def test_a_budget_that_layers_share_needs_an_allocation() -> None:
    with pytest.raises(OptionError, match="allocation must be 'kl' or 'loss' without a ratio"):
        pipeline.parse("prune_heads(size='1MB')")


def test_counts_say_what_each_layer_keeps() -> None:
    by_ratio, by_counts = decoder(), decoder()
    run(by_ratio, HALF)
    run(by_counts, HALF.replace("ratio=0.25", "counts=(1, 1)"))
    assert "ratio=0.25" in HALF
    assert graphs.text(by_counts) == graphs.text(by_ratio)
