"""Classes of texts by `siliang.predict` beside transformers' pipeline, in turn, on the same trained model.

python -m bench.predictions [--rounds 3] [--texts 1000] [--cpu]

MiniLM on SST-2's reviews, and a Chinese BERT on hotel reviews; both are trained for some steps first, at siliang's
default precision: bf16 where the machine computes it, which a run keeps in its predictions. The pipeline has the merged
model in fp32, its default, and in bf16, and the texts as they come and sorted by length; the best of all and of several
batch sizes counts. A line for each gives texts per
second of wall-clock time, or with --cpu of the process's CPU time (the median of the rounds), and in how many texts
both chose the same class.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline
from transformers.utils import logging

from bench.folders import SHARED
from siliang.config import RunConfig
from siliang.demo import encoder_folder
from siliang.functions import merge, open_run, predict
from siliang.train.run import train

BATCHES = (1, 8, 32, 128)
MAX_LENGTH = 256
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.predictions", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--cpu", action="store_true", help="CPU time, for a machine that others use too")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for name, model, rows in (
            ("SST-2, MiniLM", encoder_folder(), sst2()),
            ("hotel reviews, a Chinese BERT", SHARED / "weights" / "zh-mini-bert", hotels()),
        ):
            compare(name, model, rows, options.texts, options.rounds, Path(folder) / name, clock)


def sst2() -> list[tuple[str, str]]:
    """(text, label) of the training rows."""
    lines = (SHARED / "data" / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()
    return [(text, label) for text, label in (line.split("\t") for line in lines)]


def hotels() -> list[tuple[str, str]]:
    """Likewise, in a random order: the file is sorted by its labels."""
    with (SHARED / "data" / "ChnSentiCorp_htl_all.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["review"], row["label"]) for row in csv.DictReader(file) if row["review"].strip()]
    random.Random(0).shuffle(rows)
    return rows


def by_length(texts: list[str], answer: Callable[[list[str]], list[str]]) -> list[str]:
    """The answers to texts that are sorted by length, in the order of the texts."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    found = dict(zip(order, answer([texts[i] for i in order]), strict=True))
    return [found[i] for i in range(len(texts))]


def compare(
    name: str,
    model: Path,
    rows: list[tuple[str, str]],
    texts: int,
    rounds: int,
    folder: Path,
    clock: Callable[[], float],
) -> None:
    """Trains, and prints a line for siliang and for each batch size of the pipeline."""
    folder.mkdir()
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows[-400:]])
    settings = {
        "model": str(model),
        "task": "seq_cls",
        "data": {"train": str(folder / "train.csv"), "max_length": MAX_LENGTH},
        "train": {"max_steps": 40, "batch_size": 16, "learning_rate": 3e-3},
        "output": str(folder / "run"),
    }
    train(RunConfig.build(settings))
    merge(folder / "run", output=folder / "merged")
    asked = [text for text, _ in rows[:texts]]
    run = open_run(folder / "run")
    whole: dict[str, Any] = {"truncation": True, "max_length": MAX_LENGTH}
    ways: dict[str, Callable[[], list[str]]] = {"siliang": lambda: [str(p.predicted) for p in predict(run, asked)]}
    for dtype in (torch.float32, torch.bfloat16):
        there = pipeline("text-classification", model=str(folder / "merged"), device="cpu", dtype=dtype)
        for size in BATCHES:

            def classify(texts: list[str], there: Any = there, size: int = size) -> list[str]:
                return [str(found["label"]) for found in there(texts, batch_size=size, **whole)]

            way = f"pipeline, {NAMES[dtype]}, batches of {size}"
            ways[way] = partial(classify, asked)
            ways[f"{way}, sorted"] = partial(by_length, asked, classify)
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, list[str]] = {}
    for _ in range(rounds):
        for way, answer in ways.items():
            start = clock()
            answers[way] = answer()
            speeds[way].append(len(asked) / (clock() - start))
    medians = {way: statistics.median(of) for way, of in speeds.items()}
    for way, speed in medians.items():
        same = sum(a == b for a, b in zip(answers[way], answers["siliang"], strict=True))
        print(f"{name}: {way}: {speed:,.0f} texts/s, {same:,} of {len(asked):,} the same class", flush=True)
    for dtype in NAMES.values():
        best = max(speed for way, speed in medians.items() if f", {dtype}," in way)
        ratio = medians["siliang"] / best
        print(
            f"{name}: siliang in {run.record.precision} is {ratio:.2f} times as fast as the best in {dtype}", flush=True
        )


if __name__ == "__main__":
    main()
