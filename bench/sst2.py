"""Classification beside PEFT with transformers' Trainer: MiniLM with LoRA on SST-2, at the same settings.

python -m bench.sst2 [--labels one] [--orders default] [--steps 120] [--seeds 3] [--without-trainer]

Labels: the feeling of a review (`one`); whether it is long, which is a label of the length alone (`length`); the
feeling, `long` and `film` (`several`); or its words / 10, and half a point for the feeling (`number`).

All train on rows of the 6,920 training reviews, in steps of 16, and are measured on the 872 dev reviews. siliang has
its defaults but for what both are given, and with --orders grouped random `train.group_by_length` on and off.
A line for each run gives the metric and the loss on the dev rows, and the last ones the means and standard deviations.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
from datasets import Dataset
from scipy.stats import spearmanr
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
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
LONG = 20  # words
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
ORDERS: dict[str, dict[str, bool]] = {
    "default": {},
    "grouped": {"group_by_length": True},
    "random": {"group_by_length": False},
}
Rows = list[tuple[str, int]]


@dataclass(frozen=True)
class Kind:
    """What the labels are.

    Attributes:
        problem: transformers' name.
        outputs: Of the head.
        metric: By siliang's name.
        siliang: Its settings of classification.
        of_length: Whether the review is long, not what it feels.
    """

    problem: str
    outputs: int
    metric: str
    siliang: dict[str, str]
    of_length: bool = False

    def cell(self, text: str, feeling: int) -> str:
        """The label as siliang reads it."""
        own = self.label(text, feeling)
        if isinstance(own, list):
            return ";".join(name for name, there in zip(("positive", "long", "film"), own, strict=True) if there)
        return f"{own:g}" if isinstance(own, float) else ("no", "yes")[own]

    def label(self, text: str, feeling: int) -> int | float | list[float]:
        """The label as transformers reads it."""
        words = len(text.split())
        if self.problem == "regression":
            return words / 10 + feeling / 2
        if self.problem == "multi_label_classification":
            return [float(feeling), float(words > LONG), float("film" in text)]
        return int(words > LONG) if self.of_length else feeling

    def measure(self, p: EvalPrediction) -> float:
        """The metric of Trainer's predictions."""
        found, right = np.asarray(p.predictions), np.asarray(p.label_ids)
        if self.problem == "regression":
            return float(spearmanr(found[:, 0], right).statistic)  # type: ignore[attr-defined]
        if self.problem == "multi_label_classification":
            got = found >= 0
            return float(2 * (got * right).sum() / (got.sum() + right.sum()))
        return float((found.argmax(-1) == right).mean())


KINDS = {
    "one": Kind("single_label_classification", 2, "accuracy", {"problem": "one_label"}),
    "length": Kind("single_label_classification", 2, "accuracy", {"problem": "one_label"}, of_length=True),
    "several": Kind("multi_label_classification", 3, "f1_micro", {"problem": "several_labels", "label_separator": ";"}),
    "number": Kind("regression", 1, "spearman", {"problem": "number"}),
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.sst2", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--labels", choices=KINDS, default="one")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["default"])
    parser.add_argument("--without-trainer", action="store_true")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind = KINDS[options.labels]
    rows, dev = (read(SHARED / "data" / "sst2" / f"{name}.tsv") for name in ("train", "dev"))
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        for seed in range(1, options.seeds + 1):
            for order in options.orders:
                folder = Path(place) / f"{order}-{seed}"
                folder.mkdir()
                result = by_siliang(kind, rows, dev, options.steps, seed, folder, ORDERS[order])
                found.setdefault(f"siliang, {order}", []).append(result)
            if not options.without_trainer:
                folder = Path(place) / str(seed)
                found.setdefault("Trainer", []).append(by_trainer(kind, rows, dev, options.steps, seed, folder))
            for name, results in found.items():
                print(f"seed {seed}  {name}: {kind.metric} {results[-1][0]:.4f}  loss {results[-1][1]:.4f}", flush=True)
    for name, results in found.items():
        of = {what: [r[i] for r in results] for i, what in enumerate((kind.metric, "loss"))}
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
    kind: Kind, rows: Rows, dev: Rows, steps: int, seed: int, folder: Path, order: dict[str, bool]
) -> tuple[float, float]:
    """(metric, loss) on the dev rows."""
    for name, part in (("train", rows), ("dev", dev)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *((t, kind.cell(t, i)) for t, i in part)])
    settings: dict[str, Any] = {
        "model": str(encoder_folder()),
        "task": "seq_cls",
        "method": {"name": "lora", **LORA},
        "data": {"train": str(folder / "train.csv"), "eval": str(folder / "dev.csv"), "max_length": MAX_LENGTH},
        "classification": kind.siliang,
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
    return final[kind.metric], final["eval_loss"]


def by_trainer(kind: Kind, rows: Rows, dev: Rows, steps: int, seed: int, folder: Path) -> tuple[float, float]:
    """The same by the peer."""
    set_seed(seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(encoder_folder())
    base = AutoModelForSequenceClassification.from_pretrained(
        encoder_folder(), num_labels=kind.outputs, problem_type=kind.problem
    )
    model: Any = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", **LORA))
    tables = [
        Dataset.from_list(
            [
                tokenizer(text, truncation=True, max_length=MAX_LENGTH) | {"labels": kind.label(text, feeling)}
                for text, feeling in part
            ]
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
        compute_metrics=lambda p: {kind.metric: kind.measure(p)},
    )
    trainer.train()
    found = trainer.evaluate()
    return found[f"eval_{kind.metric}"], found["eval_loss"]


if __name__ == "__main__":
    main()
