"""The peer's side: llama.cpp quantizes one GGUF file, run in an environment without FrugalLM.

Takes an unquantized file and writes one of a type that ``llama-quantize`` knows, with the type of the vocabulary's table,
types of single tensors and an importance matrix as that tool takes them. The matrix comes as ``.npz``: name of a tensor
to the mean squares ``(in,)`` float32 of its input channels. Prints ``{"event": "stage", "text": …}`` lines on standard error.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys

import numpy as np


def stage(text: str) -> None:
    print(json.dumps({"event": "stage", "text": text}), file=sys.stderr, flush=True)


def overrides(llama: object, wanted: list[str]) -> ctypes.Array | None:
    """Return types of single tensors, given as ``PATTERN=TYPE``, ended by an empty entry."""
    if not wanted:
        return None
    pairs = [one.rsplit("=", 1) for one in wanted]
    entries = [(pattern.encode(), tensor_type(llama, kind)) for pattern, kind in pairs]
    return (llama.llama_model_tensor_override * (len(entries) + 1))(*entries, (None, 0))


def importance(llama: object, file: str | None) -> ctypes.Array | None:
    """Return the importance matrix, ended by an empty entry; the caller keeps it for as long as it is used."""
    if file is None:
        return None
    entries = []
    for name, values in np.load(file).items():
        data = np.ascontiguousarray(values, dtype=np.float32)
        pointer = (ctypes.c_float * len(data))(*data)
        entries.append((name.encode(), ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), len(data)))
    return (llama.llama_model_imatrix_data * (len(entries) + 1))(*entries, (None, None, 0))


def tensor_type(llama: object, name: str) -> int:
    return getattr(llama, f"GGML_TYPE_{name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="an unquantized GGUF file")
    parser.add_argument("--out", required=True)
    parser.add_argument("--type", required=True, help="as llama-quantize calls it: Q4_0, IQ4_NL, Q4_K_M …")
    parser.add_argument("--tables", default="Q8_0", help="type of embedding and head")
    parser.add_argument("--tensor", action="append", default=[], help="PATTERN=TYPE; may be repeated")
    parser.add_argument("--importance", help=".npz with the mean squares of each tensor's input channels")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    stage("import")
    from llama_cpp import llama_cpp as llama

    stage("compress")
    params = llama.llama_model_quantize_default_params()
    params.nthread = args.threads
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{args.type}")
    params.output_tensor_type = params.token_embedding_type = tensor_type(llama, args.tables)
    tensors, matrix = overrides(llama, args.tensor), importance(llama, args.importance)
    if tensors is not None:
        params.tt_overrides = tensors
    if matrix is not None:
        params.imatrix = matrix
    status = llama.llama_model_quantize(args.model.encode(), args.out.encode(), params)
    if status:
        raise SystemExit(f"llama_model_quantize returned {status}")


if __name__ == "__main__":
    main()
