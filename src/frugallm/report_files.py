"""What a result's folder says about itself: manifest, measurements, report page, model card."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from frugallm.evaluate import TextFacts
from frugallm.evaluate.machine import machine, versions
from frugallm.evaluate.report import JobFacts, LayerError, ModelFacts, Report
from frugallm.evaluate.speed import Rate
from frugallm.formats import shards
from frugallm.formats.engines import engines_for, grids, loads_in_transformers, schemes
from frugallm.formats.gguf_families import FAMILIES
from frugallm.formats.gguf_transcode import type_for
from frugallm.job import Job, Workplace, layer_facts
from frugallm.measure import PROMPT, Measured
from frugallm.models.linears import name_here

if TYPE_CHECKING:
    from frugallm.compression import Clock

MANIFEST, MEASUREMENTS, PAGE, CARD = "manifest.json", "measurements.json", "report.html", "README.md"
PARTS = {"embedding": "embedding and head", "block": "blocks", "final": "other"}


def write_report_files(
    job: Job, place: Workplace, measured: Measured, clock: Clock, *, resumed: bool
) -> Report:
    """Write everything but the weights and what belongs to them; return the report."""
    folder = place.folder
    manifest = manifest_of(job, folder)
    report = _report(job, place, measured, clock, resumed)
    shards.write_bytes(folder / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    shards.write_bytes(folder / MEASUREMENTS, report.to_json().encode())
    shards.write_bytes(folder / PAGE, report.to_html().encode())
    shards.write_bytes(folder / CARD, model_card(job, place, report).encode())
    return report


def manifest_of(job: Job, folder: Path) -> dict[str, Any]:
    """Return the deterministic facts: what was done to what, and the digests of what came out."""
    return {"job": job.identity(), "files": file_digests(folder)}


def file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a result that is not about it."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return {p.name: _digest(p) for p in files if p.name not in (MANIFEST, MEASUREMENTS, PAGE, CARD)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _part_of(job: Job, name: str) -> str:
    family = job.checkpoint.family
    if name.startswith(f"{family.blocks}."):
        return PARTS["block"]
    return (
        PARTS["embedding"] if name.startswith((f"{family.embedding}.", f"{family.head}.")) else PARTS["final"]
    )


def stored_bytes(job: Job, place: Workplace) -> tuple[dict[str, int], int]:
    """Return bytes of tensors by part, and those of compressed linears and tables alone."""
    by_part = dict.fromkeys(PARTS.values(), 0)
    compressed = 0
    done = {*job.plan.linears, *job.plan.pruned, *job.plan.tables}
    if job.plan.tables:
        done.add(job.checkpoint.family.head)  # a tied head has a scale of its own name
    for path in sorted(place.folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for stored in file.keys():  # noqa: SIM118
                entry = file.get_tensor(stored)
                size = entry.numel() * entry.element_size()
                name = name_here(job.checkpoint.family, stored)
                by_part[_part_of(job, name)] += size
                if name.rpartition(".")[0] in done and not name.endswith(".bias"):
                    compressed += size
    return by_part, compressed


def _models(job: Job, place: Workplace, measured: Measured) -> list[ModelFacts]:
    weights = {n: math.prod(job.given.shape(n)) for n in job.given.names()}
    before = dict.fromkeys(PARTS.values(), 0)
    for name, count in weights.items():
        before[_part_of(job, name)] += count * job.stored.itemsize
    after, compressed = stored_bytes(job, place)
    done = {*job.plan.linears, *job.plan.pruned, *job.plan.tables}
    chosen = sum(math.prod(job.checkpoint.shape(f"{n}.weight")) for n in done)
    total = sum(weights.values())
    file_bytes = sum(p.stat().st_size for p in place.folder.glob("*.safetensors"))
    dtype_bits = 8.0 * job.stored.itemsize
    return [
        ModelFacts(
            name=job.checkpoint.name,
            role="before",
            part_bytes=before,
            file_bytes=sum(before.values()),
            compressed_bits=dtype_bits,
            whole_bits=dtype_bits,
            quality=measured.before,
            **_outside(measured.outside_before),
        ),
        ModelFacts(
            name=" ".join(job.recipe.to_cli()),
            part_bytes=after,
            file_bytes=file_bytes,
            compressed_bits=8 * compressed / chosen if chosen else None,
            whole_bits=8 * file_bytes / total,
            zeros=_zeros(layer_facts(job, place)),
            quality=measured.after,
            **_outside(measured.outside_after),
        ),
    ]


def _zeros(layers: list[dict[str, Any]]) -> float | None:
    """Return the share of zeros among the weights of the linears that were pruned."""
    pruned = [facts for facts in layers if "zeros" in facts]
    return sum(f["zeros"] for f in pruned) / sum(f["weights"] for f in pruned) if pruned else None


def _outside(facts: dict[str, Any]) -> dict[str, Any]:
    if "speed" not in facts:
        return {}
    return {
        "prefill": Rate.of(facts["speed"]["prefill"]),
        "decode": Rate.of(facts["speed"]["decode"]),
        "peak_bytes": facts["default.anonymous_bytes"] or None,
        "answer": facts.get("answer", ""),
    }


def _report(job: Job, place: Workplace, measured: Measured, clock: Clock, resumed: bool) -> Report:
    notes = [*job.notes, *measured.notes]
    if measured.verification is not None:
        notes.append(
            "verified: loaded by plain transformers in a process of its own, logits agree with the model in memory "
            f"(relative squared error {measured.verification['float32_error']:.1e} in float32; "
            f"KL {measured.verification['default_kl']:.1e} nats/token as loaded by default)"
        )
    if measured.outside_after.get("speed") and job.plan.quantizes:
        notes.append(
            "speed and memory are those of plain transformers, which unpacks the weights; what an engine with kernels "
            "for few bits gains 'frugal bench' measures"
        )
    if resumed:
        notes.append("resumed: seconds and memory are those of the last part of the run")
    all_layers = layer_facts(job, place)
    layers = [facts for facts in all_layers if "error" in facts]
    text = TextFacts(**job.text, tokens=job.windows.numel()) if job.text and job.windows is not None else None
    models = _models(job, place, measured)
    return Report(
        title=f"{job.checkpoint.name}: {' '.join(job.recipe.to_cli())}",
        models=models,
        job=JobFacts(
            recipe=job.recipe.to_cli(),
            settings=job.recipe.settings(),
            seconds={k: round(v, 3) for k, v in clock.seconds.items()},
            baseline_bytes=clock.baseline_bytes,
            peak_bytes=clock.peak_bytes,
            model_digest=job.given.digest(),
            calibration=text,
            samples=None if job.windows is None else job.windows.shape[0],
            seq_len=None if job.windows is None else job.windows.shape[1],
            seed=job.seed,
            machine=machine(),
            versions=versions(),
        ),
        prompt=PROMPT if any(model.answer for model in models) else "",
        how_to_load=how_to_load(job, place.out),
        layers=[LayerError(**{k: facts[k] for k in ("name", "error", "baseline_error")}) for facts in layers],
        zeros={f["name"]: f["zeros"] / f["weights"] for f in all_layers if "zeros" in f},
        shares=measured.shares,
        notes=notes,
    )


def how_to_load(job: Job, out: Path) -> dict[str, str]:
    """Return, per engine, what to type to load the result, or why that engine does not."""
    answers: dict[str, str] = {}
    if loads_in_transformers(job.plan):
        packages = "transformers compressed-tensors" if job.plan.quantizes else "transformers"
        answers["transformers"] = (
            f"# pip install {packages} accelerate\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f'model = AutoModelForCausalLM.from_pretrained("{out}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{out}")'
        )
    else:
        answers["FrugalLM"] = f'import frugallm\n\nmodel, tokenizer = frugallm.load("{out}")'
    rows = engines_for(job.plan)
    vllm = [r for r in rows if r.engine == "vLLM" and r.seen != "no"]
    if vllm:
        devices = ", ".join(f"{r.device} ({r.version}, {r.seen})" for r in vllm)
        answers["vLLM"] = f"vllm serve {out}\n# {devices}"
    if job.checkpoint.config.model_type in FAMILIES:
        kind = "MXFP4" if grids(job.plan) == {"mxfp4"} else type_for(max(schemes(job.plan)[0]))
        file = out.with_name(f"{out.name}.gguf")
        answers["llama.cpp"] = f"frugal export {out} --to gguf:{kind} --out {file}\nllama-cli -m {file}"
    for row in rows:
        if row.seen == "no" and row.engine not in answers:
            answers[row.engine] = f"# not this folder: {row.note}"
    return answers


def model_card(job: Job, place: Workplace, report: Report) -> str:
    """Return the folder's ``README.md``: front matter, what was done, the measured table, how to load it."""
    facts = job.checkpoint.metadata
    front = {
        "license": facts.get("license", "other"),
        "base_model": job.checkpoint.name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "frugallm",
            *(["compressed-tensors"] if job.plan.quantizes else []),
            *job.recipe.versions(),
        ],
    }
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in front.items()), "---", ""]
    steps = "\n".join(f"    {step}" for step in job.recipe.to_cli())
    return "\n".join(
        [
            *lines,
            f"# {place.out.name}",
            "",
            f"{facts.get('name', job.checkpoint.name)}, compressed by FrugalLM with",
            "",
            steps,
            "",
            f"The full recipe with all defaults, digests and versions is in `{MANIFEST}`, every figure in "
            f"`{MEASUREMENTS}`, and a page with plots in `{PAGE}`.",
            "",
            report.to_markdown(),
        ]
    )
