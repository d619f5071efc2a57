"""compensate(form='adapter'): gptq's model without the file, the repaired one with it, and what it is told to do so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.artifact import Artifact
from onnxpress.compiler.calibration import Group
from onnxpress.compiler.calibration_text import CalibrationText, feeds
from onnxpress.compiler.cli import main
from onnxpress.compiler.errors import OptionError, UnsupportedModelError
from onnxpress.compiler.journal import Journal
from onnxpress.compiler.linears import Linear, find_linears
from onnxpress.compiler.lora_graph import find_slots
from onnxpress.compiler.lora_slots import read_adapter
from onnxpress.compiler.nbits import CodedMatrix, replace_linear, store
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.stats import Stats
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.quantization import _least_squares as least_squares
from onnxpress.passes.quantization._weight_only import Coded, Format, Site
from onnxpress.passes.quantization.compensate import FILE, Compensate

Array = np.ndarray
KEPT = "exclude=('head', 'embedding')"
TEXT = f"tokens=512, length=64, {KEPT}"
FEW = f"tokens=128, length=32, rounds=0, {KEPT}"
IDS = np.random.default_rng(9).integers(3, 200, (4, 48))


@pytest.fixture(params=["llama", "gpt2"])
def fused(request: pytest.FixtureRequest, tiny_export: Callable[..., Path], tmp_path: Path) -> ir.Model:
    return opened(tiny_export(request.param), tmp_path)


@pytest.fixture
def llama(tiny_export: Callable[..., Path], tmp_path: Path) -> ir.Model:
    return opened(tiny_export("llama"), tmp_path)


def opened(export: Path, work: Path, passes: str = "fuse", **context: Any) -> ir.Model:
    source = models.load(export, work_dir=work)
    pipeline.run(source.model, pipeline.parse(passes), Context(config=source.config, **context))
    return source.model


def run(model: ir.Model, passes: str, **context: Any) -> Report:
    made = Context(calibration=CalibrationText(vocab_size=200, seed=1), **context)
    return pipeline.run(model, pipeline.parse(passes), made)[-1][1]


def held(report: Report, model: ir.Model, folder: Path) -> dict[str, Array]:
    """What the file holds, as the runtime reads it."""
    path = folder / FILE
    report.files[FILE](path)
    values = read_adapter(path, find_slots(model))
    return {name: np.array(value.numpy()) for name, value in values.items()}  # copies: numpy sees memory of the value


def logits(model: ir.Model, filled: dict[str, Array]) -> Array:
    running = graphs.session(model)
    windows = feeds(model.graph, IDS)
    return np.concatenate([running.run(["logits"], {**window, **filled})[0] for window in windows])


def codes(model: ir.Model) -> dict[str, bytes]:
    stored = model.graph.initializers.items()
    return {name: value.const_value.tobytes() for name, value in stored if ".codes" in name}


def with_weights(model: ir.Model, weights: dict[str, Array]) -> ir.Model:
    """The float model with other matrices."""
    for linear in find_linears(model):
        if linear.name in weights:
            w_NK = weights[linear.name]
            linear.set_weight(lambda w_NK=w_NK: w_NK, f"{linear.name}.new")  # type: ignore[misc]
    return model


def squared_error(found: Array, wanted: Array) -> float:
    return float(((found - wanted) ** 2).mean())


def test_law_without_the_file_the_model_is_gptqs(fused: ir.Model, tmp_path: Path) -> None:
    plain, want = fused.clone(), graphs.logits(fused)
    run(plain, f"gptq(bits=2, {TEXT})")
    report = run(fused, f"compensate(bits=2, rank=16, form='adapter', {TEXT})")
    assert codes(fused) == codes(plain) != {}
    base = graphs.logits(fused)
    assert np.array_equal(base, graphs.logits(plain))
    # With it nearer to the model as it was.
    repaired = logits(fused, held(report, fused, tmp_path))
    assert squared_error(repaired, want) < 0.95 * squared_error(base, want)
    again = run(fused, f"compensate(bits=2, rank=16, form='adapter', {TEXT})")
    assert not again.modified
    assert not again.files


@pytest.mark.parametrize("is_shared", [False, True])
def test_law_with_the_file_each_matrix_is_codes_and_product(fused: ir.Model, tmp_path: Path, is_shared: bool) -> None:
    found = {one.name: one for one in find_linears(fused)}
    if is_shared:
        first, second = found["block0.o"], found["block1.o"]
        second.node.replace_input_with(1, first.weight)
    reference, in_graph = fused.clone(), fused.clone()
    report = run(fused, f"compensate(bits=4, rank=16, accuracy_level=0, form='adapter', {FEW})")
    filled = held(report, fused, tmp_path)
    names = {row["site"] for row in report.ledger if row.get("rank") == 16}
    coded = {row["site"] for row in report.ledger}
    if is_shared:
        names, coded = names | {"block1.o"}, coded | {"block1.o"}
    assert len(names) >= 8
    assert {name.removesuffix(".lora_A") for name in filled if name.endswith(".lora_A")} == names
    if is_shared:
        assert np.array_equal(filled["block0.o.lora_B"], filled["block1.o.lora_B"])
    matrices = {one.name: one for one in find_linears(fused) if one.name in coded}
    whole = {name: linear.w_NK() for name, linear in matrices.items()}  # small ones are codes alone
    for name in names:
        product_KN = filled[f"{name}.lora_A"] @ filled[f"{name}.lora_B"]
        assert np.abs(product_KN).max() > 0
        whole[name] = whole[name] + product_KN.T
    repaired = logits(fused, filled)
    want = graphs.logits(with_weights(reference, whole))
    assert np.abs(repaired - want).max() < 1e-4 * np.abs(want).max()
    # The other form of the same products: rounded to 8 bits, in the graph.
    pass_ = Compensate(rank=16)
    for linear in find_linears(in_graph):
        if linear.name in matrices:
            put_in_graph(in_graph.graph, linear, matrices[linear.name], filled, pass_)
    assert sum(one.is_side for one in find_linears(in_graph)) == len(names)
    assert np.abs(graphs.logits(in_graph) - repaired).max() < 0.02 * np.abs(want).max()
    assert np.abs(repaired - graphs.logits(fused)).max() > 0.03 * np.abs(want).max()


def put_in_graph(graph: ir.Graph, linear: Linear, coded: Linear, filled: dict[str, Array], pass_: Compensate) -> None:
    stored = [value.const_value.numpy() for value in coded.node.inputs[1:3] if value and value.const_value]
    name = linear.name
    codes = CodedMatrix(stored[0], stored[1], None, coded.num_in, 4, coded.node.attributes["block_size"].as_int())
    sides = None
    if f"{name}.lora_A" in filled:
        pair = filled[f"{name}.lora_A"], filled[f"{name}.lora_B"]
        first, second = (pass_._coded_factor(one.T, np.dtype(np.float32)) for one in pair)
        sides = store(graph, f"{name}.A", first), store(graph, f"{name}.B", second)
    replace_linear(linear, store(graph, name, codes), 0, sides)


def test_law_a_product_is_the_best_for_what_its_codes_leave(llama: ir.Model) -> None:
    linear = find_linears(llama)[0]
    num_in = linear.num_in
    rng = np.random.default_rng(0)
    x_TK = rng.standard_normal((512, num_in)) @ rng.standard_normal((num_in, num_in))
    stats = Stats(num_in)
    stats.update(x_TK.astype(np.float32))
    w_NK = linear.w_NK()
    rounded = np.round(w_NK * 8) / 8
    coded = Coded(Codes(rounded), 0.0, 1.0)  # type: ignore[arg-type]
    site = Site(linear.name, Format(4, 32, True), linear.w_NK, ir.DataType.FLOAT, linear.shape, rank=16)
    pass_ = Compensate(rank=16, form="adapter")
    record = pass_._fitted(Group([linear], stats), {id(linear): site}, {id(site): coded})
    left_NK = w_NK - rounded - (record["0.A"] @ record["0.B"]).T
    error = (w_NK - rounded).astype(np.float64)
    singular = np.linalg.svd(error @ np.linalg.cholesky(stats.hessian_KK), compute_uv=False)
    tail, moments_KK = float((singular[16:] ** 2).sum()), stats.hessian_KK.astype(np.float32)
    assert least_squares.quadratic(np.ascontiguousarray(left_NK.T), moments_KK) == pytest.approx(tail, rel=1e-3)
    energy = least_squares.quadratic(np.ascontiguousarray(w_NK.T), moments_KK)
    assert float(record["0.error"]) == pytest.approx((tail / energy) ** 0.5, rel=1e-3)
    # Codes without an error have nothing to repair.
    exact = Coded(Codes(w_NK), 0.0, 1.0)  # type: ignore[arg-type]
    assert pass_._fitted(Group([linear], stats), {id(linear): site}, {id(site): exact}) == {}


class Codes:
    """Stands for a `CodedMatrix` of which only the numbers are asked for."""

    def __init__(self, w_NK: Array) -> None:
        self._w_NK = w_NK

    def w_NK(self) -> Array:  # noqa: N802
        return self._w_NK


def test_products_are_fitted_behind_repaired_matrices(llama: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream that shows what a matrix reads has the products of those before it, not their codes alone."""
    seen: dict[str, Array] = {}
    real = Compensate._fitted

    def fitted(self: Compensate, group: Group, *rest: Any) -> Any:
        for linear in group.linears:
            seen[linear.name] = np.array(group.stats.hessian_KK)
        return real(self, group, *rest)

    monkeypatch.setattr(Compensate, "_fitted", fitted)
    other = llama.clone()
    run(llama, f"compensate(bits=2, rank=16, form='adapter', {FEW})")
    repaired, seen = seen, {}
    monkeypatch.setattr(Compensate, "_fitted", lambda self, *rest: fitted(self, *rest) and {})
    run(other, f"compensate(bits=2, rank=16, form='adapter', {FEW})")
    assert np.array_equal(repaired["block0.q"], seen["block0.q"])
    for name in ("block0.o", "block0.down", "block1.q"):
        assert not np.allclose(repaired[name], seen[name], rtol=1e-4)


