"""PruneFfn: what is left is the model with those channels cut out in torch; sizes, budgets, codes, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest
from decoders import decoder

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.artifact import write_graph
from onnxpress.compiler.calibration_arrays import CalibrationArrays
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.journal import Journal
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.models.tiny import tiny
from onnxpress.passes.pruning import _layers
from onnxpress.passes.pruning.prune_ffn import PruneFfn

Array = np.ndarray
TEXT = "tokens=512, length=32, probe=32"


def run(model: ir.Model, passes: str, **context: Any) -> Report:
    made = Context(calibration=CalibrationText(vocab_size=200, seed=1), **context)
    return pipeline.run(model, pipeline.parse(passes), made)[-1][1]


# (layers of the model, modules whose rows are channels, the module whose columns are)
MODULES = {
    "llama": ("layers", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "gemma2": ("layers", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "phi3": ("layers", ("mlp.gate_up_proj",), "mlp.down_proj"),
    "gpt_neox": ("layers", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    "gpt2": ("h", ("mlp.c_fc",), "mlp.c_proj"),
    "opt": ("decoder.layers", ("fc1",), "fc2"),
    "bert": ("encoder.layer", ("intermediate.dense",), "output.dense"),
    "vit": ("encoder.layer", ("intermediate.dense",), "output.dense"),
}
IMAGES = np.random.default_rng(2).standard_normal((24, 3, 32, 32)).astype(np.float32)


def cut_in_torch(architecture: str, cuts: dict[int, tuple[Array, Array]], ids: Array) -> Array:
    """Logits of transformers' model whose layers keep these channels, with new weights where they are read."""
    import torch

    model = tiny(architecture)
    path, makers, reader = MODULES[architecture]
    layers = model.base_model.get_submodule(path) if architecture != "opt" else model.model.decoder.layers
    with torch.no_grad():
        for number, (kept, down_NK) in cuts.items():
            index = torch.from_numpy(kept)
            for name in makers:
                module = layers[number].get_submodule(name)
                axis = 1 if type(module).__name__ == "Conv1D" else 0
                old = module.weight.shape[axis]
                halves = old // (down_width := tiny_width(layers[number].get_submodule(reader)))
                rows = torch.cat([index + half * down_width for half in range(halves)])
                module.weight = torch.nn.Parameter(module.weight.index_select(axis, rows))
                if module.bias is not None:
                    module.bias = torch.nn.Parameter(module.bias[rows])
                if hasattr(module, "nf"):
                    module.nf = len(rows)
            module = layers[number].get_submodule(reader)
            turned = type(module).__name__ == "Conv1D"
            module.weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(down_NK.T if turned else down_NK)))
        more = {} if architecture in ("bert", "vit") else {"use_cache": False}
        found: Array = model(torch.from_numpy(ids), **more).logits.numpy()
    return found


def tiny_width(module: Any) -> int:
    return int(module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1])


