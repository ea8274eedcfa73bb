"""Runs Hugging Face PEFT's own tests on siliang, and counts how they end: `make peft-tests`.

They come from PEFT's source distribution, of the version that siliang is compared with, and run unchanged with shim.py.
Models of the hub that they name are downloaded where HF_HUB_OFFLINE is not set. The columns of the table:

    passed    of them "words": an error or a warning of the right class has siliang's own words
    failed    a list follows the table
    differs   a difference on purpose, and
    refused   a method or a feature that siliang does not have: both as docs/porting.md has it
    internal  a private name of PEFT
    skipped   by the test itself, such as for want of a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".peft-tests"
TOOLS = ("diffusers", "parameterized", "importlib_metadata", "zipp")  # that the tests import
COLUMNS = ("passed", "words", "failed", "differs", "refused", "internal", "skipped")
# tests of GPUs, of quantization that siliang does not have, and of methods that it does not have
LEFT_OUT = (
    *("common_gpu", "gpu_examples", "gptqmodel", "torch_compile", "lora_megatron", "stablediffusion"),
    *(
        "adamss_asa",
        "cartridge",
        "deft",
        "frod",
        "lora_intruders",
        "pvera",
        "shadow",
        "supertuning",
        "unilora",
    ),
)


def main() -> int:
    """Fetches the tests, runs each file, prints the table; 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="files, such as test_vera.py; all without it")
    parser.add_argument("--every", type=int, default=1, help="run one test of this many")
    parser.add_argument("-k", dest="chosen", default="", help="the tests whose names match, as pytest has it")
    asked = parser.parse_args()
    tests = fetched()
    files = sorted(path.name for path in (tests / "tests").glob("test_*.py"))
    files = asked.only or [name for name in files if name[5:-3] not in LEFT_OUT]
    print(f"{'':<34}" + "".join(f"{column:>9}" for column in COLUMNS), flush=True)
    total: Counter[str] = Counter()
    failures: list[str] = []
    for name in files:
        counts, failed = run(tests, name, asked.every, asked.chosen)
        print(shown(name, counts), flush=True)
        total += counts
        failures += failed
    print(shown("all", total))
    of_ours = total["passed"] + total["failed"]
    print(
        f"{total['passed']:,} of {of_ours:,} tests that are siliang's passed: {total['passed'] / max(1, of_ours):.1%}."
    )
    print(*failures, sep="\n")
    return int(bool(failures))


def fetched() -> Path:
    """The folder of PEFT's source distribution, downloaded where it is not there yet."""
    pin = next(
        line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if line.startswith("peft=")
    )
    folder = FOLDER / pin.replace("==", "-")
    if not (folder / "tests" / "__init__.py").is_file():
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--no-deps", "--upgrade", "--target", FOLDER / "site", *TOOLS], check=True)
        subprocess.run([*pip, "download", "--no-deps", "--no-binary=peft", "--dest", FOLDER, pin], check=True)
        with tarfile.open(next(FOLDER.glob("peft-*.tar.gz"))) as archive:
            archive.extractall(FOLDER, filter="data")
        (folder / "tests" / "__init__.py").touch()  # last: the distribution lacks it
    return folder


def run(tests: Path, name: str, every: int, chosen: str) -> tuple[Counter[str], list[str]]:
    """How the tests of a file end, and a line for each that failed."""
    results = FOLDER / f"{name}.jsonl"
    results.unlink(missing_ok=True)
    paths = [str(ROOT / "src"), str(HERE), str(FOLDER / "site")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "shim",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
    ]
    options = [
        "--rootdir",
        str(tests),
        "--results",
        str(results),
        "--every",
        str(every),
        *(["-k", chosen] if chosen else []),
    ]
    ended = subprocess.run(
        [*command, *options, f"tests/{name}"], cwd=tests, env=environment, capture_output=True, text=True
    )
    if not results.is_file():
        nothing = ended.returncode in (0, 5)  # no tests were chosen
        return Counter(), [] if nothing else [f"{name}: {(ended.stdout + ended.stderr).strip().splitlines()[-1]}"]
    counts: Counter[str] = Counter()
    failed: list[str] = []
    for line in results.read_text(encoding="utf-8").splitlines():
        test, outcome, why = json.loads(line)
        if outcome == "skipped":
            named = re.match(r"Skipped: (refused|internal|differs)\b", why)
            counts[named[1] if named else "skipped"] += 1
        else:
            counts["passed" if outcome == "words" else outcome] += 1
            counts["words"] += outcome == "words"
        if outcome == "failed":
            failed.append(f"{test}: {why}")
    return counts, failed


def shown(name: str, counts: Counter[str]) -> str:
    """A row of the table."""
    return f"{name:<34}" + "".join(f"{counts[column] or '':>9}" for column in COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
