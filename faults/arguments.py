"""Every command with arguments of every kind: each ends with exit code 0, 1 or 2 and one or two lines, and none with
an internal error.

Nothing is trained long: where a command would start processes or a training, one of its arguments is always wrong.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.database import InMemoryExampleDatabase
from typer.main import get_command

from faults.commands import run
from siliang.cli.main import app

LONG = "x" * 5000
NUMBERS = [
    "0",
    "1",
    "2",
    "-1",
    "-0",
    "1.5",
    "1e3",
    "1e999",
    "nan",
    "inf",
    "-inf",
    "9" * 30,
    "9" * 500,
    "٣",
    "1_000",
    "0x10",
]
SETTINGS = [
    "train.epochs=nan", "train.batch_size=-1", "train.learning_rate=1e999", "a", "=", "a=b=c", "method=qlora", "lr=1",
    "train=", "data=[", "data.labels=a,b", "method={name: lora, r: 1e9}", "method.r=99999999999999999999", "model.x=1",
    "train.seed=-1", "output=\x00", "output=a\nb", "quantization=4", "accept=[SL999]", "method.target_modules=(a+)+$",
    "data.columns.text=\udcff", "train.max_time=1e9h", "train.memory_budget=nanGB", "data.test_size=1.0", "task=ner",
    "distributed.strategy=deepspeed", "data.template=/", "data.max_length=8", "train.best=x", "method.bias=x", LONG,
    "a.b.c.d.e=1", "data.train={}", "data.train=[[]]", "methods=[]", "seeds=[]", "search={lr: [1]}", "minutes=nan",
    "&a=*a", "train.log_every=" + "9" * 5000, "data.seed=" + "9" * 40, "train.seed=" + "9" * 40,
]  # fmt: skip
ODD = [
    "", " ", ".", "..", "/", "~", "-", "--", "-x", "--help", "---", "=", "*", "?", "%s", "$HOME", "a\nb", "a\tb",
    "\x00", "\udcff", "\ud83e", "说🤗", LONG, "y" * 300, "a/" * 3000, "http://127.0.0.1:1/x", "owner/name", "C:\\x\\y",
    "[bold]x", "{}", "null", "true", "SL001", "SLE03", "zh", "en", "lora", "full", "all", "list", "auto", "cpu",
    "cuda", "8GB",
]  # fmt: skip
# Nothing that would write for ever, start processes, a Ray, or a training that takes its time
LEFT_OUT = {"demo"}
GIVEN: dict[str, list[str]] = {
    "--max-new-tokens": ["0", "1", "2", "-1", "nan", "1.5", ""],
    "--devices": ["0", "1", "-1", "nan", "many"],
    "--jobs": ["0", "1", "-1", "nan"],
    "--ray": [],
    "--seeds": ["0", "1", "-1", "nan", "1,2"],
}
ON_A_RUN = {"predict", "generate", "eval", "chat", "merge", "report"}
STARTS_PROCESSES = {"compare"}  # is never given a model that is there


@dataclass
class Tried:
    """Counts by command and exit code, and what ended otherwise, the first of each kind."""

    codes: Counter[tuple[str, int]] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        return self.codes.total()


def make_names(folder: Path, run_folder: Path, model: Path, data: Path) -> dict[str, list[str]]:
    """Names of files and folders of every kind, by whether a model is among them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty").touch()
    (folder / "folder").mkdir(exist_ok=True)
    (folder / "new\nline.jsonl").write_text('{"text": "a", "label": "b"}\n')
    (folder / "with blank").mkdir(exist_ok=True)
    for name, target in (("dangling", "nowhere"), ("loop", "loop"), ("to-folder", "folder")):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    (folder / "binary.csv").write_bytes(bytes(range(256)) * 9)
    (folder / "list.yaml").write_text("- a\n")
    (folder / "good.yaml").write_text(
        f"model: {folder / 'nowhere'}\ntask: seq_cls\ndata: {{train: {data}}}\noutput: o\n"
    )
    (folder / "compare.yaml").write_text((folder / "good.yaml").read_text() + "methods: lora,full\n")
    os.mkfifo(folder / "unreadable") if not (folder / "unreadable").exists() else None
    (folder / "unreadable").unlink()
    (folder / "unreadable").write_text("x")
    (folder / "unreadable").chmod(0)
    with_bytes = os.fsencode(folder / "bytes-") + b"\xff.jsonl"
    Path(os.fsdecode(with_bytes)).write_text('{"text": "a", "label": "b"}\n')
    half = folder / "half-a-run"
    if not half.exists():
        shutil.copytree(run_folder, half)
        shutil.rmtree(half / "adapter")
    others = [str(p) for p in folder.iterdir()] + [str(folder / "empty" / "x"), str(folder / "nowhere"), str(data)]
    others += ["/dev/null", "/dev/full", "/proc/self/mem", "/proc", str(folder / "folder" / "report.html")]
    return {"run": [str(run_folder)], "model": [str(model)], "data": [str(data)], "other": others}


