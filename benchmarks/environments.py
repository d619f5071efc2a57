"""Makes one virtual environment per peer, with pinned packages; what is already there and right is left alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from terminal import BenchmarkError, say


@dataclass(frozen=True)
class Step:
    """One call of pip: requirements, all pinned with `==`, further options of `pip install`, environment variables."""

    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """Another system: its environment's folder name, a name for people, and how its packages come in."""

    folder: str
    title: str
    steps: tuple[Step, ...]
    hint: str

    def pins(self) -> dict[str, str]:
        """Version by normalised distribution name."""
        pairs = (requirement.split("==") for step in self.steps for requirement in step.requirements)
        return {_normalise(name): version for name, version in pairs}


_IS_MACOS = sys.platform == "darwin"

_GGML_FEATURES = {
    "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "bmi2": "BMI2", "avx512f": "AVX512", "avx512_vnni": "AVX512_VNNI",
    "avx512vbmi": "AVX512_VBMI", "avx512_bf16": "AVX512_BF16",
}  # fmt: skip


def _without_amx() -> dict[str, str]:
    """Options of llama.cpp's build: all that this processor has but AMX, which virtual machines announce and trap."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return {}
    if "amx_tile" not in flags:
        return {}
    features = [f"-DGGML_{name}=ON" for flag, name in _GGML_FEATURES.items() if flag in flags]
    return {"CMAKE_ARGS": " ".join(["-DGGML_NATIVE=OFF", "-DGGML_AMX_TILE=OFF", *features])}


GENAI = Peer(
    folder="genai",
    title="onnxruntime-genai",
    steps=(
        Step(
            (
                # The same runtime binary as ours: what differs is the graph and the loop around it.
                f"{'onnxruntime' if _IS_MACOS else 'onnxruntime-gpu'}==1.31.1",
                # The builder needs the rest.
                "onnx==1.23.2",
                "onnx-ir==1.1.0",
                "torch==2.13.0",
                "transformers==5.12.1",
            )
        ),
        # It asks for a package named `onnxruntime`; onnxruntime-gpu is that package under another name.
        Step(("onnxruntime-genai==0.18.0",), ("--no-deps",)),
    ),
    hint="it needs a wheel of onnxruntime-genai for this platform; --peers llama leaves it out",
)

LLAMA = Peer(
    folder="llama",
    title="llama.cpp",
    # Built from source here, so that the compiler sees this machine's instruction set.
    # --no-cache: a wheel that pip kept may have been made with other options.
    steps=(Step(("llama-cpp-python==0.3.36",), ("--no-cache-dir",), _without_amx()),),
    hint="it is compiled on this machine: install a C++ compiler, or leave it out with --peers genai",
)

PEERS = {peer.folder: peer for peer in (GENAI, LLAMA)}


def provide(peer: Peer, root: Path) -> Path:
    """Makes sure that `root/peer.folder` is an environment with the peer's pinned packages.

    Returns:
        the environment's Python.

    Raises:
        BenchmarkError: the environment cannot be made, or pip fails.
    """
    directory = root / peer.folder
    python = directory / "bin" / "python"
    if not python.exists():
        say(f"{peer.title}: makes an environment in {directory}")
        directory.parent.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(directory)], "python -m venv", "is the venv module installed?")
    for step in peer.steps:
        have = installed(python)
        missing = [pin for pin in step.requirements if not _is_met(pin, have)]
        if not missing:
            continue
        say(f"{peer.title}: installs {', '.join(missing)} into {directory} (this can take minutes)")
        # All of the step's pins at once, or pip might move one while it installs another.
        command = [str(python), "-m", "pip", "install", "--quiet", *step.options, *step.requirements]
        _run(command, f"pip install {' '.join(step.requirements)}", peer.hint, step.variables)
    say(f"{peer.title}: environment {directory}")
    return python


def installed(python: Path) -> dict[str, str]:
    """Version of every distribution in an environment, by normalised name."""
    code = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions() if d.metadata['Name']}))"
    )
    output = _run([str(python), "-c", code], f"{python} -c ...", "remove that environment and run again")
    return {_normalise(name): version for name, version in json.loads(output).items()}


def _is_met(pin: str, have: Mapping[str, str]) -> bool:
    name, version = pin.split("==")
    # A local label (`2.13.0+cpu`) is a build of the same version.
    return have.get(_normalise(name), "").split("+")[0] == version


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _run(command: list[str], what: str, hint: str, variables: Mapping[str, str] | None = None) -> str:
    environment = {**os.environ, **(variables or {})}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode != 0:
        tail = "\n".join(result.stderr.strip().splitlines()[-15:])
        raise BenchmarkError(f"{what}: expected exit status 0, got {result.returncode}\n{tail}", hint=hint)
    return result.stdout
