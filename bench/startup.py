"""What takes how long until the first optimizer step of `siliang train`: first run, and a second one with full caches.

python -m bench.startup --model MODEL_FOLDER --data reviews.csv [--set data.columns.text=review ...]
from the folder of the repository, where bench/ is.

Each run is a process of its own, as a user starts it. The table has seconds of the clock, and of the processor, in
which other work on the machine counts little. A phase is without the imports in it, which have a row of their own.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

IMPORTS, OTHER, TOTAL = "imports", "other", "first step done after"
# the functions of each phase, with the time of the phases that they contain left out
PHASES = {
    "tokenizer": ("siliang.models.tokenizers:load_tokenizer",),
    "rows": ("siliang.data.load:load_examples",),
    "tokens": ("siliang.data.tokens:tokenize",),
    "checks": ("siliang.check:gather_input", "siliang.check:find"),
    "plan": ("siliang.train.prepare:_plan",),
    "weights": ("siliang.train.prepare:_load",),
    "method": ("siliang.engine.attach:attach",),
    "hashes": ("siliang.run_folder:hashes",),
    "engine": ("siliang.train.setup:make_engine",),
    "optimizer": ("siliang.train.loop:Training._prepare",),
    "batches": ("siliang.train.loop:Training._epoch",),
    "first step": ("siliang.train.loop:Training._make_step",),
}
LAST = "first step"


class Clock:
    """Seconds of each phase: those of the innermost one that is running.

    Attributes:
        spent: Of each phase, seconds of the clock and of the processor.
    """

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}
        self._running = [OTHER]
        self._since = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the block for this phase."""
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    @property
    def is_importing(self) -> bool:
        """Whether an import is running."""
        return self._running[-1] == IMPORTS

    def _count(self) -> None:
        now = self._now()
        spent = self.spent.setdefault(self._running[-1], [0.0, 0.0])
        for i, (end, start) in enumerate(zip(now, self._since, strict=True)):
            spent[i] += end - start
        self._since = now

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


class _Traced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules of PHASES, and replaces their functions by timed ones before anyone has taken them."""

    def __init__(self, timed: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        self._timed, self._looking = timed, set[str]()
        self._functions: dict[str, dict[str, str]] = {}
        for phase, places in PHASES.items():
            for module, _, path in (place.partition(":") for place in places):
                self._functions.setdefault(module, {})[path] = phase
        self._loaders: dict[str, importlib.abc.Loader] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._functions or fullname in self._looking:
            return None
        self._looking.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking.discard(fullname)
        if spec is not None and spec.loader is not None:
            self._loaders[fullname], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loaders[spec.name].create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loaders[module.__name__].exec_module(module)
        for path, phase in self._functions[module.__name__].items():
            *outer, name = path.split(".")
            owner: Any = module
            for part in outer:
                owner = getattr(owner, part)
            setattr(owner, name, self._timed(phase, getattr(owner, name)))


def trace(out: Path, arguments: list[str]) -> None:
    """Runs the command in this process, and writes the seconds of each phase when the first step is done."""
    clock, import_ = Clock(), builtins.__import__

    def timed_import(name: str, *args: Any, **more: Any) -> ModuleType:
        if clock.is_importing:
            return import_(name, *args, **more)
        with clock.phase(IMPORTS):
            return import_(name, *args, **more)

    import_module = importlib.import_module

    def timed_import_module(name: str, package: str | None = None) -> ModuleType:
        if name in sys.modules or clock.is_importing:
            return import_module(name, package)
        with clock.phase(IMPORTS):
            return import_module(name, package)

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def inner(*args: Any, **more: Any) -> Any:
            with clock.phase(phase):
                found = function(*args, **more)
            if phase == LAST and not out.exists():
                out.write_text(json.dumps(clock.spent), encoding="utf-8")
            return found

        return inner

    sys.meta_path.insert(0, _Traced(timed))
    builtins.__import__, importlib.import_module = timed_import, timed_import_module
    sys.argv[1:] = arguments
    from siliang.cli.main import main

    main()


def measure(arguments: list[str], cache: Path, scratch: Path) -> dict[str, list[float]]:
    """The seconds of each phase of a run in a new process.

    Raises:
        RuntimeError: The run failed.
    """
    out, output = scratch / "trace.json", scratch / "run"
    started = time.perf_counter()
    command = [sys.executable, "-m", "bench.startup", "--trace", str(out), "--", *arguments, "--output", str(output)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "SILIANG_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, _ = process.communicate()
    if process.returncode or not out.is_file():
        raise RuntimeError(said.strip())
    spent: dict[str, list[float]] = json.loads(out.read_text(encoding="utf-8"))
    until_step = out.stat().st_mtime - (time.time() - (time.perf_counter() - started))
    counted = [sum(seconds[i] for seconds in spent.values()) for i in (0, 1)]
    spent["Python itself"] = [max(until_step - counted[0], 0.0), 0.0]
    spent[TOTAL] = [until_step, counted[1]]
    return spent


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        "python -m bench.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    traces = "--trace" in sys.argv  # the process of one run, which this one starts
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", required=not traces, help="required: the folder of a base model")
    parser.add_argument("--data", required=not traces, help="required: the data to train on")
    parser.add_argument("--task", default="seq_cls", help="default: seq_cls")
    parser.add_argument("--method", default="lora", help="default: lora")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run")
    parser.add_argument(
        "--runs", type=int, default=2, help="the first has no caches, the others have the first's; default: 2"
    )
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trace:
        trace(options.trace, options.rest)
        return 0
    if not options.model or not options.data:
        parser.error("--model and --data are required")
    arguments = ["train", "--model", options.model, "--data", options.data, "--task", options.task]
    arguments += ["--method", options.method, "--set", "train.max_steps=2"]
    arguments += [part for assignment in options.set for part in ("--set", assignment)]
    found: list[dict[str, list[float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.runs):
            scratch = Path(folder) / str(number)
            scratch.mkdir()
            found.append(measure(arguments, Path(folder) / "cache", scratch))
    print(render(found))
    return 0


def render(found: list[dict[str, list[float]]]) -> str:
    """The phases of the runs, in Markdown: seconds of the clock (of the processor)."""
    names = ["first run", *(f"run {i}" for i in range(2, len(found) + 1))]
    lines = ["| seconds (of the processor) | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(found)]
    for phase in ("Python itself", IMPORTS, OTHER, *PHASES, TOTAL):
        each = [spent.get(phase, [0.0, 0.0]) for spent in found]
        lines.append(f"| {phase} | " + " | ".join(f"{clock:.2f} ({cpu:.2f})" for clock, cpu in each) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
