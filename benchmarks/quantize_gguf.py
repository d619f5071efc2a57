"""Re-quantizes a GGUF file with llama.cpp's own quantizer: `quantize_gguf.py IN.gguf OUT.gguf TYPE`.

TYPE is the name of a llama.cpp file type, `Q4_0`, `F16`, `Q4_K_M`, ...; the mix of tensor types is llama.cpp's default.
"""

from __future__ import annotations

import sys

import llama_cpp


def main(source: str, target: str, kind: str) -> None:
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), params)
    if status != 0:
        raise SystemExit(f"llama_model_quantize of {source} to {kind} returned {status}")


if __name__ == "__main__":
    main(*sys.argv[1:])
