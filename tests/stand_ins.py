"""Do-nothing CUDA libraries, so that ONNX Runtime's real CUDA provider loads without a GPU and plans a session.

cuDNN is left out: the provider opens it by name and does without it. The provider asks for a device, its properties and
memory; everything else answers "success". Placement, fusion, kernel constructors and copies between devices are decided
before anything computes, so they are real; nothing may be run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import util
from pathlib import Path

LIBRARIES = ("libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudart.so.13")
HEADER = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n"
ARCHITECTURE = 'static int sm(void) { const char *e = getenv("STUB_SM"); return e ? atoi(e) : 90; }\n'

# Functions whose answer matters; all others return 0.
ANSWERS = {
    "cudaGetDeviceCount": "int {0}(int *n) {{ *n = 1; return 0; }}",
    "cudaGetDevice": "int {0}(int *n) {{ *n = 0; return 0; }}",
    "cudaRuntimeGetVersion": "int {0}(int *v) {{ *v = 13000; return 0; }}",
    "cudaDriverGetVersion": "int {0}(int *v) {{ *v = 13000; return 0; }}",
    "cudaMemGetInfo": "int {0}(size_t *f, size_t *t) {{ *f = *t = 80ull << 30; return 0; }}",
    # Offsets of cudaDeviceProp in CUDA 13: total memory, then the compute capability.
    "cudaGetDeviceProperties": (
        'int {0}(char *p, int d) {{ memset(p, 0, 900); strcpy(p, "stand-in"); *(size_t *)(p + 288) = 80ull << 30;'
        " *(int *)(p + 360) = sm() / 10; *(int *)(p + 364) = sm() % 10; return 0; }}"
    ),
    "cudaDeviceGetAttribute": (
        "int {0}(int *v, int a, int d) {{ *v = a == 75 ? sm() / 10 : a == 76 ? sm() % 10 : a == 16 ? 108"
        " : a == 97 ? 166912 : 0; return 0; }}"
    ),
    "cudaMalloc": "int {0}(void **p, size_t n) {{ *p = aligned_alloc(256, (n + 255) / 256 * 256); return 0; }}",
    "cudaFree": "int {0}(void *p) {{ free(p); return 0; }}",
    "cudaMemcpy": "int {0}(void *d, void *s, size_t n, int k) {{ memcpy(d, s, n); return 0; }}",
    "cudaMemcpyAsync": "int {0}(void *d, void *s, size_t n, int k, void *t) {{ memcpy(d, s, n); return 0; }}",
    "cudaStreamCreate": "int {0}(void **p) {{ *p = malloc(8); return 0; }}",
    "cudaStreamCreateWithFlags": "int {0}(void **p, unsigned f) {{ *p = malloc(8); return 0; }}",
    "cudaGetErrorString": 'const char *{0}(int e) {{ return "stand-in"; }}',
    "__cudaRegisterFatBinary": "void **{0}(void *p) {{ static void *x[2]; return x; }}",
}
SAME_AS = {
    "cudaMallocHost": "cudaMalloc",
    "cudaHostAlloc": "cudaMalloc",
    "cudaFreeHost": "cudaFree",
    "cudaEventCreate": "cudaStreamCreate",
    "cudaEventCreateWithFlags": "cudaStreamCreateWithFlags",
    "cublasCreate_v2": "cudaStreamCreate",
    "cublasLtCreate": "cudaStreamCreate",
    "cudaGetErrorName": "cudaGetErrorString",
}


def missing() -> str | None:
    """Why the stand-ins cannot be built here, None when they can."""
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if not _provider().exists():
        return "this ONNX Runtime has no CUDA provider"
    return None


def build(directory: Path) -> None:
    """Compiles the stand-ins into `directory`, for LD_LIBRARY_PATH of a child process."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(_provider())], capture_output=True, text=True, check=True
    ).stdout.split()
    for library in LIBRARIES:
        names = sorted({name.partition("@")[0] for name in symbols if name.endswith(f"@{library}")})
        source = HEADER + ARCHITECTURE + "\n".join(_function(name) for name in names) + "\n"
        versions = directory / f"{library}.map"
        versions.write_text(f"{library} {{ global: *; }};\n")
        _compile(directory, library, source, [f"-Wl,--version-script={versions}"])
    driver = sorted({n.partition("@")[0] for n in symbols if re.match(r"cu[A-Z]", n)})
    _compile(directory, "libcuda.so.1", HEADER + "\n".join(f"int {name}(void) {{ return 0; }}" for name in driver), [])


def _provider() -> Path:
    found = util.find_spec("onnxruntime")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "capi" / "libonnxruntime_providers_cuda.so"


def _function(name: str) -> str:
    template = ANSWERS.get(SAME_AS.get(name, name), "int {0}(void) {{ return 0; }}")
    return template.format(name)


def _compile(directory: Path, library: str, source: str, flags: list[str]) -> None:
    code = directory / f"{library}.c"
    code.write_text(source)
    command = ["gcc", "-shared", "-fPIC", "-w", "-o", str(directory / library), str(code), f"-Wl,-soname,{library}"]
    subprocess.run([*command, *flags], check=True)
