"""All ways through a text give the same logits, on every kind of graph."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from decoders import decoder as random_decoder
from decoders import write_decoder

from onnxpress.compiler.errors import BadModelFileError, OptionError, UnsupportedModelError
from onnxpress.runtime import session as sessions
from onnxpress.runtime.session import DecoderSession, as_float32, positions_of

KINDS = ("growing", "fused", "lengths")
every_kind = pytest.mark.parametrize("kind", KINDS)
LENGTH = 12


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def text(session, batch=1, length=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(5, session.vocab_size, (batch, length))


def test_the_kinds_are_told_apart(decoder):
    faces = {kind: decoder(kind).interface for kind in KINDS}
    assert {kind: face.shares_cache for kind, face in faces.items()} == {
        "growing": False,
        "fused": True,
        "lengths": True,
    }
    assert {kind: face.pads_left for kind, face in faces.items()} == {"growing": True, "fused": True, "lengths": False}
    assert all(len(face.cache) == 4 for face in faces.values())


@every_kind
def test_steps_chunks_and_the_whole_agree(decoder, kind):
    session = decoder(kind)
    ids = text(session)
    whole = session.run_logits(ids).copy()
    decoding = session.begin(1, LENGTH)
    close(decoding.prefill(ids[:, :4]), whole[:, 3])
    close(decoding.step(ids[:, 4]), whole[:, 4])
    close(decoding.forward(ids[:, 5:8]), whole[:, 5:8])
    for position in range(8, LENGTH):
        close(decoding.step(ids[:, position]), whole[:, position])
    assert decoding.length == LENGTH


def test_a_shared_buffer_gives_what_a_growing_one_gives(decoder):
    shared = decoder("fused")
    ids = text(shared)
    growing = object.__new__(DecoderSession)
    growing.__dict__ = {**shared.__dict__, "interface": dataclasses.replace(shared.interface, shares_cache=False)}
    one, other = shared.begin(1, 64), growing.begin(1, 64)
    close(one.prefill(ids[:, :5]), other.prefill(ids[:, :5]))
    for position in range(5, LENGTH):
        close(one.step(ids[:, position]), other.step(ids[:, position]))


def test_the_exporters_graph_and_the_fused_one_agree(decoder):
    ids = text(decoder("fused"), batch=2)
    close(decoder("fused").run_logits(ids), decoder("growing").run_logits(ids))


@every_kind
def test_a_batch_gives_what_its_rows_give_alone(decoder, kind):
    session = decoder(kind)
    ids = text(session, batch=3)
    whole = session.run_logits(ids).copy()
    together = session.begin(3, LENGTH)
    close(together.prefill(ids[:, :6]), whole[:, 5])
    for position in range(6, LENGTH):
        close(together.step(ids[:, position]), whole[:, position])
    for row in range(3):
        close(session.run_logits(ids[row : row + 1])[0], whole[row])


@pytest.mark.parametrize("kind", ["growing", "fused"])
def test_padding_on_the_left_changes_nothing(decoder, kind):
    session = decoder(kind)
    ids = text(session, batch=2)
    lengths = (LENGTH - 4, 5)
    alone = [session.run_logits(ids[row : row + 1, :size]).copy()[0] for row, size in enumerate(lengths)]
    longest = max(lengths) - 3
    padded, mask = np.zeros((2, longest), np.int64), np.zeros((2, longest), np.int64)
    for row, size in enumerate(lengths):
        padded[row, longest - (size - 3) :] = ids[row, : size - 3]
        mask[row, longest - (size - 3) :] = 1
    decoding = session.begin(2, 32)
    logits = decoding.prefill(padded, mask).copy()
    for step in range(3):
        for row, size in enumerate(lengths):
            close(logits[row], alone[row][size - 4 + step])
        logits = decoding.step([ids[row, size - 3 + step] for row, size in enumerate(lengths)])
    close(session.run_logits(padded, mask)[:, -1], [alone[row][size - 4] for row, size in enumerate(lengths)])


def test_padding_is_refused_where_it_would_be_wrong(decoder):
    session = decoder("lengths")
    with pytest.raises(OptionError, match="left"):
        session.begin(2, 8).prefill([[1, 2], [3, 4]], [[1, 1], [0, 1]])
    with pytest.raises(OptionError, match="left"):
        decoder("fused").begin(2, 8).prefill([[1, 2], [3, 4]], [[1, 1], [1, 0]])


@every_kind
def test_truncate_goes_back(decoder, kind):
    session = decoder(kind)
    ids = text(session)
    decoding = session.begin(1, 32)
    expected = decoding.forward(ids).copy()
    decoding.truncate(7)
    close(decoding.prefill(ids[:, 7:10]), expected[:, 9])
    close(decoding.step(ids[:, 10]), expected[:, 10])
    decoding.truncate(0)
    close(decoding.forward(ids), expected)
    with pytest.raises(OptionError):
        decoding.truncate(LENGTH + 1)


def test_two_texts_run_side_by_side(decoder):
    session = decoder("fused")
    ids, others = text(session), text(session, seed=1)
    whole, whole_other = session.run_logits(ids).copy(), session.run_logits(others).copy()
    one, other = session.begin(1, LENGTH), session.begin(1, LENGTH)
    one.prefill(ids[:, :3])
    other.prefill(others[:, :3])
    for position in range(3, LENGTH):
        close(one.step(ids[:, position]), whole[:, position])
        close(other.step(others[:, position]), whole_other[:, position])


@pytest.mark.parametrize(("kind", "pieces"), [("lengths", 3), ("fused", 1)], ids=["all logits", "last logits"])
def test_a_long_prompt_is_taken_in_pieces_where_all_logits_are_computed(decoder, monkeypatch, kind, pieces):
    session = decoder(kind)
    ids = text(session)
    expected = session.run_logits(ids)[:, -1].copy()
    monkeypatch.setattr(sessions, "PREFILL_LOGITS_BYTES", 5 * 4 * session.vocab_size)
    runs = []
    decoding = session.begin(1, LENGTH)
    run = decoding._ort_run
    decoding._ort_run = lambda binding: (runs.append(1), run(binding))
    close(decoding.prefill(ids), expected)
    assert len(runs) == pieces


@pytest.mark.parametrize(("kind", "pieces"), [("lengths", 3), ("fused", 3), ("growing", 1)])
@pytest.mark.parametrize("known", [0, 2])
def test_a_long_prompt_is_taken_in_equal_pieces_where_the_cache_is_shared(decoder, monkeypatch, kind, pieces, known):
    session = decoder(kind)
    ids = text(session)
    expected = session.run_logits(ids)[:, -1].copy()
    monkeypatch.setattr(sessions, "PREFILL_TOKENS", 4)
    decoding = session.begin(1, LENGTH)
    if known:
        decoding.prefill(ids[:, :known])
    lengths = []
    forward = decoding._forward
    decoding._forward = lambda piece, *rest, **named: (lengths.append(piece.shape[1]), forward(piece, *rest, **named))[
        1
    ]
    close(decoding.prefill(ids[:, known:]), expected)
    assert sum(lengths) == LENGTH - known
    assert len(lengths) == (pieces if known == 0 else min(pieces, 2))
    assert max(lengths) - min(lengths) <= 1


def test_a_prompt_that_does_not_fit_is_refused_before_its_first_piece(decoder, monkeypatch):
    monkeypatch.setattr(sessions, "PREFILL_TOKENS", 4)
    decoding = decoder("fused").begin(1, 10)
    with pytest.raises(OptionError, match="at most 10 tokens, got 12"):
        decoding.prefill(text(decoder("fused")))
    assert decoding.length == 0
    with pytest.raises(OptionError, match="1 or more"):
        decoding.prefill(np.zeros((1, 0), np.int64))


def test_the_end_of_the_cache_is_said(decoder):
    decoding = decoder("fused").begin(1, 4)
    decoding.prefill([[1, 2, 3]])
    decoding.step([4])
    with pytest.raises(OptionError, match="at most 4 tokens, got 5"):
        decoding.step([5])
    with pytest.raises(OptionError, match="at least 1"):
        decoder("fused").begin(1, 0)
    with pytest.raises(OptionError, match="shape"):
        decoder("fused").begin(2, 4).prefill([[1, 2]])


def save(model, directory, **files):
    directory.mkdir(exist_ok=True)
    ir.save(model, directory / "model.onnx")
    return directory


def strip_cache(model):
    graph = model.graph
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            node.replace_input_with(3, None)
            node.replace_input_with(4, None)
    del graph.inputs[2:]
    del graph.outputs[1:]
    return model


def test_a_graph_without_a_cache_runs_the_whole_text_again(tmp_path):
    ids = text(DecoderSession(save(random_decoder(), tmp_path / "with"), provider="cpu"))
    session = DecoderSession(save(strip_cache(random_decoder()), tmp_path / "without"), provider="cpu")
    assert not session.interface.cache
    whole = session.run_logits(ids).copy()
    decoding = session.begin(1, LENGTH)
    close(decoding.prefill(ids[:, :4]), whole[:, 3])
    close(decoding.step(ids[:, 4]), whole[:, 4])
    close(decoding.forward(ids[:, 5:]), whole[:, 5:])


def test_a_head_that_takes_a_count_computes_one_row_of_a_prompt(tmp_path):
    model = random_decoder()
    graph = model.graph
    head = graph.outputs[0].producer()
    keep = ir.Value(name="logits_to_keep", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    keep.const_value = ir.Tensor(np.array([2**31 - 1]), name="logits_to_keep")
    ends = ir.Value(name="ends", const_value=ir.Tensor(np.array([2**62]), name="ends"))
    axes = ir.Value(name="axes", const_value=ir.Tensor(np.array([1]), name="axes"))
    for value in (ends, axes):
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        graph.register_initializer(value)
    graph.register_initializer(keep)
    graph.inputs.append(keep)
    start = ir.node("Neg", [keep])
    cut = ir.node("Slice", [head.inputs[0], start.outputs[0], ends, axes])
    graph.insert_before(head, [start, cut])
    head.replace_input_with(0, cut.outputs[0])
    graph.outputs[0].shape = ir.Shape(["batch", "kept", graph.outputs[0].shape[2]])
    session = DecoderSession(save(model, tmp_path), provider="cpu")
    assert session.interface.keep == "logits_to_keep"
    ids = text(session)
    whole = session.run_logits(ids).copy()
    assert whole.shape[1] == LENGTH
    decoding = session.begin(1, LENGTH)
    shapes = []
    buffer = session._logits_buffer
    session._logits_buffer = lambda rows: (shapes.append(rows), buffer(rows))[1]
    close(decoding.prefill(ids[:, :6]), whole[:, 5])
    assert shapes == [1]
    close(decoding.forward(ids[:, 6:9]), whole[:, 6:9])
    close(decoding.step(ids[:, 9]), whole[:, 9])


def test_a_float16_model_speaks_float32(decoder, decoder_path, tmp_path):
    from onnxpress.compiler import pipeline
    from onnxpress.compiler.pass_ import Context

    model = ir.load(decoder_path("fused") / "model.onnx")
    pipeline.run(model, pipeline.parse("cast_float16"), Context())
    session = DecoderSession(save(model, tmp_path), provider="cpu", threads=1)
    assert {tensor.type for tensor in session.interface.cache} == {"tensor(float16)"}
    ids = text(session)
    whole = session.run_logits(ids).copy()
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, decoder("fused").run_logits(ids), atol=0.02)
    decoding = session.begin(1, LENGTH)
    np.testing.assert_allclose(decoding.prefill(ids[:, :5]), whole[:, 4], atol=0.02)
    for position in range(5, LENGTH):
        np.testing.assert_allclose(decoding.step(ids[:, position]), whole[:, position], atol=0.02)


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16"])
def test_other_float_types_become_float32(dtype):
    values = np.array([[0.5, -2.0, 3.25]], np.float32)
    kind = ir.DataType[dtype].numpy()
    raw = values.astype(kind)
    raw = raw.view(np.uint16) if dtype == "BFLOAT16" else raw
    found = as_float32(raw)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values)
    assert as_float32(values) is values


def test_positions_count_tokens_and_not_padding():
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(positions_of(mask), [[1, 1, 0, 1], [0, 1, 2, 3]])


def test_what_is_no_decoder_is_refused(tmp_path):
    text_ = '<ir_version: 10, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) { y = Neg(x) }'
    ir.save(ir.from_onnx_text(text_), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError, match="expected a decoder"):
        DecoderSession(tmp_path, provider="cpu")
    model = random_decoder()
    extra = ir.val("pixel_values", ir.DataType.FLOAT, [1])
    model.graph.inputs.append(extra)
    with pytest.raises(UnsupportedModelError, match="pixel_values"):
        DecoderSession(save(model, tmp_path / "extra"), provider="cpu")


def test_broken_files_are_one_line(tmp_path):
    directory = write_decoder(tmp_path / "model")
    (directory / "model.onnx.data").unlink()
    with pytest.raises(BadModelFileError, match="missing"):
        DecoderSession(directory, provider="cpu")
    model = random_decoder()
    next(node for node in model.graph if node.op_type == "Tanh").op_type = "Nonsense"
    with pytest.raises(BadModelFileError, match="cannot load"):
        DecoderSession(save(model, tmp_path / "nonsense"), provider="cpu")


def test_threads_and_batch_are_checked(decoder_path):
    with pytest.raises(OptionError, match="threads"):
        DecoderSession(decoder_path("lengths"), provider="cpu", threads=0)
    with pytest.raises(OptionError, match="batch"):
        DecoderSession(decoder_path("lengths"), provider="cpu").begin(0)
