"""Front ends: whatever the user has (Hugging Face, GGUF, ONNX) becomes a `Source`."""

from __future__ import annotations

from onnxpress.models.load import load
from onnxpress.models.source import Source

__all__ = ["Source", "load"]
