"""Sizes of models as people write them, and what of a model's files a pass does not touch."""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx_ir as ir

from onnxpress.compiler.pass_ import weight_bytes

_UNITS = {"": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}


def written(nbytes: float) -> str:
    """A size of at least so many bytes, as `read` reads it."""
    return f"{-(-nbytes // 1000):.0f}kB" if nbytes < 1e7 else f"{-(-nbytes // 10**5) / 10}MB"


def read(text: str) -> int | None:
    """Bytes that a size such as "90MB" stands for, None when it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or len(found[1]) > 18:
        return None
    return int(float(found[1]) * unit)


def bytes_besides(model: ir.Model, weights: Iterable[ir.Value]) -> int:
    """Bytes of the model's files without those `weights`; the graph itself is estimated, rather a little too large."""
    tensors = {id(value.const_value): value.const_value for value in weights}
    graph: int = sum(ir.to_proto(node).ByteSize() + 8 for node in model.graph)
    values = [value for node in model.graph for value in node.outputs if value.name] + list(model.graph.inputs)
    graph += sum(ir.to_proto(value).ByteSize() + 8 for value in values)
    graph += sum(2 * len(name) + 200 for name in model.graph.initializers)
    return weight_bytes(model) - sum(tensor.nbytes for tensor in tensors.values() if tensor is not None) + graph
