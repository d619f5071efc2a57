"""Channels of convolutional and plain networks: the same surgery in torch, the fit, what is left whole and refused."""

from __future__ import annotations

import functools
from typing import Any

import graphs
import numpy as np
import onnx
import onnx_ir as ir
import plain_networks
import pytest
import torch
from onnx_ir.passes import common

from onnxpress.compiler import obs, pipeline, sizes
from onnxpress.compiler.calibration_arrays import CalibrationArrays
from onnxpress.compiler.errors import CalibrationError, OptionError
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.pruning import _channel_fit as fitting
from onnxpress.passes.pruning._channel_groups import alive_without, find_groups, weigh
from onnxpress.passes.pruning._channel_readers import find_readers
from onnxpress.passes.pruning._channel_rules import follow
from onnxpress.passes.pruning._channel_walk import Walk, name_of, walk
from onnxpress.passes.pruning.prune_channels import PruneChannels

Array = np.ndarray[Any, Any]
every_network = pytest.mark.parametrize("name", plain_networks.NETWORKS)


@functools.cache
def _stored(name: str) -> bytes:
    model = plain_networks.export(plain_networks.network(name), plain_networks.inputs(name, 2))
    common.ShapeInferencePass()(model)  # so that shapes are declared, which have to follow
    return ir.to_proto(model).SerializeToString()


def exported(name: str) -> ir.Model:
    return ir.from_proto(onnx.load_from_string(_stored(name)))


def samples(name: str, count: int = 96) -> Context:
    return Context(arrays=CalibrationArrays({"x": plain_networks.inputs(name, count, seed=3).numpy()}, "samples"))


def run(model: ir.Model, text: str, context: Context | None = None) -> Report:
    (pass_,) = pipeline.parse(f"prune_channels({text})").passes
    return pass_.run(model, context or Context())


def outputs(model: ir.Model, x: torch.Tensor) -> Array:
    return graphs.run(model, {"x": x.numpy()})["y"]


def error(model: ir.Model, expected: Array, x: torch.Tensor) -> float:
    return float(np.linalg.norm(outputs(model, x) - expected) / np.linalg.norm(expected))


