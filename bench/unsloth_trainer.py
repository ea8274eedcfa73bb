"""Unsloth's own way on a CPU: its model with its adapter in SFTTrainer. Runs in Unsloth's own environment, where it is
imported first."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer

from bench.record import Job
from bench.trl_trainers import sft_trainer
from bench.workloads import Method
from siliang.config import RunConfig
from siliang.data.prepared import PreparedData

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of a block of Llama


def unsloth_trainer(config: RunConfig, method: Method, job: Job, data: PreparedData, folder: Path) -> Trainer:
    """Its SFTTrainer, without gradient checkpointing: the peer is the fastest setting.

    Raises:
        ValueError: Unsloth has no such method.
    """
    import unsloth  # pyright: ignore  # only in its own environment

    if method.peft != "LoraConfig":
        raise ValueError(f"Unsloth trains LoRA and whole models, not {method.label}")
    dtype = job.setting.dtype
    base = in_bf16(Path(config.model)) if dtype == "bf16 storage" else Path(config.model)
    kind: Any = unsloth.FastLanguageModel
    model, _ = kind.from_pretrained(
        str(base),
        max_seq_length=config.data.max_length,
        dtype=torch.bfloat16 if dtype == "bf16 weights" else torch.float32,
        load_in_4bit=method.quantized,
        use_gradient_checkpointing=False,
    )
    values = dict(method.arguments)
    if values["target_modules"] == "all-linear":  # which Unsloth's models for text do not know on every device
        values["target_modules"] = LINEAR_LAYERS
    model = kind.get_peft_model(model, **values, use_gradient_checkpointing=False)
    return sft_trainer(model, config, job, data, folder)


def in_bf16(folder: Path) -> Path:
    """A copy of the base model whose file is in bf16: only such weights stay in bf16 where fp32 is computed."""
    copy = folder.with_name(f"{folder.name}-bf16")
    if not copy.exists():
        unfinished = copy.with_name(f"{copy.name}-{os.getpid()}")
        shutil.copytree(folder, unfinished)
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(unfinished)
        unfinished.rename(copy)
    return copy
