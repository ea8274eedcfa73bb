"""The methods of a comparison again, with `peft` in a plain loop: same rows, seeds and learning rates.

python -m bench.seed_table examples/compare/chnsenticorp.yaml --output runs/peft

The loop is that of the tutorials: padded batches, AdamW, a linear schedule with warm-up, the task's metrics at the end.
Each run is a line in results.jsonl of the output folder; a run that is there is not run again. Where the comparison's
own folder is there, the table has both.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import peft
import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup, set_seed
from transformers.utils import logging

from bench.peft_on_new_transformers import show_old_name
from siliang.compare.trials import find_entry, run_config, test_trials
from siliang.config import RunConfig, assign
from siliang.config.comparison import CompareConfig
from siliang.data.collate import PadCollator
from siliang.data.tokens import TokenSet
from siliang.hardware import find_device
from siliang.methods import find_method
from siliang.records import COMPARISON_NAME, Comparison, Record, Trial
from siliang.run_folder import load_base
from siliang.safety.safe_yaml import read_yaml
from siliang.tasks import TASKS, metrics
from siliang.tasks.prepare import prepare_data
from siliang.types import TaskType

CONFIGS = {
    "lora": peft.LoraConfig,
    "ia3": peft.IA3Config,
    "ln_tuning": peft.LNTuningConfig,
    "prompt_tuning": peft.PromptTuningConfig,
    "p_tuning": peft.PromptEncoderConfig,
    "prefix_tuning": peft.PrefixTuningConfig,
}
HEADS = ("classifier", "score", "pre_classifier", "qa_outputs")


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser("python -m bench.seed_table", description=str(__doc__).partition("\n")[0])
    parser.add_argument("settings", type=Path, help="compare.yaml")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.jsonl and README.md")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting by name")
    options = parser.parse_args()
    values = read_yaml(options.settings)
    for assignment in options.set:
        assign(values, assignment, RunConfig)
    config = CompareConfig.build(values, source=str(options.settings))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "results.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    there = {(d["method"], d["seed"]) for d in done}
    missing = [trial for trial in test_trials(config, {}) if (trial.method, trial.seed) not in there]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        for future in as_completed([pool.submit(measure, config, trial) for trial in missing]):
            done.append(future.result())
            with path.open("a") as opened:
                opened.write(json.dumps(done[-1]) + "\n")
            print(json.dumps(done[-1]), flush=True)
    text = render(config, done)
    (options.output / "README.md").write_text(text, encoding="utf-8")
    print(text)


def measure(config: CompareConfig, trial: Trial) -> dict[str, Any]:
    """One run with peft: the task's metrics."""
    logging.set_verbosity_error()
    run = run_config(config, trial, Path("unused"), {})
    set_seed(trial.seed)
    data = prepare_data(run)
    device, t = find_device(), run.train
    model: Any = load_base(run, data.labels, data.tokenizer, dtype=torch.float32)
    model = attach(model, run).to(device)
    pad = data.tokenizer.pad_token_id
    assert pad is not None
    collate = PadCollator(pad)
    loader = DataLoader(data.train, batch_size=t.batch_size, shuffle=True, collate_fn=collate)
    steps = t.max_steps or int(np.ceil(len(loader) * t.epochs))
    rate = t.learning_rate or find_method(run.method.name).learning_rate
    optimizer = AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=t.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, int(np.ceil(t.warmup_fraction * steps)), steps)
    step = 0
    model.train()
    while step < steps:
        for batch in loader:
            loss = model(**{k: v.to(device) for k, v in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), t.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step == steps:
                break
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shown = {"method": trial.method, "seed": trial.seed, "trained": trained, "rate": rate}
    return shown | evaluate(model, data.eval, collate, run, data.labels or [])


def attach(model: Any, run: RunConfig) -> Any:
    """The method on the base model, by peft; BitFit, the head and full tuning, which it does not have, by hand."""
    name = run.method.name
    if name in CONFIGS:
        show_old_name()
        return peft.get_peft_model(model, CONFIGS[name](task_type=run.task.value, **run.method.arguments))
    for key, p in model.named_parameters():
        head = key.split(".")[0] in HEADS
        p.requires_grad_(name == "full" or head or (name == "bitfit" and key.endswith("bias")))
    return model


@torch.no_grad()
def evaluate(model: Any, rows: TokenSet, collate: PadCollator, run: RunConfig, labels: list[str]) -> dict[str, float]:
    """The loss, and the task's metrics, on the held-out rows."""
    model.eval()
    device, total, weight = find_device(), 0.0, 0
    guesses: list[Any] = []
    right: list[Any] = []
    for batch in DataLoader(rows, batch_size=run.train.batch_size, collate_fn=collate):
        batch = {k: v.to(device) for k, v in batch.items()}
        output = model(**batch)
        gold = batch["labels"]
        shifted = gold[:, 1:] if run.task is TaskType.CAUSAL_LM else gold
        n = int((shifted != -100).sum())
        total, weight = total + float(output.loss) * n, weight + n
        if run.task is TaskType.SEQ_CLS:
            guesses += output.logits.argmax(-1).tolist()
            right += gold.tolist()
        elif run.task is TaskType.TOKEN_CLS:
            for predicted, row in zip(output.logits.argmax(-1).tolist(), gold.tolist(), strict=True):
                kept = [(labels[a], labels[b]) for a, b in zip(predicted, row, strict=True) if b != -100]
                guesses.append([a for a, _ in kept])
                right.append([b for _, b in kept])
    found = {"eval_loss": total / max(weight, 1)}
    if run.task is TaskType.SEQ_CLS:
        found |= metrics.classification(guesses, right)
    elif run.task is TaskType.TOKEN_CLS:
        found |= metrics.spans_of_tags(guesses, right)
    return found


def render(config: CompareConfig, done: list[dict[str, Any]]) -> str:
    """Both libraries' metrics, mean and spread over seeds, in Markdown; speed is `python -m bench`'s to measure."""
    quality = TASKS[config.run.task].quality
    folder = Path(config.run.output)
    path = folder / COMPARISON_NAME
    trials = [t for t in Comparison.open(path).trials if t.purpose == "test"] if path.is_file() else []
    lines = [
        f"| method | learning rate | trained | siliang, {quality.name} | peft, {quality.name} | peft, seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in config.settings.methods:
        theirs = [d for d in done if d["method"] == entry.label]
        ours = [Record.read(folder / t.folder) for t in trials if (t.method, t.status) == (entry.label, "completed")]
        rate = theirs[0]["rate"] if theirs else find_method(find_entry(config, entry.label).name).learning_rate
        lines.append(
            f"| {entry.label} | {rate:g} | {theirs[0]['trained'] if theirs else 0:,} "
            f"| {_spread([r.final[quality.name] for r in ours])} | {_spread([d[quality.name] for d in theirs])} "
            f"| {len(theirs)} |"
        )
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
