"""Heal: what a pruned model predicts comes nearer to the original, and nothing but numbers changes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest
import torch
from decoders import decoder, write_decoder

from onnxpress.compiler import distillation, pipeline
from onnxpress.compiler.artifact import write_graph
from onnxpress.compiler.calibration_text import CalibrationText, feeds
from onnxpress.compiler.differentiable import Differentiable, Factors
from onnxpress.compiler.errors import OptionError, PreconditionError
from onnxpress.compiler.journal import Journal, Section
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.sample_text import default_text
from onnxpress.passes.pruning.heal import Heal, find_vectors

IDS = np.random.default_rng(1).integers(3, 200, (1, 24))
SHORT = "steps=40, length=32"
CUT = "prune_ffn(ratio=0.4, allocation='uniform', tokens=256, length=32, probe=32)"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("original"))


def context(directory: Path, work_dir: Path, **fields: Any) -> Context:
    """As `optimize` makes it."""
    text = {"help": default_text()[:20000]}
    calibration = CalibrationText(texts=text, tokenizer=directory / "tokenizer.json", vocab_size=259, max_length=512)
    given = {"original": directory / "model.onnx", "work_dir": work_dir, "calibration": calibration, **fields}
    return Context(**given)


def broken(passes: str = CUT) -> ir.Model:
    """The original with something lost."""
    model = decoder()
    if passes:
        pipeline.run(model, pipeline.parse(passes), Context(calibration=CalibrationText(vocab_size=200)))
    return model


def heal(model: ir.Model, options: str, given: Context) -> Report:
    ((_, report),) = pipeline.run(model, pipeline.parse(f"heal({options})"), given)
    return report


def form(model: ir.Model) -> list[Any]:
    """All of a graph but the numbers of its weights."""
    nodes = [
        (node.op_type, node.name, [one and one.name for one in node.inputs], [one.name for one in node.outputs])
        for node in model.graph
    ]
    return [nodes, [(key, one.dtype, one.shape) for key, one in model.graph.initializers.items()]]


def biased() -> ir.Model:
    """A decoder with biases and, behind the first block, a norm; one matrix lost much."""
    model = decoder()
    graph = model.graph
    for node in list(graph):
        if node.name in ("l0.down", "l1.down", "l0.o"):
            bias = ir.Value(
                name=f"{node.name}.bias",
                shape=ir.Shape([32]),
                type=ir.TensorType(ir.DataType.FLOAT),
                const_value=ir.Tensor(np.full(32, 0.1, np.float32), name=f"{node.name}.bias"),
            )
            graph.register_initializer(bias)
            added = ir.node("Add", [node.outputs[0], bias], name=f"{node.name}.added")
            added.outputs[0].name, added.outputs[0].type = f"{node.name}.sum", node.outputs[0].type
            node.outputs[0].replace_all_uses_with(added.outputs[0])
            added.replace_input_with(0, node.outputs[0])
            graph.insert_after(node, added)
    return model


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (broken, f"train='lora', rank=4, learning_rate=5e-3, {SHORT}"),
        (biased, f"learning_rate=0.05, {SHORT}"),
        (lambda: broken("rtn(bits=2, block_size=32)"), f"train='scales', learning_rate=5e-3, {SHORT}"),
    ],
    ids=["factors", "norms and biases", "scales"],
)
def test_text_that_training_did_not_see_is_predicted_better(
    make: Callable[[], ir.Model], options: str, original: Path, tmp_path: Path
) -> None:
    model, given = make(), context(original, tmp_path)
    before, outputs = form(model), graphs.logits(model)
    report = heal(model, options, given)
    assert report.changed, report.skipped
    assert form(model) == before
    assert report.metrics["held_out_kl_after"] < 0.9 * report.metrics["held_out_kl_before"]
    want = torch.from_numpy(graphs.logits(decoder())).log_softmax(-1)

    def loss(logits: np.ndarray) -> float:
        return float((want.exp() * (want - torch.from_numpy(logits).log_softmax(-1))).sum(-1).mean())

    # Random tokens, which are another kind of text than that of training.
    assert loss(graphs.logits(model)) < loss(outputs)


def test_equal_runs_give_equal_bits_and_another_seed_others(original: Path, tmp_path: Path) -> None:
    texts = []
    for seed in (0, 0, 1):
        model = broken()
        heal(model, "train='lora', rank=2, steps=10, length=32", context(original, tmp_path, seed=seed))
        texts.append(graphs.text(model))
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_merged_factors_are_the_factors_beside(original: Path, tmp_path: Path) -> None:
    model = broken()
    linears = [one for one in find_linears(model) if one.kind in ("q", "down")]
    graph = Differentiable(model, feeds(model.graph, IDS)[0], [], tmp_path)
    rng = np.random.default_rng(3)
    pairs = {
        id(one.node): (
            one,
            *(
                distillation.Trained(torch.from_numpy(made))
                for made in (
                    rng.standard_normal((3, one.num_in)).astype(np.float32) / 5,
                    rng.standard_normal((one.num_out, 3)).astype(np.float32) / 5,
                )
            ),
        )
        for one in linears
    }
    factors = {key: Factors(one, down.value(), up.value()) for key, (one, down, up) in pairs.items()}
    with torch.no_grad():
        beside = graph.logits(graph.hidden(torch.from_numpy(IDS), {}, factors), {}).numpy()
    plain = graphs.logits(model, IDS)
    from onnxpress.passes.pruning import heal as module

    module._write(distillation.Student(graph, {}, pairs), {}, Report())
    check.close(beside, graphs.logits(model, IDS))
    assert np.abs(beside - plain).max() > 0.1


def test_a_run_that_was_killed_goes_on(original: Path, tmp_path: Path) -> None:
    whole = broken()
    options = "train='lora', rank=2, steps=20, length=32"
    heal(whole, options, context(original, tmp_path))
    journal, model = Journal(tmp_path / "journal"), broken()

    def killed(items: Any, label: str) -> Any:
        for number, item in enumerate(items):
            if label == "heal: training" and number == 13:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        heal(model, options, context(original, tmp_path, journal=journal, track=killed))
    assert graphs.text(model) == graphs.text(broken())
    seen: list[int] = []

    def counted(items: Any, label: str) -> Any:
        for item in items:
            seen.extend([item] if label == "heal: training" else [])
            yield item

    heal(model, options, context(original, tmp_path, journal=journal, track=counted))
    assert seen[0] == 12
    assert graphs.text(model) == graphs.text(whole)


def test_what_is_whole_already_is_left(original: Path, tmp_path: Path) -> None:
    model = decoder()
    report = heal(model, f"train='lora', {SHORT}", context(original, tmp_path))
    assert not report.changed
    assert any("the model predicts what the original does" in reason for reason in report.reasons())
    assert graphs.text(model) == graphs.text(decoder())


def test_what_does_not_help_is_not_kept(original: Path, tmp_path: Path) -> None:
    model = broken()
    report = heal(model, "train='lora', rank=2, steps=4, length=32, learning_rate=50.0", context(original, tmp_path))
    assert not report.changed
    assert any("did not fall below" in reason for reason in report.reasons())
    assert graphs.text(model) == graphs.text(broken())


def test_the_whole_way_after_pruning_vocabulary_and_before_quantizing(original: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(default_text()[:8000].lower())
    passes = f"prune_vocab, {CUT}, heal(train='lora', rank=2, steps=10, length=32), "
    passes += "gptq(bits=8, block_size=16, tokens=256, length=32)"
    optimize(original, output=tmp_path / "out", passes=passes, calibration=text, verify=True)
    card = json.loads((tmp_path / "out" / "onnxpress.json").read_text())
    row = card["passes"][2]
    assert row["metrics"]["held_out_kl_after"] < row["metrics"]["held_out_kl_before"]
    assert row["metrics"]["kl_added"] < 0
    assert card["quality"]["kl"] >= 0


def test_a_teacher_is_named_where_the_original_is_not_at_hand(original: Path, tmp_path: Path) -> None:
    model = broken()
    write_graph(model, tmp_path, pipeline="")
    options = f"train='lora', rank=2, steps=10, length=32, teacher={str(original)!r}"
    assert heal(model, options, context(original, tmp_path, original=tmp_path / "model.onnx")).changed


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ("", {"original": None}, "expected the original model .*\n.*heal\\(teacher='path"),
        ("teacher='/nowhere'", {}, "teacher must be a directory with model.onnx.*'/nowhere'"),
        ("", {}, "train='norms' has no effect: the model has no norms or biases\n.*train='lora'"),
        ("rank=0", {}, "rank must be at least 1, got 0"),
        ("length=7", {}, "length must be at least 8, got 7"),
        ("learning_rate=-1.0", {}, "learning_rate must be positive, got -1.0"),
        ("train='all'", {}, "train must be norms or scales or lora"),
    ],
)
def test_refused_with_the_reason(
    options: str, fields: dict[str, Any], message: str, original: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError) as error:
        heal(broken(), options, context(original, tmp_path, **fields))
    import re

    assert re.search(message, str(error.value)), error.value


def test_refused_without_text_and_without_torch(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PreconditionError, match=r"expected text to train on"):
        heal(broken(), SHORT, context(original, tmp_path, calibration=CalibrationText()))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(PreconditionError, match=r"takes torch, which is not installed"):
        heal(broken(), SHORT, context(original, tmp_path))


def test_another_vocabulary_is_refused(original: Path, tmp_path: Path) -> None:
    model = broken()
    head = next(one for one in find_linears(model) if one.kind == "head")
    head.set_weight(lambda: np.ones((250, 32), np.float32), "shorter", (250, 32))
    with pytest.raises(OptionError, match=r"has logits of 259 tokens, the model to heal of 250"):
        heal(model, f"train='lora', {SHORT}", context(original, tmp_path))


def test_matrices_that_get_no_factors_are_named(original: Path, tmp_path: Path) -> None:
    model = broken(
        "magnitude(sparsity=0.5, kinds=('up',)), rtn(bits=4, block_size=16, exclude=('*.[qkvo]', '*.up', 'head'))"
    )
    report = heal(model, f"train='lora', rank=2, learning_rate=5e-3, {SHORT}", context(original, tmp_path))
    reasons = {skip.site: skip.reason for skip in report.skipped}
    assert "sparse" in reasons["block0.up"]
    assert "MatMulNBits holds codes" in reasons["block1.down"]
    assert "outside of the blocks" in reasons["head"]
    assert {row["site"] for row in report.ledger} >= {"block0.q", "block1.o"}


def test_vectors_are_norms_and_biases_alone(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    from onnxpress import models

    for form, passes in (("plain", ""), ("packed", "fuse, pack, rtn(bits=4, block_size=32)")):
        source = models.load(tiny_export("gemma2"), work_dir=tmp_path)
        if passes:
            pipeline.run(source.model, pipeline.parse(passes), Context(config=source.config))
        found = find_vectors(source.model, find_linears(source.model))
        assert [tuple(one.shape.numpy()) for one in found] == [(64,)] * 9, form  # four a block, and the last  # type: ignore[union-attr]


def test_law_divergence() -> None:
    rng = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 40, generator=rng) for _ in range(2))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    whole = float((log_p.exp() * (log_p - log_q)).sum())

    def measured(k: int, logits: Any) -> float:
        targets = distillation.Targets(1, 5, k, None)
        targets.put(0, p.numpy())
        return float(distillation.divergence(logits, *targets.get(0, 0, 5)))

    assert measured(40, q) == pytest.approx(whole, rel=1e-5)
    assert 0 < measured(4, q) < measured(12, q) < whole
    assert measured(12, p + 3) == pytest.approx(0, abs=1e-5)


def test_gradients_are_those_of_what_is_trained(tmp_path: Path) -> None:
    """Chunks of tokens, factors, and the units of changes: along its gradient the loss falls as the gradient says."""
    model = biased()
    linears = find_linears(model)
    vectors = find_vectors(model, linears)
    graph = Differentiable(model, feeds(model.graph, IDS)[0], vectors, tmp_path)
    student = distillation.student_of(graph, vectors, [], [one for one in linears if one.kind == "o"], rank=2, seed=0)
    targets = distillation.Targets(1, IDS.shape[1], 64, None)
    targets.put(0, graphs.logits(decoder(seed=1), IDS)[0])
    for _, _, up in student.factors.values():
        up.change += 0.3  # at zero the first factor has no gradient
    loss, gradients = student.gradients(IDS[0], targets, 0)
    assert loss == pytest.approx(student.loss(IDS[0], targets, 0), rel=1e-5)
    assert [one.size for one in student.weights.values()] == pytest.approx([0.1] * 3)
    for one, gradient in zip(student.all(), gradients, strict=True):
        direction, step, ends = gradient / gradient.norm(), 0.02 / float(one.size) ** 0.5, []
        for sign in (1, -1):
            one.change += sign * step * direction
            ends.append(student.loss(IDS[0], targets, 0))
            one.change -= sign * step * direction
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=5e-2)


class Scripted:
    """A student whose held-out losses are given beforehand, and whose gradient is always 1."""

    def __init__(self, losses: list[float]) -> None:
        self.trained, self.losses = distillation.Trained(torch.zeros(3)), iter(losses)

    def all(self) -> list[distillation.Trained]:
        return [self.trained]

    def loss(self, *window: Any) -> float:
        return next(self.losses)

    def gradients(self, *window: Any) -> tuple[float, list[torch.Tensor]]:
        return 1.0, [torch.ones(3)]


def test_law_the_best_state_is_kept_and_not_the_last() -> None:
    student: Any = Scripted([5, 4, float("nan"), 1, 2, 6, 7, 8, 9, 9, 9])
    windows = np.zeros((3, 8), np.int64)
    course = distillation.train(
        student,
        windows,
        Any,  # type: ignore[arg-type]
        held_out=1,
        steps=10,
        rate=0.1,
        seed=0,
        section=Section(),
        digest="",
        track=lambda items, label: items,
    )
    assert course.best == 3
    want = distillation.Trained(torch.zeros(3))
    for step in range(3):
        want.step(torch.full((3,), 3**-0.5), distillation.rate_at(step, 10, 0.1), step + 1)
    check.close(want.change.numpy(), student.trained.change.numpy(), tolerance=1e-6)


def test_law_learning_rate_rises_and_falls() -> None:
    rates = [distillation.rate_at(step, 100, 2.0) for step in range(100)]
    assert max(rates) == rates[5] == 2.0
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 0.01


def test_law_every_window_comes_before_one_comes_again() -> None:
    found = distillation.order(7, 17, 3)
    assert sorted(found[:7]) == sorted(found[7:14]) == list(range(7))
    assert len(found) == 17
    assert list(found[:7]) != list(found[7:14])


def test_law_adam_is_that_of_torch() -> None:
    start = torch.randn(6, generator=torch.Generator().manual_seed(1))
    trained, theirs = distillation.Trained(start), torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99))
    for number in range(1, 6):
        gradient = torch.sin(trained.value() * number)
        theirs.grad = gradient.clone()
        trained.step(gradient, 0.1, number)
        optimizer.step()
    check.close(theirs.detach().numpy(), trained.value().numpy(), tolerance=1e-6)


def test_text_of_options_parses_back() -> None:
    pass_ = Heal(train="lora", rank=4, teacher="a/b")
    assert pipeline.parse(str(pass_)).passes == (pass_,)


def test_nothing_is_kept_without_a_journal() -> None:
    assert Section().read("state", "") is None