def valid(model: ir.Model) -> None:
    """The declared shapes are those that follow from the weights."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)


def plan(model: ir.Model, ratio: float, multiple: int = 8) -> tuple[Walk, Array]:
    """What the pass takes out by weights alone: the walk, and the roots that go."""
    walked = walk(model, follow)
    groups = find_groups(walked, Report())
    gone = []
    for group in groups:
        group.set_counts(multiple)
        weigh(walked, [group])
        nearest = min(range(len(group.counts)), key=lambda one: abs(group.counts[one] - (1 - ratio) * group.total))
        gone.append(np.delete(group.roots, group.kept[nearest]))
    return walked, np.concatenate(gone)


def module(made: torch.nn.Module, node: ir.Node) -> torch.nn.Module:
    """The module of which the exporter made a node: "/blocks/blocks.0/one/Conv" is blocks.0.one."""
    path: list[str] = []
    for part in name_of(node).split("/")[1:-1]:
        path = [*path[:-1], *part.split(".")] if path and part.startswith(f"{path[-1]}.") else [*path, part]
    return made.get_submodule(".".join(path))


def masked(name: str, ratio: float) -> torch.nn.Module:
    """The network in torch, where every product reads zeros in place of the channels that the pass takes out."""
    model, made = exported(name), plain_networks.network(name)
    walked, gone = plan(model, ratio)
    alive = alive_without(walked, gone)
    for cut in walked.cuts:
        source = walked.of(cut.node.inputs[0])
        if cut.role != "column" or source is None:
            continue
        stays = torch.from_numpy(alive(source.labels))

        def zero(_: Any, given: tuple[torch.Tensor], stays: torch.Tensor = stays) -> tuple[torch.Tensor]:
            (x,) = given
            return (x * stays.reshape(1, -1, *(1,) * (x.ndim - 2)),)

        module(made, cut.node).register_forward_pre_hook(zero)
    return made


@every_network
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_is_the_same_surgery_as_in_torch(name: str, ratio: float) -> None:
    model, x = exported(name), plain_networks.inputs(name, 4)
    before = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None)
    with torch.no_grad():
        expected = masked(name, ratio)(x).numpy()
    report = run(model, f"ratio={ratio}")
    valid(model)
    np.testing.assert_allclose(outputs(model, x), expected, atol=1e-5)
    after = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None)
    assert after < (1 - ratio / 2) * before
    assert report.metrics["channels_after"] < (1 - ratio / 2) * report.metrics["channels_before"]
    assert [skip.site for skip in report.skipped if "output of the model" not in skip.reason] == []


def test_what_each_network_couples() -> None:
    """Which layers make each group, by hand."""
    expected = {
        "residual": {"stem.0 blocks.0.two", "blocks.1.two blocks.1.down blocks.2.two"},
        "inverted": {"stem down", "up gate.excite", "gate.squeeze"},
        "dense": {"stem", "one", "two", "last"},
    }
    for name, groups in expected.items():
        made = plain_networks.network(name)
        names = {id(one): key for key, one in made.named_modules()}
        walked = walk(exported(name), follow)
        nodes = {name_of(cut.node): cut.node for cut in walked.cuts}
        found = find_groups(walked, Report())
        assert groups <= {" ".join(names[id(module(made, nodes[one]))] for one in group.makers) for group in found}


@every_network
def test_the_fit_lowers_the_error_on_other_data(name: str) -> None:
    x = plain_networks.inputs(name, 64, seed=5)
    expected = outputs(exported(name), x)
    errors = {}
    for options in ("ratio=0.4", "ratio=0.4, refit=False"):
        model = exported(name)
        report = run(model, options, samples(name))
        valid(model)
        errors[options] = error(model, expected, x)
        assert ("output_error" in report.metrics) == ("refit" not in options)
    assert errors["ratio=0.4"] < 0.7 * errors["ratio=0.4, refit=False"]


def test_channels_that_never_vary_cost_nothing() -> None:
    """Zeros by weights alone; numbers, too, with data, where a bias takes them over."""
    torch.manual_seed(0)
    made = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 24, 3, 1, 1), torch.nn.ReLU(), torch.nn.Conv2d(24, 16, 3), torch.nn.ReLU()),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 5)),
    )
    first, second = made[0], made[2]
    assert isinstance(first, torch.nn.Conv2d)
    assert isinstance(second, torch.nn.Conv2d)
    x = plain_networks.inputs("residual", 8)
    for value, context in ((0.0, Context()), (0.7, samples("residual", 64))):
        with torch.no_grad():
            first.weight[3:11] = 0
            assert first.bias is not None
            first.bias[3:11] = value
        model = plain_networks.export(made, x)
        report = run(model, "ratio=0.3, exclude=('/2/Conv',)", context)
        assert [row["channels_after"] for row in report.ledger] == [16]
        with torch.no_grad():
            np.testing.assert_allclose(outputs(model, x), made(x).numpy(), atol=1e-5)


def test_a_single_reader_loses_what_the_surgeon_says() -> None:
    rng = np.random.default_rng(0)
    w_NK, x_TK = rng.standard_normal((6, 12)), rng.standard_normal((80, 12)) @ rng.standard_normal((12, 12))
    h_KK = x_TK.T @ x_TK / 80
    places = np.arange(12).reshape(6, 2)
    whole = float(np.einsum("nk,nk->", w_NK @ h_KK, w_NK))
    ours = list(fitting.eliminate_together([fitting.part(w_NK, h_KK, places)], 6, [6, 4, 3]))
    for (kept, loss), other in zip(ours, obs.eliminate(w_NK, h_KK, 2, [6, 4, 3]), strict=True):
        assert list(kept) == list(other.kept)
        assert loss * whole == pytest.approx(other.loss)


def test_two_readers_decide_together() -> None:
    """A channel that one of them needs stays, however little it is to the other."""
    strong, weak = np.array([[3.0, 0.1, 1.0]]), np.array([[0.1, 3.0, 1.0]])
    parts = [fitting.part(w, np.eye(3), np.arange(3)[:, None]) for w in (strong, weak)]
    (kept, loss), *_ = fitting.eliminate_together(parts, 3, [2])
    assert list(kept) == [0, 1]
    assert loss == pytest.approx(2 / 10.01)


def test_a_fit_that_does_not_help_on_other_samples_is_left_out() -> None:
    rng = np.random.default_rng(0)
    sums = [fitting._Sums(21, 4) for _ in range(2)]
    for one in sums:  # what is missing has nothing to do with what is seen
        z = np.concatenate([rng.standard_normal((22, 20)), np.ones((22, 1))], axis=1).astype(np.float32)
        one.add(z, rng.standard_normal((22, 4)).astype(np.float32))
    sums[1].cross *= -1
    change, before, after = fitting.best_change(*sums, with_bias=True)
    assert not change.any()
    assert before == after


@pytest.mark.parametrize(
    "tail, reason",
    [
        ("s = Softmax <axis = 1> (h)", "Softmax s normalizes over them"),
        ("s = ReduceMean <keepdims = 1> (h, one)", "ReduceMean s mixes them"),
        ("s = Add (h, rest)", "Add s combines them with rest, which is not cut"),
        ("s = DepthToSpace <blocksize = 2> (h)", "DepthToSpace s reads them, which this pass does not see through"),
        ("s = Cast <to = 1> (n)\n n = Shape (h)", "Shape n reads their number"),
    ],
)
def test_what_is_not_understood_stays_whole(tail: str, reason: str) -> None:
    lines = "\n".join(reversed(tail.split("\n")))
    model = ir.from_onnx_text(f"""<ir_version: 8, opset_import: ["": 18]>
        net (float[n, 3, 8, 8] x, float[n, 16, 8, 8] rest) => (float y)
        <int64[1] one = {{1}}>
        {{
            h = Conv <kernel_shape = [1, 1]> (x, w)
            {lines}
            v = Conv <kernel_shape = [1, 1]> (h, u)
            t = ReduceSum (s)
            a = ReduceSum (v)
            y = Add (t, a)
        }}""")
    add_weights(model, w=(16, 3, 1, 1), u=(4, 16, 1, 1))
    with pytest.raises(OptionError, match="no channels that can go") as caught:
        run(model, "ratio=0.5")
    assert caught.value.hint
    report = Report()
    assert not find_groups(walk(model, follow), report)
    assert {skip.site: skip.reason for skip in report.skipped}["h"] == reason


def add_weights(model: ir.Model, **shapes: tuple[int, ...]) -> None:
    """Random weights for names that a text only mentions."""
    rng = np.random.default_rng(0)
    for value in {id(one): one for node in model.graph for one in node.inputs if one is not None}.values():
        if value.name in shapes:
            value.const_value = ir.tensor(rng.standard_normal(shapes[value.name]).astype(np.float32), name=value.name)
            value.shape, value.dtype = value.const_value.shape, ir.DataType.FLOAT
            model.graph.register_initializer(value)


def net(body: str, head: str = "(float[n, 16] x) => (float[n, 4] y)", **shapes: tuple[int, ...]) -> ir.Model:
    """A graph, and random weights by name."""
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": 18]>\nnet {head} {{\n{body}\n}}')
    add_weights(model, **shapes)
    return model


def vectors(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32)


def given(x: Array) -> Context:
    return Context(arrays=CalibrationArrays({"x": x}, "samples"))


IMAGES = "(float[2, 3, 8, 8] x) => (float y)"


@pytest.mark.parametrize(
    "body, head, shapes, site, reason",
    [
        (
            """sh = Shape (x)
            n0 = Gather <axis = 0> (sh, zero)
            target = Concat <axis = 0> (n0, sixteen, rest)
            a = Conv (x, w)
            ar = Reshape (a, target)
            b = Conv (x, v)
            z = Reshape (b, target)
            y = Conv (ar, u)""",
            "(float[n, 3, 8, 8] x) => (float y, float z)\n"
            "<int64[1] zero = {0}, int64[1] sixteen = {16}, int64[1] rest = {64}>",
            {"w": (16, 3, 1, 1), "v": (16, 3, 1, 1), "u": (4, 16, 1)},
            "a",
            "Reshape ar computes its target",
        ),
        (
            """h = Conv (x, w)
            s = Sigmoid (h)
            k = Cast <to = 7> (s)
            q = Gather <axis = 0> (table, k)
            a = Conv (h, u)
            b = Conv (q, v)
            y = Add (a, b)""",
            IMAGES,
            {"w": (16, 3, 1, 1), "u": (4, 16, 1, 1), "v": (4, 16, 1, 1), "table": (8,)},
            "h",
            "Gather q reads them beside what it works on",
        ),
        (
            """h = Conv (x, w)
            p, i = MaxPool <kernel_shape = [2, 2]> (h)
            y = Conv (p, u)""",
            "(float[2, 3, 8, 8] x) => (float y, int64 i)",
            {"w": (16, 3, 1, 1), "u": (4, 16, 1, 1)},
            "h",
            "MaxPool p reads them, which this pass does not see through",
        ),
        (
            """h = Conv (x, w)
            c = Resize <mode = "nearest", axes = [-3]> (h, , twice)
            y = Conv (c, u)""",
            IMAGES + " <float[1] twice = {2.0}>",
            {"w": (16, 3, 1, 1), "u": (4, 32, 1, 1)},
            "h",
            "Resize c reads them, which this pass does not see through",
        ),
        (
            """h = Gemm (x, w)
            f = Flatten <axis = 2> (h)
            y = MatMul (f, u)""",
            "(float[2, 16] x) => (float y)",
            {"w": (16, 24), "u": (1, 5)},
            "h",
            "MatMul y reads them, which this pass does not see through",
        ),
    ],
)
def test_what_another_reader_needs_stays_whole(
    body: str, head: str, shapes: dict[str, tuple[int, ...]], site: str, reason: str
) -> None:
    report = Report()
    assert not find_groups(walk(net(body, head, **shapes), follow), report)
    assert {skip.site: skip.reason for skip in report.skipped}[site] == reason


@pytest.mark.parametrize("size", ["3", "k"])
def test_a_gate_of_one_channel_spreads_over_others(size: str) -> None:
    """Where a graph does not say over how many, nothing that is put behind them can be told apart."""
    model = net(
        """g = Conv (x, gate)
        t = Mul (g, x)
        h = Conv (x, w)
        c = Concat <axis = 1> (t, h)
        y = Conv (c, u)""",
        f"(float[2, {size}, 8, 8] x) => (float y)",
        gate=(1, 3, 1, 1),
        w=(16, 3, 1, 1),
        u=(4, 19, 1, 1),
    )
    if size == "k":
        with pytest.raises(OptionError, match="no channels that can go"):
            run(model, "ratio=0.5")
        return
    assert [row["channels_after"] for row in run(model, "ratio=0.5").ledger] == [8]
    graphs.run(model, {"x": np.ones((2, 3, 8, 8), np.float32)})


def test_a_value_of_another_size_has_no_channels() -> None:
    value = ir.val("h", ir.DataType.FLOAT, [2, 3])
    walked = Walk(18, {id(value): (2, 3)})
    labels = walked.new(4)
    walked.give(value, 1, labels)
    assert walked.of(value) is None
    assert walked.reason(0) == "h has another size than their number"


@pytest.mark.parametrize(
    "parts", ["l, r = Split <axis = 1> (h, eights)", "l = Slice (h, none, eight, one)\nr = Slice (h, eight, all, one)"]
)
def test_no_part_of_what_is_split_is_emptied(parts: str) -> None:
    """However little one of them weighs: runtimes refuse tensors of no channels."""
    model = net(
        f"""h = Conv (x, w)
        {parts}
        m = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r)
        c = Concat <axis = 1> (l, m)
        y = Conv (c, u)""",
        IMAGES + " <int64[2] eights = {8, 8}, int64[1] none = {0}, int64[1] eight = {8}, int64[1] all = {99},"
        " int64[1] one = {1}>",
        w=(16, 3, 1, 1),
        u=(4, 16, 1, 1),
    )
    for name in ("w", "u"):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        array[(slice(8, None),) if name == "w" else (slice(None), slice(8, None))] *= 1e-3
        value.const_value = ir.tensor(array, name=name)
    report = run(model, "ratio=0.5, multiple=4")
    assert [row["channels_after"] for row in report.ledger] == [4, 4]
    graphs.run(model, {"x": np.ones((2, 3, 8, 8), np.float32)})


THREE = """a = Gemm (x, w)
    r = Relu (a)
    b = Gemm (r, u)
    s = Relu (b)
    c = Gemm (s, SECOND)
    t = Relu (c)
    d = Gemm (t, THIRD)
    y = Gemm (d, v)"""


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("kind", ["shared", "copied", "plain"])
def test_a_size_counts_what_is_shared_and_what_the_fit_adds(kind: str, with_data: bool) -> None:
    shapes = {"w": (16, 64), "u": (64, 64), "v": (64, 4)}
    if kind == "shared":
        model = net(THREE.replace("SECOND", "u").replace("THIRD", "u"), **shapes)
    elif kind == "copied":
        copies = "second = Identity (u)\n third = Identity (u)\n"
        model = net(copies + THREE.replace("SECOND", "second").replace("THIRD", "third"), **shapes)
    else:
        model = net("a = Gemm (x, w)\n r = Relu (a)\n y = Gemm (r, u)", w=(16, 16), u=(16, 512))
        model.graph.outputs[0].shape = ir.Shape(["n", 512])
    asked = int(0.75 * sizes.bytes_besides(model, []))
    run(model, f"size='{asked}', multiple=1", given(vectors(64)) if with_data else None)
    assert 0.85 * asked < sizes.bytes_besides(model, []) <= asked
    if kind != "plain":
        matrices = [value for value in model.graph.initializers.values() if len(value.shape or ()) == 2]
        assert len(matrices) == 3
    graphs.run(model, {"x": vectors(2)})


def test_a_fit_is_judged_within_one_window_too() -> None:
    x = vectors(16, seed=1) @ np.diag([4.0] * 3 + [0.1] * 13).astype(np.float32)
    found = {}
    for count in (16, 1):
        model = net("a = Gemm (x, w)\n r = Tanh (a)\n y = Gemm (r, v)", w=(16, 32), v=(32, 4))
        found[count] = run(model, "ratio=0.5", given(x[:count]))
    assert 0 < found[16].metrics["output_error"] < found[16].metrics["output_error_unfitted"]
    assert "output_error" not in found[1].metrics
    assert "refit" in {skip.site for skip in found[1].skipped}
    assert "removed, fitted" in found[16].notes[0]
    assert "not fitted" in found[1].notes[0]


def test_a_matrix_too_wide_for_second_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias is fitted, where there may be one."""
    monkeypatch.setattr(fitting, "_WIDEST", 8)
    for kind, told in (("MatMul", "not fitted"), ("Gemm", "removed, fitted")):
        model = net(f"a = Gemm (x, w)\n r = Relu (a)\n y = {kind} (r, v)", w=(16, 32), v=(32, 4))
        assert told in run(model, "ratio=0.5", given(vectors(64))).notes[0]
        graphs.run(model, {"x": vectors(2)})


