"""Facts about the machine a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from frugallm.evaluate.precision import processor_flags

FLAGS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *(
        "avx512_bf16",
        "avx512_fp16",
        "amx_tile",
        "amx_int8",
        "amx_bf16",
        "asimd",
        "asimddp",
        "i8mm",
        "bf16",
        "sve",
    ),
)
VERSIONS = ("frugallm", "torch", "transformers", "compressed-tensors", "safetensors", "gguf")


def machine() -> dict[str, Any]:
    """Return the facts about the machine this runs on, now.

    Returns
    -------
    dict
        ``cpu`` and ``flags``: the processor, and which features of interest it has; ``cores`` and
        ``threads``: those this process may use, and those torch uses; ``memory_bytes``; ``os``; ``python``;
        ``load``: the load average over the last minute, ``None`` where the system keeps none.
    """
    import psutil
    import torch

    present = processor_flags()
    return {
        "cpu": _cpu_name(),
        "flags": [flag for flag in FLAGS if flag in present],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the figures."""
    return {name: metadata.version(name) for name in VERSIONS}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
