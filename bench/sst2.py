"""One class a text beside PEFT with transformers' Trainer: MiniLM with LoRA on SST-2, at the same settings.

python -m bench.sst2 [--steps 120] [--seeds 3]

Both train on rows of the 6,920 training reviews, in steps of 16, and are measured on the 872 dev reviews. siliang has
its defaults but for what both are given; --order random turns its grouping of rows by length off, as the Trainer has
none.
A line for each run gives the accuracy and the loss on the dev rows, and the last one the means and standard deviations.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from bench.folders import SHARED
from siliang.config import RunConfig
from siliang.demo import encoder_folder
from siliang.train.run import train

RATE, BATCH, WARMUP, MAX_LENGTH = 2e-3, 16, 0.06, 64
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
Rows = list[tuple[str, int]]


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.sst2", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--order", choices=("default", "random"), default="default")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, dev = (read(SHARED / "data" / "sst2" / f"{name}.tsv") for name in ("train", "dev"))
    found: dict[str, list[tuple[float, float]]] = {"siliang": [], "Trainer": []}
    with tempfile.TemporaryDirectory() as place:
        for seed in range(1, options.seeds + 1):
            folder = Path(place) / str(seed)
            folder.mkdir()
            order = {"group_by_length": False} if options.order == "random" else {}
            found["siliang"].append(by_siliang(rows, dev, options.steps, seed, folder, order))
            found["Trainer"].append(by_trainer(rows, dev, options.steps, seed, folder))
            for name, results in found.items():
                print(f"seed {seed}  {name}: accuracy {results[-1][0]:.4f}  loss {results[-1][1]:.4f}", flush=True)
    for name, results in found.items():
        of = {what: [r[i] for r in results] for i, what in enumerate(("accuracy", "loss"))}
        means = "  ".join(
            f"{what} {statistics.mean(v):.4f} ± {statistics.stdev(v) if len(v) > 1 else 0:.4f}"
            for what, v in of.items()
        )
        print(f"{name}: {means}", flush=True)


def read(path: Path) -> Rows:
    """(text, 0 or 1) of each line."""
    lines = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [(text, int(label)) for text, label in lines]


def by_siliang(
    rows: Rows, dev: Rows, steps: int, seed: int, folder: Path, order: dict[str, bool]
) -> tuple[float, float]:
    """(accuracy, loss) on the dev rows."""
    for name, part in (("train", rows), ("dev", dev)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *((t, ("neg", "pos")[i]) for t, i in part)])
    settings: dict[str, Any] = {
        "model": str(encoder_folder()),
        "task": "seq_cls",
        "method": {"name": "lora", **LORA},
        "data": {"train": str(folder / "train.csv"), "eval": str(folder / "dev.csv"), "max_length": MAX_LENGTH},
        "train": {
            "max_steps": steps,
            "batch_size": BATCH,
            "learning_rate": RATE,
            "warmup_fraction": WARMUP,
            "precision": "fp32",
            "seed": seed,
            **order,
        },
        "output": str(folder / "run"),
    }
    final = train(RunConfig.build(settings)).final
    return final["accuracy"], final["eval_loss"]


def by_trainer(rows: Rows, dev: Rows, steps: int, seed: int, folder: Path) -> tuple[float, float]:
    """The same by the peer."""
    set_seed(seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(encoder_folder())
    base = AutoModelForSequenceClassification.from_pretrained(encoder_folder(), num_labels=2)
    model: Any = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", **LORA))
    tables = [
        Dataset.from_list(
            [tokenizer(text, truncation=True, max_length=MAX_LENGTH) | {"labels": label} for text, label in part]
        )
        for part in (rows, dev)
    ]
    arguments = TrainingArguments(
        str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=32,
        learning_rate=RATE,
        warmup_steps=round(WARMUP * steps),
        lr_scheduler_type="linear",
        seed=seed,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=tables[0],
        eval_dataset=tables[1],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {
            "accuracy": float((np.asarray(p.predictions).argmax(-1) == np.asarray(p.label_ids)).mean())
        },
    )
    trainer.train()
    found = trainer.evaluate()
    return found["eval_accuracy"], found["eval_loss"]


if __name__ == "__main__":
    main()
