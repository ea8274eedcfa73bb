"""Every method at its own best learning rate: SST-2's reviews classified by MiniLM, and written on by stories260K.

    rate = d 3^k        d the method's default; k climbs, up or down, while the loss on validation rows falls

python -m bench.methods_table             the runs that the record lacks, then the tables of docs/methods.md
python -m bench.methods_table --costs     processor time of a step and memory, some minutes on an idle machine
python -m bench.methods_table --write     only the tables

The record has a line for each run (`Line`), and a run that is there is not run again. Each run is made in a forked
process, so that its memory is its own. The search sees one seed and the validation rows. SEEDS at the chosen rate are
measured on the test rows, by which nothing is chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from transformers.utils import logging

from bench.folders import SHARED
from bench.methods_page import DOCS, RECORD, Kind, Line, read_lines, write_docs
from siliang.config import RunConfig
from siliang.demo import encoder_folder
from siliang.methods import METHODS
from siliang.models.tokenizers import load_tokenizer
from siliang.records import RECORD_NAME, Record
from siliang.run_folder import open_run
from siliang.train.log import Progress
from siliang.train.run import train
from siliang.train.types import Listener
from siliang.types import InterruptedRunError, SiliangError, first_line
from siliang.use.evaluate import evaluate

STEPS = 100
SEEDS = (42, 43, 44)
TRAIN_ROWS, VALIDATION_ROWS = 3000, 300  # the first of train.tsv, and those behind them
MOST = 5  # steps of the search in one direction
LARGE = 1e-2  # a default rate that was measured on a small model, or needs little more
TIMED_STEPS, WARM_UP = 16, 4
CONTEXT_ROWS = 2  # of CPT
TOKENS = 100  # of trainable_tokens: the most frequent ones


@dataclass(frozen=True)
class Question:
    """What is learned.

    Attributes:
        batch: Rows of a step.
        first: k where the search begins: few steps of a small model want a large rate.
        test_rows: Of dev.tsv, the first so many.
    """

    name: str
    model: str
    task: str
    batch: int
    precision: str
    max_length: int
    test_rows: int
    first: int


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        arguments: Of the method's config, besides its defaults.
        text: Others on stories260K, whose layers are 64 wide.
    """

    label: str
    method: str
    arguments: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)


CLASSES = Question("classes", "", "seq_cls", 16, "auto", 48, 872, 1)
TEXT = Question("text", str(SHARED / "weights" / "stories260K"), "causal_lm", 8, "fp32", 128, 300, 2)
PROMPT = {"num_virtual_tokens": 20}
# In the order in which they are run: what the others are measured against, then those whose default rate was a guess.
ENTRIES = (
    Entry("lora", "lora"),
    Entry("full", "full"),
    Entry("head", "head"),
    Entry("oft", "oft"),
    Entry("vera", "vera"),
    Entry("adalora", "adalora"),
    Entry("loha", "loha"),
    Entry("beft", "beft"),
    Entry("waveft", "waveft", {}, {"n_frequency": 256}),
    Entry("trainable_tokens", "trainable_tokens"),
    Entry("multitask_prompt_tuning", "multitask_prompt_tuning", {**PROMPT, "num_tasks": 1}),
    Entry("cpt", "cpt"),
    Entry("xlora", "xlora"),
    Entry("lora, use_dora", "lora", {"use_dora": True}),
    Entry("lora, all-linear", "lora", {"target_modules": "all-linear"}),
    Entry("ia3", "ia3"),
    Entry("ln_tuning", "ln_tuning"),
    Entry("bitfit", "bitfit"),
    Entry("prompt_tuning", "prompt_tuning", PROMPT),
    Entry("prefix_tuning", "prefix_tuning", PROMPT, {"init_weights": "zero"}),
    Entry("miss", "miss"),
    Entry("shira", "shira"),
    Entry("hira", "hira"),
    Entry("lily", "lily"),
    Entry("lokr", "lokr"),
    Entry("boft", "boft"),
    Entry("delora", "delora"),
    Entry("hra", "hra"),
    Entry("gralora", "gralora"),
    Entry("randlora", "randlora"),
    Entry("road", "road"),
    Entry("c3a", "c3a", {"block_size": 128}, {"block_size": 16}),
    Entry("fourierft", "fourierft"),
    Entry("vblora", "vblora", {"vector_length": 128}, {"vector_length": 32}),
    Entry("osf", "osf"),
    Entry("poly", "poly"),
    Entry("p_tuning", "p_tuning", {**PROMPT, "encoder_hidden_size": 128}),
    Entry("adaption_prompt", "adaption_prompt"),
    Entry("lora, use_rslora", "lora", {"use_rslora": True}),
    Entry("lora, pissa", "lora", {"init_lora_weights": "pissa"}),
)
EXPERTS = SEEDS[1:]  # the seeds of the LoRA runs whose adapters X-LoRA mixes


