"""`python -m onnxpress`: the command line."""

from __future__ import annotations

from onnxpress.compiler.cli import entry

if __name__ == "__main__":
    entry()
