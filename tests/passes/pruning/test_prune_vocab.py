"""PruneVocab: the same logits over kept tokens however they are stored, and files that agree with each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import decoders
import graphs
import numpy as np
import onnx_ir as ir
import pytest
import tokenizer_kinds

from onnxpress.compiler import pipeline
from onnxpress.compiler.artifact import Artifact
from onnxpress.compiler.errors import CalibrationError, OptionError, UnsupportedModelError
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.vocabulary import Vocabulary, columns
from onnxpress.passes.pruning._token_files import renumbered
from onnxpress.passes.pruning._vocabulary import cut, find_places
from onnxpress.passes.pruning.prune_vocab import PruneVocab
from onnxpress.runtime.model import load
from onnxpress.runtime.tokenizer import Tokenizer

ROWS = 720  # of the table; the tokenizer has 702 tokens and two added ones
TEXT = "The following example shows how a class can be used.\n" * 40 + "exceptions naming\n" * 3 + "with\n"
STORED = (
    "",
    "rtn(bits=8)",
    "rtn(bits=4, symmetric=False)",
    "rtn(bits=4, overrides={'head': {'bits': 8}})",
    "nf4",
    "dynamic_int8",
    "static_int8",
    "svd(ratio=0.5, kinds=('head',)), rtn(bits=8)",
    "cast_float16",
)
IDS = np.sort(np.random.default_rng(3).choice(96, 64, replace=False))


def network(form: str) -> ir.Model:
    """An embedding, a product and a head of 96 tokens: tied, untied, with a bias, as a Gemm, or scaled and capped."""
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table", scale=1.0)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    x = builder.step("linear", x, x)
    if form in ("tied", "untied"):
        return builder.finish(x, form == "tied", table)
    if form == "gemm":
        flat = builder.op("Reshape", x, builder.axes(-1, 32))
        logits = builder.op("Gemm", flat, builder.weight(96, 32), builder.weight(96), transB=1)
        logits.shape = ir.Shape(["tokens", 96])
    else:
        logits = builder.op("MatMul", x, builder.weight(32, 96), width=96)
        logits = builder.op("Add", builder.weight(96), logits, width=96)
        if form == "capped":
            logits = builder.op("Mul", builder.op("Tanh", logits, width=96), builder.scalar(30.0), width=96)
    logits.name = "logits"
    graph = ir.Graph([builder.ids], [logits], nodes=builder.nodes, initializers=builder.weights, opset_imports={"": 18})
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    "stored",
    STORED,
)
@pytest.mark.parametrize("form", ["tied", "untied", "bias", "capped", "gemm"])
def test_law_logits_of_kept_tokens_are_bit_equal(form: str, stored: str) -> None:
    model = network(form)
    if stored:
        try:
            pipeline.run(model, pipeline.parse(stored), Context())
        except OptionError:
            pytest.skip("nothing to store so")
    kept = np.random.default_rng(0).integers(0, 64, (2, 7))
    before = graphs.run(model, {"input_ids": IDS[kept]})["logits"]
    nbytes = sum(one.const_value.nbytes for one in model.graph.initializers.values())  # type: ignore[union-attr]
    cut(model, find_places(model), IDS, {})
    after = graphs.run(model, {"input_ids": kept})["logits"]
    assert after.shape[-1] == 64
    np.testing.assert_array_equal(before[..., IDS], after)
    assert sum(one.const_value.nbytes for one in model.graph.initializers.values()) < nbytes  # type: ignore[union-attr]
    logits = next(one for one in model.graph.outputs if one.name == "logits")
    assert logits.shape is not None
    assert logits.shape[-1] == 64


def test_what_the_graph_does_with_tokens_must_be_known() -> None:
    model = network("tied")
    model.graph.append(ir.node("Shape", [model.graph.initializers["table0"]], outputs=[ir.Value(name="sizes")]))
    find_places(model)
    reader = ir.node("ReduceMax", [model.graph.initializers["table0"]], name="reader", outputs=[ir.Value(name="max")])
    model.graph.append(reader)
    with pytest.raises(UnsupportedModelError, match=r"ReduceMax \(reader\) reads table0"):
        find_places(model)
    model = network("untied")
    model.graph.append(ir.node("Neg", [model.graph.inputs[0]], name="odd", outputs=[ir.Value(name="minus")]))
    with pytest.raises(UnsupportedModelError, match=r"Neg \(odd\) reads token ids"):
        find_places(model)
    with pytest.raises(UnsupportedModelError, match="looks no token up"):
        find_places(graphs.branching())


def test_token_ids_in_the_graph_are_renumbered() -> None:
    model = network("untied")
    padding = ir.tensor(np.array([IDS[5]]), name="pad")
    constant = ir.Value(name="pad", shape=padding.shape, type=ir.TensorType(padding.dtype), const_value=padding)
    model.graph.register_initializer(constant)
    output = ir.Value(name="is_pad", shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.BOOL))
    model.graph.append(ir.node("Equal", [model.graph.inputs[0], constant], outputs=[output]))
    model.graph.outputs.append(output)
    places = find_places(model)
    assert places.named_ids() == {IDS[5]}
    cut(model, places, IDS, {int(old): new for new, old in enumerate(IDS)})
    assert graphs.run(model, {"input_ids": np.array([[4, 5, 6]])})["is_pad"].tolist() == [[False, True, False]]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A decoder of 720 rows with a trained tokenizer, and files that name tokens."""
    monkeypatch.setattr(decoders, "VOCABULARY", ROWS)
    directory = decoders.write_decoder(tmp_path / "source", layers=1)
    (directory / "tokenizer.json").write_text(tokenizer_kinds.content("byte_level"), encoding="utf-8")
    tool = Tokenizer(directory).backend.token_to_id("<tool>")
    files: dict[str, Any] = {
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": "{{ 'Assistant: yield ' }}",
            "added_tokens_decoder": {str(tool): {"content": "<tool>"}, "1": {"content": "<s>"}},
        },
        "added_tokens.json": {"<tool>": tool},
        "generation_config.json": {"eos_token_id": [2, tool], "suppress_tokens": [ROWS - 1]},
        "vocab.json": {},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return directory