def words(names: dict[str, list[str]]) -> st.SearchStrategy[list[str]]:
    """Command lines."""
    group: Any = get_command(app)
    commands: dict[str, Any] = {name: command for name, command in group.commands.items() if name not in LEFT_OUT}
    text = st.text(max_size=12) | st.sampled_from(ODD)

    def of(name: str) -> st.SearchStrategy[list[str]]:
        files = names["other"] + names["run"] + ([] if name in STARTS_PROCESSES else names["model"])
        value = st.sampled_from(files) | st.sampled_from(files) | text | st.sampled_from(NUMBERS)
        option: list[st.SearchStrategy[list[str]]] = []
        for parameter in commands[name].params:
            flag = next((o for o in parameter.opts if o.startswith("--")), None)
            if flag is None or flag == "--help":
                continue
            if parameter.is_flag:
                option.append(st.just([flag]))
                continue
            some = st.sampled_from(SETTINGS) | text if flag == "--set" else value
            if flag in GIVEN:
                some = st.sampled_from(GIVEN[flag]) if GIVEN[flag] else st.nothing()
            elif flag == "--task":
                some = st.sampled_from(["seq_cls", "causal_lm", "token_cls", "question_ans", "seq_2_seq_lm"]) | text
            elif flag == "--data":
                some = st.sampled_from(files) | value
            elif flag == "--model":
                some = st.sampled_from(files[-1:]) | value
            option.append(st.builds(lambda v, f=flag: [f, v], some))
        unknown = st.builds(lambda a, b: [f"--{a}", b], st.text(max_size=8) | st.sampled_from(ODD), text)
        options = st.lists(st.one_of(*option, unknown) if option else unknown, max_size=6)
        whole = ["--model", *names["model"], "--data", names["data"][0], "--task", "seq_cls"]
        quick = ["--set", "train.max_steps=1", "--set", "data.max_length=16"] if name in ("train", "check") else []
        begun: st.SearchStrategy[list[str]] = st.lists(value, max_size=2)
        if name in ON_A_RUN:
            begun = begun | st.just(names["run"]) | st.builds(lambda v: [*names["run"], v], value)
        elif name in ("train", "check", "plan"):  # good as it begins, and then not
            begun = begun | st.just([*whole, *(["--method", "lora"] if name == "plan" else [])])
        return st.builds(
            lambda given, rest: [name, *given, *(part for pair in rest for part in pair), *quick], begun, options
        )

    anything = st.lists(text, max_size=4)
    return st.one_of(*(of(name) for name in commands), anything)


def try_arguments(
    names: dict[str, list[str]], folder: Path, *, cases: int, seconds: float = math.inf, seed: int = 0
) -> Tried:
    """So many command lines, or as many as the time allows, in `folder`.

    Args:
        names: As `make_names` gives them.
        seed: 0 for the same command lines each time.
    """
    tried, until, here = Tried(), time.monotonic() + seconds, Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)

    @settings(
        max_examples=cases,
        phases=[Phase.generate],
        database=None if seed == 0 else InMemoryExampleDatabase(),
        deadline=None,
        derandomize=seed == 0,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(words(names), st.binary(max_size=20) | st.just(b"a film\n"))
    def one(given: list[str], stdin: bytes) -> None:
        if time.monotonic() < until:
            _try(given, stdin, tried)

    try:
        one()
    finally:
        os.chdir(here)
    return tried


def _try(given: list[str], stdin: bytes, tried: Tried) -> None:
    shown = repr(given)[:1500]
    try:
        ended = run(*given, stdin=stdin)
    except BaseException as error:  # the entry point lets nothing out but the exit
        tried.failures.setdefault(f"{type(error).__name__}: {error}"[:200], shown)
        return
    tried.codes[given[0] if given and given[0].isalpha() else "?", ended.code] += 1
    lines = ended.err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error")]
    if ended.code not in (0, 1, 2) or "Traceback" in ended.err or "a fault of siliang" in ended.err:
        tried.failures.setdefault((errors[0] if errors else ended.err)[:300], shown)
    elif ended.code == 2 and not errors and "Usage" not in ended.out:
        tried.failures.setdefault(f"code 2 without an error: {ended.err[:200]}", shown)
    elif errors and len(lines) - lines.index(errors[0]) > 2:
        tried.failures.setdefault(f"more than two lines: {ended.err[:300]}", shown)
