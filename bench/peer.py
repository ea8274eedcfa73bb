"""One measurement of a peer: PEFT with transformers.Trainer, or TRL's SFTTrainer, on the same model, data and start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.utils.import_utils import is_flash_attn_2_available

from bench.peft_on_new_transformers import show_old_name
from bench.record import Job, Measurement, Setting
from bench.steps import StepClock, set_start, settle, start_sha256
from bench.workloads import WORKLOADS, Method, run_config
from siliang.config import RunConfig
from siliang.data.collate import PadCollator
from siliang.data.tokens import TokenSet
from siliang.hardware import find_device
from siliang.memory.peak import PeakMemory
from siliang.methods import find_method
from siliang.run_folder import load_base
from siliang.tasks.prepare import prepare_data
from siliang.types import TaskType


def measure(found: Measurement, scratch: Path) -> None:
    """Trains as the record's job says, and fills the record."""
    job, device = found.job, find_device()
    workload = WORKLOADS[job.workload]
    method = workload.method(job.method)
    config = run_config(
        workload,
        method,
        scratch,
        smoke=job.smoke,
        steps=job.warmup + job.steps,
        log_every=1 if job.purpose == "gate" else job.warmup + job.steps,
    )
    data = prepare_data(config)
    model = _model(config, method, job.setting, data.labels, data.tokenizer, device)
    set_start(model)
    found.start_sha256 = start_sha256(model)
    found.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    build = _sft_trainer if job.library == "trl" else _trainer
    trainer = build(model, data.train, data.tokenizer, config, job, scratch / "runs" / job.name)
    trainer.data_collator = counting = _Counting(trainer.data_collator)
    clock = StepClock(job, device)
    clock.tokens = counting.until
    trainer.add_callback(clock)
    settle(model)
    with PeakMemory(device) as memory:
        trainer.train()
        clock.fill(found, trainer.state.log_history, memory)


class _Counting:
    """A collator that counts the tokens of each batch: the loader is a batch ahead of the step."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
        self._collate = collate
        self._tokens: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self._tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self._collate(rows)

    def until(self, step: int) -> int:
        """Tokens of the first `step` batches."""
        return sum(self._tokens[:step])


def _model(
    config: RunConfig, method: Method, setting: Setting, labels: list[str] | None, tokenizer: Any, device: torch.device
) -> Any:
    """The base model, and on it what is trained."""
    dtype = torch.bfloat16 if setting.dtype == "bf16 weights" else torch.float32
    if config.quantization:
        config.quantization.compute_dtype = "fp32" if setting.dtype == "fp32" else "bf16"
    model = load_base(config, labels, tokenizer, dtype=dtype, device=device)
    if setting.layout == "flat" and is_flash_attn_2_available():
        model.set_attn_implementation("flash_attention_2")
    if method.peft:
        show_old_name()
        settings = getattr(peft, method.peft)(task_type=config.task.value, **method.arguments)
        return peft.get_peft_model(model, settings)
    for name, p in model.named_parameters():
        p.requires_grad_(method.name == "full" or name.endswith("bias") or name.startswith("classifier"))
    return model


def _arguments(config: RunConfig, setting: Setting, folder: Path) -> dict[str, Any]:
    """The Trainer's arguments, the same for both peers."""
    t = config.train
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(folder),
        "max_steps": t.max_steps,
        "per_device_train_batch_size": t.batch_size,
        "learning_rate": t.learning_rate or find_method(config.method.name).learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": t.weight_decay,
        "max_grad_norm": t.max_grad_norm,
        "bf16": setting.dtype == "bf16 autocast",
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "seed": t.seed,
        "data_seed": t.seed,
        "train_sampling_strategy": "group_by_length" if setting.layout == "grouped" else "random",
        "logging_steps": t.log_every,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def _trainer(model: Any, rows: TokenSet, tokenizer: Any, config: RunConfig, job: Job, folder: Path) -> Trainer:
    flat = job.setting.layout == "flat"
    arguments = TrainingArguments(
        **_arguments(config, job.setting, folder), remove_unused_columns=False, label_names=["labels"]
    )
    collate: Any = DataCollatorWithFlattening() if flat else PadCollator(tokenizer.pad_token_id)
    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)


def _sft_trainer(model: Any, rows: TokenSet, tokenizer: Any, config: RunConfig, job: Job, folder: Path) -> Trainer:
    from trl import SFTConfig, SFTTrainer  # pyright: ignore  # an extra, which need not be installed

    assert config.task is TaskType.CAUSAL_LM
    arguments = SFTConfig(
        **_arguments(config, job.setting, folder),
        gradient_checkpointing=False,  # its default: less memory for more time; the peer is the fastest setting
        padding_free=job.setting.layout == "flat",
        max_length=None,  # the rows are cut already
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    table = rows.table.select_columns(["input_ids", "labels"])
    assert isinstance(table, Dataset)  # the rows of a run are
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=table, processing_class=tokenizer)
    if job.setting.dtype == "fp32":
        for p in model.parameters():  # on a quantized base TRL turns the adapter to bf16, whatever was asked for
            p.data = p.data.float() if p.requires_grad else p.data
    return trainer
