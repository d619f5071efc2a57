"""One door for every kind of model: `load` finds out what the user means and hands it to the right front end.

Front ends are imported when they are needed: opening an ONNX directory imports neither torch nor transformers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from onnxpress.compiler.errors import BadModelFileError, OptionError, UnsupportedModelError, near_miss
from onnxpress.models import directory, zoo
from onnxpress.models.export import EXPORTERS, Exporter
from onnxpress.models.source import Source

logger = logging.getLogger(__name__)

MIN_OPSET, MAX_OPSET = 18, 24  # what ONNX Runtime has kernels for and our passes are written for

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack")


def load(
    spec: str | Path,
    *,
    work_dir: Path,
    exporter: Exporter | None = None,
    opset: int = 18,
    progress: Callable[[str], None] | None = None,
) -> Source:
    """Opens any model that onnxpress understands.

    Args:
        spec: an `.onnx` file or a directory with one (optimum's layout, onnxruntime-genai's, an onnxpress artifact),
            a `.gguf` file, a Hugging Face directory or id, or a zoo name such as `smollm2-135m`.
        work_dir: an existing scratch folder; an exported graph is written below it and read from there until the
            caller removes it. Not touched for ONNX input.
        exporter: who makes a graph of a checkpoint: "optimum" (TorchScript) or "dynamo" (torch.export). By default
            optimum where optimum-onnx is installed, else dynamo.
        opset: `ai.onnx` opset of an exported graph, 18 to 24.
        progress: told in a few words what takes time, e.g. "exporting llama with optimum".

    Returns:
        The graph with memory-mapped weights, its configs, and the files that travel with it.

    Raises:
        BadModelFileError: a file is missing, damaged, or points outside its directory.
        UnsupportedModelError: the model is whole, but nothing here can read or export it; or `spec` means nothing.
        OptionError: unknown exporter, one that is needed and not installed, or an opset out of range.
        UserError: a model must be downloaded and cannot be.
    """
    if exporter is not None and exporter not in EXPORTERS:
        raise OptionError(f"exporter must be one of {EXPORTERS}, got {exporter!r}", hint=near_miss(exporter, EXPORTERS))
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise OptionError(f"opset must be in [{MIN_OPSET}, {MAX_OPSET}], got {opset!r}", hint=f"use {MIN_OPSET}")
    name, tell = str(spec), progress or _log
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_directory(path, name, work_dir, exporter, opset, tell)
    if path.exists():
        return _from_file(path, name, work_dir, exporter, opset, tell)
    if path.is_symlink():
        raise BadModelFileError(f"{path}: the link points to {path.readlink()}, which is missing", hint="mend the link")
    if name in zoo.names():
        return _from_gguf(zoo.fetch(name, tell), name, work_dir, exporter, opset, tell)
    if _HUB_ID.fullmatch(name) and path.suffix not in (".onnx", ".gguf"):
        from onnxpress.models import huggingface

        return _from_directory(huggingface.fetch(name, tell), name, work_dir, exporter, opset, tell)
    if re.search(r"[/\\]", name) or path.suffix in (".onnx", ".gguf", ".safetensors"):
        raise BadModelFileError(f"{name}: no such file or directory", hint="check the path")
    raise UnsupportedModelError(
        f"{name!r} is no file, directory, Hugging Face id (org/name) or zoo name", hint=near_miss(name, zoo.names())
    )


def _from_file(
    path: Path, name: str, work_dir: Path, exporter: Exporter | None, opset: int, tell: Callable[[str], None]
) -> Source:
    if path.suffix == ".gguf" or _starts_with(path, b"GGUF"):
        return _from_gguf(path, name, work_dir, exporter, opset, tell)
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise UnsupportedModelError(
            f"{path}: weights alone are no model", hint=f"give the directory with its config.json: {path.parent}"
        )
    if path.suffix == ".ort":
        raise UnsupportedModelError(
            f"{path}: an ORT-format model cannot be rewritten", hint="give the .onnx it came from"
        )
    return directory.onnx_source(path, name=name)


def _from_directory(
    path: Path, name: str, work_dir: Path, exporter: Exporter | None, opset: int, tell: Callable[[str], None]
) -> Source:
    if graph := directory.find_graph(path):
        return directory.onnx_source(graph, name=name)
    config = directory.read_json(path / "config.json")
    if config and any(any(path.glob(pattern)) for pattern in _WEIGHTS):
        from onnxpress.models import huggingface

        return huggingface.load(path, name=name, work_dir=work_dir, exporter=exporter, opset=opset, tell=tell)
    if (path / "onnx").is_dir() and (graph := directory.find_graph(path / "onnx")):
        return directory.onnx_source(graph, name=name)
    if len(ggufs := sorted(path.glob("*.gguf"))) == 1:
        return _from_gguf(ggufs[0], name, work_dir, exporter, opset, tell)
    if ggufs:
        found = ", ".join(gguf.name for gguf in ggufs)
        raise BadModelFileError(f"{path}: expected one model, found {found}", hint="give one of the files")
    if config:
        raise BadModelFileError(
            f"{path}: expected weights beside config.json, found none", hint="fetch model.safetensors too"
        )
    raise BadModelFileError(
        f"{path}: expected a model, found neither model.onnx, nor config.json with weights, nor a .gguf file",
        hint="give the directory that holds the model",
    )


def _from_gguf(
    path: Path, name: str, work_dir: Path, exporter: Exporter | None, opset: int, tell: Callable[[str], None]
) -> Source:
    from onnxpress.models import gguf

    return gguf.load(path, name=name, work_dir=work_dir, exporter=exporter, opset=opset, tell=tell)


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False  # the front end says better what is wrong


def _log(message: str) -> None:
    logger.info("%s", message)
