"""BitNet's quantizers against plain float64, and what its linears do."""

import math

import pytest
import torch
from torch import nn

from frugallm.compress.quantize.bitnet import BitLinear, BitNet, TwoStages, quantize
from frugallm.errors import ModelError
from frugallm.models.family import family_of
from frugallm.training.students import new_config, new_model


def test_ternary_weights_are_the_papers():
    weight = torch.randn(16, 24, dtype=torch.float64) * 0.02
    mean = float(weight.abs().mean())
    q = quantize(weight.float(), "ternary")
    scale = float(q.scale[0])
    assert scale == pytest.approx(mean, rel=2**-8)  # its inverse in bf16
    wanted = (weight / scale).round().clamp(-1, 1)
    assert torch.equal(q.codes.double(), wanted)
    assert torch.allclose(q.dequantize().double(), wanted * scale, rtol=1e-6)
    assert set(q.codes.unique().tolist()) == {-1, 0, 1}


def test_binary_weights_are_signs_about_the_mean():
    weight = torch.randn(16, 24, dtype=torch.float64) * 0.02 + 0.01
    q = quantize(weight.float(), "binary")
    above = weight > weight.mean()
    assert torch.equal(q.codes > 0, above)
    assert (above != (weight > 0)).any()  # the mean matters here
    assert q.codes.abs().eq(1).all()
    assert float(q.scale[0]) == pytest.approx(float(weight.abs().mean()), rel=2**-8)


def test_a_linear_computes_what_is_stored_and_learns_through_it():
    torch.manual_seed(0)
    linear = BitLinear(nn.Linear(24, 16, bias=False), "ternary", True)
    x = torch.randn(3, 24, requires_grad=True)
    y = linear(x)
    normal = x.detach().double() / (x.detach().double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    step = normal.abs().amax(-1, keepdim=True) / 127
    inputs = (normal / step).round() * step
    wanted = inputs @ linear.stored().dequantize().double().T
    assert torch.allclose(y.double(), wanted, atol=1e-5)
    slope = torch.randn(3, 16)
    (y * slope).sum().backward()
    # straight through: the gradient of the latent weight is that of the rounded one
    assert torch.allclose(linear.weight.grad.double(), slope.double().T @ inputs, atol=1e-5)
    assert x.grad.isfinite().all() and x.grad.any()


def _student(method, **shape):
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = new_config("tiny", {**small, **shape})
    student = new_model(config, 0)
    method.rewrite(student, family_of(config))
    return student


def test_norms_before_linears_stay_one_where_linears_have_their_own():
    inside, plain = _student(BitNet()), _student(BitNet(norm=False))
    layer, other = inside.model.layers[0], plain.model.layers[0]
    assert not layer.input_layernorm.weight.requires_grad
    assert not layer.post_attention_layernorm.weight.requires_grad
    assert layer.self_attn.q_proj.rms_norm.weight.requires_grad
    assert inside.model.norm.weight.requires_grad
    assert other.input_layernorm.weight.requires_grad
    assert other.self_attn.q_proj.rms_norm is None
    assert not isinstance(inside.lm_head, BitLinear)


def test_a_norm_of_a_norm_is_the_norm():
    student = _student(BitNet())
    layer = student.model.layers[0]
    x = torch.randn(2, 5, 32) * 7
    once = layer.self_attn.q_proj.rms_norm(x)
    twice = layer.self_attn.q_proj.rms_norm(layer.input_layernorm(x))
    assert torch.allclose(once, twice, atol=1e-5)


def test_outputs_that_do_not_pack_are_refused():
    with pytest.raises(ModelError, match="60 outputs, no multiple of 8"):
        _student(BitNet(weights="binary"), intermediate_size=60)
    _student(BitNet(), intermediate_size=60)


def test_the_second_stage_is_slower_and_does_not_decay():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.1)
    schedule = TwoStages(optimizer, 100)
    rates, decays = [], []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        decays.append(optimizer.param_groups[0]["weight_decay"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.2)  # warming up over five steps
    assert rates[49] == pytest.approx(0.51)
    assert rates[50] == pytest.approx(0.5 * 2 / 3)
    assert decays[49] == 0.1 and decays[50] == 0.0
    assert math.isclose(rates[99], 0.01 * 2 / 3, rel_tol=1e-6)
    again = TwoStages(torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.1), 100)
    again.load_state_dict(schedule.state_dict())
    assert again.last_epoch == schedule.last_epoch
