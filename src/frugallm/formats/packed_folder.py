"""A folder whose linears are packed, as a checkpoint: every tensor has the value that its codes stand for.

Each toolkit has its own layout: which tensors stand in the place of ``<linear>.weight`` and what they mean. A layout is
one file with a subclass of :class:`PackedFolder`. Tensors are decoded one at a time, so a model larger than memory can
be read, and neither the toolkit nor its kernels are needed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safetensors import SafetensorError
from torch import Tensor

from frugallm.errors import ModelError
from frugallm.formats.quantized_tensor import QuantizedTensor
from frugallm.models.checkpoint import Checkpoint
from frugallm.models.family import FAMILIES
from frugallm.models.safetensors_folder import SafetensorsFolder, read_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FLOAT_SCALES = ("F16", "BF16", "F32")
#: Bytes of a number by its type as safetensors calls it.
BYTES = {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
INTACT = "Get an intact copy of the model"


class Parts:
    """The stored tensors of one packed linear, by the ends of their names.

    Parameters
    ----------
    folder
        Where they are.
    path
        The linear, ``model.layers.0.mlp.up_proj``.
    names
        From the end of a name, ``qweight``, to the stored name.
    """

    def __init__(self, folder: PackedFolder, path: str, names: dict[str, str]) -> None:
        self.path = path
        self._folder, self._names = folder, names

    def __contains__(self, leaf: str) -> bool:
        return leaf in self._names

    def __getitem__(self, leaf: str) -> Tensor:
        return self._folder.stored(self._named(leaf))

    def get(self, leaf: str) -> Tensor | None:
        """Return a stored tensor, or ``None`` if it was left out."""
        return self[leaf] if leaf in self._names else None

    def shape(self, leaf: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor without reading it."""
        return tuple(self._folder.stored_slice(self._named(leaf)).get_shape())

    def dtype(self, leaf: str) -> str:
        """Return the type of a stored tensor as safetensors calls it, ``I32``."""
        return self._folder.stored_slice(self._named(leaf)).get_dtype()

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors of this linear."""
        return sum(math.prod(self.shape(leaf)) * BYTES[self.dtype(leaf)] for leaf in self._names)

    def expect(self, leaf: str, types: tuple[str, ...], shape: tuple[int, ...] | None = None) -> None:
        """Check that a tensor is there, has one of these types and, if it is given, this shape."""
        found = self.dtype(leaf)
        if found not in types:
            raise self.error(f"{self._named(leaf)} is stored as {found}, expected {' or '.join(types)}")
        if shape is not None and self.shape(leaf) != shape:
            raise self.error(f"{self._named(leaf)} has shape {self.shape(leaf)}, expected {shape}")

    def matrix(self, leaf: str, types: tuple[str, ...]) -> tuple[int, int]:
        """Check that a tensor is there, has one of these types and two dimensions; return them."""
        self.expect(leaf, types)
        if len(self.shape(leaf)) != 2:
            raise self.error(f"{self._named(leaf)} has shape {self.shape(leaf)}, expected a matrix")
        rows, columns = self.shape(leaf)
        return rows, columns

    def error(self, what: str) -> ModelError:
        """Return the error that says what is wrong with this linear."""
        return ModelError(f"{self._folder.where(f'{self.path}.weight')}: {what}", INTACT)

    def _named(self, leaf: str) -> str:
        if leaf not in self._names:
            raise self.error(f"{self.path}.{leaf} is missing")
        return self._names[leaf]


class PackedFolder(SafetensorsFolder):
    """A folder as one toolkit packs it, read back.

    A layout names its tensors in ``leaves`` and writes :meth:`packed_shape`, :meth:`decode` and :meth:`summary`. The
    content of ``quantization_config`` is ``settings``.

    Raises
    ------
    ModelError
        If it is no model folder, or not packed in this layout.
    """

    #: What ``quant_method`` in ``config.json`` says.
    method: ClassVar[str]
    #: Ends of the names of tensors that stand in the place of a weight. One that has ``weight`` alone is not packed.
    leaves: ClassVar[tuple[str, ...]]
    #: Whether weights and rounded inputs are all that there is to the function, so that other formats can hold it.
    exports: ClassVar[bool] = True
    #: Whether a head that is tied to the embedding may have tensors of its own, such as a second name of its scale.
    names_tied_head: ClassVar[bool] = False

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        super().__init__(folder, name)
        self.settings = self.read_settings()
        if self.settings.get("quant_method") != self.method:
            raise ModelError(f"{self.path} is not compressed in the {self.method} format")
        packed: dict[str, dict[str, str]] = {}
        for stored in self._shapes:
            for leaf in self.leaves:
                if stored.endswith(f".{leaf}"):
                    packed.setdefault(stored.removesuffix(f".{leaf}"), {})[leaf] = stored
        self._parts = {path: Parts(self, path, n) for path, n in packed.items() if set(n) != {"weight"}}
        inside = {stored for path in self._parts for stored in packed[path].values()}
        self._plain = [stored for stored in self._shapes if stored not in inside]

    def read_settings(self) -> dict[str, Any]:
        """Return ``quantization_config`` of ``config.json``."""
        return self.quantization if isinstance(self.quantization, dict) else {}

    @abstractmethod
    def packed_shape(self, parts: Parts) -> tuple[int, int]:
        """Check a linear's tensors against each other without reading them; return ``(out, in)``."""

    @abstractmethod
    def decode(self, parts: Parts) -> QuantizedTensor | Tensor:
        """Return the weight ``(out, in)``: codes on a grid where the layout has one, else its values."""

    @abstractmethod
    def summary(self) -> str:
        """Return what the linears are stored as: ``GPTQ, 4 bits, groups of 64``."""

    @classmethod
    def only_read_here(cls, folder: Path) -> bool:
        """Whether plain ``transformers`` does not load the folder without the toolkit that wrote it."""
        return True

    def prepare(self, model: PreTrainedModel) -> None:
        """Make a plain model do what the folder asks for at run time besides its weights."""

    @property
    def packed(self) -> list[str]:
        """Paths of the packed linears."""
        return sorted(self._parts)

    def bits_per_weight(self) -> float:
        """Return the bits a weight of the packed linears of blocks, everything stored in their place counted."""
        sizes = {
            path: math.prod(self.packed_shape(self._parts[path]))
            for path in self.linears()
            if path in self._parts
        }
        total = sum(sizes.values())
        return 8 * sum(self._parts[path].nbytes for path in sizes) / total if total else math.nan

    def part(self, path: str, leaf: str) -> Tensor | None:
        """Return one stored tensor of a packed linear; ``None``: there is none of that name."""
        return self._parts[path].get(leaf) if path in self._parts else None

    def quantized(self, name: str) -> QuantizedTensor | None:
        """Return the codes of a linear, given by its path or the name of its weight.

        ``None``: it is not packed, or not on a grid of consecutive groups.
        """
        path = name.removesuffix(".weight")
        found = self.decode(self._parts[path]) if path in self._parts else None
        return found if isinstance(found, QuantizedTensor) else None

    def names(self) -> list[str]:  # noqa: D102
        names = {*self._plain, *(f"{path}.weight" for path in self._parts)}
        return sorted(names - ({self._head} if self.config.tie_word_embeddings else set()))

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        parts = self._parts_of(name)
        return super().shape(name) if parts is None else self.packed_shape(parts)

    def where(self, name: str) -> str:  # noqa: D102
        parts = self._parts_of(name)
        files = {self._holder[n] for n in parts._names.values()} if parts else set()
        return str(self.path / files.pop()) if len(files) == 1 else super().where(name)

    def validate(self) -> None:
        """Check names and shapes of all tensors, those of packed linears against each other too."""
        Checkpoint.validate(self)
        if self.config.tie_word_embeddings and self.family.head in self._parts and not self.names_tied_head:
            raise ModelError(
                f"{self.where(self._head)}: {self.family.head} is packed, config.json ties it to the embedding",
                'Set "tie_word_embeddings": false in config.json',
            )
        for path in self._parts:
            if f"{path}.weight" in self._plain:
                raise ModelError(
                    f"{self.where(f'{path}.weight')}: {path} is stored packed and as it is", INTACT
                )
        self._check_stored([name for name in self.names() if self._parts_of(name) is None])

    def stored(self, name: str) -> Tensor:
        """Read a tensor as it is stored."""
        try:
            return self._files[self._holder[name]].get_tensor(self._stored_as[name])
        except SafetensorError as error:
            raise ModelError(f"{self.where(name)}: {name} cannot be read ({error})") from error

    def stored_slice(self, name: str) -> Any:
        """Return the handle that knows shape and type of a stored tensor."""
        return self._slice(name)

    def _parts_of(self, name: str) -> Parts | None:
        path = name.removesuffix(".weight")
        return self._parts.get(path) if path != name else None

    def _read(self, name: str, start: int | None, stop: int | None) -> Tensor:
        parts = self._parts_of(name)
        if parts is None:
            return self._stored(name, start, stop)
        self.packed_shape(parts)
        found = self.decode(parts)
        if isinstance(found, QuantizedTensor):
            found = found.dequantize()
        return found if start is None else found[start:stop].clone()


