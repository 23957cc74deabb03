"""Quantizes a GGUF file: `python llama_quantize.py F16_FILE OUTPUT LLAMA_FTYPE`, in the
environment of llama.cpp's binding."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp


def main(source: str, output: str, kind: int) -> int:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = kind
    return llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(params))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
