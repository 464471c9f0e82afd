"""Every family passes the shipped checks on small random models; what no description covers is refused."""

import pytest
from transformers import BloomConfig, OPTConfig

from frugallm.conformance.families import CHECKS, VARIANTS, variant
from frugallm.errors import ModelError
from frugallm.models.family import FAMILIES, family_of


@pytest.fixture(params=VARIANTS, scope="module")
def model(request):
    return variant(request.param)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check(check, model, tmp_path):
    check(model, tmp_path)


def test_every_type_has_a_variant():
    assert {kind for kind, _ in VARIANTS.values()} == {t for family in FAMILIES for t in family.model_types}


def test_nothing_is_folded_where_an_activation_function_or_a_clip_is_in_the_way():
    def writer(name, site):
        config = variant(name).config
        return {s.name: s for s in family_of(config).sites(config, 0)}[site].writer

    assert writer("gpt2", "mlp.c_proj") is None
    assert writer("gpt_neox", "mlp.dense_4h_to_h") is None
    assert writer("opt, gelu, untied", "fc2") is None
    assert writer("olmoe, clipped", "self_attn.o_proj") is None
    assert writer("opt", "fc2") == "fc1"
    assert writer("olmoe", "self_attn.o_proj") == "self_attn.v_proj"


def test_another_architecture_is_named_with_those_that_are_known():
    with pytest.raises(ModelError, match="'bloom' is not supported") as caught:
        family_of(BloomConfig())
    assert "gpt_neox" in caught.value.hint and "add-a-family" in caught.value.hint


def test_variants_that_no_description_covers_are_refused():
    with pytest.raises(ModelError, match="opt-350m"):
        family_of(OPTConfig(do_layer_norm_before=False))
