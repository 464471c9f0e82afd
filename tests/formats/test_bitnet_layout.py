"""The bitnet layout against transformers' own packing, and what damaged folders do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.integrations.bitnet import pack_weights

from frugallm.compress.quantize.bitnet import quantize
from frugallm.errors import ModelError
from frugallm.formats import bitnet_layout
from frugallm.formats.packed_folder import reader_of


def _codes(rows, columns, bits):
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    return codes if bits == 2 else torch.where(codes >= 0, 1, -1).to(torch.int8)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(8, 1), (16, 7), (64, 65)])
def test_what_is_packed_is_unpacked(bits, rows, columns):
    codes = _codes(rows, columns, bits)
    packed = bitnet_layout.pack(codes, bits)
    assert packed.shape == (rows * bits // 8, columns)
    assert packed.dtype == torch.uint8
    assert torch.equal(bitnet_layout.unpack(packed, bits), codes)


def test_ternary_codes_are_packed_as_transformers_packs_them():
    codes = _codes(24, 10, 2)
    assert torch.equal(bitnet_layout.pack(codes, 2), pack_weights(codes.clone()))


def test_tokens_are_rounded_as_transformers_rounds_them():
    x = torch.randn(3, 5, 33) * torch.tensor([1e-7, 1, 30.0])[:, None, None]
    scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    assert torch.equal(bitnet_layout.round_tokens(x), (x * scale).round().clamp(-128, 127) / scale)


def test_the_scale_survives_its_type():
    q = quantize(torch.randn(16, 12) * 0.037, "ternary")
    stored = bitnet_layout.encode_linear("p", q, 2)["p.weight_scale"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(1 / stored.float(), q.scale[0])


@pytest.fixture
def folder(tmp_path, bitnet_folder):
    """A copy that may be damaged."""
    import shutil

    return shutil.copytree(bitnet_folder, tmp_path / "copy")


def _read(folder, name):
    checkpoint = reader_of(folder)(folder)
    checkpoint.validate()
    return checkpoint.tensor(name)


def test_a_damaged_folder_is_refused_in_one_line(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("up_proj.weight"))
    good = tensors[name].clone()

    def refused(**changes):
        changed = {n: t for n, t in {**tensors, **changes}.items() if t is not None}
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ModelError) as caught:
            _read(folder, name)
        assert "\n" not in str(caught.value)

    refused(**{name: torch.full_like(good, 255)})  # four times 3, which is no code
    refused(**{name: good[:-1]})
    refused(**{name.replace(".weight", ".weight_scale"): None})
    refused(**{name.replace(".weight", ".weight_scale"): torch.tensor([float("nan")])})
    refused(**{name.replace(".weight", ".rms_norm.weight"): None})


def test_a_folder_of_latent_weights_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(quantization_mode="online", linear_class="autobitlinear")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="online"):
        reader_of(folder)(folder)


def test_normalize_is_the_root_mean_square_norm():
    x, gains = torch.randn(4, 9, dtype=torch.float64), torch.rand(9, dtype=torch.float64) + 0.5
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gains
    assert torch.allclose(bitnet_layout.normalize(x.float(), gains.float(), 1e-6).double(), wanted, atol=1e-6)
    assert torch.allclose(F.rms_norm(x, (9,), gains, 1e-6), wanted)