@dataclass(frozen=True)
class Trial:
    """A run of the table."""

    question: Question
    entry: Entry
    rate: float
    seed: int
    work: Path

    @property
    def folder(self) -> Path:
        return self.work / self.question.name / self.entry.label / f"{self.rate:g}-{self.seed}"

    def settings(self, held_out: str) -> dict[str, Any]:
        """Of its run.yaml; `held_out` names the file that measures it."""
        q, entry = self.question, self.entry
        arguments = entry.arguments | (entry.text if q is TEXT else {})
        if make := FROM_DATA.get(entry.label):
            arguments = make(self)
        columns = {"header": ["text", "label"], "max_length": q.max_length}
        columns |= {"layout": "text"} if q is TEXT else {}
        return {
            "model": q.model or str(encoder_folder()),
            "task": q.task,
            "method": {"name": entry.method, **arguments},
            "data": {"train": self.rows("train"), "eval": self.rows(held_out), **columns},
            "train": {
                "max_steps": STEPS,
                "batch_size": q.batch,
                "learning_rate": self.rate,
                "precision": q.precision,
                "seed": self.seed,
            },
            "output": str(self.folder),
        }

    def rows(self, name: str) -> str:
        return str(self.work / f"{name if name != 'test' else self.question.name + '-test'}.tsv")

    def line(self, kind: Kind, **found: Any) -> Line:
        return Line(kind, self.question.name, self.entry.label, self.rate, self.seed, **found)


def frequent_tokens(trial: Trial) -> dict[str, Any]:
    counts = Counter(token for row in first_rows(trial, TRAIN_ROWS) for token in row)
    return {"token_indices": sorted(token for token, _ in counts.most_common(TOKENS))}


def context(trial: Trial) -> dict[str, Any]:
    """The first rows; of each the last token is what CPT calls the label (4 + 4k), the others its input (2 + 4k)."""
    rows = first_rows(trial, CONTEXT_ROWS)
    types = [kind for k, row in enumerate(rows) for kind in [2 + 4 * k] * (len(row) - 1) + [4 + 4 * k]]
    return {"cpt_token_ids": [token for row in rows for token in row], "cpt_tokens_type_mask": types}


def experts(trial: Trial) -> dict[str, Any]:
    """Adapters of LoRA's own runs on this task: X-LoRA learns to mix them, after their 100 steps each."""
    rate = chosen_rate(read_lines(RECORD), trial.question.name, "lora")
    lora = [replace(trial, entry=ENTRIES[0], rate=rate, seed=seed) for seed in EXPERTS]
    for run in lora:
        if not is_finished(run.folder):
            shutil.rmtree(run.folder, ignore_errors=True)
            train(RunConfig.build(run.settings("validation")))
    return {"adapters": {f"seed-{run.seed}": str(run.folder / "adapter") for run in lora}}


FROM_DATA: dict[str, Callable[[Trial], dict[str, Any]]] = {
    "trainable_tokens": frequent_tokens,
    "cpt": context,
    "xlora": experts,
}


def first_rows(trial: Trial, number: int) -> list[list[int]]:
    """The tokens of the first training rows, without special ones."""
    tokenizer = load_tokenizer(trial.question.model or str(encoder_folder()))
    texts = [line.split("\t")[0] for line in Path(trial.rows("train")).read_text().splitlines()[:number]]
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def is_finished(folder: Path) -> bool:
    return (folder / RECORD_NAME).is_file() and Record.read(folder).status == "completed"


def search(trial: Trial) -> Line:
    """Trains, and measures on the validation rows."""
    shutil.rmtree(trial.folder, ignore_errors=True)  # of a run that was interrupted
    try:
        record = train(RunConfig.build(trial.settings("validation")))
    except InterruptedRunError:
        raise
    except SiliangError as error:
        return trial.line("search", error=first_line(error))
    return trial.line("search", values=dict(record.final) | {"trained": record.parameters.trained})


def test(trial: Trial) -> Line:
    """Trains, unless the search has, and measures on the test rows."""
    if is_finished(trial.folder):
        values = evaluate(open_run(trial.folder), trial.rows("test"))
    else:
        shutil.rmtree(trial.folder, ignore_errors=True)
        record = train(RunConfig.build(trial.settings("test")))
        values = dict(record.final) | {"loss": record.final["eval_loss"], "trained": record.parameters.trained}
    return trial.line("test", values=values)


