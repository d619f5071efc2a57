"""A graph compiler that makes language models smaller and faster on ONNX Runtime, and proves every step.

    import onnxpress

    artifact = onnxpress.optimize("smollm2-135m", output="smollm2-int4")
    artifact.generate("What is the capital of France?")
    artifact.report["quality"]

Names are imported when they are used, so that `import onnxpress` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxpress.compiler.adapters import add_slots, convert_adapter, extract_adapter, merge_adapters
    from onnxpress.compiler.artifact import Artifact, open_artifact
    from onnxpress.compiler.errors import OnnxpressError, PassError, UserError
    from onnxpress.compiler.inspect import Summary, summarize
    from onnxpress.compiler.optimize import export, optimize
    from onnxpress.runtime.model import Model, load
    from onnxpress.runtime.sampling import GenerationOptions

    __version__: str

__all__ = [
    "Artifact",
    "GenerationOptions",
    "Model",
    "OnnxpressError",
    "PassError",
    "Summary",
    "UserError",
    "__version__",
    "add_slots",
    "convert_adapter",
    "export",
    "extract_adapter",
    "load",
    "merge_adapters",
    "open_artifact",
    "optimize",
    "summarize",
]

_HOMES = {
    "Artifact": "onnxpress.compiler.artifact",
    "GenerationOptions": "onnxpress.runtime.sampling",
    "Model": "onnxpress.runtime.model",
    "OnnxpressError": "onnxpress.compiler.errors",
    "PassError": "onnxpress.compiler.errors",
    "Summary": "onnxpress.compiler.inspect",
    "UserError": "onnxpress.compiler.errors",
    "add_slots": "onnxpress.compiler.adapters",
    "convert_adapter": "onnxpress.compiler.adapters",
    "export": "onnxpress.compiler.optimize",
    "extract_adapter": "onnxpress.compiler.adapters",
    "load": "onnxpress.runtime.model",
    "merge_adapters": "onnxpress.compiler.adapters",
    "open_artifact": "onnxpress.compiler.artifact",
    "optimize": "onnxpress.compiler.optimize",
    "summarize": "onnxpress.compiler.inspect",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("onnxpress")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
