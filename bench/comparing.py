"""How much of a comparison's time its runs train and evaluate, and where the rest is.

python -m bench.comparing                                   the demo
python -m bench.comparing -- compare.yaml --set KEY=VALUE   another comparison, with the arguments of `siliang compare`
from the folder of the repository, where bench/ is. `--runs 2` makes it twice: the second one has full caches.

Seconds of the clock, of the command as a user starts it, with one worker.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from siliang.records import COMPARISON_NAME, RECORD_NAME, Comparison, Record
from siliang.run_place import CONFIG_NAME


@dataclass(frozen=True)
class Spent:
    """Seconds of one comparison.

    Attributes:
        whole: Of the command.
        steps: Of the runs' steps, with the evaluations and checkpoints between them, and of their last evaluations.
        loading: Before their first steps: data, plan, model.
        before: From the start of the command until the first run began.
        after: From the end of the last run to the end of the command.
    """

    whole: float
    steps: float
    loading: float
    before: float
    after: float

    @property
    def rest(self) -> float:
        """Between the runs' last evaluations and the next runs: adapters, answers, records, the base model's check."""
        return self.whole - self.steps - self.loading - self.before - self.after


def measure(arguments: list[str], cache: Path, output: Path) -> Spent:
    """Makes the comparison in a new process.

    Raises:
        RuntimeError: It failed.
    """
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "siliang", *arguments, "--output", str(output)],
        env={**os.environ, "SILIANG_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ended = time.time()
    if done.returncode:
        raise RuntimeError(done.stdout)
    trials = Comparison.open(output / COMPARISON_NAME).trials
    folders = [output / trial.folder for trial in trials if trial.status == "completed"]
    seconds = [Record.read(folder).seconds for folder in folders]
    # run.yaml is written when a run is prepared, run.json last of all
    began = min((folder / CONFIG_NAME).stat().st_mtime - s.load for folder, s in zip(folders, seconds, strict=True))
    last = max((folder / RECORD_NAME).stat().st_mtime for folder in folders)
    return Spent(
        whole=ended - started,
        steps=sum(s.train + s.eval for s in seconds),
        loading=sum(s.load for s in seconds),
        before=began - started,
        after=ended - last,
    )


def render(found: list[Spent]) -> str:
    """The comparisons, in Markdown."""
    rows = {
        "imports and checks, until the first run": [s.before for s in found],
        "data, plan and model of the runs": [s.loading for s in found],
        "steps and evaluations": [s.steps for s in found],
        "what else the runs do": [s.rest for s in found],
        "table and page": [s.after for s in found],
        "the whole command": [s.whole for s in found],
    }
    names = ["first time", *(f"time {i}" for i in range(2, len(found) + 1))]
    lines = ["| seconds | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(found)]
    for name, values in rows.items():
        shares = (f"{value:.1f} ({value / s.whole:.1%})" for value, s in zip(values, found, strict=True))
        lines.append(f"| {name} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        "python -m bench.comparing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1, help="default: 1")
    parser.add_argument("rest", nargs="*", help="arguments of `siliang compare`; without any: the demo")
    options = parser.parse_args()
    arguments = ["compare", *options.rest] if options.rest else ["demo"]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        found = [measure(arguments, scratch / "cache", scratch / str(i)) for i in range(options.runs)]
    print(render(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