@pytest.mark.parametrize(
    ("architecture", "before"),
    [*((name, "fuse, pack") for name in MODULES), ("llama", ""), ("gemma2", ""), ("gpt_neox", ""), ("opt", "")],
)
def test_equals_the_same_surgery_in_torch(
    architecture: str, before: str, tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    source = models.load(tiny_export(architecture), work_dir=tmp_path)
    model = source.model
    if before:
        run(model, before, config=source.config)
    old = {one.name: one.w_NK().copy() for one in find_linears(model)}
    # Images take the place of text where the model reads them.
    arrays = CalibrationArrays({"pixel_values": IMAGES} if architecture == "vit" else {}, "images")
    report = run(model, f"prune_ffn(ratio=0.3, {TEXT})", config=source.config, arrays=arrays)
    assert ("images" in report.calibration["text"]) == (architecture == "vit")
    cuts = {}
    new = {one.name: one.w_NK() for one in find_linears(model)}
    for row in report.ledger:
        block = int(row["site"].removeprefix("block").partition(".")[0])
        kind = "gate_up" if f"block{block}.gate_up" in new else "up"
        rows_before, rows = old[f"block{block}.{kind}"], new[f"block{block}.{kind}"]
        halves = len(rows) // row["structures_after"]
        rows = rows[: row["structures_after"]]
        kept = np.flatnonzero((rows_before[: len(rows_before) // halves, None] == rows[None]).all(axis=2).any(axis=1))
        assert len(kept) == row["structures_after"] < row["structures_before"]
        cuts[block] = kept, new[f"block{block}.down"]
    assert cuts, report.skipped
    if architecture == "vit":
        got, given = graphs.run(model, {"pixel_values": IMAGES[:2]})["logits"], IMAGES[:2]
    else:
        given = np.random.default_rng(0).integers(3, 200, (2, 9))
        got = graphs.logits(model, given)
    check.close(cut_in_torch(architecture, cuts, given), got, tolerance=1e-5)


def test_layers_may_differ_and_the_ratio_is_that_of_all() -> None:
    model = decoder(layers=3)
    report = run(model, f"prune_ffn(ratio=0.3, {TEXT})")
    widths = [one.num_in for one in find_linears(model) if one.kind == "down"]
    assert 1 - sum(widths) / (3 * 64) == pytest.approx(0.3, abs=0.05)
    assert 1 - sum(widths) / (3 * 64) >= 0.3
    assert all(width % 8 == 0 for width in widths)
    after = sum(one.num_in * one.num_out for one in find_linears(model) if one.kind in ("up", "down"))
    assert report.metrics["parameters_after"] == after
    graphs.logits(model)


def test_fit_targets_and_choice_each_bring_the_outputs_nearer() -> None:
    want = graphs.logits(decoder(layers=4))

    def error(options: str, passes: str = "prune_ffn") -> float:
        model = decoder(layers=4)
        run(model, f"{passes}(ratio=0.4, {options}, tokens=4096, length=64, probe=64)")
        return float(((graphs.logits(model) - want) ** 2).mean())

    plain = error("allocation='uniform'")
    fitted = error("allocation='uniform', teacher=True")
    refitted = error("allocation='uniform', teacher=True, refit=True")
    assert fitted < plain
    assert refitted < 0.97 * fitted


def test_the_config_follows_where_it_can() -> None:
    config = {"intermediate_size": 64, "text_config": {"intermediate_size": 64}, "hidden_size": 32}
    run(decoder(), f"prune_ffn(ratio=0.25, allocation='uniform', {TEXT})", config=config)
    assert config == {"intermediate_size": 48, "text_config": {"intermediate_size": 48}, "hidden_size": 32}


@pytest.mark.parametrize("bits", [4, 8])
def test_of_codes_rows_stay_bit_for_bit_and_columns_keep_their_format(bits: int) -> None:
    model = decoder()
    run(model, f"rtn(bits={bits}, block_size=16)")
    old = {one.name: one for one in find_linears(model.clone())}
    report = run(model, f"prune_ffn(ratio=0.25, allocation='uniform', exclude=('block1.*',), {TEXT})")
    assert [row["site"] for row in report.ledger] == ["block0.ffn"]
    new = {one.name: one for one in find_linears(model)}
    assert new["block0.down"].holder == new["block0.up"].holder == "MatMulNBits"
    assert new["block0.down"].node.attributes["bits"].as_int() == bits
    levels = [some["block0.down"].node.attributes["accuracy_level"].value for some in (old, new)]
    assert levels[0] == levels[1]
    assert new["block0.down"].shape == (32, 48)
    rows_before, rows = old["block0.up"].w_NK(), new["block0.up"].w_NK()
    assert (rows_before[:, None] == rows[None]).all(axis=2).any(axis=0).all()
    for name in ("block1.up", "block1.down", "block0.q"):
        assert np.array_equal(new[name].w_NK(), old[name].w_NK())
    graphs.logits(model)


def test_codes_of_layers_that_stay_whole_are_what_they_were() -> None:
    model = decoder(layers=3)
    run(model, "rtn(bits=8, block_size=16)")
    old = {one.name: one.w_NK() for one in find_linears(model)}
    report = run(model, f"prune_ffn(ratio=0.05, {TEXT})")
    whole = {skip.site for skip in report.skipped}
    assert whole
    for one in find_linears(model):
        if one.kind == "down" and f"block{one.block}.ffn" in whole:
            assert one.holder == "MatMulNBits"
            assert np.array_equal(one.w_NK(), old[one.name])


def test_a_size_is_met_by_what_is_written(tmp_path: Path) -> None:
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    model = decoder(layers=4)
    write_graph(model, tmp_path / "before", pipeline="", max_in_flight_bytes=1 << 20)
    nbytes = sum(one.stat().st_size for one in (tmp_path / "before").iterdir())
    size = f"{nbytes * 85 // 100 // 1000}kB"
    run(model, f"prune_ffn(size='{size}', {TEXT})")
    write_graph(model, tmp_path / "after", pipeline="", max_in_flight_bytes=1 << 20)
    got = sum(one.stat().st_size for one in (tmp_path / "after").iterdir())
    assert 0.75 * nbytes < got <= int(size[:-2]) * 1000


def test_a_smaller_loss_keeps_more() -> None:
    reports = [run(decoder(layers=3), f"prune_ffn(kl={kl}, {TEXT})") for kl in (1e-4, 1e-3)]
    assert reports[1].metrics["parameters_after"] < reports[0].metrics["parameters_after"]
    assert 0 < reports[0].metrics["expected_kl"] <= 1e-4


def test_it_can_be_pruned_again_and_quantized() -> None:
    model = decoder()
    for expected in (48, 32):
        run(model, f"prune_ffn(ratio=0.25, allocation='uniform', {TEXT})")
        assert {one.num_in for one in find_linears(model) if one.kind == "down"} == {expected}
    want = graphs.logits(model)
    run(model, "gptq(bits=8, block_size=16, tokens=256, length=32)")
    assert np.abs(graphs.logits(model) - want).max() < 0.1 * np.abs(want).max()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [1, 3])
def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    passes, calls, resumed = f"prune_ffn(ratio=0.3, {TEXT})", [], True
    (tmp_path / "work").mkdir()
    for owner, method in ((_layers, "curve"), (PruneFfn, "_fitted")):
        real = getattr(owner, method)

        def watched(*arguments: Any, real: Any = real, method: str = method) -> Any:
            if len(calls) == moment and not resumed:
                raise Killed
            calls.append(method)
            return real(*arguments)

        monkeypatch.setattr(owner, method, watched)
    want, broken, again = decoder(), decoder(), decoder()
    run(want, passes, work_dir=tmp_path / "work")
    everything, resumed = list(calls), False
    calls.clear()
    with pytest.raises(Killed):
        run(broken, passes, journal=Journal(tmp_path / "journal"))
    resumed = True
    run(again, passes, journal=Journal(tmp_path / "journal"))
    assert calls == everything, "each unit is worked on once"
    assert graphs.text(again) == graphs.text(want)


def test_weights_that_are_not_finite_stay() -> None:
    model = decoder()
    broken = next(one for one in find_linears(model) if one.name == "block1.down")
    w_NK = broken.w_NK().copy()
    w_NK[0, 0] = np.nan
    broken.set_weight(lambda: w_NK, "broken")
    report = run(model, f"prune_ffn(ratio=0.3, allocation='uniform', {TEXT})")
    reasons = {skip.site: skip.reason for skip in report.skipped}
    assert "not finite" in reasons["block1.ffn"]
    assert "block0.ffn" in report.changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "expected one of ratio, size, kl and counts, got none"),
        ("ratio=0.2, size='1MB'", "got ratio and size"),
        ("ratio=1.2", "ratio must be between 0 and 1"),
        ("size='much'", "size must be a size such as '90MB'"),
        ("kl=0.0", "kl must be positive"),
        ("size='1MB', allocation='uniform'", "allocation must be 'kl' or 'loss' without a ratio"),
        ("kl=0.1, allocation='loss'", "allocation must be 'kl' where kl is given"),
        ("ratio=0.2, multiple=0", "multiple must be at least 1"),
        ("ratio=0.2, probe=1", "probe must be at least 16"),
        ("ratio=0.2, refit=True", "refit must be False without teacher"),
    ],
)
def test_options_are_checked(options: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pipeline.parse(f"prune_ffn({options})")


def test_what_cannot_be_met_is_refused_with_the_nearest() -> None:
    model = decoder()
    before = graphs.text(model)
    for options, message in (
        ("ratio=0.99", r"cannot be met, all layers at the smallest size take ratio=0\.875"),
        ("size='1kB'", "cannot be met, all layers at the smallest size take size='"),
        ("size='1GB'", "size=1GB is met as it is: the model takes"),
        ("kl=1e-9", "cannot be met, the least that anything costs is"),
        ("ratio=0.2, exclude=('nothing',)", "exclude='nothing' matches no layer"),
    ):
        with pytest.raises(OptionError, match=message) as caught:
            run(model, f"prune_ffn({options}, {TEXT})")
        assert caught.value.hint
    assert graphs.text(model) == before


def test_what_is_no_layer_of_its_own_is_reported(tiny_export: Callable[..., Path]) -> None:
    model = decoder()
    features = next(node for node in model.graph if node.name == "l0.tanh").outputs[0]
    extra = ir.Node("", "ReduceSum", [features], name="probe")
    extra.outputs[0].name, extra.outputs[0].dtype = "probe", ir.DataType.FLOAT
    model.graph.append(extra)
    model.graph.outputs.append(extra.outputs[0])
    report = run(model, f"prune_ffn(ratio=0.25, allocation='uniform', {TEXT})")
    assert {skip.site: skip.reason for skip in report.skipped} == {
        "block0.ffn": "its channels are not its own: ReduceSum reads them too"
    }
    run(model, "svd(ratio=0.3, kinds=('down',))")
    again = run(model, f"prune_ffn(ratio=0.25, {TEXT})")
    assert not again.modified
    assert "pair of low rank" in {skip.site: skip.reason for skip in again.skipped}["block1.ffn"]


def test_channels_that_are_never_on_go_first_and_cost_nothing() -> None:
    model = decoder()
    up = next(one for one in find_linears(model) if one.name == "block0.up")
    w_NK = up.w_NK().copy()
    w_NK[::4] = 0
    up.set_weight(lambda: w_NK, "off")
    want = graphs.logits(model)
    run(model, f"prune_ffn(ratio=0.25, allocation='uniform', exclude=('block1.*',), {TEXT})")
    left = next(one for one in find_linears(model) if one.name == "block0.up").w_NK()
    assert np.abs(left).sum(axis=1).min() > 0
    np.testing.assert_allclose(graphs.logits(model), want, atol=1e-4 * np.abs(want).max())


def test_a_size_of_a_quantized_model_counts_its_codes(tmp_path: Path) -> None:
    model = decoder(layers=4)
    run(model, "rtn(bits=4, block_size=16)")
    write_graph(model, tmp_path, pipeline="", max_in_flight_bytes=1 << 20)
    nbytes = sum(one.stat().st_size for one in tmp_path.iterdir())
    report = run(model, f"prune_ffn(size='{nbytes * 97 // 100000}kB', {TEXT})")
    assert report.metrics["parameters_after"] < report.metrics["parameters_before"]


def test_codes_come_back_where_a_layer_is_left_out() -> None:
    model = decoder(layers=3)
    run(model, "rtn(bits=8, block_size=16)")
    broken = next(one for one in find_linears(model) if one.name == "block2.down")
    scale = broken.weights[1].const_value.numpy().copy()  # type: ignore[union-attr]
    scale[0, 0] = np.nan
    broken.weights[1].const_value = ir.tensor(scale, name=broken.weights[1].name)
    report = run(model, f"prune_ffn(ratio=0.3, allocation='loss', {TEXT})")
    assert "block0.ffn" in report.changed
    assert {one.holder for one in find_linears(model) if one.kind == "down"} == {"MatMulNBits"}


@pytest.mark.parametrize("option", ["teacher=False", "teacher=True"])
def test_layers_that_stay_whole_keep_their_weights_unless_they_may_change(option: str) -> None:
    model = decoder(layers=3)
    old = {one.name: one.w_NK().copy() for one in find_linears(model)}
    report = run(model, f"prune_ffn(ratio=0.05, {option}, {TEXT})")
    whole = [skip.site.removesuffix("ffn") + "down" for skip in report.skipped]
    assert whole
    new = {one.name: one.w_NK() for one in find_linears(model)}
    for name in whole:
        assert np.array_equal(old[name], new[name])
    assert not any("make up for" in note for note in report.notes)


def test_a_config_says_no_width_that_some_layers_lack() -> None:
    config = {"intermediate_size": 64, "vision_config": {"intermediate_size": 64}}
    report = run(
        decoder(layers=3), f"prune_ffn(ratio=0.5, allocation='uniform', exclude=('block0.*',), {TEXT})", config=config
    )
    assert config == {"intermediate_size": 64, "vision_config": {"intermediate_size": 64}}
    assert any("different widths" in note for note in report.notes)
    gpt2: dict[str, Any] = {"n_embd": 16, "n_inner": None}
    run(decoder(), f"prune_ffn(ratio=0.5, allocation='uniform', {TEXT})", config=gpt2)
    assert gpt2 == {"n_embd": 16, "n_inner": 32}


def test_a_factor_for_all_channels_is_no_maker_of_them() -> None:
    """A product with one number a token before the reader: broadcast, not a channel each."""
    model = decoder()
    nodes = {node.name: node for node in model.graph}
    weight = ir.Value(name="scalar.weight", const_value=ir.tensor(np.ones((32, 1), np.float32), name="scalar.weight"))
    weight.shape, weight.type = ir.Shape([32, 1]), ir.TensorType(ir.DataType.FLOAT)
    model.graph.register_initializer(weight)
    scalar = ir.Node("", "MatMul", [nodes["l0.up"].inputs[0], weight], name="scalar")
    product = ir.Node("", "Mul", [nodes["l0.tanh"].outputs[0], scalar.outputs[0]], name="scaled")
    for node in (scalar, product):
        node.outputs[0].name, node.outputs[0].dtype = node.name, ir.DataType.FLOAT
    model.graph.insert_before(nodes["l0.down"], [scalar, product])
    nodes["l0.down"].replace_input_with(0, product.outputs[0])
    report = run(model, f"prune_ffn(ratio=0.25, allocation='uniform', {TEXT})")
    assert "makes something else too" in {skip.site: skip.reason for skip in report.skipped}["block0.ffn"]
    graphs.logits(model)


def test_counts_say_what_each_layer_keeps() -> None:
    by_ratio, by_counts = decoder(), decoder()
    run(by_ratio, f"prune_ffn(ratio=0.3, {TEXT})")
    widths = [one.num_in for one in find_linears(by_ratio) if one.kind == "down"]
    run(by_counts, f"prune_ffn(counts={tuple(widths)!r}, {TEXT})")
    assert graphs.text(by_counts) == graphs.text(by_ratio)


@pytest.mark.parametrize(
    "counts, message, hint",
    [
        ("(8,)", "one number for each of 2 layers, got 1", "counts=(64, 64,)"),
        ("(8, 13)", "block1.ffn has 64 channels, and can keep a multiple of 8, got 13", "the nearest is 16"),
        ("(8, 0)", "counts must be numbers of at least 1", None),
    ],
)
def test_counts_that_cannot_be_are_refused(counts: str, message: str, hint: str | None) -> None:
    with pytest.raises(OptionError) as caught:
        run(decoder(), f"prune_ffn(counts={counts}, {TEXT})")
    assert message in caught.value.message
    assert hint is None or hint in str(caught.value.hint)
