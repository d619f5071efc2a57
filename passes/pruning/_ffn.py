"""Feed-forward layers whose channels can be taken out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from onnxpress.compiler.inner_features import InnerFeatures, all_inner_features, choose_constant, inner_biases
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Report
from onnxpress.passes.pruning._coded import Index, cut_rows, obstacle
from onnxpress.passes.pruning._layers import Structure


def ffn_layers(
    linears: Sequence[Linear],
    excluded: Callable[[Sequence[str]], Callable[[str], bool]],
    multiple: int | None,
    report: Report,
) -> list[Structure]:
    """The layers, in order.

    Args:
        linears: of the model.
        excluded: gets the names of all layers, and says which are left out.
        multiple: what widths are a multiple of; None: 64, or 8 in layers below 512.
        report: told of those that cannot be cut.
    """
    layers, reasons = all_inner_features(linears)
    for name, met in reasons.items():
        report.skip(_layer(name), f"its channels are not its own: {met}")
    names = [*map(_layer, reasons), *(_layer(one.reader.name) for one in layers)]
    is_excluded = excluded(names)
    found = []
    for features in layers:
        name = _layer(features.reader.name)
        step = multiple or (64 if features.width >= 512 else 8)
        if is_excluded(name):
            report.skip(name, "excluded")
        elif (reason := obstacle([features.reader, *features.makers])) is not None:
            report.skip(name, reason)
        elif features.width <= step:
            report.skip(name, f"has {features.width} channels, and keeps a multiple of {step}")
        else:
            found.append(_structure(name, features, step))
    return found


def _layer(name: str) -> str:
    """ "block3.ffn" for "block3.down"."""
    return name.removesuffix("down") + "ffn" if name.endswith("down") else f"{name}.ffn"


def _structure(name: str, features: InnerFeatures, step: int) -> Structure:
    reader = features.reader
    stored = reader.nbytes + sum(one.nbytes for one in features.makers)
    numbers = reader.num_out + sum(part.linear.num_in for part in features.parts)

    def cut(kept: Index, results: dict[int, npt.NDArray[Any]]) -> None:
        for maker in features.makers:
            rows = features.rows(maker, kept)
            for slot in inner_biases(maker):
                maker.bias = choose_constant(maker.node, slot, rows)
            cut_rows(maker, rows, results.pop(id(maker.output), None))
        features.choose_vectors(kept)
        features.resize(len(kept))

    return Structure(name, reader, 1, features.width, step, numbers, stored / features.width, cut)