def made(model: Path | Artifact, output: Path, passes: str, text: str = TEXT, **options: Any) -> Artifact:
    file = output.with_suffix(".txt")
    file.write_text(text, encoding="utf-8")
    directory = model.directory if isinstance(model, Artifact) else model
    return optimize(directory, output=output, passes=passes, calibration=str(file), measure=False, **options)


def test_an_artifact_is_whole(source: Path, tmp_path: Path) -> None:
    artifact = made(source, tmp_path / "out", "prune_vocab(keep=('decorator',))")
    found = json.loads((artifact.directory / "config.json").read_text())
    size = found["vocab_size"]
    assert size % 32 == 0
    assert size < ROWS - 100
    before, after = Tokenizer(source), Tokenizer(artifact.directory)
    ids = before.encode(TEXT)
    vocabulary = Vocabulary.from_card(artifact.report)
    assert vocabulary is not None
    assert vocabulary.source_size == ROWS
    assert vocabulary.ids_V[after.encode(TEXT)].tolist() == ids
    for text in ("Assistant: yield ", "decorator", "<tool>", "user"):
        assert vocabulary.ids_V[after.encode(text)].tolist() == before.encode(text)
    odd = "zażółć gęślą 日本 deque"
    assert after.decode(after.encode(odd)) == before.decode(before.encode(odd))
    tool = after.backend.token_to_id("<tool>")
    generation = json.loads((artifact.directory / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, tool], "suppress_tokens": []}
    assert json.loads((artifact.directory / "added_tokens.json").read_text()) == {"<tool>": tool}
    assert str(tool) in json.loads((artifact.directory / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    genai = json.loads((artifact.directory / "genai_config.json").read_text())
    assert genai["model"]["vocab_size"] == size
    assert genai["model"]["eos_token_id"] == [2, tool]
    assert not (artifact.directory / "vocab.json").exists()
    (row,) = artifact.report["passes"]
    assert row["metrics"]["text_kept"] == 1.0
    assert row["metrics"]["text_growth"] == 0.0
    assert row["metrics"]["tokens_after"] == size
    assert row["metrics"]["bytes_saved"] == (ROWS - size) * 2 * 32 * 4
    assert any("vocab.json is left out" in note for note in row["notes"])
    model, reference = load(artifact.directory), load(source)
    prompt = after.encode("The following example")
    old = reference.session.run_logits(vocabulary.ids_V[prompt][None])
    np.testing.assert_array_equal(old[..., vocabulary.ids_V], model.session.run_logits(np.array([prompt])))
    assert model.generate("The following", max_new_tokens=4).tokens


def test_again_and_after_quantization(source: Path, tmp_path: Path) -> None:
    first = made(source, tmp_path / "first", "prune_vocab(size=640), rtn(bits=8)")
    second = made(first, tmp_path / "second", "prune_vocab(size=500)")
    third = made(second, tmp_path / "third", "rtn(bits=4, requantize=True)")
    both = [Vocabulary.from_card(one.report) for one in (first, second, third)]
    assert [len(one.ids_V) for one in both if one] == [640, 512, 512]
    old, new = Tokenizer(source), Tokenizer(third.directory)
    assert both[2] is not None
    assert both[2].ids_V[new.encode(TEXT)].tolist() == old.encode(TEXT)
    known = columns(both[1], 512, both[0], 640)
    assert known is not None
    ids = np.array([Tokenizer(second.directory).encode("The following example shows")])
    sessions = [one.session(provider="cpu") for one in (first, second)]
    np.testing.assert_array_equal(sessions[0].run_logits(known[ids])[..., known], sessions[1].run_logits(ids))
    same = made(second, tmp_path / "same", "prune_vocab(size=512)")
    (row,) = same.report["passes"]
    assert row["changed"] == 0
    assert "512 tokens are needed" in row["skipped"][0]["reason"]


def test_a_pruned_model_is_compared_over_what_it_has(source: Path, tmp_path: Path) -> None:
    artifact = made(source, tmp_path / "out", "prune_vocab(size=480)")
    found = artifact.evaluate(TEXT, reference=source, context=64, tokens=256)
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert found.top1_agreement == 1.0
    assert found.kept_probability is not None
    assert 0.4 < found.kept_probability < 1
    assert found.reference_perplexity == pytest.approx(found.perplexity)
    with pytest.raises(UnsupportedModelError, match=f"lacks {ROWS - 480} tokens"):
        load(source).evaluate(TEXT, reference=load(artifact.directory), context=64, tokens=64)
    other = made(source, tmp_path / "other", "prune_vocab(size=480)", "x = [0, 1, 2, 3] * 77\n" * 20)
    with pytest.raises(UnsupportedModelError, match=r"lacks .* tokens that the model has"):
        other.evaluate(TEXT, reference=artifact, context=64, tokens=64)


def test_losses_are_measured_over_kept_tokens(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    passes = "rtn(bits=8), prune_vocab(size=480), rtn(bits=4, requantize=True)"
    artifact = optimize(source, output=tmp_path / "out", passes=passes, calibration=str(file), verify=True)
    metrics = [row["metrics"] for row in artifact.report["passes"]]
    assert abs(metrics[1]["kl_added"]) < 0.05
    assert metrics[2]["kl_added"] > metrics[1]["kl_added"]
    assert "over the 480 tokens that were kept" in artifact.report["quality"]["measured_on"]
    assert artifact.report["quality"]["top1_agreement"] > 0.2
    assert not any("not_verified" in row for row in artifact.report["verified"])


def test_later_passes_read_the_new_tokens(source: Path, tmp_path: Path) -> None:
    artifact = made(source, tmp_path / "out", "prune_vocab(size=480), gptq(bits=4, tokens=512)")
    row = artifact.report["passes"][1]
    assert row["changed"]
    assert "tokens of" in row["calibration"]["text"]


def test_what_cannot_be_is_refused_with_the_nearest(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"size must be at least (\d+), got 20") as least:
        made(source, tmp_path / "out", "prune_vocab(size=20)")
    assert least.value.hint is not None
    smallest = int(least.value.hint.rpartition("=")[2])
    assert made(source, tmp_path / "out", f"prune_vocab(size={smallest})").report["passes"][0]["changed"]
    with pytest.raises(OptionError, match=r"below the 720 tokens .* got 9999") as most:
        made(source, tmp_path / "out", "prune_vocab(size=9999)")
    assert most.value.hint == "the largest with an effect is size=704"
    with pytest.raises(CalibrationError, match="got none"):
        optimize(source, output=tmp_path / "out", passes="prune_vocab", measure=False)
    (source / "tokenizer.json").rename(source / "elsewhere")
    with pytest.raises(OptionError, match=r"expected tokenizer.json beside the model, found vocab.json"):
        optimize(source, output=tmp_path / "out", passes="prune_vocab", measure=False)


def test_an_encoder_decoder_is_refused(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": True}))
    with pytest.raises(UnsupportedModelError, match="two graphs that share a tokenizer"):
        made(source, tmp_path / "out", "prune_vocab")


@pytest.mark.parametrize("options", [{"size": 0}, {"min_count": 0}, {"multiple_of": 0}, {"size": 9, "min_count": 1}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="prune_vocab: "):
        PruneVocab(**options)


def test_law_a_vocabulary_comes_back_from_its_card() -> None:
    ids = np.sort(np.random.default_rng(0).choice(49152, 20000, replace=False))
    card = json.loads(json.dumps({"vocabulary": Vocabulary(49152, ids).to_card()}))
    found = Vocabulary.from_card(card)
    assert found is not None
    np.testing.assert_array_equal(found.ids_V, ids)
    assert len(json.dumps(card)) < 20_000
    for damage in (
        {"size": 19999},
        {"size_before": 100},
        {"size": 10**30},
        {"size": 0},
        {"ids_before": "?"},
        {"ids_before": None},
    ):
        assert Vocabulary.from_card({"vocabulary": {**card["vocabulary"], **damage}}) is None
    assert Vocabulary.from_card({}) is None


def test_configs_that_are_not_as_they_should_be_are_left_so() -> None:
    new = {5: 0, 6: 1}
    content = {
        "bad_words_ids": [5, [5, 6], [5, 9]],
        "forced_decoder_ids": [5, [1, 6], [1, 2, 3]],
        "suppress_tokens": [5, [6], None],
    }
    assert renumbered(content, new) == {
        "bad_words_ids": [[0, 1]],
        "forced_decoder_ids": [5, [1, 1], [1, 2, 3]],
        "suppress_tokens": [0],
    }
