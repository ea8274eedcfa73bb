"""Finds the title of an abstract among all held-out titles: siliang before and after training, and with --peer
sentence-transformers with the same settings. Each trains in its own process, whose seconds and peak memory are printed.

python examples/embeddings/titles.py --model FOLDER --data csl_title/dev.tsv [--peer]

The data is CSL (Li et al. 2022): a line has an instruction, an abstract and a title, with tabs between them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEP, RATE, LENGTH = 32, 2e-3, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with an encoder")
    parser.add_argument("--data", required=True, type=Path, help="lines of instruction, abstract, title")
    parser.add_argument("--output", default="titles", type=Path, help="a new folder")
    parser.add_argument("--rows", default=600, type=int, help="to train on; 200 more are held out")
    parser.add_argument("--epochs", default=2, type=int)
    parser.add_argument("--peer", action="store_true", help="also train with sentence-transformers")
    parser.add_argument("--alone", choices=["siliang", "sentence-transformers"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps((ours if given.alone == "siliang" else theirs)(given)))
        return
    write_rows(given)
    names = ["siliang", *(["sentence-transformers"] if given.peer else [])]
    for name in names:
        words = [sys.executable, __file__, *sys.argv[1:], "--alone", name]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        shown = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
        print(f"{name:<22} {shown}")


def write_rows(given: argparse.Namespace) -> None:
    """Abstracts and titles as anchors and positives; the output folder must be new."""
    given.output.mkdir(parents=True)
    lines = [line.split("\t") for line in given.data.read_text(encoding="utf-8").splitlines()]
    rows = [{"anchor": line[1], "positive": line[2]} for line in lines[: given.rows + 200] if len(line) == 3]
    for name, part in (("train", rows[: given.rows]), ("eval", rows[given.rows :])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (given.output / f"{name}.jsonl").write_text(text, encoding="utf-8")


def rows_of(given: argparse.Namespace, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (given.output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def ours(given: argparse.Namespace) -> dict[str, float]:
    from siliang.config import RunConfig
    from siliang.train.loop import Training
    from siliang.train.prepare import prepare
    from siliang.train.run import train
    from siliang.train.types import Listener

    values = {
        "model": given.model,
        "task": "embedding",
        "method": {"name": "lora", "r": 8, "lora_alpha": 16},
        "data": {"train": str(given.output / "train.jsonl"), "eval": str(given.output / "eval.jsonl")}
        | {"max_length": LENGTH},
        # as one batch, which is run once: several would be run twice, in less memory
        "train": {"batch_size": STEP, "tokens_at_once": 2 * STEP * LENGTH, "epochs": given.epochs}
        | {"learning_rate": RATE, "precision": "fp32"},
        "output": str(given.output / "run"),
    }
    config = RunConfig.build(values)
    before = Training(prepare(config, Listener(), given.output)).measure()
    started = time.perf_counter()
    record = train(config)
    return {
        "recall@1 before": before["recall_at_1"],
        "after": record.final["recall_at_1"],
        "seconds": time.perf_counter() - started,
        "peak MB": peak_mb(),
    }


def theirs(given: argparse.Namespace) -> dict[str, float]:
    from datasets import Dataset
    from peft import LoraConfig, inject_adapter_in_model
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model: Any = SentenceTransformer(given.model, device="cpu")
    model.max_seq_length = LENGTH
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    inject_adapter_in_model(lora, model[0].model)
    before = recall(model, rows_of(given, "eval"))
    started = time.perf_counter()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(given.output / "peer"),
        num_train_epochs=given.epochs,
        per_device_train_batch_size=STEP,
        learning_rate=RATE,
        warmup_ratio=0.06,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    data = Dataset.from_list(rows_of(given, "train"))
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
    ).train()
    seconds = time.perf_counter() - started
    after = recall(model, rows_of(given, "eval"))
    return {"recall@1 before": before, "after": after, "seconds": seconds, "peak MB": peak_mb()}


def recall(model: Any, rows: list[dict[str, str]]) -> float:
    """The share of abstracts whose nearest title is their own."""
    queries = model.encode([row["anchor"] for row in rows], convert_to_tensor=True)
    titles = model.encode([row["positive"] for row in rows], convert_to_tensor=True)
    nearest = model.similarity(queries, titles).argmax(1).tolist()
    return sum(rows[i]["positive"] == row["positive"] for i, row in zip(nearest, rows, strict=True)) / len(rows)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    main()