def test_a_budget_is_kept_in_graph_and_file(llama: ir.Model, tmp_path: Path) -> None:
    few = f"scale_bits=32, {FEW}"
    written, reports = [], []
    for number, passes in enumerate(
        (f"gptq({few})", f"compensate(rank=16, size='60kB', probe=64, form='adapter', {few})")
    ):
        model = llama.clone()
        reports.append(run(model, passes))
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, write in reports[-1].files.items():
            write(folder / name)
        ir.save(model, folder / "model.onnx", external_data="model.data")
        written.append(sum(one.stat().st_size for one in folder.iterdir()))
    assert 20_000 < written[1] - written[0] <= 60_000
    some = {row["site"] for row in reports[1].ledger if row.get("rank")}
    filled = held(reports[1], model, tmp_path)
    assert {name.rpartition(".")[0] for name in filled} == some == set(find_slots(model))
    assert 0 < len(some) < len(reports[1].ledger)
    assert sum(row["repair_bytes"] for row in reports[1].ledger if row["site"] in some) == sum(
        one.nbytes for one in filled.values()
    )


def test_on_cuda_all_is_float16(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    cuda = {"target": TARGETS["cuda"]}
    model = opened(tiny_export("llama"), tmp_path, "fuse, cast_float16(tokens=0)", **cuda)
    report = run(model, f"compensate(rank=16, form='adapter', {FEW})", **cuda)
    assert {np.dtype(slot.dtype).name for slot in find_slots(model).values()} == {"float16"}
    assert {one.dtype.name for one in held(report, model, tmp_path).values()} == {"float16"}


def test_slots_for_other_adapters_are_not_mixed_with_it(llama: ir.Model, tmp_path: Path) -> None:
    taken, shared = llama.clone(), llama.clone()
    with pytest.raises(UnsupportedModelError, match="without slots for adapters, found those of 14 matrices") as caught:
        run(taken, f"lora_slots, compensate(rank=16, form='adapter', {FEW})")
    assert "form='graph'" in (caught.value.hint or "")
    run(llama, f"compensate(rank=16, {FEW}), lora_slots")  # what the hint says
    assert len(find_slots(llama)) == 14
    # The other way round slots of the repair are slots like all others.
    made = Context(calibration=CalibrationText(vocab_size=200, seed=1))
    some = FEW.replace("('head'", "('*.q', 'head'")
    passes = pipeline.parse(f"compensate(rank=16, form='adapter', {some}), lora_slots")
    repair, later = (report for _, report in pipeline.run(shared, passes, made))
    repaired = {row["site"] for row in repair.ledger if "rank" in row}
    assert {"block0.q", "block1.q"} <= set(later.changed)
    assert {skip.site for skip in later.skipped if skip.reason == "has a slot already"} == repaired
    assert len(find_slots(shared)) == 14
    assert {name.rpartition(".")[0] for name in held(repair, shared, tmp_path)} == repaired


def test_what_no_text_reaches_has_no_repair(llama: ir.Model) -> None:
    report = run(llama, f"compensate(rank=16, form='adapter', fallback=True, {FEW})")
    assert any("rounded to the nearest" in note for note in report.notes)
    assert not report.files
    assert not find_slots(llama)
    assert report.ledger


class Killed(BaseException):
    pass


def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(
    llama: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, fits, real = f"compensate(rank=16, form='adapter', {FEW})", [], Compensate._fitted

    def fitted(self: Compensate, *rest: Any) -> Any:
        if len(fits) == limit:
            raise Killed
        fits.append(rest)
        return real(self, *rest)

    monkeypatch.setattr(Compensate, "_fitted", fitted)
    want, broken, limit = llama.clone(), llama.clone(), -1
    wanted = held(run(want, passes), want, tmp_path)
    total, limit = len(fits), 3
    fits.clear()
    with pytest.raises(Killed):
        run(broken, passes, journal=Journal(tmp_path / "journal"))
    fits.clear()
    limit = -1
    found = held(run(llama, passes, journal=Journal(tmp_path / "journal")), llama, tmp_path)
    assert len(fits) == total - 3
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_text_and_options() -> None:
    text = "compensate(bits=2, rank=48, form='adapter')"
    assert str(pipeline.parse(text)) == text
    with pytest.raises(OptionError, match="form must be graph or adapter") as caught:
        Compensate(form="adaptor")  # type: ignore[arg-type]
    assert "adapter" in (caught.value.hint or "")
    with pytest.raises(OptionError, match="turns=2 has no effect with form='adapter'"):
        Compensate(turns=2, form="adapter")


@pytest.fixture(scope="module")
def artifact(tiny_export: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    passes = f"fuse, pack, compensate(bits=2, rank=16, form='adapter', {FEW})"
    output = tmp_path_factory.mktemp("repair") / "out"
    return optimize(tiny_export("llama"), output=output, passes=passes, calibration="english", measure=False)


def test_the_file_lies_beside_the_model(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    file = artifact.directory / FILE
    assert artifact.report["files"][FILE] == {"bytes": file.stat().st_size}
    (row,) = (one for one in artifact.report["passes"] if one["pass"].startswith("compensate"))
    assert any(f"{FILE} repairs 8 matrices" in note for note in row["notes"])
    repair = artifact.load_adapter(file)
    settings: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, "chat": False}
    texts = [artifact.generate("hello", adapter=one, **settings) for one in (None, repair, None)]
    assert texts[0] == texts[2] != texts[1]
    few = {"context": 32, "tokens": 64}
    found = [artifact.evaluate(adapter=one, **few).perplexity for one in (None, repair)]
    shown = []
    for extra in ([], ["--adapter", str(file)]):
        assert main(["eval", str(artifact.directory), "--context", "32", "--tokens", "64", "--json", *extra]) == 0
        shown.append(float(capsys.readouterr().out.partition('"perplexity": ')[2].partition(",")[0]))
    assert shown == pytest.approx(found, rel=1e-4)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_a_directory_with_the_file_can_be_written_again(artifact: Artifact, tmp_path: Path) -> None:
    place = tmp_path / "out"
    shutil.copytree(artifact.directory, place)
    optimize(artifact.directory, output=place, passes="simplify", measure=False)
    assert not (place / FILE).exists()
    assert find_slots(models.load(place, work_dir=tmp_path).model), "the file of another directory fits still"
