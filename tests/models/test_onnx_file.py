"""Opening ONNX files: weights stay on the disk, and whatever is wrong with a file is said in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxpress.compiler.errors import BadModelFileError
from onnxpress.models import onnx_file

ROWS, COLUMNS = 64, 48  # 12 KiB as float32: above the limit
WEIGHT = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def small_model() -> ir.Model:
    """(x @ weight) + bias: one weight above the inline limit, one below it."""
    x = ir.val("x", ir.DataType.FLOAT, ["batch", ROWS])
    weight = ir.val("weight", const_value=ir.tensor(WEIGHT, name="weight"))
    bias = ir.val("bias", const_value=ir.tensor(np.ones(COLUMNS, np.float32), name="bias"))
    product = ir.node("MatMul", [x, weight])
    total = ir.node("Add", [product.outputs[0], bias])
    total.outputs[0].name = "y"
    total.outputs[0].dtype, total.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["batch", COLUMNS])
    graph = ir.Graph(
        [x], total.outputs, nodes=[product, total], initializers=[weight, bias], opset_imports={"": 18}, name="g"
    )
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def inline(tmp_path: Path) -> Path:
    """The model with its weights inside the protobuf."""
    ir.save(small_model(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """The model with its large weight in model.data."""
    ir.save(small_model(), tmp_path / "model.onnx", external_data="model.data")
    return tmp_path / "model.onnx"


def edit_entry(path: Path, **entry: str) -> None:
    """Overwrites keys of the external data entry of the weight."""
    proto = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "weight")
    for pair in tensor.external_data:
        pair.value = entry.pop(pair.key, pair.value)
    for key, value in entry.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def weight_of(model: ir.Model) -> ir.TensorProtocol:
    tensor = model.graph.initializers["weight"].const_value
    assert tensor is not None
    return tensor


@pytest.mark.parametrize("kind", ["inline", "external"])
def test_weights_stay_on_the_disk_and_are_equal(kind: str, request: pytest.FixtureRequest) -> None:
    model = onnx_file.load_onnx(request.getfixturevalue(kind))
    assert isinstance(weight_of(model), ir.ExternalTensor)
    np.testing.assert_array_equal(weight_of(model).numpy(), WEIGHT)
    bias = model.graph.initializers["bias"].const_value
    assert bias is not None
    assert not isinstance(bias, ir.ExternalTensor)
    np.testing.assert_array_equal(bias.numpy(), np.ones(COLUMNS, np.float32))


def test_an_inline_model_survives_the_round_trip(inline: Path, tmp_path: Path) -> None:
    model = onnx_file.load_onnx(inline)
    ir.save(model, tmp_path / "again.onnx")
    before, after = onnx.load(inline), onnx.load(tmp_path / "again.onnx")
    assert [node.op_type for node in after.graph.node] == [node.op_type for node in before.graph.node]
    assert after.graph.initializer[0].raw_data == before.graph.initializer[0].raw_data


def test_data_files(inline: Path, tmp_path: Path) -> None:
    assert onnx_file.data_files(onnx_file.load_onnx(inline)) == [inline]
    ir.save(small_model(), tmp_path / "other.onnx", external_data="other.data")
    assert onnx_file.data_files(onnx_file.load_onnx(tmp_path / "other.onnx")) == [tmp_path / "other.data"]


def test_typed_fields_stay_in_memory(inline: Path) -> None:
    proto = onnx.load(inline)
    tensor = proto.graph.initializer[0]
    values = onnx.numpy_helper.to_array(tensor).ravel().tolist()
    tensor.ClearField("raw_data")
    tensor.float_data.extend(values)
    inline.write_bytes(proto.SerializeToString())
    np.testing.assert_array_equal(weight_of(onnx_file.load_onnx(inline)).numpy(), WEIGHT)


def test_an_inline_model_behind_a_link(inline: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "model.onnx"
    link.symlink_to(inline)
    np.testing.assert_array_equal(weight_of(onnx_file.load_onnx(link)).numpy(), WEIGHT)


def test_the_hub_cache_keeps_data_behind_links(external: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc" / "onnx", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, blob in (("model.onnx", "111"), ("model.data", "222")):
        os.replace(external.parent / name, blobs / blob)
        (snapshot / name).symlink_to(Path("../../../blobs") / blob)
    np.testing.assert_array_equal(weight_of(onnx_file.load_onnx(snapshot / "model.onnx")).numpy(), WEIGHT)


def test_a_large_inline_model_is_never_read_whole(tmp_path: Path) -> None:
    rows = 32 << 20
    x = ir.val("x", ir.DataType.FLOAT, [rows])
    weight = ir.val("w", const_value=ir.tensor(np.zeros(rows, np.float32), name="w"))
    node = ir.node("Add", [x, weight])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape([rows])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 18}, name="g")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")  # 128 MiB
    program = (
        "import resource, sys; from pathlib import Path; from onnxpress.models import onnx_file\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); onnx_file.load_onnx(Path(sys.argv[1])); print(peak() - before)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.onnx")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 16 << 10  # KiB


# --- bad input: each names the file or tensor, what was expected, what was found, and a way out ----------------------


def refuse(path: Path, *words: str) -> None:
    with pytest.raises(BadModelFileError) as caught:
        onnx_file.load_onnx(path)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_code == 2
    assert len(caught.value.message.splitlines()) == 1


def test_missing_file(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing.onnx", "nothing.onnx", "no such file")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    refuse(tmp_path, "expected a file")


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "empty"),
        (b"<html>not found</html>\n", "not one"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x08\x0a", "without opset_import"),  # ir_version alone
        (os.urandom(4096), ""),
    ],
)
def test_not_onnx(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    refuse(tmp_path / "model.onnx", "model.onnx", word)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_protobuf(inline: Path, share: float) -> None:
    whole = inline.read_bytes()
    inline.write_bytes(whole[: int(len(whole) * share)])
    refuse(inline, "truncated", "complete?")


def test_external_data_missing(external: Path) -> None:
    (external.parent / "model.data").unlink()
    refuse(external, "'weight'", "'model.data' is missing")


def test_external_data_truncated(external: Path) -> None:
    data = external.parent / "model.data"
    data.write_bytes(data.read_bytes()[:-1])
    refuse(external, "'weight'", "12,288", "12,287", "truncated")


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../model.data", "a/../../model.data", "..\\model.data", "C:\\x", ""]
)
def test_external_data_outside(external: Path, location: str) -> None:
    edit_entry(external, location=location)
    refuse(external, "'weight'", "below the model's directory", repr(location))


def test_external_data_behind_a_link_that_leaves(external: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "model.data"
    os.replace(external.parent / "model.data", elsewhere)
    (external.parent / "model.data").symlink_to(elsewhere)
    refuse(external, "'weight'", "link", "outside")


def test_external_data_behind_a_hard_link(external: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    os.link(external.parent / "model.data", tmp_path_factory.mktemp("elsewhere") / "x")
    refuse(external, "'weight'", "hard links")


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"length": "5"}, ("expected 12,288 bytes", "says 5")),
        ({"offset": "4096"}, ("expected bytes 4,096 to 16,384",)),
        ({"offset": "-8"}, ("-8",)),
        ({"offset": "many"}, ("many",)),
    ],
)
def test_external_entry_is_wrong(external: Path, entry: dict[str, str], words: tuple[str, ...]) -> None:
    edit_entry(external, **entry)
    refuse(external, *words)


def test_an_inline_tensor_of_the_wrong_size(inline: Path) -> None:
    for index, kept in ((0, 4096), (1, 4)):
        proto = onnx.load(inline)
        tensor = proto.graph.initializer[index]
        tensor.raw_data = tensor.raw_data[:kept]
        (inline.parent / "bad.onnx").write_bytes(proto.SerializeToString())
        refuse(inline.parent / "bad.onnx", repr(tensor.name), f"{kept:,}")


def test_tensors_of_constant_nodes_are_checked(inline: Path) -> None:
    proto = onnx.load(inline)
    tensor = onnx.TensorProto(dims=[4], data_type=1, name="c", data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    node = onnx.NodeProto(op_type="Constant", output=["c"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, t=tensor)
    proto.graph.node.insert(0, node)
    inline.write_bytes(proto.SerializeToString())
    refuse(inline, "'../secret'")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_loads_or_is_refused(inline: Path, data: st.DataObject) -> None:
    content = bytearray(inline.read_bytes())
    # The weight in the middle may change as it likes; what steers the reader lies before and after it.
    edges = [*range(256), *range(len(content) - 400, len(content))]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.sampled_from(edges))] = data.draw(st.integers(0, 255))
    damaged = inline.parent / "damaged.onnx"
    damaged.write_bytes(content)
    try:
        model = onnx_file.load_onnx(damaged)
    except BadModelFileError:
        pass
    else:
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.numpy()
