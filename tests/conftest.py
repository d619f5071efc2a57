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
    """`tiny_export(architecture, exporter="optimum", **options)`: directory with the export of a small random model.

    Options are those of `models.tiny.tiny`, whose model it is.
    """
    from onnxpress import models
    from onnxpress.models.tiny import save_tiny

    root = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def make(architecture: str, exporter: str, **options: int) -> Path:
        checkpoint = root / "-".join([architecture, *map(str, options.values())])
        if not checkpoint.exists():
            save_tiny(architecture, checkpoint, **options)
        work = root / f"{checkpoint.name}-{exporter}"
        work.mkdir()
        return models.load(checkpoint, work_dir=work, exporter=exporter).directory

    def export(architecture: str, exporter: str = "optimum", **options: int) -> Path:
        return make(architecture, exporter, **options)

    return export


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that write down what tests measure."""
    parser.addoption("--update-golden", action="store_true", help="write what is measured into tests/golden")
    parser.addoption("--update-architectures", action="store_true", help="write docs/architectures.md")
