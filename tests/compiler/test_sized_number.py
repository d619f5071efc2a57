"""sized_number: what known sizes and constants decide, and nothing that an unknown size or an input does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler.region import sized_number


class Sizes:
    """x [batch, heads 4, tokens, 32], a graph around it, and what is asked of its shape."""

    def __init__(self, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        self.x = ir.val("x", dtype, ["batch", 4, "tokens", 32])
        self.step = ir.val("step", ir.DataType.FLOAT, [1])
        self.nodes: list[ir.Node] = []

    def const(self, *numbers: float, dtype: type = np.int64) -> ir.Value:
        tensor = ir.tensor(np.array(numbers, dtype), name=f"c{len(self.nodes)}.{numbers}")
        return ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)

    def op(self, kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.Node("", kind, list(inputs), [ir.AttrInt64(key, number) for key, number in attributes.items()])
        self.nodes.append(node)
        return node.outputs[0]

    def size(self, axis: int) -> ir.Value:
        return self.op("Cast", self.op("Gather", self.op("Shape", self.x), self.const(axis), axis=0), to=1)

    def number(self, value: ir.Value) -> float | None:
        ir.Graph([self.x, self.step], [value], nodes=self.nodes, opset_imports={"": 18}, name="sizes")
        return sized_number(value)


CASES: dict[str, tuple[Callable[[Sizes], ir.Value], float | None]] = {
    "1 / sqrt(head size)": (lambda s: s.op("Reciprocal", s.op("Sqrt", s.size(3))), 32**-0.5),
    "heads times size": (lambda s: s.op("Mul", s.size(1), s.size(3)), 128.0),
    "tokens": (lambda s: s.size(2), None),
    "tokens, rounded down": (
        lambda s: s.op("Div", s.op("Cast", s.size(2), to=7), s.const(4)),  # 2 // 4 and 3 // 4 are equal
        None,
    ),
    "an input": (lambda s: s.op("Mul", s.size(3), s.step), None),
    "several numbers": (lambda s: s.op("Slice", s.op("Shape", s.x), s.const(1), s.const(2)), 4.0),
    "constants alone": (lambda s: s.op("Sqrt", s.const(4.0, dtype=np.float32)), 2.0),
}


@pytest.mark.parametrize("case", CASES)
def test_number_that_sizes_decide(case: str) -> None:
    make, expected = CASES[case]
    sizes = Sizes()
    assert sizes.number(make(sizes)) == (None if expected is None else pytest.approx(expected))


def test_half_precision_activations_have_sizes_too() -> None:
    sizes = Sizes(ir.DataType.BFLOAT16)
    assert sizes.number(sizes.size(3)) == 32.0
