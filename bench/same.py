"""Whether two states of siliang train the same bits: a fixed set of small runs, here and at a commit.

`make same COMMIT=main` trains each run with the working tree and with the commit, on the same files and compares hashes
of what was saved, the losses of each step and the final metrics. A change that should not alter results passes
before it is committed. The runs are started by the command alone, whose settings both states know. What a commit gave
is kept in .venv/same, so that each of its runs is trained once.

    python -m bench.same COMMIT                       all runs; exit code 1 where one differs
    python -m bench.same COMMIT --only lora resumed   some of them
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from every_task import make_models, rows_of  # pyright: ignore[reportMissingImports]  # of tests/
from tiny import write_jsonl  # pyright: ignore[reportMissingImports]

from faults.runs import make_place

ROOT = Path(__file__).resolve().parents[1]
PROMPT = {"num_virtual_tokens": 4}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_dropout": 0.1},
    "ia3": {},
    "ln_tuning": {},
    "bitfit": {},
    "prompt_tuning": PROMPT,
    "p_tuning": PROMPT,
    "prefix_tuning": PROMPT | {"prefix_projection": True},
    "full": {},
}
TASKS = ("seq_cls", "token_cls", "question_ans", "seq_2_seq_lm")
# lora again, with one thing otherwise: what is added to the settings
VARIATIONS: dict[str, dict[str, Any]] = {
    "bf16": {"train": {"precision": "bf16"}},
    "recomputed": {"train": {"gradient_checkpointing": True}},
    "padded": {"train": {"packing": False}},
    "qlora": {"quantization": {"bits": 4, "type": "nf4", "double": True}},
    "dora": {"method": {"name": "lora", "r": 4, "use_dora": True}},
    "rslora-pissa": {"method": {"name": "lora", "r": 4, "use_rslora": True, "init_lora_weights": "pissa"}},
    "best": {"train": {"best": "loss", "save_every": 7}},
}
RANKS = {"ddp": {"name": "lora", "r": 4}, "fsdp": {"name": "full"}}  # on two processes
KILLED = "resumed"
FAILED = {"": "it failed"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.same", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("commit", help="to compare with")
    parser.add_argument("--only", nargs="*", help="names of runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="siliang-same-") as name, _tree_of(arguments.commit) as other:
        folder = Path(name)
        runs = {k: v for k, v in make_runs(folder).items() if not arguments.only or k in arguments.only}
        if not runs:
            parser.error(f"there are the runs {', '.join(make_runs(folder))}")
        kept = Kept.of(folder, other)
        missing = {name: values for name, values in runs.items() if kept.find(name, values) is None}
        kept.add(missing, _timed("there", missing, other, folder))
        here = _timed("here", runs, ROOT, folder)
        there = {name: kept.find(name, values) or {} for name, values in runs.items()}
    differing = [name for name in runs if here[name] != there[name] or here[name] == FAILED]
    for name in differing:
        names = here[name].keys() | there[name].keys()
        parts = sorted(part for part in names if here[name].get(part) != there[name].get(part))
        print(f"{name}: " + (f"other {', '.join(parts)}" if parts else "failed on both sides"))
    print(f"same   {len(runs) - len(differing)} of {len(runs)} runs are the same bits as at {arguments.commit}")
    return 1 if differing else 0


def make_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings of each run by its name; their models and data are written into `folder`."""
    place = make_place(folder / "place")
    models = make_models(folder / "models")
    train = {
        "epochs": 2,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "log_every": 1,
        "eval_every": 7,
    }
    causal: dict[str, Any] = {
        "model": str(place.model),
        "task": "causal_lm",
        "data": {"train": str(place.data), "max_length": 32},
        "train": train,
    }
    runs = {name: causal | {"method": {"name": name, **values}} for name, values in METHODS.items()}
    lora = runs["lora"]
    for name, more in VARIATIONS.items():
        runs[name] = lora | more | {"train": train | more.get("train", {})}
    for task in TASKS:
        data = {"train": str(write_jsonl(folder / f"{task}.jsonl", rows_of(task))), "test_size": 0.3, "max_length": 24}
        for name in ("lora", "full", "prefix_tuning"):
            method = {"name": name, **METHODS[name]}
            runs[f"{task}-{name}"] = {
                "model": str(models[task]), "task": task, "data": data, "train": train, "method": method
            }  # fmt: skip
    runs |= {name: lora | {"distributed": {"strategy": name}, "method": method} for name, method in RANKS.items()}
    runs[KILLED] = lora | {"train": train | {"epochs": 12, "save_every": 3}}
    return {name: values | {"accept": ["SL002", "SL003", "SL041", "SL042"]} for name, values in runs.items()}