def test_a_scale_of_the_bias_changes_nothing() -> None:
    """beta of Gemm; what is multiplied with 0 is none."""
    found = {}
    for beta in (1.0, 2.0, 0.0):
        model = net(
            f"""a = Gemm (x, w)
            r = Relu (a)
            b = Gemm <beta = {beta}> (r, u)
            s = Relu (b)
            y = Gemm <beta = {beta}> (s, v)""",
            w=(16, 32),
            u=(32, 32),
            v=(32, 4),
        )
        run(model, "ratio=0.5", given(vectors(64)))
        found[beta] = graphs.run(model, {"x": vectors(32, seed=1)})["y"]
    np.testing.assert_allclose(found[1.0], found[2.0], rtol=1e-3, atol=1e-2)
    assert not np.allclose(found[1.0], found[0.0], rtol=1e-3, atol=1e-2)


def test_groups_without_numbers_are_not_counted_on() -> None:
    """Where a logarithm of what is negative goes in, nothing is known of what channels are worth."""
    body = "a = Gemm (x, w)\n l = Log (a)\n b = Gemm (l, u)\n"
    shapes = {"w": (16, 64), "u": (64, 4)}
    with pytest.raises(CalibrationError, match="not finite") as caught:
        run(net(body + "y = Identity (b)", **shapes), "ratio=0.5", given(vectors(64)))
    assert caught.value.hint
    other = "c = Gemm (x, v)\n r = Relu (c)\n d = Gemm (r, t)\n y = Add (b, d)"
    model = net(body + other, **shapes, v=(16, 64), t=(64, 4))
    asked = int(0.5 * sizes.bytes_besides(model, []))
    with pytest.raises(OptionError, match="cannot be met"):
        run(model, f"size='{asked}'", given(vectors(64)))


