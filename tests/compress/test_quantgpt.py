"""QuantGPT: what is rounded, the memory of tokens, how it is stored."""

import pytest
import torch

from frugallm.compress.quantize.quantgpt import MEMORY, ClippedLinear, QuantGPT, TiedHead, likeness
from frugallm.conformance.trial import random_model
from frugallm.models.family import family_of
from frugallm.training.loop import begin

WINDOWS = torch.arange(48).view(4, 12)


def _student(kind="tied", **parameters):
    student, teacher = random_model(kind).requires_grad_(True), random_model(kind)
    method = QuantGPT(**parameters)
    begin(student, teacher, [method], family_of(student.config), WINDOWS, 0)
    return method, student, teacher


def _batch(*rows):
    index = torch.tensor(rows)
    return {"input_ids": WINDOWS[index], "index": index}


def test_a_range_is_a_factor_of_the_mean_magnitude():
    _, student, _ = _student()
    linear = student.model.layers[0].mlp.up_proj
    assert linear.clip.item() == 1
    mean = linear.weight.detach().abs().mean()
    assert linear.stored().scale[0].item() == pytest.approx(mean.item(), rel=2**-8)
    assert set(linear.stored().codes.unique().tolist()) == {-1, 0, 1}
    with torch.no_grad():
        linear.weight.mul_(3)  # the range follows
    assert linear.range().item() == pytest.approx(3 * mean.item(), rel=1e-5)
    table = student.model.embed_tokens
    assert table.clip.shape == (67,)


@pytest.mark.parametrize("bits", [4, 8])
def test_above_two_bits_the_range_begins_at_the_largest_weight(bits):
    _, student, _ = _student(bits=bits)
    linear = student.model.layers[0].mlp.up_proj
    assert linear.range().item() == pytest.approx(linear.weight.abs().max().item(), rel=1e-5)


def test_a_tied_head_is_rounded_with_the_embedding():
    _, student, _ = _student(activation_bits=None)
    assert isinstance(student.lm_head, TiedHead)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    states = torch.randn(3, 96)
    wanted = states @ student.model.embed_tokens.stored().dequantize().T
    assert torch.allclose(student.lm_head(states), wanted, atol=1e-5)
    _, untied, _ = _student("untied")
    assert not isinstance(untied.lm_head, (TiedHead, ClippedLinear))


def test_the_memory_moves_while_training_alone():
    method, student, teacher = _student(momentum=0.75)
    memory = student.get_buffer(MEMORY)
    student.eval()
    method.loss(student, teacher, _batch(1, 3))
    assert not memory.any()
    student.train()
    method.loss(student, teacher, _batch(1, 3))
    assert memory[1].any() and memory[3].any() and not memory[0].any() and not memory[2].any()
    first = memory[1].clone()
    with torch.no_grad():
        student.contrast_projection.weight.neg_()
    method.loss(student, teacher, _batch(1))
    assert torch.allclose(memory[1], 0.75 * first - 0.25 * first, atol=1e-5)


def test_ranges_learn_at_a_rate_of_their_own():
    for scaling, rate in (("dynamic", 5e-3), ("pact", None)):
        method, student, _ = _student(scaling=scaling)
        weights, ranges = method.optimizer(student, 1e-3).param_groups
        assert weights["lr"] == 1e-3
        clips = [p for n, p in student.named_parameters() if n.endswith(".clip")]
        assert {id(p) for p in ranges["params"]} == {id(p) for p in clips}
        assert ranges["lr"] == rate if rate else ranges["lr"] < 5e-3


def test_without_contrasts_nothing_is_added():
    _, student, _ = _student(contrast=0, embedding=False)
    added = set(student.state_dict()) - set(random_model("tied").state_dict())
    assert added and all(name.endswith(".clip") for name in added)


def test_likeness_is_the_mean_cosine_of_pairs():
    model = random_model("tied")
    with torch.no_grad():
        states = model(WINDOWS[:1], output_hidden_states=True).hidden_states[-1][0].double()
    unit = states / states.norm(dim=-1, keepdim=True)
    cosines = unit @ unit.T
    pairs = ~torch.eye(12, dtype=torch.bool)
    assert likeness(model, WINDOWS[:1]) == pytest.approx(cosines[pairs].mean().item(), abs=1e-5)


def test_ranges_are_not_rounded_when_the_rest_is():
    from frugallm.training.result import as_stored

    method, student, _ = _student()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith(".clip"):
                parameter.mul_(1.2345)  # no number of bf16
    layout = method.hand_on(student, family_of(student.config), torch.bfloat16)
    as_stored(student, layout, torch.bfloat16)
    for name, q in layout.stored.items():
        assert torch.equal(student.get_submodule(name).stored().scale, q.scale)
        assert torch.equal(student.get_submodule(name).stored().codes, q.codes)