def costs(trial: Trial) -> Line:
    """The median processor time of a step, and the peak memory of the steps above the loaded model."""
    settings, times = trial.settings("few"), [0.0]
    settings["train"] |= {"max_steps": TIMED_STEPS}
    settings["output"] = str(trial.work / "costs" / trial.question.name / trial.entry.label)
    shutil.rmtree(settings["output"], ignore_errors=True)

    def note(progress: Progress) -> None:
        if progress.measured is None and progress.step == len(times):
            times.append(time.process_time())

    try:
        record = train(RunConfig.build(settings), Listener(progress=note))
    except SiliangError as error:
        return trial.line("costs", error=first_line(error))
    took = [b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
    values = {"step_s": statistics.median(took), "above_bytes": record.memory.above_bytes}
    return trial.line("costs", values=values | {"trained": record.parameters.trained})


MAKE: dict[Kind, Callable[[Trial], Line]] = {"search": search, "test": test, "costs": costs}


def chosen_rate(lines: Sequence[Line], question: str, label: str) -> float:
    """The rate with the least loss on the validation rows."""
    tried = [line for line in lines if (line.kind, line.question, line.label) == ("search", question, label)]
    return min(tried, key=lambda line: line.loss).rate


def climb(loss: Callable[[int], float], start: int) -> None:
    """Asks for the loss at neighbours of `start`, upwards and then downwards, while it falls."""
    best = start
    for direction in (1, -1):
        while abs(best + direction) <= MOST and loss(best) > loss(best + direction):
            best += direction
        if best != start:
            return


class Runs:
    """Makes the runs of one question and method that the record lacks."""

    def __init__(self, question: Question, entry: Entry, work: Path) -> None:
        self.question, self.entry, self.work = question, entry, work

    def run(self) -> None:
        """Searches the rate and measures the seeds at it, unless the method does not work here."""
        first = self._first_rate()
        losses = cache(lambda k: self._made("search", float(f"{first * 3.0**k:.2g}"), SEEDS[0]).loss)
        climb(losses, 0)
        if any(math.isfinite(losses(k)) for k in (0, 1, -1)):
            rate = chosen_rate(read_lines(RECORD), self.question.name, self.entry.label)
            for seed in SEEDS:
                self._made("test", rate, seed)
        if self.entry.label != "lora":  # X-LoRA takes its adapters
            shutil.rmtree(self.work / self.question.name / self.entry.label, ignore_errors=True)

    def measure_costs(self) -> None:
        """Times a few steps, anew."""
        self._made("costs", METHODS[self.entry.method].learning_rate, SEEDS[0])

    def _first_rate(self) -> float:
        """Where the search begins. What a record has begun with stays."""
        for line in read_lines(RECORD):
            if (line.kind, line.question, line.label) == ("search", self.question.name, self.entry.label):
                return line.rate
        default = METHODS[self.entry.method].learning_rate
        k = self.question.first if default < LARGE else self.question.first - 1
        return float(f"{default * 3.0**k:.2g}")

    def _made(self, kind: Kind, rate: float, seed: int) -> Line:
        trial = Trial(self.question, self.entry, rate, seed, self.work)
        key = trial.line(kind).key
        for line in read_lines(RECORD):
            if line.key == key and (kind != "costs" or line.error):
                return line
        process = get_context("fork").Process(target=_write, args=(MAKE[kind], trial))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{key}: the process ended with {process.exitcode}")
        return next(line for line in reversed(read_lines(RECORD)) if line.key == key)


def _write(make: Callable[[Trial], Line], trial: Trial) -> None:
    started = time.process_time()
    text = json.dumps(asdict(make(trial)))
    with RECORD.open("a", encoding="utf-8") as opened:
        opened.write(text + "\n")
    print(f"{time.process_time() - started:5.1f} s of CPU  {text}", flush=True)
    os._exit(0)  # what a thread of the parent has registered for its end is not this process's


def write_rows(work: Path) -> None:
    """The rows of both questions, as files."""
    work.mkdir(parents=True, exist_ok=True)
    data = SHARED / "data" / "sst2"
    rows, dev = ((data / f"{name}.tsv").read_text(encoding="utf-8").splitlines() for name in ("train", "dev"))
    parts = {
        "train": rows[:TRAIN_ROWS],
        "validation": rows[TRAIN_ROWS : TRAIN_ROWS + VALIDATION_ROWS],
        "few": rows[TRAIN_ROWS : TRAIN_ROWS + 16],
        **{f"{q.name}-test": dev[: q.test_rows] for q in (CLASSES, TEXT)},
    }
    for name, part in parts.items():
        (work / f"{name}.tsv").write_text("\n".join(part) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.methods_table", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--costs", action="store_true", help="only time and memory of a step, anew")
    parser.add_argument("--write", action="store_true", help="only the tables")
    parser.add_argument("--only", nargs="*", help="labels of methods")
    parser.add_argument("--questions", nargs="*", default=["text", "classes"], choices=["text", "classes"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--work", type=Path, default=Path("runs/methods-table"))
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not options.write:
        write_rows(options.work)
        asked = {q.name: q for q in (TEXT, CLASSES)}
        entries = [e for e in ENTRIES if not options.only or e.label in options.only]
        runs = [Runs(asked[name], entry, options.work.resolve()) for name in options.questions for entry in entries]
        with ThreadPoolExecutor(1 if options.costs else options.jobs) as pool:
            list(pool.map(lambda run: run.measure_costs() if options.costs else run.run(), runs))
    write_docs(DOCS, read_lines(RECORD), [entry.label for entry in ENTRIES])


if __name__ == "__main__":
    main()
