"""Calibration arrays: which files count, what is held out, and what does not fit the model."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import plain_networks
import pytest

from onnxpress.compiler.calibration_arrays import CalibrationArrays, read_arrays
from onnxpress.compiler.calibration_sources import split_sources
from onnxpress.compiler.errors import CalibrationError
from onnxpress.compiler.optimize import optimize

GRAPH = ir.from_onnx_text("""<ir_version: 8, opset_import: ["": 18]>
    net (float[n, 3] x, int64[n] kind) => (float[n, 3] y) { y = Relu (x) }""").graph
ONE = ir.from_onnx_text("""<ir_version: 8, opset_import: ["": 18]>
    net (float[2, 3] x) => (float[2, 3] y) { y = Relu (x) }""").graph


def test_files_and_folders_of_arrays_are_told_from_text(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    np.save(tmp_path / "some" / "x.npy", np.zeros((2, 3)))
    np.savez(tmp_path / "one.npz", x=np.ones((1, 3)))
    (tmp_path / "text.txt").write_text("words")
    given = [tmp_path / "some", str(tmp_path / "one.npz"), tmp_path / "text.txt", "english"]
    files, others = split_sources(given)
    assert [path.name for path in files] == ["x.npy", "one.npz"]
    assert others == given[2:]
    assert read_arrays(files).arrays["x"].tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3]
    assert not read_arrays([])
    with pytest.raises(CalibrationError, match=r"found both: one\.npz and text\.txt") as caught:
        split_sources(tmp_path)
    assert caught.value.hint


def test_windows_leave_an_eighth_out() -> None:
    count = 40
    arrays = CalibrationArrays({"x": np.repeat(np.arange(count)[:, None], 3, 1), "kind": np.arange(count)}, "samples")
    windows, facts = arrays.windows(GRAPH, 100)
    seen = [one for window in windows for one in window["kind"].tolist()]
    left, about = arrays.held_out(GRAPH)
    assert sorted(seen) == sorted(set(seen))
    assert len(seen) == 32
    assert set(seen).isdisjoint(left["kind"].tolist())
    assert left["kind"].tolist() == list(range(35, 40))
    assert "held out" in about
    assert {window["x"].dtype for window in windows} == {np.dtype(np.float32)}
    assert all((window["x"][:, 0] == window["kind"]).all() for window in windows)
    assert facts["windows"] == [4, 8]


def test_some_write_any_size_as_minus_one() -> None:
    graph = ir.Graph([ir.val("x", ir.DataType.FLOAT, [-1, 3, -1])], [], nodes=[])
    windows, _ = CalibrationArrays({"x": np.zeros((16, 3, 5))}, "samples").windows(graph, 100)
    assert [window["x"].shape for window in windows] == [(8, 3, 5)]


def test_a_fixed_batch_and_another_name_of_the_only_input() -> None:
    windows, _ = CalibrationArrays({"images": np.zeros((5, 3))}, "samples").windows(ONE, 100)
    assert [window["x"].shape for window in windows] == [(2, 3), (2, 3)]


def test_what_may_not_be_expected_is_told() -> None:
    _, facts = CalibrationArrays({"images": np.zeros((5, 3), np.uint8)}, "a.npz").windows(ONE, 100)
    assert facts["text"] == "4 samples of a.npz ('images' as x, x from uint8, not scaled)"
    given = {"x": np.zeros((16, 3), np.float32), "kind": np.arange(16), "label": np.arange(16)}
    _, facts = CalibrationArrays(given, "a.npz").windows(GRAPH, 100)
    assert facts["text"] == "8 samples of a.npz ('label' not read)"


@pytest.mark.parametrize(
    "shape, hint",
    [((4, 5, 6, 3), "np.moveaxis(array, -1, 1)"), ((3, 5, 6), "array[None]"), ((4, 7, 5, 6), "give a .npz file")],
)
def test_a_shape_of_another_layout_is_hinted_at(shape: tuple[int, ...], hint: str) -> None:
    graph = ir.Graph([ir.val("x", ir.DataType.FLOAT, ["n", 3, None, None])], [], nodes=[])
    with pytest.raises(CalibrationError) as caught:
        CalibrationArrays({"x": np.zeros(shape, np.float32)}, "a.npz").windows(graph, 100)
    assert hint in str(caught.value.hint)


def test_only_samples_that_are_taken_are_cast() -> None:
    """A cast of all would hold a second copy of all."""

    class Counted(np.ndarray):
        cast = 0

        def astype(self, *args: object, **options: object) -> np.ndarray:
            Counted.cast = max(Counted.cast, len(self))
            return np.asarray(self).astype(*args, **options)

    given = {"x": np.zeros((100, 3)).view(Counted), "kind": np.arange(100)}
    CalibrationArrays(given, "samples").windows(GRAPH, 8)
    assert Counted.cast == 8


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": np.zeros((4, 3))}, "the model reads kind, x; samples has no 'kind', only x"),
        ({"x": np.zeros((4, 5)), "kind": np.zeros(4)}, "'x' of samples: expected ['n', 3], found [4, 5]"),
        ({"x": np.zeros((4, 3, 1)), "kind": np.zeros(4)}, "found [4, 3, 1]"),
        ({"x": np.full((4, 3), np.nan), "kind": np.zeros(4)}, "'x' of samples holds NaN"),
    ],
)
def test_what_does_not_fit_is_told(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        CalibrationArrays(arrays, "samples").windows(GRAPH, 8)
    assert message in caught.value.message
    assert caught.value.hint


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"text")
    np.save(tmp_path / "b.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "c.npy", np.zeros((0, 3)))
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 3)), y=np.zeros((3, 3)))
    np.savez(tmp_path / "e.npz", x=np.zeros((2, 4)), y=np.zeros((2, 3)))
    (tmp_path / "empty.npy").write_bytes(b"")
    whole = (tmp_path / "e.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[:200])
    np.savez_compressed(tmp_path / "bad.npz", x=np.arange(1000))
    packed = bytearray((tmp_path / "bad.npz").read_bytes())
    packed[60:90] = bytes(30)
    (tmp_path / "bad.npz").write_bytes(packed)
    with zipfile.ZipFile(tmp_path / "words.npz", "w") as archive:
        archive.writestr("x.txt", "words")
    bad = (["empty.npy"], ["short.npz"], ["bad.npz"], ["words.npz"])
    for names in (["a.npy"], ["b.npy"], ["c.npy"], ["d.npz"], ["d.npz", "e.npz"], *bad):
        with pytest.raises(CalibrationError) as caught:
            read_arrays([tmp_path / name for name in names])
        assert caught.value.hint


def test_optimize_prunes_by_them_and_measures_on_what_is_left_out(tmp_path: Path) -> None:
    """The whole way: file, samples, fit, an artifact that is cut again by int8 and read back."""
    model = plain_networks.export(plain_networks.network("flat"), plain_networks.inputs("flat", 2))
    ir.save(model, tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=plain_networks.inputs("flat", 64).numpy())
    artifact = optimize(
        tmp_path / "net.onnx",
        output=tmp_path / "out",
        passes="simplify, prune_channels(ratio=0.3), rtn(bits=8, block_size=32)",
        calibration=tmp_path / "data.npz",
    )
    card = json.loads((tmp_path / "out" / "onnxpress.json").read_text())
    assert card["quality"]["measured_on"] == "8 samples of data.npz, held out"
    assert card["passes"][1]["calibration"]["text"] == "56 samples of data.npz"
    assert card["quality"]["cosine_similarity"] > 0.95
    assert card["size"]["bytes_after"] < 0.4 * card["size"]["bytes_before"]
    assert artifact.directory == tmp_path / "out"
    with pytest.raises(CalibrationError, match="read no text"):
        optimize(tmp_path / "net.onnx", passes="simplify", calibration=[tmp_path / "data.npz", "english"])