def test_weights_that_several_layers_share_stay_one() -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["": 18]>
        net (float[n, 16] x) => (float[n, 4] y)
        {
            a = Gemm (x, w)
            r = Relu (a)
            b = Gemm (r, u)
            s = Relu (b)
            c = Gemm (s, u)
            y = Gemm (c, v)
        }""")
    add_weights(model, w=(16, 24), u=(24, 24), v=(24, 4))
    assert len(run(model, "ratio=0.3").changed) == 1
    assert sorted(tuple(value.shape or ()) for value in model.graph.initializers.values()) == [
        (16, 4),
        (16, 16),
        (16, 16),
    ]
    valid(model)


def test_a_bias_that_is_computed_and_one_that_is_stored_once() -> None:
    """Of what is added unknown nothing is cut; torch's exporter reads equal weights through Identity."""
    text = """<ir_version: 8, opset_import: ["": 18]>
        net (float[n, 3, 8, 8] x, float[16] given) => (float[n, 4, 8, 8] y)
        {
            same = Identity (bias)
            a = Conv (x, w, bias)
            b = Conv (a, u, OTHER)
            c = Conv (b, v)
            y = Conv (c, t)
        }"""
    counts = {"same": [(16, 8), (16, 8), (16, 8)], "given": [(16, 8)]}
    for other, expected in counts.items():
        model = ir.from_onnx_text(text.replace("OTHER", other))
        add_weights(model, w=(16, 3, 1, 1), u=(16, 16, 1, 1), v=(16, 16, 3, 3), t=(4, 16, 1, 1), bias=(16,))
        model.graph[3].attributes["pads"] = ir.AttrInt64s("pads", [1] * 4)
        x = plain_networks.inputs("flat", 2)[:, :, :8, :8].numpy()
        report = run(model, "ratio=0.5")
        assert [(row["channels_before"], row["channels_after"]) for row in report.ledger] == expected
        assert ("Identity" in {node.op_type for node in model.graph}) == (other == "given")
        graphs.run(model, {"x": x, "given": np.zeros(16, np.float32)})


