"""Makes every peer's model from the same weights, each with the peer's own tool; what is already made is kept.

    GGUF --- transformers ----------> Hugging Face directory --- genai's builder --> int4, symmetric, block 32
         \\-- llama.cpp's quantizer -> Q4_0 and F16 files

Everything lies below one folder named after the GGUF's contents, so another checkpoint never meets these files.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from client import HERE, clean_environment
from terminal import BenchmarkError, say

# Files that hold a model's graph and weights; tokenizers and configurations are not model data.
_MODEL_DATA = ("*.onnx", "*.onnx.data", "*.onnx_data", "*.gguf")

_TO_HUGGING_FACE = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
source, target = Path(sys.argv[1]), sys.argv[2]
load = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
AutoTokenizer.from_pretrained(**load).save_pretrained(target)
AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32).save_pretrained(target)
"""


def run(command: list[str], what: str, *, hint: str | None = None) -> str:
    """Runs a tool to its end and returns its stdout; raises BenchmarkError with the end of its stderr."""
    # `python -m` and `python -c` import from the working directory first: not from the caller's, which may be a
    # checkout with half of onnxpress in it.
    environment = clean_environment()
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE, env=environment)
    if result.returncode != 0:
        tail = "\n".join((result.stderr or result.stdout).strip().splitlines()[-15:])
        raise BenchmarkError(f"{what}: expected exit status 0, got {result.returncode}\n{tail}", hint=hint)
    return result.stdout


def onnxpress(*arguments: str | Path) -> list[str]:
    """The command line of onnxpress in this environment."""
    return [sys.executable, "-m", "onnxpress", *map(str, arguments)]


def genai_builder(python: Path, checkpoint: Path, output: Path) -> list[str]:
    """The command line that builds onnxruntime-genai's int4 model (symmetric, block 32) of a checkpoint."""
    command = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(output)]
    cache = output.with_name(f"{output.name}.cache")
    options = ["block_size=32", "is_symmetric=true"]
    return [*command, "-p", "int4", "-e", "cpu", "-c", str(cache), "--extra_options", *options]


def model_bytes(path: Path) -> int:
    """Bytes of graph and weights of a model file or directory."""
    if path.is_file():
        return path.stat().st_size
    found = {file for pattern in _MODEL_DATA for file in path.glob(pattern)}
    if not found:
        raise BenchmarkError(f"{path}: expected model files ({', '.join(_MODEL_DATA)}), got none")
    return sum(file.stat().st_size for file in found)


