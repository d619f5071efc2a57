"""`python -m onnxpress`: the command line."""

from __future__ import annotations

import sys

from onnxpress.compiler.cli import main

if __name__ == "__main__":
    sys.exit(main())
