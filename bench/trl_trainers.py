"""TRL's SFTTrainer, and its DPOTrainer where the rows are pairs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from bench.peft_trainer import adapter_settings, arguments_of, base_model, padding, token_rows, with_adapter
from bench.record import Job
from bench.workloads import Method
from siliang.config import RunConfig
from siliang.data.encode import IGNORED
from siliang.data.prepared import PreparedData
from siliang.types import TaskType

Rows = list[dict[str, Any]]


def trl_trainer(config: RunConfig, method: Method, job: Job, data: PreparedData, folder: Path) -> Trainer:
    """The trainer that the task needs."""
    if config.task is TaskType.PREFERENCE:
        return _dpo_trainer(config, method, job, data, folder)
    model = with_adapter(base_model(config, job.setting, data), config, method)
    return sft_trainer(model, config, job, data, folder)


def sft_trainer(model: Any, config: RunConfig, job: Job, data: PreparedData, folder: Path) -> Trainer:
    """SFTTrainer on rows that are tokens already."""
    from trl import SFTConfig, SFTTrainer  # pyright: ignore  # an extra, which need not be installed

    assert config.task is TaskType.CAUSAL_LM
    arguments = SFTConfig(
        **arguments_of(config, job.setting, folder),
        gradient_checkpointing=False,  # its default: less memory for more time; the peer is the fastest setting
        padding_free=job.setting.layout == "flat",
        max_length=None,  # the rows are cut already
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    table = data.train.table.select_columns(["input_ids", "labels"])
    if not isinstance(table, Dataset):  # few rows are in a small table
        table = Dataset.from_dict({name: table[name] for name in table.column_names})
    tokenizer: Any = data.tokenizer
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=token_rows(data), processing_class=tokenizer)
    if job.setting.dtype == "fp32":
        for p in model.parameters():  # on a quantized base TRL turns the adapter to bf16, whatever was asked for
            p.data = p.data.float() if p.requires_grad else p.data
    return trainer


def _dpo_trainer(config: RunConfig, method: Method, job: Job, data: PreparedData, folder: Path) -> Trainer:
    """DPOTrainer on pairs that are tokens already.

    It makes the adapter itself: given a model with one, it would keep a copy of it as the reference, which costs more
    than the base model does.
    """
    from trl import DPOConfig, DPOTrainer  # pyright: ignore  # an extra, which need not be installed
    from trl.trainer.dpo_trainer import DataCollatorForPreference  # pyright: ignore

    class OnTokens(DPOTrainer):
        first_pass_s_per_row = 0.0

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = super()._precompute_ref_logps(dataset, *args, **kwargs)
            self.first_pass_s_per_row = (time.perf_counter() - start) / len(dataset)
            return found

    rows, unlearned = pairs(data)
    first = "reference first" in job.setting.options
    if first:  # only those that are trained
        rows = rows[: (job.warmup + job.steps) * config.train.batch_size]
    arguments = DPOConfig(
        **arguments_of(config, job.setting, folder),
        gradient_checkpointing=False,
        precompute_ref_log_probs=first,
        max_length=None,
        length_column_name="length",
        remove_unused_columns=False,  # the lengths would be among them
        beta=0.1,
        loss_type=["sigmoid"],
    )
    collate = _Collator(DataCollatorForPreference(pad_token_id=padding(data)), unlearned)
    tokenizer: Any = data.tokenizer
    return OnTokens(
        model=base_model(config, job.setting, data),
        args=arguments,
        data_collator=collate,  # pyright: ignore  # called as one
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter_settings(config, method),
    )


def pairs(data: PreparedData) -> tuple[Rows, int]:
    """The pairs as DPOTrainer has them, and how many tokens at the end of each answer are not learned."""
    rows, ends = Rows(), set[int]()
    for row in (data.train[i] for i in range(len(data.train))):
        ids, labels, length = row["input_ids"], row["labels"], row["sequences"][0]
        answers: list[list[int]] = []
        start = next(i for i, label in enumerate(labels) if label != IGNORED)
        for part, marks in ((ids[:length], labels[:length]), (ids[length:], labels[length:])):
            learned = [i for i, label in enumerate(marks) if label != IGNORED]
            assert part[:start] == ids[:start]
            assert learned == list(range(start, learned[-1] + 1))
            answers.append(part[start:])
            ends.add(len(part) - 1 - learned[-1])
        longest = start + max(map(len, answers))
        rows.append(
            {"prompt_ids": ids[:start], "chosen_ids": answers[0], "rejected_ids": answers[1], "length": longest}
        )
    (unlearned,) = ends
    return rows, unlearned


class _Collator:
    """TRL's own, but for what ends an answer and is not learned."""

    def __init__(self, collate: Any, unlearned: int) -> None:
        self._collate, self._unlearned = collate, unlearned

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        batch = self._collate(rows)
        ends = batch["attention_mask"].sum(1, keepdim=True)
        places = torch.arange(batch["attention_mask"].shape[1])
        batch["completion_mask"] *= places < ends - self._unlearned
        return batch
