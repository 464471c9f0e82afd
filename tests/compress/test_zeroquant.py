"""ZeroQuant and layer-by-layer distillation on small models: grids, what is trained, what is refused, resume."""

from __future__ import annotations

import pytest
import torch

from frugallm.compress.plan import make_plan
from frugallm.compress.prune.unstructured.magnitude import Magnitude
from frugallm.compress.quantize.gptq import GPTQ
from frugallm.compress.quantize.lkd import LKD
from frugallm.compress.quantize.lorc import LoRC
from frugallm.compress.quantize.olive import Olive
from frugallm.compress.quantize.rtn import RTN
from frugallm.compress.quantize.zeroquant import ZeroQuant, attention_linears
from frugallm.conformance import families
from frugallm.conformance.block_methods import Killed, KilledAfter
from frugallm.conformance.trial import carry_out, job_for, random_model, windows
from frugallm.errors import RecipeError
from frugallm.job import layer_facts, needs_text
from frugallm.models.in_memory import InMemory

FEW = {"steps": 12, "rate": 0.02, "batch": 2}


def run_of(steps, tmp_path, kind="tied", name="out", **options):
    job = job_for(InMemory(random_model(kind)), steps, windows(kind), **options)
    return carry_out(job, tmp_path / name)


def weights(run):
    stored = run.place.stored(run.job)
    return {name: stored.tensor(f"{name}.weight") for name in run.job.plan.linears}


def test_feed_forward_has_4_bits_and_attention_8(tmp_path):
    run = run_of([ZeroQuant(steps=0)], tmp_path)
    for name, linear in run.job.plan.linears.items():
        assert linear.scheme.weights.bits == (8 if ".self_attn." in name else 4)
        assert linear.scheme.weights.group_size == 32
        assert linear.scheme.activations.dynamic and linear.scheme.activations.bits == 8
    assert not needs_text(run.job.plan) and run.job.plan.reconstructions == ()


def test_untrained_at_equal_bits_it_is_rounding_to_nearest(tmp_path):
    ours = run_of([ZeroQuant(steps=0, bits=4, attention_bits=4)], tmp_path, name="ours")
    nearest = run_of([RTN(bits=4)], tmp_path, name="nearest")
    assert all(torch.equal(weight, weights(nearest)[name]) for name, weight in weights(ours).items())


@pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral"])
def test_attention_is_known_in_every_family(name):
    checkpoint = InMemory(families.variant(name))
    attention = attention_linears(checkpoint)
    rest = set(checkpoint.linears()) - attention
    assert attention and all("att" in linear for linear in attention)
    assert rest and not any("att" in linear for linear in rest)


@pytest.mark.parametrize(
    "steps", [[ZeroQuant(**FEW)], [RTN(bits=3), LKD(**FEW)], [ZeroQuant(**FEW, inputs="original")]]
)
def test_training_changes_codes_alone_and_says_by_how_much(steps, tmp_path):
    run = run_of(steps, tmp_path)
    untrained = [s for s in steps if not isinstance(s, LKD)]
    untrained = [s.model_copy(update={"steps": 0}) if isinstance(s, ZeroQuant) else s for s in untrained]
    before = run_of(untrained, tmp_path, name="untrained")
    tensors, old = run.tensors(), before.tensors()
    assert tensors.keys() == old.keys()
    first = "model.layers.0."
    changed = {n for n in tensors if n.startswith(first) and not torch.equal(tensors[n], old[n])}
    assert changed and all(n.endswith(("weight_packed", ".weight")) for n in changed)
    facts = layer_facts(run.job, run.place)
    assert all(f["block_error"] <= f["block_error_before"] for f in facts)
    assert any(f["block_error"] < f["block_error_before"] for f in facts)
    assert all("error" not in f and f["step"].split()[-1] == steps[-1].name() for f in facts)


@pytest.mark.parametrize("inputs", ["stored", "own"])
@pytest.mark.parametrize("limit", [2**30, 0])
def test_a_killed_run_goes_on_to_the_same_bytes(inputs, limit, tmp_path):
    steps = [RTN(bits=3), LKD(**FEW, inputs=inputs)]
    options = {"seed": 3, "hidden_limit": limit, "fast": torch.bfloat16}
    whole = run_of(steps, tmp_path, name="whole", **options)
    job = job_for(InMemory(random_model("tied")), steps, windows("tied"), **options)
    with pytest.raises(Killed):
        carry_out(job, tmp_path / "killed", KilledAfter(1))
    assert carry_out(job, tmp_path / "killed", resume=True).digest() == whole.digest()
    assert not list(whole.place.path.glob("*.bin"))
    other = run_of(steps, tmp_path, name="other", **{**options, "seed": 4})
    assert other.digest() != whole.digest()


def test_zeros_of_an_earlier_step_stay(tmp_path):
    run = run_of([Magnitude(sparsity=0.5), GPTQ(bits=3), LKD(**FEW)], tmp_path)
    alone = run_of([Magnitude(sparsity=0.5), GPTQ(bits=3)], tmp_path, name="alone")
    for name, weight in weights(run).items():
        if ".0." in name:
            assert not weight[weights(alone)[name] == 0].any()
        assert (weight == 0).float().mean() >= 0.5


def test_linears_that_are_not_touched_are_not_trained(tmp_path):
    run = run_of([RTN(bits=3), LKD(**FEW, only=("*.0.mlp.*",))], tmp_path)
    plain = run_of([RTN(bits=3)], tmp_path, name="plain")
    for fact in layer_facts(run.job, run.place):
        assert ("block_error" in fact) == (".0.mlp." in fact["name"])
    same = {n: torch.equal(w, weights(plain)[n]) for n, w in weights(run).items() if ".layers.0." in n}
    assert {n for n, equal in same.items() if not equal} <= {n for n in same if ".mlp." in n}
    assert not all(same.values())


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([LKD(), LoRC()], "what lkd trains"),
        ([LKD(), Magnitude()], "what lkd trains"),
        ([LKD(only=("*.mlp.*",)), GPTQ()], "what lkd trains"),
        ([Olive(), LKD()], "there is nothing between pairs"),
    ],
)
def test_what_is_trained_is_not_changed_afterwards(steps, said):
    with pytest.raises(RecipeError, match=said):
        make_plan(steps, InMemory(random_model("tied")))