def read_through(path: Path) -> None:
    """Reads a file, or all files of a directory, so that they lie in the page cache when a clock starts."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as stream:
                while stream.read(1 << 22):
                    pass


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights in the forms that the systems read.

    Attributes:
        gguf: the file that everything is made from.
        folder: where what is made lies.
    """

    gguf: Path
    folder: Path

    @classmethod
    def of(cls, gguf: Path, root: Path) -> Checkpoint:
        """Names the folder below `root` after the contents of `gguf`."""
        digest = hashlib.sha256()
        with open(gguf, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        folder = root / digest.hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        return cls(gguf, folder)

    def hugging_face(self) -> Path:
        """The weights as a float32 Hugging Face directory, by transformers in this environment."""

        def make(target: Path) -> None:
            run(
                [sys.executable, "-c", _TO_HUGGING_FACE, str(self.gguf), str(target)], f"transformers reads {self.gguf}"
            )

        return self._once("hf", "transformers turns the GGUF into a Hugging Face directory", make)

    def exported(self, checkpoint: Path) -> Path:
        """The ONNX export that onnxpress optimizes, by `onnxpress export`."""

        def make(target: Path) -> None:
            run(onnxpress("export", checkpoint, "-o", target, "--quiet"), "onnxpress export")

        return self._once("onnx", "onnxpress exports the checkpoint to ONNX", make)

    def genai_int4(self, python: Path, checkpoint: Path) -> Path:
        """onnxruntime-genai's own int4 model of `checkpoint`."""

        def make(target: Path) -> None:
            run(genai_builder(python, checkpoint, target), "onnxruntime-genai's builder")
            # The transformers that the builder needs rebuilds the tokenizer of a checkpoint that came from a GGUF, and
            # the result splits text differently. The weights are what is compared: they get the checkpoint's own.
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(checkpoint / name, target / name)

        return self._once("genai-int4-b32", "onnxruntime-genai's builder makes its int4 model", make)

    def requantized(self, python: Path, kind: str) -> Path:
        """The GGUF in another llama.cpp file type, `Q4_0` or `F16`."""

        def make(target: Path) -> None:
            run(
                [str(python), str(HERE / "quantize_gguf.py"), str(self.gguf), str(target), kind], "llama_model_quantize"
            )

        return self._once(f"{kind}.gguf", f"llama.cpp makes its {kind} file", make)

    def built(self, python: Path, checkpoint: Path, name: str, arguments: list[str]) -> Path:
        """A model of onnxruntime-genai's builder, with options of its command line."""

        def make(target: Path) -> None:
            command = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(target)]
            cache = target.with_name(f"{target.name}.cache")
            run([*command, "-e", "cpu", "-c", str(cache), *arguments], "onnxruntime-genai's builder")
            for file in ("tokenizer.json", "tokenizer_config.json"):  # as in `genai_int4`
                shutil.copyfile(checkpoint / file, target / file)

        return self._once(f"genai-{_plain(name)}", f"onnxruntime-genai's builder makes {name}", make)

    def ort_quantized(self, exported: Path, algorithm: str, text: Path) -> Path:
        """The ONNX export quantized by ONNX Runtime's MatMulNBits quantizer, in this environment."""

        def make(target: Path) -> None:
            command = [sys.executable, str(HERE / "quantize_onnx.py"), str(exported), str(target), algorithm, str(text)]
            run(command, "onnxruntime.quantization")

        return self._once(f"ort-{_plain(algorithm)}", f"onnxruntime.quantization makes {algorithm}", make)

    def passed(self, exported: Path, passes: str, calibration: Path | None, *, fresh: bool) -> Path:
        """An artifact of ours, by a recipe's name or the text of a pipeline; kept unless `fresh`."""
        name = f"onnxpress-{_plain(passes)}"

        def make(target: Path) -> None:
            how = ["--passes" if "," in passes else "--recipe", passes]
            how += ["--calibration", str(calibration)] if calibration else []
            run(onnxpress("optimize", exported, "-o", target, *how, "--quiet", "--no-measure"), "onnxpress optimize")

        if fresh:
            _remove(self.folder / name)
        return self._once(name, f"onnxpress makes {passes}", make)

    def optimized(self, model: str, recipe: str) -> Path:
        """A fresh artifact of `onnxpress optimize`; never kept from an earlier run, for the code may have changed."""
        target = self.folder / f"onnxpress-{recipe}"
        _remove(target)
        say(f"onnxpress optimizes {model} with the recipe {recipe}")
        run(onnxpress("optimize", model, "-o", target, "--recipe", recipe, "--quiet"), "onnxpress optimize")
        return target

    def _once(self, name: str, what: str, make: Callable[[Path], None]) -> Path:
        final = self.folder / name
        if final.exists():
            say(f"keeps {final}")
            return final
        say(f"{what}: {final}")
        # Complete or absent: an interrupted tool must not leave half a model that the next run trusts.
        partial = self.folder / f"partial-{name}"
        _remove(partial)
        try:
            make(partial)
            partial.rename(final)
        finally:
            _remove(partial)
            _remove(partial.with_name(f"{partial.name}.cache"))
        return final


def last_json(text: str, what: str) -> dict[str, object]:
    """The JSON object that a command printed on stdout, which may hold nothing else."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"{what}: expected JSON on stdout, got {text[:200]!r}") from error
    if not isinstance(value, dict):
        raise BenchmarkError(f"{what}: expected a JSON object, got {type(value).__name__}")
    return value


def _plain(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
