"""The tasks of docs/extending.md, added to a copy of the package by the files that the page names, and run by the
commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from every_task import make_models, rows_of
from safetensors.torch import load_file
from tiny import write_jsonl

ROOT = Path(__file__).resolve().parents[1]

# Runs several commands in one process: torch is loaded once.
DRIVER = """
import json, sys
from faults.commands import run
print(json.dumps([run(*words) for words in json.load(sys.stdin)]))
"""


@dataclass
class Place:
    """A copy of the package with one more task."""

    folder: Path
    model: Path
    data: Path

    def run(self, *commands: tuple[object, ...]) -> list[str]:
        """What these commands print, which must succeed."""
        paths = os.pathsep.join((str(self.folder / "src"), str(ROOT), str(ROOT / "tests")))
        words = json.dumps([[str(word) for word in command] for command in commands])
        env = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
        done = subprocess.run(
            [sys.executable, "-c", DRIVER], input=words, capture_output=True, text=True, cwd=self.folder, env=env
        )
        assert done.returncode == 0, done.stderr
        ended = json.loads(done.stdout.splitlines()[-1])
        for command, (code, out, err) in zip(commands, ended, strict=True):
            assert code in (0, None), (command, out, err)
        return [out for _, out, _ in ended]

    def settings(self, task: str, *more: str) -> tuple[object, ...]:
        """The flags of a run."""
        values = ("data.max_length=24", "data.test_size=0.5", "train.precision=fp32", "train.schedule=constant", *more)
        sets = [word for value in values for word in ("--set", value)]
        return ("--model", self.model, "--data", self.data, "--task", task, *sets)

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))["seq_cls"]


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Callable[[str, str], Place]:
    def make(name: str, metric: str) -> Place:
        """The package with the task of this name and metric, as the page says."""
        source = tmp_path / "src" / "siliang"
        shutil.copytree(ROOT / "src" / "siliang", source, ignore=shutil.ignore_patterns("__pycache__"))
        page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
        (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if f"{name.upper()} = Task(" in c)
        (source / "tasks" / f"{name}.py").write_text(code, encoding="utf-8")
        edit(source / "types.py", "    QUESTION_ANS =", f'    {name.upper()} = "{name.upper()}"\n    QUESTION_ANS =')
        table = source / "tasks" / "__init__.py"
        line = f"from siliang.tasks.{name} import {name.upper()}\n"
        edit(table, "from siliang.tasks.causal_lm", line + "from siliang.tasks.causal_lm")
        edit(table, "    for task in (\n", f"    for task in (\n        {name.upper()},\n")
        words = source / "report" / "words.py"
        line = '    "no_metrics": ("failed", "失败"),\n'
        edit(words, line, f'{line}    "{metric}": ("{metric}", "{metric}"),\n')
        rows = [{"text": row["text"], "label": len(row["text"]) / 10} for row in rows_of("seq_cls", 40)]
        return Place(tmp_path, model, write_jsonl(tmp_path / "rows.jsonl", rows))

    return make


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(("task", "metric"), [("regression", "mae"), ("hazard", "concordance")])
def test_a_task_of_the_page(place: Callable[[str, str], Place], task: str, metric: str) -> None:
    asked = "we liked the film"
    here = place(task, metric)
    steps = ("train.batch_size=4", "train.gradient_accumulation=2", "train.save_every=3", "train.eval_every=3")
    settings = here.settings(task, *steps)
    check, plan, _, _, _, evaluated, predicted, merged, compared = here.run(
        ("check", *settings),
        ("plan", *settings, "--method", "lora"),
        ("train", *settings, "--set", "train.max_steps=6", "--output", "whole"),
        ("train", *settings, "--set", "train.max_steps=3", "--output", "part"),
        ("train", "--resume", "part", "--set", "train.max_steps=6"),
        ("eval", "part"),
        ("predict", "part", asked, "--json"),
        ("merge", "part", "--output", "merged"),
        (
            "compare",
            *settings,
            "--methods",
            "lora,bitfit",
            "--seeds",
            "1",
            "--set",
            "train.max_steps=2",
            "--output",
            "all",
        ),
    )
    assert "->" in check or "rows" in check
    assert "lora" in plan.lower()
    assert metric in evaluated and metric.split("_")[0] in compared.lower()
    assert asked in json.loads(predicted).values()
    assert "difference" in merged and (here.folder / "merged" / "config.json").is_file()
    whole, part = here.weights("whole"), here.weights("part")
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)
    final = [json.loads((here.folder / run / "run.json").read_text())["final"] for run in ("whole", "part")]
    assert all(final[0][name] == final[1][name] for name in ("eval_loss", metric))
