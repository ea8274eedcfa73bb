"""Classes of texts by `siliang.predict` beside transformers' pipeline, in turn, on the same trained model.

python -m bench.predictions [--rounds 3] [--texts 1000]

MiniLM on SST-2's reviews, and a Chinese BERT on hotel reviews; both are trained for some steps first. The pipeline has
the merged model, and the best of several batch sizes counts. A line for each gives texts per second (the median of the
rounds), and in how many texts both chose the same class.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import pipeline
from transformers.utils import logging

from bench.folders import SHARED
from siliang.config import RunConfig
from siliang.demo import encoder_folder
from siliang.functions import merge, open_run, predict
from siliang.train.run import train

BATCHES = (1, 8, 32, 128)
MAX_LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.predictions", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=1000)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for name, model, rows in (
            ("SST-2, MiniLM", encoder_folder(), sst2()),
            ("hotel reviews, a Chinese BERT", SHARED / "weights" / "zh-mini-bert", hotels()),
        ):
            compare(name, model, rows, options.texts, options.rounds, Path(folder) / name)


def sst2() -> list[tuple[str, str]]:
    """(text, label) of the training rows."""
    lines = (SHARED / "data" / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()
    return [(text, label) for text, label in (line.split("\t") for line in lines)]


def hotels() -> list[tuple[str, str]]:
    """Likewise, of every fifth review: the file is sorted by its labels."""
    with (SHARED / "data" / "ChnSentiCorp_htl_all.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["review"], row["label"]) for row in csv.DictReader(file) if row["review"].strip()]
    return rows[::5]


def compare(name: str, model: Path, rows: list[tuple[str, str]], texts: int, rounds: int, folder: Path) -> None:
    """Trains, and prints a line for siliang and for each batch size of the pipeline."""
    folder.mkdir()
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows[-400:]])
    settings = {
        "model": str(model),
        "task": "seq_cls",
        "data": {"train": str(folder / "train.csv"), "max_length": MAX_LENGTH},
        "train": {"max_steps": 40, "batch_size": 16, "learning_rate": 3e-3, "precision": "fp32"},
        "output": str(folder / "run"),
    }
    train(RunConfig.build(settings))
    merge(folder / "run", output=folder / "merged")
    asked = [text for text, _ in rows[:texts]]
    run = open_run(folder / "run")
    there = pipeline("text-classification", model=str(folder / "merged"), device="cpu")
    whole: dict[str, Any] = {"truncation": True, "max_length": MAX_LENGTH}
    ways: dict[str, Callable[[], list[str]]] = {"siliang": lambda: [str(p.predicted) for p in predict(run, asked)]}
    for size in BATCHES:
        ways[f"pipeline, batches of {size}"] = lambda size=size: [
            str(found["label"]) for found in there(asked, batch_size=size, **whole)
        ]
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, list[str]] = {}
    for _ in range(rounds):
        for way, answer in ways.items():
            start = time.perf_counter()
            answers[way] = answer()
            speeds[way].append(len(asked) / (time.perf_counter() - start))
    medians = {way: statistics.median(of) for way, of in speeds.items()}
    best = max(speed for way, speed in medians.items() if way != "siliang")
    for way, speed in medians.items():
        same = sum(a == b for a, b in zip(answers[way], answers["siliang"], strict=True))
        print(f"{name}: {way}: {speed:,.0f} texts/s, {same:,} of {len(asked):,} the same class", flush=True)
    print(f"{name}: siliang is {medians['siliang'] / best:.2f} times as fast as the best", flush=True)


if __name__ == "__main__":
    main()
