"""Products that read channels, as matrices on patches: convolutions, Gemm and MatMul all become W x.

Axes:    P parts (groups of a convolution), N out features of a part, K in features, T samples, Q numbers of a kernel
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.passes.pruning._channel_walk import Cut, Labels, Walk, constant_of, origin, uses

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Reader:
    """A node that mixes channels.

    Attributes:
        node: reads them as its first input, and a matrix as its second.
        cut: the columns of that matrix.
    """

    node: ir.Node
    cut: Cut

    @property
    def source(self) -> ir.Value:
        """The activation that it reads."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> Array:
        """As the graph has it, float32."""
        tensor = constant_of(self.node.inputs[1])
        assert tensor is not None
        return tensor.numpy().astype(np.float32)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the weight."""
        tensor = constant_of(self.node.inputs[1])
        assert tensor is not None
        return int(tensor.dtype.itemsize)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel in space; () for matrices."""
        tensor = constant_of(self.node.inputs[1])
        assert tensor is not None
        return tuple(int(one) for one in tensor.shape.numpy()[2:])

    @property
    def parts(self) -> int:
        """P."""
        return _ints(self.node, "group", [1])[0]

    @property
    def labels(self) -> Labels:
        """[K], of the columns of each part."""
        is_patch = self.node.op_type == "Conv"
        return np.repeat(self.cut.labels, int(np.prod(self.kernel)) if is_patch else 1)

    def bias(self) -> Array | None:
        """What it adds to each row [P N], zeros where there is none yet; None where it cannot hold one."""
        kind = self.node.op_type
        if kind not in ("Conv", "Gemm") or self.scales[1] == 0:
            return None
        tensor = constant_of(self.node.inputs[1])
        assert tensor is not None
        rows = int(tensor.shape.numpy()[0 if kind == "Conv" or self.cut.axis == 1 else 1])
        if len(self.node.inputs) < 3 or self.node.inputs[2] is None:
            return np.zeros(rows, np.float32)
        tensor = constant_of(self.node.inputs[2])
        if tensor is None or tuple(tensor.shape.numpy()) != (rows,):
            return None
        return tensor.numpy().astype(np.float32)

    @property
    def scales(self) -> tuple[float, float]:
        """What the product and the bias are multiplied with (alpha and beta of Gemm)."""
        found = [self.node.attributes.get(name) for name in ("alpha", "beta")]
        return tuple(1.0 if one is None else one.as_float() for one in found)  # type: ignore[return-value]

    def matrices(self, array: Array | None = None) -> Array:
        """[P, N, K] of the weight, or of another array like it."""
        w = self.weight if array is None else array
        kind = self.node.op_type
        if kind == "Conv":
            return w.reshape(self.parts, len(w) // self.parts, -1)
        if kind == "ConvTranspose":
            return np.ascontiguousarray(w.reshape(len(w), -1).T)[None]
        return w[None] if self.cut.axis == 1 else np.ascontiguousarray(w.T)[None]

    def stored(self, w_PNK: Array) -> Array:
        """The opposite of `matrices`."""
        shape = self.weight.shape
        if self.node.op_type == "Conv" or (self.cut.axis == 1 and self.node.op_type != "ConvTranspose"):
            return w_PNK.reshape(shape)
        turned: Array = w_PNK[0].T.reshape(shape)
        return turned

    def samples(self, x: npt.NDArray[np.floating], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Places at which outputs are compared, at most `count`: numbers of positions, ascending."""
        total = self.total(x)
        if total <= count:
            return np.arange(total)
        return np.sort(rng.choice(total, count, replace=False))

    def total(self, x: npt.NDArray[np.floating]) -> int:
        """Positions in all."""
        return int(np.prod(self._positions(x)))

    def _positions(self, x: npt.NDArray[np.floating]) -> tuple[int, ...]:
        """Sizes of the axes along which outputs lie: batch and space."""
        if self.node.op_type == "Conv":
            sizes = [size + sum(pads) for size, pads in zip(x.shape[2:], self._pads(x.shape[2:]), strict=True)]
            return (len(x), *(self._out(axis, size) for axis, size in enumerate(sizes)))
        if self.node.op_type == "ConvTranspose":
            return (len(x), *x.shape[2:])
        return (x.size // x.shape[-1],)

    def _out(self, axis: int, size: int) -> int:
        extent = (self.kernel[axis] - 1) * self._each("dilations")[axis] + 1
        return (size - extent) // self._each("strides")[axis] + 1

    def patches(self, x: npt.NDArray[np.floating], places: npt.NDArray[np.int64]) -> Array:
        """What the rows are multiplied with at each of the places, [P, T, K]."""
        if self.node.op_type == "ConvTranspose":
            channels = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])
            return channels[places].astype(np.float32, copy=False)[None]
        if self.node.op_type != "Conv":
            return x.reshape(-1, x.shape[-1])[places].astype(np.float32, copy=False)[None]
        padded = np.pad(x, [(0, 0), (0, 0), *self._pads(x.shape[2:])])
        batch, *space = np.unravel_index(places, self._positions(x))
        rank = len(space)
        strides, dilations = self._each("strides"), self._each("dilations")
        index = []
        for axis, place in enumerate(space):
            steps = np.arange(self.kernel[axis]) * dilations[axis]
            at = (place * strides[axis])[:, None] + steps
            index.append(at.reshape(len(places), *(1,) * axis, -1, *(1,) * (rank - axis - 1)))
        at_all: tuple[Any, ...] = (batch.reshape(-1, *(1,) * rank), slice(None), *index)
        found = padded[at_all]  # [T, *kernel, C]
        whole = np.moveaxis(found, -1, 1).reshape(len(places), self.parts, -1)
        return np.ascontiguousarray(whole.transpose(1, 0, 2), np.float32)

    def _pads(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        rank = len(sizes)
        mode = self.node.attributes.get("auto_pad")
        name = "NOTSET" if mode is None else mode.as_string()
        if name == "VALID":
            return [(0, 0)] * rank
        if name == "NOTSET":
            pads = _ints(self.node, "pads", [0] * 2 * rank)
            return list(zip(pads[:rank], pads[rank:], strict=True))
        found = []
        for axis, size in enumerate(sizes):
            stride, extent = self._each("strides")[axis], (self.kernel[axis] - 1) * self._each("dilations")[axis] + 1
            total = max((-(-size // stride) - 1) * stride + extent - size, 0)
            less, more = total // 2, total - total // 2
            found.append((less, more) if name == "SAME_UPPER" else (more, less))
        return found

    def _each(self, name: str) -> list[int]:
        return _ints(self.node, name, [1] * len(self.kernel))


def is_shared(reader: Reader) -> bool:
    """Whether something else reads the same matrix, so that none is fitted: each would need one of its own."""
    value = reader.node.inputs[1]
    return value is not None and uses(origin(value)) > 1


def find_readers(walk: Walk) -> list[Reader]:
    """All nodes that mix channels, in the order of the graph."""
    return [Reader(cut.node, cut) for cut in walk.cuts if cut.role == "column"]


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return [attribute.as_int()] if attribute.type == ir.AttributeType.INT else list(attribute.as_ints())
