"""Runs the contract tests with the oldest and with the newest libraries that pyproject.toml allows: `make compat`.

Each set of versions has its own virtual environment under `.venv-compat/`. torch is the one of constraints.txt in
all of them: another would be a download of gigabytes. A failure is one line that says what a release has changed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-compat"
TESTS = ("tests/contracts", "tests/ops", "tests/engine", "tests/test_stock_trainer.py")
# what the tests themselves take; as pinned, for they are not what is tried
TOOLS = ("pytest", "hypothesis")
EXTRAS = ("cuda",)  # bitsandbytes
SHOWN = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes")


def main() -> int:
    """Makes the environments that are asked for, and runs the tests in each; the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", choices=["oldest", "newest", []], help="one of the sets; both without it")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="other tests than the contracts")
    asked = parser.parse_args()
    failed = 0
    for name in asked.only or ("oldest", "newest"):
        python = install(name, wanted(name))
        shown = versions(python)
        print(
            f"{name:<10} {', '.join(f'{library} {shown[library]}' for library in SHOWN if library in shown)}",
            flush=True,
        )
        failed += run(python, asked.tests) != 0
    return failed


def wanted(name: str) -> list[str]:
    """The requirements of one set of versions."""
    pins = {requirement.partition("==")[0].lower(): requirement for requirement in lines(ROOT / "constraints.txt")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [pins[tool] for tool in TOOLS]
    for requirement in [*project["dependencies"], *(r for e in EXTRAS for r in project["optional-dependencies"][e])]:
        library, bounds = re.fullmatch(r"([\w-]+)(.*)", requirement.replace(" ", "")).groups()  # type: ignore[union-attr]
        lowest = re.search(r">=([\d.]+)", bounds)
        if library == "torch":
            found.append(pins[library])
        elif name == "oldest" and lowest is not None:
            found.append(f"{library}=={lowest[1]}")
        else:
            found.append(requirement)
    return found


def install(name: str, requirements: list[str]) -> Path:
    """Creates an environment with these requirements, again if they have changed; returns its Python."""
    folder = FOLDER / name
    python, list_file = folder / "bin" / "python", folder / "requirements.txt"
    text = "".join(f"{requirement}\n" for requirement in requirements)
    if list_file.is_file() and list_file.read_text(encoding="utf-8") == text:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    subprocess.run([*pip, *requirements], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)  # whose bounds these are
    list_file.write_text(text, encoding="utf-8")  # last: a broken install is not taken for a whole one
    return python


def versions(python: Path) -> dict[str, str]:
    """The installed versions."""
    code = "from importlib.metadata import distributions as d; [print(x.name.lower(), x.version) for x in d()]"
    said = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(line.split() for line in said.splitlines())


def run(python: Path, tests: list[str]) -> int:
    """The tests, with warnings shown and not raised: another release has other ones."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        "-o",
        "filterwarnings=default",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def lines(path: Path) -> list[str]:
    """Of a list of requirements, without comments."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


if __name__ == "__main__":
    sys.exit(main())
