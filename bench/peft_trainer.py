"""PEFT with transformers.Trainer, and what the trainers of all peers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.utils.import_utils import is_flash_attn_2_available

from bench.peft_on_new_transformers import show_old_name
from bench.record import Job, Setting
from bench.workloads import Method
from siliang.config import RunConfig
from siliang.data.collate import PadCollator
from siliang.data.prepared import PreparedData
from siliang.hardware import find_device
from siliang.methods import find_method
from siliang.run_folder import load_base
from siliang.types import TaskType


def base_model(config: RunConfig, setting: Setting, data: PreparedData) -> Any:
    """The base model, as transformers has it."""
    dtype = torch.bfloat16 if setting.dtype == "bf16 weights" else torch.float32
    if config.quantization:
        config.quantization.compute_dtype = "fp32" if setting.dtype == "fp32" else "bf16"
    model = load_base(config, data.labels, data.tokenizer, dtype=dtype, device=find_device())
    if setting.layout == "flat" and is_flash_attn_2_available():
        model.set_attn_implementation("flash_attention_2")
    return model


def adapter_settings(config: RunConfig, method: Method) -> peft.PeftConfig | None:
    """PEFT's config of the adapter; None where parameters of the model itself are trained."""
    if method.peft is None:
        return None
    show_old_name()
    kind = TaskType.CAUSAL_LM if config.task is TaskType.PREFERENCE else config.task
    return getattr(peft, method.peft)(task_type=kind.value, **method.arguments)


def with_adapter(model: Any, config: RunConfig, method: Method) -> Any:
    """The model with what is trained."""
    settings = adapter_settings(config, method)
    if settings is not None:
        return peft.get_peft_model(model, settings)
    for name, p in model.named_parameters():
        p.requires_grad_(method.name == "full" or name.endswith("bias") or name.startswith("classifier"))
    return model


def arguments_of(config: RunConfig, setting: Setting, folder: Path) -> dict[str, Any]:
    """The Trainer's arguments, the same for all peers."""
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


def padding(data: PreparedData) -> int:
    """The token that fills gaps."""
    assert data.tokenizer.pad_token_id is not None
    return data.tokenizer.pad_token_id


def token_rows(data: PreparedData) -> Dataset:
    """The rows as the libraries that ask for a Dataset take them."""
    rows = (data.train[i] for i in range(len(data.train)))
    return Dataset.from_list([{name: row[name] for name in ("input_ids", "labels")} for row in rows])


def peft_trainer(config: RunConfig, method: Method, job: Job, data: PreparedData, folder: Path) -> Trainer:
    """transformers' Trainer on PEFT's model."""
    model = with_adapter(base_model(config, job.setting, data), config, method)
    arguments = TrainingArguments(
        **arguments_of(config, job.setting, folder), remove_unused_columns=False, label_names=["labels"]
    )
    flat = job.setting.layout == "flat"
    collate: Any = DataCollatorWithFlattening() if flat else PadCollator(padding(data))
    return Trainer(model=model, args=arguments, train_dataset=data.train, data_collator=collate)