@dataclass(frozen=True)
class Kept:
    """The hashes of a commit's runs, in a file for each run.

    Attributes:
        inputs: Hash of what the runs read, of the commit, the versions and the processor.
        place: The temporary folder of the runs, whose name is not part of their settings.
    """

    inputs: str
    place: str
    folder: Path = ROOT / ".venv/same"

    @classmethod
    def of(cls, place: Path, tree: Path) -> Kept:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, check=True, capture_output=True, text=True)
        capability = torch.backends.cpu.get_cpu_capability()
        parts = [commit.stdout, torch.__version__, transformers.__version__, capability, platform.processor()]
        parts += [_hash(path.read_bytes()) for path in sorted(place.rglob("*")) if path.is_file()]
        return cls(_hash("\n".join(parts)), str(place))

    def find(self, name: str, values: dict[str, Any]) -> dict[str, str] | None:
        file = self._file(name, values)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def add(self, runs: dict[str, dict[str, Any]], found: dict[str, dict[str, str]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, values in runs.items():
            file = self._file(name, values)
            temporary = file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(found[name]), encoding="utf-8")
            temporary.replace(file)

    def _file(self, name: str, values: dict[str, Any]) -> Path:
        settings = json.dumps(values, sort_keys=True).replace(self.place, "")
        return self.folder / f"{name}-{_hash(self.inputs + settings)[:16]}.json"


def _timed(side: str, runs: dict[str, dict[str, Any]], tree: Path, folder: Path) -> dict[str, dict[str, str]]:
    started = time.perf_counter()
    found = train_all(runs, tree, folder / side)
    print(f"{side:6} {len(runs)} runs in {time.perf_counter() - started:.0f} s", flush=True)
    if FAILED in found.values():
        print("\n".join((folder / side / "log").read_text(encoding="utf-8").splitlines()[-20:]), file=sys.stderr)
    return found


def train_all(runs: dict[str, dict[str, Any]], tree: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Trains with the siliang of that tree; returns the hashes of each run."""
    folder.mkdir()
    if not runs:
        return {}
    alone = [name for name in runs if name not in (*RANKS, KILLED)]
    for name, values in runs.items():
        text = yaml.safe_dump(values | {"output": str(folder / name)})
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    if alone:
        _run(tree, folder, "-c", _ALL, *(str(folder / f"{name}.yaml") for name in alone))
    for name in [name for name in RANKS if name in runs]:
        _run(tree, folder, "-m", "siliang", "train", str(folder / f"{name}.yaml"), "--devices", "2")
    if KILLED in runs:
        _kill(tree, folder)
        _run(tree, folder, "-m", "siliang", "train", str(folder / KILLED), "--resume")
    return {name: hashes(folder / name) for name in runs}


def hashes(run: Path) -> dict[str, str]:
    """Of what a run saved and measured, but for times, memory and names of folders."""
    if not (run / "run.json").exists():
        return FAILED
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    kept = ("step", "loss", "eval_loss", "metrics", "grad_norm", "learning_rate")
    steps = [{name: step[name] for name in kept} for step in record["steps"]]
    found = {"losses": _hash(json.dumps(steps)), "figures": _hash(json.dumps(record["final"], sort_keys=True))}
    weights = sorted(p for part in ("adapter", "model") for p in (run / part).glob("*.safetensors"))
    return found | {p.relative_to(run).as_posix(): _hash(p.read_bytes()) for p in weights}


def _hash(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


# all runs of one process, which has the slow imports behind it
_ALL = """
import sys
from siliang.cli.main import main
for path in sys.argv[1:]:
    sys.argv = ["siliang", "train", path]
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            print(path, "ended with", stopped.code, file=sys.stderr)
"""


def _run(tree: Path, folder: Path, *arguments: str) -> None:
    with (folder / "log").open("a") as log:
        subprocess.run([sys.executable, *arguments], env=_environment(tree), cwd=folder, stdout=log, stderr=log)


def _kill(tree: Path, folder: Path) -> None:
    """Kills the run when it has its first checkpoint."""
    command = [sys.executable, "-m", "siliang", "train", str(folder / f"{KILLED}.yaml")]
    with (
        (folder / "log").open("a") as log,
        subprocess.Popen(command, env=_environment(tree), cwd=folder, stdout=log, stderr=log) as process,
    ):
        while process.poll() is None and not list(folder.glob(f"{KILLED}/checkpoints/checkpoint-*")):
            time.sleep(0.02)
        process.kill()


def _environment(tree: Path) -> dict[str, str]:
    ours = {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | ours


@contextmanager
def _tree_of(commit: str) -> Iterator[Path]:
    """A checkout of a commit, for a while."""
    with tempfile.TemporaryDirectory(prefix="siliang-tree-") as name:
        tree = Path(name) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
