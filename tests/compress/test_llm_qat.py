"""LLM-QAT: what is rounded, against the formulas written out; the KV cache; how it is stored."""

import pytest
import torch
from torch import nn

from frugallm.compress.quantize.llm_qat import LLMQAT, RoundedLinear, round_cache
from frugallm.conformance.trial import random_model
from frugallm.errors import ModelError
from frugallm.formats.quantized_tensor import ActivationScheme, WeightScheme
from frugallm.models.family import family_of


def _round(values, bits):
    """Return values with one symmetric scale a row; the widest lies on a boundary, so in float32 as well."""
    step = values.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    return (values / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step


def _student(**parameters):
    student = random_model("tied").requires_grad_(True)
    LLMQAT(**parameters).rewrite(student, family_of(student.config))
    return student


def test_a_linear_rounds_weight_input_and_what_is_cached():
    torch.manual_seed(0)
    plain = nn.Linear(24, 16)
    linear = RoundedLinear(plain, WeightScheme(bits=3, scale_dtype="float32"), ActivationScheme(bits=8), 4)
    x = torch.randn(5, 24)
    inputs, weight = _round(x, 8), _round(plain.weight.detach(), 3)
    assert torch.equal(linear.stored().dequantize(), weight)
    wanted = _round(nn.functional.linear(inputs, weight, plain.bias.detach()), 4)
    assert torch.allclose(linear(x), wanted, atol=1e-6)
    linear(x).sum().backward()
    assert torch.allclose(plain.weight.grad, inputs.sum(0).expand(16, 24), atol=1e-4)


def test_keys_and_values_alone_are_rounded_for_the_cache():
    student = _student(kv_bits=4)
    cached = {n.rpartition(".")[2] for n, m in student.named_modules() if getattr(m, "cached_bits", None)}
    assert cached == {"k_proj", "v_proj"}
    ids = torch.arange(20)[None]
    with torch.no_grad():
        with_cache = student(ids).logits
        round_cache(student, None)
        without = student(ids).logits
        round_cache(student, 4)
        again = student(ids).logits
    assert torch.equal(with_cache, again)
    assert not torch.allclose(with_cache, without)


def test_at_eight_bits_nearly_nothing_changes():
    plain, ids = random_model("tied"), torch.arange(20)[None]
    student = _student(bits=8, kv_bits=8)
    with torch.no_grad():
        a, b = plain(ids).logits, student(ids).logits
    assert (a - b).square().sum() < 1e-2 * a.square().sum()


def test_the_loss_is_zero_where_student_and_teacher_are_one():
    teacher = random_model("tied")
    batch = {"input_ids": torch.arange(20)[None], "index": torch.tensor([0])}
    assert LLMQAT().loss(teacher, teacher, batch).item() == pytest.approx(0, abs=1e-6)
    assert LLMQAT().loss(_student(bits=2), teacher, batch).item() > 0.01


def test_a_model_with_fused_keys_is_refused_unless_its_cache_is_left():
    from transformers import Phi3Config

    from frugallm.training.students import new_model

    config = Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    with pytest.raises(ModelError, match="kv_bits=null"):
        LLMQAT().rewrite(new_model(config, 0), family_of(config))
    LLMQAT(kv_bits=None).rewrite(new_model(config, 0), family_of(config))


def test_what_is_handed_on_loads_in_transformers():
    student = _student(bits=4)
    layout = LLMQAT(bits=4).hand_on(student, family_of(student.config), torch.bfloat16)
    assert layout.in_transformers and layout.rounds_inputs
    assert not any(getattr(m, "cached_bits", None) for m in student.modules())
    group = layout.quantization["config_groups"]["group_0"]
    assert group["weights"]["num_bits"] == 4 and group["input_activations"]["num_bits"] == 8
