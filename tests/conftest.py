"""Shared fixtures: small random decoders, exported once a run, and threads that leave the other workers their cores."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers fill the cores. More threads each would wait for one another: an eigh of 64 x 64 took 50 ms instead of 1.
    # In the environment, so that children keep to it too, and before anything imports numpy or torch.
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")


@pytest.fixture(scope="session", autouse=True)
def no_spinning() -> Iterator[None]:
    """Threads of ONNX Runtime sleep while they wait: thousands of short sessions would spin on each other's cores.

    Only when threads wake up differs; how many there are, and what they compute, is as in production.
    """
    import onnxruntime as ort

    plain = ort.InferenceSession.__init__

    @functools.wraps(plain)
    def sleeping(self: Any, model: Any, sess_options: Any = None, *others: Any, **named: Any) -> None:
        options = ort.SessionOptions() if sess_options is None else sess_options
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        plain(self, model, options, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort.InferenceSession, "__init__", sleeping)
        yield


def pytest_collection_finish() -> None:
    """Modules and collected tests stay to the end: no garbage collection has to walk over them again and again."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path` against other processes."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of this run that all its workers see."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_export(shared_folder: Path) -> Callable[..., Path]:
    """`tiny_export(architecture, exporter, opset=18, attention=None, **options)`: the export of a small random model.

    A directory, which other tests and other workers read too. Options are those of `models.tiny.tiny`, whose model it
    is. A test that asks for optimum is skipped where optimum is not installed.
    """
    from onnxpress import models
    from onnxpress.models import export as exports
    from onnxpress.models.tiny import save_tiny

    root = shared_folder / "tiny"
    root.mkdir(exist_ok=True)

    @functools.cache
    def make(architecture: str, exporter: str, opset: int, attention: str | None, **options: int) -> Path:
        checkpoint = root / "-".join([architecture, *map(str, options.values())])
        work = root / f"{checkpoint.name}-{exporter}-{opset}-{attention}"
        done = root / f"{work.name}.done"
        with locked(root / f"{checkpoint.name}.lock"):
            if not done.exists():
                if not checkpoint.exists():
                    save_tiny(architecture, checkpoint, **options)
                work.mkdir(exist_ok=True)
                done.write_text(str(write(checkpoint, work, exporter, opset, attention)))
        return Path(done.read_text())

    def write(checkpoint: Path, work: Path, exporter: Any, opset: int, attention: Any) -> Path:
        if attention is None:
            return models.load(checkpoint, work_dir=work, exporter=exporter, opset=opset).directory
        exports.run(exports.Job("huggingface", str(checkpoint), str(work), exporter, opset, attention))
        return work

    def export(
        architecture: str, exporter: str = "optimum", *, opset: int = 18, attention: str | None = None, **options: int
    ) -> Path:
        if exporter == "optimum" and not exports.has_optimum():
            pytest.skip("optimum is not installed")
        return make(architecture, exporter, opset, attention, **options)

    return export


@pytest.fixture(scope="session")
def real_model(shared_folder: Path) -> Any:
    """SmolLM2-135M as optimum exports it, an Artifact; skipped where it cannot be fetched."""
    import onnxpress

    directory = shared_folder / "smollm2" / "exported"
    with locked(shared_folder / "smollm2.lock"):
        if not directory.exists():
            directory.parent.mkdir(exist_ok=True)
            try:
                return onnxpress.export("smollm2-135m", directory)
            except onnxpress.UserError as error:
                pytest.skip(f"the model cannot be fetched: {error.message}")
    return onnxpress.open_artifact(directory)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that write down what tests measure."""
    parser.addoption("--update-golden", action="store_true", help="write what is measured into tests/golden")
    parser.addoption("--update-architectures", action="store_true", help="write docs/architectures.md")
