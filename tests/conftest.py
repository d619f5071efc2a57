"""Shared fixtures: small random decoders, exported once a session."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_export(architecture, exporter, opset=18, attention=None, **options)`: the export of a small random model.

    A directory. Options are those of `models.tiny.tiny`, whose model it is. A test that asks for optimum is skipped
    where optimum is not installed.
    """
    from onnxpress import models
    from onnxpress.models import export as exports
    from onnxpress.models.tiny import save_tiny

    root = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def make(architecture: str, exporter: str, opset: int, attention: str | None, **options: int) -> Path:
        checkpoint = root / "-".join([architecture, *map(str, options.values())])
        if not checkpoint.exists():
            save_tiny(architecture, checkpoint, **options)
        work = root / f"{checkpoint.name}-{exporter}-{opset}-{attention}"
        work.mkdir()
        if attention is None:
            return models.load(checkpoint, work_dir=work, exporter=exporter, opset=opset).directory
        job = exports.Job("huggingface", str(checkpoint), str(work), exporter, opset, attention)  # type: ignore[arg-type]
        exports.run(job)
        return work

    def export(
        architecture: str, exporter: str = "optimum", *, opset: int = 18, attention: str | None = None, **options: int
    ) -> Path:
        if exporter == "optimum" and not exports.has_optimum():
            pytest.skip("optimum is not installed")
        return make(architecture, exporter, opset, attention, **options)

    return export


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that write down what tests measure."""
    parser.addoption("--update-golden", action="store_true", help="write what is measured into tests/golden")
    parser.addoption("--update-architectures", action="store_true", help="write docs/architectures.md")
