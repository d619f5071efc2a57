"""Quantizes an ONNX directory with ONNX Runtime's own tool: `quantize_onnx.py IN OUT ALGORITHM TEXT`.

ALGORITHM is "default", "default asymmetric", "rtn", "k_quant", "hqq" or "gptq"; 4 bits in blocks of 32, embeddings too
where the algorithm can. TEXT calibrates gptq: four windows of 256 tokens.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization import matmul_nbits_quantizer as tool
from tokenizers import Tokenizer

_WINDOWS, _LENGTH = 4, 256


class Windows(CalibrationDataReader):
    """Text as the decoder reads it, with an empty cache."""

    def __init__(self, source: Path, text: Path) -> None:
        self._ids = Tokenizer.from_file(str(source / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
        self._inputs = onnx.load(source / "model.onnx", load_external_data=False).graph.input
        self._next = 0  # a number, not an iterator: the quantizer copies its configuration

    def get_next(self) -> dict[str, Any] | None:
        self._next += 1
        return self._feeds(self._next - 1) if self._next <= _WINDOWS else None

    def rewind(self) -> None:
        self._next = 0

    def _feeds(self, number: int) -> dict[str, Any]:
        ids = np.array([self._ids[number * _LENGTH : (number + 1) * _LENGTH]], np.int64)
        known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(_LENGTH)[None]}
        feeds = {}
        for one in self._inputs:
            sizes = [dim.dim_value for dim in one.type.tensor_type.shape.dim]
            empty = np.zeros([1, sizes[1], 0, sizes[3]], np.float32) if len(sizes) == 4 else None
            feeds[one.name] = known.get(one.name, empty)
        return feeds


def main(source: Path, target: Path, algorithm: str, text: Path) -> None:
    symmetric = algorithm != "default asymmetric"
    both = ("MatMul", "Gather")
    default = tool.DefaultWeightOnlyQuantConfig(32, symmetric, 4, op_types_to_quantize=both)
    config = {
        "rtn": tool.RTNWeightOnlyQuantConfig,
        "k_quant": tool.KQuantWeightOnlyQuantConfig,
        "hqq": lambda: tool.HQQWeightOnlyQuantConfig(block_size=32),
        "gptq": lambda: tool.GPTQWeightOnlyQuantConfig(Windows(source, text), block_size=32, actorder=False, mse=False),
    }.get(algorithm, lambda: default)()
    made = tool.MatMulNBitsQuantizer(str(source / "model.onnx"), 4, 32, symmetric, accuracy_level=4, algo_config=config)
    made.process()
    model = made.model.model
    for node in model.graph.node:  # hqq leaves it out, and runs hundreds of times slower
        if node.op_type == "MatMulNBits" and not any(one.name == "accuracy_level" for one in node.attribute):
            node.attribute.append(onnx.AttributeProto(name="accuracy_level", type=onnx.AttributeProto.INT, i=4))
    if not any(one.domain == "com.microsoft" for one in model.opset_import):
        model.opset_import.append(onnx.OperatorSetIdProto(domain="com.microsoft", version=1))
    onnx.load_external_data_for_model(model, str(source))  # what rtn and k_quant left where it was
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, target / file.name)
    os.chdir(target)  # a file of that name lies in the source
    onnx.save(model, target / "model.onnx", save_as_external_data=True, location="model.onnx.data")


if __name__ == "__main__":
    directory, output, text_file = (Path(sys.argv[index]).resolve() for index in (1, 2, 4))
    os.chdir(directory)  # gptq opens sessions of a model in memory, whose weights are looked for here
    main(directory, output, sys.argv[3], text_file)
