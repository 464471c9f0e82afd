"""The compressed-tensors format: how quantized linears lie in a Hugging Face folder.

============== ======================== ===================================================================================
container      used for                 tensors of a linear ``<p>``
============== ======================== ===================================================================================
pack-quantized linears, inputs as they  ``weight_packed`` int32 ``(out, ceil(in b / 32))``, ``weight_scale (out, groups)``,
               are, or weights of other ``weight_shape`` int64 ``[out, in]``; asymmetric: ``weight_zero_point`` int32
               than 8 bits              ``(ceil(out b / 32), groups)``; static inputs: ``input_scale``
int-quantized  8 bits with rounded      ``weight`` int8 ``(out, in)``, ``weight_scale (out, groups)``; static inputs:
               inputs                   ``input_scale (1,)`` float32; asymmetric: ``weight_zero_point`` int8
                                        ``(out, groups)``
naive-         embedding and head in    ``weight`` int8 ``(vocabulary, width)``, ``weight_scale``; a tied head has a scale of
quantized      8 bits                   its own name and shares the weight
mxfp4-, nvfp4- FP4 in groups with      ``weight_packed`` uint8 ``(out, in / 2)``, ``weight_scale (out, groups)``: uint8,
pack-quantized scales powers of two,    the exponent of two plus 127; or float8, and ``weight_global_scale (1,)`` float32 by
               or in E4M3               which it is divided; static inputs: ``input_scale``
float-, naive- FP8, inputs rounded or   ``weight`` float8 ``(out, in)``, ``weight_scale (out, groups)``; static inputs:
quantized      not                      ``input_scale``
============== ======================== ===================================================================================

Some keys are our own: ``outliers`` in ``input_activations``, the magnitude from which on input channels are not rounded,
``clusters``, how many static grids their channels share (:mod:`frugallm.formats.rounded_inputs`), ``rotation``, the order
of the Hadamard matrix in whose basis they are rounded, and ``reassembled``, where channels are split and shared before
they are rounded (:mod:`frugallm.formats.channels`); ``grid`` in both, where the format has no name for what codes stand
for (:mod:`frugallm.formats.levels`); ``zero_dtype`` in ``weights``, where ``weight_zero_point`` is float16 ``(out, groups)``
and not packed; ``extras`` in ``weights``, kinds of what is stored beside the codes (:mod:`frugallm.formats.extras`); and
``second`` in ``weights``, a scheme in which scales and zero points are stored: as ``weight_scale_packed``,
``weight_scale_scale``, ``weight_scale_zero_point`` and ``weight_zero_packed``, … instead of ``weight_scale`` and
``weight_zero_point``. Readers of the format refuse keys that they do not know, so none of them computes something else
instead.

Codes are stored unsigned, ``code + 2^(b-1)``, as a little-endian bit stream along each row. Packing is left to the
``compressed-tensors`` package, so that what is written is what it reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from frugallm.compress.plan import Plan
from frugallm.formats.extras import KINDS
from frugallm.formats.quantized_tensor import LinearScheme, QuantizedTensor, WeightScheme, first_level
from frugallm.models.family import Family

#: Name of our own container, as quantization method and as stem of its files.
OWN = "frugallm"
#: Stems of the tensors of a second level, and their ends.
SECOND = ("weight_scale", "weight_zero")
SECOND_LEAVES = tuple(f"{stem}_{end}" for stem in SECOND for end in ("packed", "scale", "zero_point"))

FP4_CONTAINERS = ("mxfp4-pack-quantized", "nvfp4-pack-quantized")
FLOAT_CONTAINERS = (*FP4_CONTAINERS, "float-quantized")
_FP4_OF = dict(zip(("float8_e8m0fnu", "float8_e4m3fn"), FP4_CONTAINERS))
#: What the format calls types of scales that it must be told.
_SCALE_TYPES = {"float8_e8m0fnu": "torch.uint8", "float8_e4m3fn": "torch.float8_e4m3fn"}


def container(scheme: LinearScheme, *, table: bool = False) -> str:
    """Return the name of the container for one linear, or for an embedding or head."""
    weights = scheme.weights
    if weights.grid == "e4m3":
        return "naive-quantized" if scheme.activations is None else "float-quantized"
    if weights.grid == "e2m1" and weights.group_size is not None:
        return _FP4_OF.get(weights.scale_dtype, "pack-quantized")
    if table and scheme.weights.bits == 8:
        return "naive-quantized"
    # The format's own rule would put 4-bit codes of rounded inputs into int8 as well, at twice the bytes.
    whole_bytes = scheme.activations is not None and scheme.weights.bits == 8
    return "int-quantized" if whole_bytes else "pack-quantized"


def encode_linear(
    path: str,
    q: QuantizedTensor,
    scheme: LinearScheme,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    table: bool = False,
) -> dict[str, Tensor]:
    """Return the tensors, by full name, that store linear ``path``; ``inputs`` are those of its rounded inputs, by leaf."""
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    out: dict[str, Tensor] = {}
    packed = container(scheme, table=table) == "pack-quantized"
    if container(scheme, table=table) in FP4_CONTAINERS:
        out[f"{path}.weight_packed"] = pack_fp4_to_uint8(q.scheme.values(q.codes))
    elif q.scheme.grid == "e4m3":
        out[f"{path}.weight"] = q.scheme.values(q.codes).to(torch.float8_e4m3fn)
    elif packed:
        out[f"{path}.weight_packed"] = pack_to_int32(q.codes, q.scheme.bits)
        out[f"{path}.weight_shape"] = torch.tensor(q.codes.shape, dtype=torch.int64)
    else:
        out[f"{path}.weight"] = q.codes.contiguous()
    if scheme.weights.second is None:
        powers = q.scheme.scale_dtype == "float8_e8m0fnu"  # known to the format as their exponents
        out[f"{path}.weight_scale"] = (q.scale.view(torch.uint8) if powers else q.scale).contiguous()
        if q.unit is not None:
            out[f"{path}.weight_global_scale"] = q.unit
        if q.zero is not None:
            whole = packed and not q.zero.is_floating_point()
            zero = pack_to_int32(q.zero, q.scheme.bits, packed_dim=0) if whole else q.zero
            out[f"{path}.weight_zero_point"] = zero.contiguous()
    else:
        assert q.second is not None
        for stem, level in zip(SECOND, q.second):
            assert level.zero is not None
            out[f"{path}.{stem}_packed"] = pack_to_int32(level.codes, level.scheme.bits)
            out[f"{path}.{stem}_scale"] = level.scale.contiguous()
            out[f"{path}.{stem}_zero_point"] = level.zero.contiguous()
    for extra in q.extras:
        out.update({f"{path}.{leaf}": tensor.contiguous() for leaf, tensor in extra.tensors().items()})
    out.update({f"{path}.{leaf}": tensor.contiguous() for leaf, tensor in (inputs or {}).items()})
    return out


def decode_linear(
    path: str, tensors: Mapping[str, Tensor], scheme: LinearScheme, *, table: bool = False
) -> QuantizedTensor:
    """Read back what :func:`encode_linear` wrote."""
    q = _decode_codes(path, tensors, scheme, table=table)
    for kind in scheme.weights.extras:
        leaves = {
            leaf: tensors[f"{path}.{leaf}"] for leaf in KINDS[kind].leaves if f"{path}.{leaf}" in tensors
        }
        q = q.plus(KINDS[kind].from_tensors(leaves))
    return q


def _decode_codes(
    path: str, tensors: Mapping[str, Tensor], scheme: LinearScheme, *, table: bool
) -> QuantizedTensor:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    bits, packed_codes = scheme.weights.bits, container(scheme, table=table) == "pack-quantized"
    if scheme.weights.grid == "e4m3" or container(scheme, table=table) in FP4_CONTAINERS:
        codes = _decode_floats(path, tensors, scheme.weights)
    elif packed_codes:
        shape = torch.Size(tensors[f"{path}.weight_shape"].tolist())
        codes = unpack_from_int32(tensors[f"{path}.weight_packed"], bits, shape)
    else:
        codes = tensors[f"{path}.weight"]
    if scheme.weights.second is not None:
        second = _decode_second(path, tensors, scheme.weights.second)
        return QuantizedTensor(codes, *first_level(second, len(codes)), scheme.weights, second=second)
    scale, unit = tensors[f"{path}.weight_scale"], tensors.get(f"{path}.weight_global_scale")
    if scheme.weights.scale_dtype == "float8_e8m0fnu":
        scale = scale.view(torch.float8_e8m0fnu)
    packed = tensors.get(f"{path}.weight_zero_point")
    if not packed_codes or packed is None or packed.is_floating_point():
        return QuantizedTensor(codes, scale, packed, scheme.weights, unit=unit)
    # Packed down the rows. Turned here, by a copy: the package's own way fails where all rows fit in one word.
    turned = packed.T.clone(memory_format=torch.contiguous_format)
    zero = unpack_from_int32(turned, bits, scale.T.shape).T.contiguous()
    return QuantizedTensor(codes, scale, zero, scheme.weights)


def _decode_floats(path: str, tensors: Mapping[str, Tensor], scheme: WeightScheme) -> Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    if scheme.grid == "e4m3":
        values = tensors[f"{path}.weight"].float()
    else:
        packed = tensors[f"{path}.weight_packed"]
        values = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], torch.float32)
    return scheme.nearest(values).to(torch.int8)


def _decode_second(
    path: str, tensors: Mapping[str, Tensor], scheme: WeightScheme
) -> tuple[QuantizedTensor, QuantizedTensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    def level(stem: str) -> QuantizedTensor:
        step, zero = (tensors[f"{path}.{stem}_{end}"] for end in ("scale", "zero_point"))
        shape = torch.Size((len(step), step.shape[1] * (scheme.group_size or 1)))
        codes = unpack_from_int32(tensors[f"{path}.{stem}_packed"], scheme.bits, shape)
        return QuantizedTensor(codes, step, zero, scheme)

    return level(SECOND[0]), level(SECOND[1])


def _weight_arguments(scheme: WeightScheme, format: str) -> dict[str, Any]:
    strategy = "group" if scheme.group_size else "channel"
    known = scheme.grid == "e4m3" or format in FP4_CONTAINERS
    arguments: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "float" if known else "int",
        "symmetric": scheme.symmetric,
        "strategy": "tensor_group" if known and scheme.two_scales else strategy,
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    if scheme.scale_dtype in _SCALE_TYPES:
        arguments["scale_dtype"] = _SCALE_TYPES[scheme.scale_dtype]
    if scheme.grid != "int" and not known:
        arguments["grid"] = scheme.grid
    if scheme.zero_dtype != "int8":
        # Not in the format, as "outliers" below.
        arguments["zero_dtype"] = scheme.zero_dtype
    if scheme.extras:
        arguments["extras"] = list(scheme.extras)
    if scheme.second is not None:
        arguments["second"] = _weight_arguments(scheme.second, format)
    return arguments


def _input_arguments(scheme: LinearScheme) -> dict[str, Any] | None:
    if scheme.activations is None:
        return None
    dynamic = scheme.activations.dynamic
    arguments: dict[str, Any] = {
        "num_bits": scheme.activations.bits,
        "type": "float" if scheme.activations.grid == "e4m3" else "int",
        "symmetric": scheme.activations.clusters is None,
        "strategy": "token" if dynamic else "tensor",
        "dynamic": dynamic,
    }
    if scheme.activations.outliers is not None:
        # Not in the format: who does not know this key must refuse the folder rather than round everything.
        arguments["outliers"] = scheme.activations.outliers
    if scheme.activations.clusters is not None:
        arguments["clusters"] = scheme.activations.clusters
    if scheme.activations.grid == "olive":
        arguments["grid"] = scheme.activations.grid
    if scheme.activations.reassembled:
        arguments["reassembled"] = True
    if scheme.activations.rotation is not None:
        arguments["rotation"] = scheme.activations.rotation
    return arguments


def _group(scheme: LinearScheme, targets: list[str], *, table: bool = False) -> dict[str, Any]:
    format = container(scheme, table=table)
    return {
        "targets": targets,
        "weights": _weight_arguments(scheme.weights, format),
        "input_activations": _input_arguments(scheme),
        "output_activations": None,
        "format": format,
    }


def quant_method(plan: Plan) -> str:
    """Return whose format a folder is in: compressed-tensors, or our own container of the same tensors.

    What ``transformers`` keeps as ``Conv1D`` or as fused experts compressed-tensors does not reach: plain ``transformers``
    would fill those weights with random numbers and only warn. Our container lies in files of another name
    (``frugallm.safetensors``), so that no engine takes it for something it can load; :func:`frugallm.load` does.
    """
    return "compressed-tensors" if plan.modules == "Linear" else OWN


def quantization_config(plan: Plan, family: Family, *, tied: bool) -> dict[str, Any] | None:
    """Return the ``quantization_config`` of ``config.json``, or ``None`` when nothing is quantized.

    The scheme that most linears have is targeted by class; exceptions are named one by one.
    """
    by_scheme: dict[LinearScheme, list[str]] = {}
    for name, linear in plan.linears.items():
        by_scheme.setdefault(linear.scheme, []).append(name)
    groups: list[dict[str, Any]] = []
    ordered = sorted(by_scheme.items(), key=lambda item: len(item[1]))
    for scheme, names in ordered[:-1]:
        groups.append(_group(scheme, names))
    if ordered:
        groups.append(_group(ordered[-1][0], ["Linear"]))
    dense = [*plan.left_alone, *(name for name in plan.pruned if name not in plan.linears)]
    ignore = dense if ordered else []
    tables = [*plan.tables, *([family.head] if tied and plan.tables else [])]
    for name, table in plan.tables.items():
        packed = table.scheme.bits != 8
        targets = [name] if packed else [n for n in tables if n == name or tied]
        groups.insert(
            0,
            _group(LinearScheme(weights=table.scheme), [f"re:{re.escape(n)}$" for n in targets], table=True),
        )
        if packed and tied:
            ignore.append(family.head)
    if family.head not in tables:
        ignore.append(family.head)
    if not groups:
        return None
    formats = {g["format"] for g in groups}
    return {
        "quant_method": quant_method(plan),
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {f"group_{i}": g for i, g in enumerate(groups)},
    }
