"""Finds the native library and chooses the path for this processor."""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from importlib import metadata
from pathlib import Path

from frugallm.errors import ParameterError

#: Of the interface between this file and ``native/api.cpp``.
VERSION = 2
#: Native paths, the best last.
PATHS = ("generic", "avx2", "avx512", "avx512bf16")
CHOICES = ("native", "reference", "generic", "avx2", "avx512")
NAME = "libfrugal_kernels.so"


class Linear(ctypes.Structure):
    """A packed weight; see ``native/kernels.hpp``."""

    _fields_ = [
        *((name, c_void_p) for name in ("lines", "scales", "zeros", "bias")),
        *(
            (name, c_int32)
            for name in ("kind", "scale_type", "zero_type", "rows", "width", "group", "groups", "tiles")
        ),
    ]


class Cache(ctypes.Structure):
    """The cache of one head of one layer."""

    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("block_stride", c_int64),
        *((name, c_int32) for name in ("head", "padded", "window")),
        ("scale", c_float),
    ]


class Layer(ctypes.Structure):
    """One decoder block."""

    _fields_ = [
        *((name, Linear) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("norm", "second_norm", "output_norm", "down_norm")),
        *((name, c_void_p) for name in ("query_norm", "key_norm", "cos", "sin")),
        ("window", c_int32),
    ]


class Model(ctypes.Structure):
    """A decoder with its cache; see ``native/step.hpp``."""

    _fields_ = [
        ("layers", POINTER(Layer)),
        ("embedding", Linear),
        ("head", Linear),
        *((name, c_void_p) for name in ("last_norm", "keys", "values")),
        *((name, c_int32) for name in ("count", "hidden", "heads", "key_heads", "head_dim", "inner")),
        *((name, c_int32) for name in ("vocabulary", "positions", "blocks", "activation")),
        *((name, c_float) for name in ("eps", "scale", "embed_scale")),
    ]


class Batch(ctypes.Structure):
    """The tokens of one step."""

    _fields_ = [
        *((name, c_void_p) for name in ("tokens", "positions", "starts", "tables", "wanted")),
        *((name, c_int32) for name in ("count", "sequences", "table_width", "rows")),
        ("logits", c_void_p),
    ]


FUNCTIONS = {
    "frugal_path": (c_void_p, [c_char_p]),
    "frugal_pool_new": (c_void_p, [c_int]),
    "frugal_pool_free": (None, [c_void_p]),
    "frugal_stepper_new": (c_void_p, [c_void_p, c_void_p, POINTER(Model)]),
    "frugal_stepper_free": (None, [c_void_p]),
    "frugal_step": (c_int, [c_void_p, POINTER(Batch)]),
    "frugal_linear": (
        None,
        [c_void_p, c_void_p, POINTER(Linear), c_void_p, c_int64, c_int64, *[c_void_p] * 4, c_int64, c_int],
    ),
    "frugal_embed": (None, [c_void_p, POINTER(Linear), c_void_p, c_int64, c_void_p, c_int64]),
    "frugal_rms_norm": (None, [c_void_p, c_void_p, c_void_p, c_float, c_int64, c_int, c_void_p]),
    "frugal_rotate": (None, [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int]),
    "frugal_gated_mul": (None, [c_void_p, c_void_p, c_void_p, c_int64, c_int, c_void_p]),
    "frugal_to_bf16": (None, [c_void_p, c_void_p, c_int64, c_int, c_int, c_void_p]),
    "frugal_write_cache": (None, [c_void_p, POINTER(Cache), c_void_p, c_int, c_int64, c_void_p, c_void_p]),
    "frugal_attend": (None, [c_void_p, POINTER(Cache), c_void_p, c_void_p, c_void_p, c_int64, c_void_p]),
}


def _places() -> list[Path]:
    """Return where the library may lie: beside this file, in a build folder of the sources, where it was installed."""
    here = Path(__file__).parent
    places = [here / NAME, here / "native" / "build" / NAME]
    with contextlib.suppress(metadata.PackageNotFoundError):
        places.append(Path(str(metadata.distribution("frugallm").locate_file(f"frugallm/kernels/{NAME}"))))
    return places


@cache
def library() -> ctypes.CDLL | None:
    """Return the native library; ``None``, after one warning, where there is none that fits these sources."""
    found = next((place for place in _places() if place.is_file()), None)
    reason = "they were not built when the package was installed"
    if found is not None:
        try:
            native = ctypes.CDLL(str(found))
        except OSError as error:
            reason = f"{found} cannot be loaded ({error})"
        else:
            if native.frugal_version() == VERSION:
                for name, (result, arguments) in FUNCTIONS.items():
                    function = getattr(native, name)
                    function.restype, function.argtypes = result, arguments
                return native
            reason = f"{found} was built from other sources"
    warnings.warn(
        f"the native kernels are missing ({reason}), so the slow reference kernels are used; "
        "install a C++ compiler (GCC or Clang) and then the package again",
        stacklevel=3,
    )
    return None


@cache
def usable_paths() -> tuple[str, ...]:
    """Return the native paths that are built and that this processor can run, the best last."""
    native = library()
    return () if native is None else tuple(p for p in PATHS if native.frugal_path(p.encode()))


def path_name() -> str:
    """Return the path in use: ``reference`` or a native one; ``FRUGAL_KERNELS`` asks for another than the best.

    Raises
    ------
    ParameterError
        If ``FRUGAL_KERNELS`` names no path, or one that is not built or that this processor cannot run.
    """
    asked = os.environ.get("FRUGAL_KERNELS", "")
    if asked == "reference":
        return "reference"
    if asked and asked not in (*CHOICES, *PATHS):
        raise ParameterError(f"FRUGAL_KERNELS must be one of {', '.join(CHOICES)}; got '{asked}'")
    usable = usable_paths()
    if asked in ("", "native"):
        if asked and not usable:
            raise ParameterError(
                "FRUGAL_KERNELS asks for native kernels, which are not built",
                "Install a C++ compiler, then the package",
            )
        return usable[-1] if usable else "reference"
    fitting = [path for path in usable if path == asked or (asked == "avx512" and path == "avx512bf16")]
    if not fitting:
        raise ParameterError(
            f"FRUGAL_KERNELS asks for {asked}, which is not built or not in this processor",
            f"It has {', '.join(usable) or 'none'}",
        )
    return fitting[-1]


def operations(path: str) -> int:
    """Return the address of a native path's table."""
    native = library()
    assert native is not None
    return native.frugal_path(path.encode())


class Pool:
    """Threads that work on native calls.

    Parameters
    ----------
    threads
        How many, the caller's among them.
    """

    def __init__(self, threads: int) -> None:
        native = library()
        assert native is not None
        self.threads, self._native = threads, native
        self.address = native.frugal_pool_new(threads)

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._native.frugal_pool_free(self.address)
            self.address = None


@cache
def pool(threads: int) -> Pool:
    """Return the pool of that many threads that all calls share."""
    return Pool(threads)
