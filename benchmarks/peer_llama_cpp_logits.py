"""The peer's side: logits of llama.cpp for the same tokens in several GGUF files, in an environment without FrugalLM.

Reads a request (JSON: ``ids`` and ``models``) and writes beside each model its logits ``(tokens, vocabulary)`` as ``.npy``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

F32 = 0  # of ggml's types: keys and values are kept without rounding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--request", type=Path, required=True, help="ids, models")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    from llama_cpp import Llama

    request = json.loads(args.request.read_text())
    ids = request["ids"]
    for file in request["models"]:
        model = Llama(
            model_path=file,
            n_ctx=len(ids),
            n_threads=args.threads,
            n_threads_batch=args.threads,
            logits_all=True,
            type_k=F32,
            type_v=F32,
            verbose=False,
        )
        model.eval(ids)
        np.save(Path(file).with_suffix(".npy"), model.scores[: len(ids)])
        model.close()


if __name__ == "__main__":
    main()