def test_a_second_run_takes_out_more() -> None:
    model = exported("residual")
    run(model, "ratio=0.25")
    names = [value.name for value in model.graph.initializers.values()]
    report = run(model, "ratio=0.25, multiple=4")
    assert report.changed
    assert not any(str(name).count(".pruned") > 1 for name in names)
    valid(model)


def test_what_is_excluded_stays() -> None:
    model = exported("residual")
    report = run(model, "ratio=0.5, exclude=('/blocks/blocks.0/two/*', '/blocks/blocks.2/one/Conv')")
    assert {skip.site for skip in report.skipped if skip.reason == "excluded"} == {
        "/stem/stem.0/Conv",
        "/blocks/blocks.2/one/Conv",
    }
    assert [row["channels_after"] for row in report.ledger] == [8, 16, 16]


def test_a_size_is_met() -> None:
    model = exported("residual")
    size = len(ir.to_proto(model).SerializeToString())
    for share in (0.7, 0.4):
        model = exported("residual")
        run(model, f"size='{size * share / 1000:.0f}kB', multiple=2")
        assert 0.85 * share * size < len(ir.to_proto(model).SerializeToString()) <= share * size


@pytest.mark.parametrize(
    "options, message, hint",
    [
        ("", "expected one of ratio and size, got none", "ratio=0.3"),
        ("ratio=0.3, size='1MB'", "expected one of ratio and size, got both", "ratio=0.3"),
        ("ratio=1.2", "ratio must be between 0 and 1", "0.3 removes 30 %"),
        ("ratio=0.97", "each group keeps 8, which removes 69%", "the nearest is ratio=0.687"),
        ("ratio=0.01", "removes nothing at multiples of 8", "the nearest is ratio=0.126"),
        ("size='90MB'", "is met as it is", "ask for less"),
        ("size='1kB'", "cannot be met", "the nearest is size='"),
        ("ratio=0.3, exclude=('nothing',)", "matches no node", "they are called /stem/stem.0/Conv"),
        ("ratio=0.3, exclude=('*',)", "no channels that can go: excluded", "prune_ffn"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest(options: str, message: str, hint: str) -> None:
    model = exported("residual")
    before = graphs.text(model)
    with pytest.raises(OptionError) as caught:
        run(model, options)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)
    assert graphs.text(model) == before


def test_the_nearest_that_is_told_can_be_had() -> None:
    for ratio in (0.687, 0.126):
        assert PruneChannels(ratio=ratio).run(exported("residual"), Context()).changed


@pytest.mark.parametrize(
    "size, kernel, attributes",
    [
        (
            (2, 4, 9, 8),
            (6, 4, 3, 2),
            "kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 0, 1], dilations = [1, 2]",
        ),
        ((2, 4, 9, 8), (6, 2, 3, 3), "kernel_shape = [3, 3], group = 2, auto_pad = 'SAME_UPPER', strides = [2, 2]"),
        ((2, 4, 9, 8), (6, 4, 2, 2), "kernel_shape = [2, 2], auto_pad = 'SAME_LOWER'"),
        ((2, 4, 9), (6, 4, 3), "kernel_shape = [3], pads = [2, 0], dilations = [2]"),
        ((1, 4, 3, 4, 5), (6, 4, 2, 2, 2), "kernel_shape = [2, 2, 2], auto_pad = 'VALID'"),
    ],
)
def test_patches_times_matrix_is_the_convolution(
    size: tuple[int, ...], kernel: tuple[int, ...], attributes: str
) -> None:
    attributes = attributes.replace("'", '"')
    shape = ", ".join(map(str, size))
    model = ir.from_onnx_text(f"""<ir_version: 8, opset_import: ["": 18]>
        net (float[{shape}] x) => (float y) {{
            h = Conv <kernel_shape = {[1] * (len(size) - 2)}> (x, first)
            y = Conv <{attributes}> (h, w)
        }}""")
    add_weights(model, w=kernel, first=(4, 4, *[1] * (len(size) - 2)))
    x = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    model.graph.outputs.append(model.graph[0].outputs[0])
    model.graph.outputs[1].dtype = ir.DataType.FLOAT
    found = graphs.run(model, {"x": x})
    reader = find_readers(walk(model, follow))[-1]
    places = reader.samples(found["h"], 10**6, np.random.default_rng(0))
    rows = np.concatenate(
        [w_NK @ x_TK.T for w_NK, x_TK in zip(reader.matrices(), reader.patches(found["h"], places), strict=True)]
    )
    expected = np.moveaxis(found["y"], 1, 0).reshape(len(rows), -1)
    np.testing.assert_allclose(rows, expected, atol=1e-4)
    assert np.array_equal(reader.stored(reader.matrices()), reader.weight)


def test_a_trained_network_keeps_most_of_its_accuracy() -> None:
    made = plain_networks.trained("residual", 40, kinds=5)
    images, classes = plain_networks.patterns(500, seed=7, kinds=5)
    seen = CalibrationArrays({"x": plain_networks.patterns(128, seed=100, kinds=5)[0].numpy()}, "images")

    def share(options: str) -> float:
        model = plain_networks.export(made, images[:2])
        if options:
            run(model, options, Context(arrays=seen))
        return float((outputs(model, images).argmax(1) == classes.numpy()).mean())

    whole = share("")
    assert whole > 0.7
    assert share("ratio=0.3, multiple=4") > whole - 0.05
    assert share("ratio=0.3, multiple=4, refit=False") < whole - 0.2