def groups_of(width: int, size: Any, folder: Path) -> int:
    """Return how many groups of ``size`` columns, -1 for the whole row, a linear of that width has."""
    if type(size) is not int or (size < 1 and size != -1):
        raise ModelError(f"{folder / 'config.json'}: group_size is {size!r}", INTACT)
    return 1 if size == -1 else -(-width // size)


def reader_of(folder: Path) -> type[PackedFolder] | None:
    """Return the class that reads a compressed folder; ``None``: its layout or its family is not read here.

    Folders in the compressed-tensors format are read here if ``frugal run`` wrote them.
    """
    from frugallm.formats.awq_layout import AWQFolder
    from frugallm.formats.bitnet_folder import BitNetFolder, OneBitFolder
    from frugallm.formats.bitsandbytes_layout import BitsAndBytesFolder
    from frugallm.formats.decoded import Decoded, Own
    from frugallm.formats.gptq_layout import GPTQFolder

    raw = read_config(folder)
    settings = raw.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    described = any(raw.get("model_type") in family.model_types for family in FAMILIES)
    if not described or (method == Decoded.method and not (folder / "manifest.json").is_file()):
        return None
    readers: tuple[type[PackedFolder], ...] = (
        Decoded,
        Own,
        GPTQFolder,
        AWQFolder,
        BitsAndBytesFolder,
        BitNetFolder,
        OneBitFolder,
    )
    return next((reader for reader in readers if reader.method == method), None)


def load_packed(checkpoint: PackedFolder, dtype: torch.dtype) -> PreTrainedModel:
    """Return a plain model with the values that the codes stand for, doing at run time what the folder asks for."""
    from frugallm.models.open import dense_model

    checkpoint.validate()
    model = dense_model(checkpoint, dtype)
    checkpoint.prepare(model)
    return model
