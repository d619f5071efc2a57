"""The packages pass mypy in strict mode, seen in the layout in which they install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_strictly_typed(tmp_path: Path) -> None:
    # mypy does not follow the import hook of an editable install; links give it the installed tree.
    package = tmp_path / "onnxpress"
    package.mkdir()
    for name in ("__init__.py", "__main__.py", "py.typed"):
        (package / name).symlink_to(ROOT / "onnxpress" / name)
    for name in ("compiler", "models", "passes", "runtime"):
        (package / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache"), "-p", "onnxpress"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
