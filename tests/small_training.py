"""Trainings small enough for tests."""

import frugallm

SMALL = {
    "from_scratch": True,
    "shape": {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "seq_len": 32,
    "max_steps": 4,
    "batch": 2,
    "windows": 2,
    "threads": 1,
}


def small_training(steps, out, model="tiny", **options):
    """Train a model of 30 thousand weights for four steps and return the report."""
    text = _text(out)
    return frugallm.train(model, steps, out=out, **{"text": text, "eval_text": text, **SMALL, **options})


def small_bitnet(out, weights="ternary"):
    """Return the folder of such a training with BitNet."""
    small_training([f"bitnet:weights={weights}"], out, evaluate=False, verify=False)
    return out


def _text(out):
    path = out.parent / "words.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(" ".join(f"the {a} saw a {b}." for a in WORDS for b in WORDS for _ in range(4)))
    return path


WORDS = "cat dog bird fish horse mouse snake frog bear wolf".split()
