"""Decoders of the three kinds the runtime serves, small and made once."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from decoders import write_decoder

from onnxpress.runtime.session import DecoderSession


@pytest.fixture(scope="session")
def decoder_path(tiny_export: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`decoder_path(kind)`: a directory with a decoder whose cache is

    * growing: an exporter's graph, Concat caches, position_ids;
    * fused: the same graph with GroupQueryAttention, a bias for padding on the left;
    * lengths: GroupQueryAttention that knows only the sum of the mask, no position_ids.
    """

    @functools.cache
    def make(kind: str) -> Path:
        if kind == "lengths":
            return write_decoder(tmp_path_factory.mktemp("lengths"))
        exported = tiny_export("llama", "optimum")
        if kind == "growing":
            return exported
        from onnxpress.compiler import pipeline
        from onnxpress.compiler.pass_ import Context

        folder = tmp_path_factory.mktemp("fused")
        shutil.copytree(exported, folder, dirs_exist_ok=True)
        model = ir.load(exported / "model.onnx")
        pipeline.run(model, pipeline.parse("fuse"), Context())
        (folder / "model.onnx").unlink()
        ir.save(model, folder / "model.onnx")
        return folder

    return make


@pytest.fixture(scope="session")
def decoder(decoder_path: Callable[[str], Path]) -> Callable[[str], DecoderSession]:
    """`decoder(kind)`: a loaded session, shared between tests."""

    @functools.cache
    def load(kind: str) -> DecoderSession:
        return DecoderSession(decoder_path(kind), provider="cpu", threads=1)

    return load
