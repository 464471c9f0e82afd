"""Figures equal a naive computation in whole logits, and do not depend on how they are computed."""

import copy
import math

import pytest
import torch

from frugallm.errors import DataError, ModelError, ParameterError
from frugallm.evaluate import Evaluation, evaluate, evaluate_all, predictions
from frugallm.evaluate.precision import fast_dtype
from frugallm.evaluate.predictions import Predictions
from frugallm.text import Text


def naive(model, reference, windows):
    """Return NLL, KL and top-1 per window from whole float64 logits."""
    rows = []
    for window in windows:
        log_p = model(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1)
        log_q = reference(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1)
        nll = -log_p[torch.arange(len(window) - 1), window[1:]].mean()
        kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        top1 = (log_q.argmax(-1) == log_p.argmax(-1)).double().mean()
        rows.append([float(nll), float(kl), float(top1)])
    return torch.tensor(rows, dtype=torch.float64)


def test_figures_equal_a_naive_computation(model, other, windows):
    rows = naive(other, model, windows)
    result = evaluate_all({"other": other}, model, windows, dtype="fp32")["other"]
    assert result.perplexity.value == pytest.approx(math.exp(rows[:, 0].mean()), rel=1e-5)
    assert result.kl.value == pytest.approx(float(rows[:, 1].mean()), rel=1e-4) and result.kl.value > 1e-4
    assert result.top1.value == pytest.approx(float(rows[:, 2].mean()), abs=1e-6) and result.top1.value < 1
    assert torch.allclose(torch.tensor(result.nll_per_window).double(), rows[:, 0], rtol=1e-5)
    base = naive(model, model, windows)[:, 0].mean()
    assert result.perplexity_ratio.value == pytest.approx(math.exp(rows[:, 0].mean() - base), rel=1e-5)
    assert result.perplexity.low < result.perplexity.value < result.perplexity.high


def test_a_model_does_not_diverge_from_itself(model, make_model, windows):
    results = evaluate_all({"copy": make_model(), "same": model}, model, windows)
    result = results["copy"]
    same = results["same"]
    assert (same.kl.value, same.top1.value, same.verdict) == (0, 1, "same within noise")
    assert same.nll_per_window == result.nll_per_window
    assert result.kl.value == pytest.approx(0, abs=1e-9) and result.top1.value == 1
    assert result.perplexity_ratio.value == 1 and result.verdict == "same within noise"


def test_chunks_do_not_change_figures(model, other, windows, monkeypatch):
    results = []
    for chunk in (1, 7, 63, 1000):
        monkeypatch.setattr(predictions, "CHUNK", chunk)
        results.append(evaluate_all({"x": other}, model, windows, dtype="fp32")["x"])
    for result in results[1:]:
        assert result.nll_per_window == pytest.approx(results[0].nll_per_window, rel=1e-6)
        assert result.kl_per_window == pytest.approx(results[0].kl_per_window, rel=1e-4)


def test_no_more_logits_than_a_chunk_at_once(model, windows, monkeypatch):
    monkeypatch.setattr(predictions, "CHUNK", 16)
    seen = []
    model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.shape[-2]))
    evaluate_all({"x": copy.copy(model)}, model, windows, dtype="fp32")
    assert max(seen) == 16 and sum(seen) >= 2 * windows.numel() - 2 * len(windows)


def test_an_architecture_that_caps_its_logits_is_measured_right(windows, make_model):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    assert not Predictions(model).chunked and Predictions(make_model()).chunked
    result = evaluate_all({"x": copy.deepcopy(model)}, model, windows, dtype="fp32")["x"]
    assert result.nll_per_window == pytest.approx(naive(model, model, windows)[:, 0].tolist(), rel=1e-5)
    assert result.kl.value == pytest.approx(0, abs=1e-9)


def test_bf16_units_are_used_inside_only_and_leave_everything_in_float32(model, windows):
    seen = []

    def look(_, inputs, output):
        seen.append((torch.backends.mkldnn.matmul.fp32_precision, inputs[0].dtype, output.dtype))

    for name in ("model.layers.1.mlp.down_proj", "lm_head"):
        model.get_submodule(name).register_forward_hook(look)
    before = torch.backends.mkldnn.matmul.fp32_precision
    half = evaluate_all({"x": model}, None, windows, dtype="bf16")["x"]
    assert ("bf16", torch.float32, torch.float32) in seen
    assert {entry[1:] for entry in seen} == {(torch.float32, torch.float32)}
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    seen.clear()
    full = evaluate_all({"x": model}, None, windows, dtype="fp32")["x"]
    assert {entry[0] for entry in seen} == {before}
    assert half.perplexity.value == pytest.approx(full.perplexity.value, rel=1e-3)
    assert half.dtype != full.dtype == "fp32"


