"""The peer's side: llama.cpp on one GGUF file, run in an environment without FrugalLM.

Reads a request (JSON), writes a reply (JSON): the mean negative log-likelihood of each token window, the greedy
continuation of a prompt, and the tokens of a text. Prints ``{"event": "stage", "text": …}`` lines on standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROWS = 256  # of logits turned into probabilities at a time


def stage(text: str) -> None:
    print(json.dumps({"event": "stage", "text": text}), file=sys.stderr, flush=True)


def window_nll(scores: np.ndarray, ids: list[int]) -> float:
    """Return the mean over positions of ``-log p(next token)``; ``scores (length, vocabulary)`` are logits."""
    nll = 0.0
    for start in range(0, len(ids) - 1, ROWS):
        stop = min(start + ROWS, len(ids) - 1)
        rows = scores[start:stop].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        chosen = rows[np.arange(stop - start), ids[start + 1 : stop + 1]]
        nll += float((np.log(np.exp(rows).sum(axis=1)) - chosen).sum())
    return nll / (len(ids) - 1)


def greedy(model: object, ids: list[int], most: int, ends: list[int]) -> list[int]:
    """Return the likeliest token again and again, until one of ``ends`` or ``most`` tokens."""
    model.reset()
    model.eval(ids)
    answer: list[int] = []
    while len(answer) < most:
        token = int(model.scores[model.n_tokens - 1].argmax())
        answer.append(token)
        if token in ends:
            break
        model.eval([token])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument(
        "--request", type=Path, required=True, help="windows, prompt, ends, answer_tokens, text"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    stage("import")
    from llama_cpp import Llama

    request = json.loads(args.request.read_text())
    windows = request["windows"]
    stage("load")
    model = Llama(
        model_path=args.model,
        n_ctx=max(len(windows[0]), len(request["prompt"]) + request["answer_tokens"]),
        n_threads=args.threads,
        n_threads_batch=args.threads,
        logits_all=True,
        verbose=False,
    )
    stage("tokenize")
    tokens = model.tokenize(request["text"].encode(), add_bos=False, special=True)
    stage("generate")
    answer = greedy(model, request["prompt"], request["answer_tokens"], request["ends"])
    stage("windows")
    nll = []
    for ids in windows:
        model.reset()
        model.eval(ids)
        nll.append(window_nll(model.scores, ids))
    args.out.write_text(json.dumps({"nll_per_window": nll, "answer": answer, "tokens": tokens}))


if __name__ == "__main__":
    main()
