"""A finished run of a small random model, for tests of what is made of results."""

import json

import torch

from frugallm.conformance import trial
from frugallm.formats.stored import model_in_memory
from frugallm.models.in_memory import InMemory
from frugallm.progress import Progress
from frugallm.recipe import Recipe
from frugallm.report_files import manifest_of


class Heard(Progress):
    """Remembers what it was told."""

    def __init__(self):
        super().__init__()
        self.events = []

    def event(self, kind, **facts):
        self.events.append((kind, facts))


def finished(folder, kind, steps, stored=torch.bfloat16):
    """Return a finished run on one of the trial's models, or on a given one without text; the values in it; its model."""
    on_trial = isinstance(kind, str)
    checkpoint = InMemory(trial.random_model(kind) if on_trial else kind)
    tokens = trial.windows(kind) if on_trial else None
    job = trial.job_for(checkpoint, Recipe.parse(steps).steps, tokens, stored=stored)
    run = trial.carry_out(job, folder / "run")
    shown = run.place.stored(job)
    values = {name: shown.tensor(name) for name in shown.names()}
    model = model_in_memory(shown)
    (run.folder / "manifest.json").write_text(json.dumps(manifest_of(job, run.folder)))
    (run.folder / "README.md").write_text('---\nlicense: "apache-2.0"\n---\n')
    (run.folder / "LICENSE").write_text("do as you like\n")
    run.place.finish()
    return folder / "run", values, model