def test_a_model_loaded_in_bf16_is_measured_as_it_is_and_named_so(model, windows):
    full = evaluate_all({"x": model}, None, windows, dtype="fp32")["x"]
    half = evaluate_all({"x": model.bfloat16()}, None, windows, dtype="fp32")["x"]
    assert half.dtype == "bf16 throughout"
    assert half.perplexity.value != full.perplexity.value
    assert half.perplexity.value == pytest.approx(full.perplexity.value, rel=0.05)


@pytest.mark.parametrize("dynamic", [True, False])
def test_activations_are_quantized_in_float32_under_bf16_products(model, windows, dynamic):
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.lifecycle import forward as lifecycle

    inputs = {
        "num_bits": 8,
        "symmetric": True,
        "dynamic": dynamic,
        "strategy": "token" if dynamic else "tensor",
    }
    weights = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = QuantizationConfig(config_groups={"w8a8": scheme}, ignore=["lm_head"])
    plain = naive(model, model, windows)[:, 0].mean()
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.weight_scale.copy_(module.weight.abs().amax(1, keepdim=True) / 127.5)
            if not dynamic:
                module.input_scale.fill_(0.05)

    arrived = set()
    original = lifecycle.fake_quantize

    def spy(x, scale, **rest):
        arrived.add((x.dtype, scale.dtype))
        return original(x=x, scale=scale, **rest)

    lifecycle.fake_quantize = spy
    try:
        half = evaluate_all({"x": model}, None, windows, dtype="bf16")["x"]
    finally:
        lifecycle.fake_quantize = original
    assert arrived == {(torch.float32, torch.float32)}
    full = evaluate_all({"x": model}, None, windows, dtype="fp32")["x"]
    assert half.perplexity.value == pytest.approx(full.perplexity.value, rel=0.01)
    assert full.perplexity.value != pytest.approx(math.exp(plain), rel=1e-6)  # it was quantized at all


def test_the_reference_runs_once_for_all_candidates(model, other, windows, make_model):
    runs = []
    model.model.register_forward_hook(lambda *_: runs.append(1))
    results = evaluate_all({"a": other, "b": make_model(seed=7)}, model, windows)
    assert len(runs) == len(windows) + 2  # two for finding out how logits are made
    assert results["a"].kl.value < results["b"].kl.value
    assert results["a"].reference_nll_per_window == results["b"].reference_nll_per_window


def test_a_broken_model_is_called_broken_and_survives_json(model, windows, make_model):
    bad = make_model()
    bad.model.norm.weight.fill_(math.nan)
    result = evaluate_all({"bad": bad}, model, windows)["bad"]
    assert result.verdict == "broken" and math.isnan(result.perplexity.value)
    again = Evaluation.model_validate_json(result.model_dump_json())
    assert math.isnan(again.perplexity.value) and again.verdict == "broken"


def test_one_window_has_no_interval_and_says_so(model, other, windows):
    result = evaluate_all({"x": other}, model, windows[:1])["x"]
    assert result.perplexity.low is None and result.kl.high is None and result.verdict is None
    assert "one window" in result.note


def test_models_that_cannot_be_compared_are_refused(model, windows, make_model):
    with pytest.raises(ModelError, match="103 and 101 tokens"):
        evaluate_all({"x": make_model(vocab_size=103)}, model, windows)
    with pytest.raises(ParameterError, match="must be one of auto, bf16, fp32; got 'int8'"):
        evaluate_all({"x": model}, None, windows, dtype="int8")


@pytest.mark.parametrize("bos", [False, True])
def test_evaluate_reads_the_text_and_records_what_it_was(bos, make_model, make_tokenizer):
    tokenizer = make_tokenizer(bos=bos)
    model = make_model(vocab_size=len(tokenizer))
    text = Text(name="numbers", digest="abc", documents=(" ".join(map(str, range(500))),))
    result = evaluate(model, model, text, windows=3, window_length=40, tokenizer=tokenizer)
    assert result.bos is bos and result.text.name == "numbers" and result.text.tokens == 120
    assert (result.windows, result.window_length, len(result.nll_per_window)) == (3, 40, 3)
    alone = evaluate(model, None, text, windows=3, window_length=40, tokenizer=tokenizer)
    assert alone.kl is None and alone.against is None and alone.nll_per_window == result.nll_per_window
    with pytest.raises(DataError, match="without a tokenizer"):
        evaluate(model, None, text)


def test_fast_dtype_is_a_dtype_that_products_run_in(model, windows):
    assert fast_dtype() in (torch.bfloat16, torch.float32)
    auto = evaluate_all({"x": model}, None, windows, dtype="auto")["x"]
    named = {torch.bfloat16: "bf16", torch.float32: "fp32"}[fast_dtype()]
    assert auto.nll_per_window == evaluate_all({"x": model}, None, windows, dtype=named)["x"].nll_per_window
