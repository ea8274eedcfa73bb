"""The environments of peers that need other libraries than siliang: each in `.venv-peers/`, made once.

torch is the one of constraints.txt in all of them: another would be a download of gigabytes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from bench.workloads import Library

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-peers"
# oneDNN's defaults: siliang, whose functions read the peers' rows and weights, would bound them for its own runs
KERNEL_CACHES = {"LRU_CACHE_CAPACITY": "1024", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}


@dataclass(frozen=True)
class Environment:
    """What a peer needs.

    Attributes:
        alone: Installed without what it requires: GPU libraries that it can do without, and a torchvision that does
            not fit a CPU's torch.
        requirements: What it uses of that.
        first: Modules that are imported before all others.
    """

    alone: tuple[str, ...]
    requirements: tuple[str, ...]
    first: tuple[str, ...]


ENVIRONMENTS: dict[Library, Environment] = {
    "unsloth": Environment(
        alone=("unsloth==2026.10.9", "unsloth_zoo==2026.10.9"),
        requirements=(
            "transformers==5.17.0",
            "datasets==4.8.5",
            "trl==1.15.0",
            "peft==0.21.2",
            "bitsandbytes==0.50.2",
            "torchao==0.18.0",
            "cut_cross_entropy",
            "einops",
            "hf_transfer",
            "msgspec",
            "nest-asyncio",
            "pillow",
            "regex",
            "structlog",
            "tyro",
            "wheel",
        ),
        first=("unsloth",),
    ),
    "swift": Environment(
        alone=("ms-swift==4.6.0",),
        requirements=(
            "transformers==5.19.0",
            "datasets==4.8.4",
            "trl==0.29.1",
            "peft==0.20.0",
            "addict",
            "aiohttp",
            "attrdict",
            "binpacking",
            "charset-normalizer",
            "cpm-kernels",
            "dacite",
            "einops",
            "fastapi",
            "importlib-metadata",
            "json-repair",
            "matplotlib",
            "modelscope",
            "nltk",
            "openai",
            "oss2",
            "pandas",
            "pillow",
            "requests",
            "rouge",
            "simplejson",
            "sortedcontainers",
            "tensorboard",
            "tiktoken",
            "transformers-stream-generator",
            "uvicorn",
            "zstandard",
        ),
        first=("swift",),
    ),
}


def python_of(library: Library) -> Path:
    """The Python of a peer's environment, which is made, or made again if its requirements have changed.

    Raises:
        subprocess.CalledProcessError: pip could not install it.
    """
    environment = ENVIRONMENTS[library]
    requirements = wanted(environment)
    folder = FOLDER / library
    python, list_file = folder / "bin" / "python", folder / "requirements.txt"
    text = "".join(f"{line}\n" for line in [*requirements, *environment.alone])
    if list_file.is_file() and list_file.read_text(encoding="utf-8") == text:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for some in ([*requirements], ["--no-deps", *environment.alone]):
        subprocess.run([*pip, *some], check=True, capture_output=True, text=True)
    list_file.write_text(text, encoding="utf-8")  # last: a broken install is not taken for a whole one
    return python


def wanted(environment: Environment) -> list[str]:
    """The peer's requirements, and siliang's in versions that fit them: rows, settings and clocks are siliang's."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {_name(line): line for line in lines if line and not line.startswith("#")}
    own = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    theirs = {_name(line) for line in environment.requirements}
    return [pins["torch"], *environment.requirements, *(line for line in own if _name(line) not in {*theirs, "torch"})]


def variables() -> dict[str, str]:
    """The environment variables of a peer's process: it finds siliang and the bench, and no network."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "HF_HUB_OFFLINE": "1"}


def versions_in(python: Path) -> dict[str, str]:
    """The versions of the libraries that determine a result."""
    names = (
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "safetensors",
        "peft",
        "trl",
        "unsloth",
        "unsloth_zoo",
        "ms_swift",
    )
    code = "from importlib.metadata import distributions as d; [print(x.name.lower(), x.version) for x in d()]"
    printed = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    found = dict(line.split() for line in printed.splitlines())
    return {name: found[name] for name in names if name in found}


def _name(requirement: str) -> str:
    match = re.match(r"[\w-]+", requirement)
    assert match is not None
    return match[0].lower().replace("_", "-")
