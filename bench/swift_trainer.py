"""ms-swift's way: its model, its LoRA and its trainer, on rows that are tokens already. Runs in an environment of its
own."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

from transformers import Trainer

from bench.peft_trainer import arguments_of, token_rows
from bench.record import Job
from bench.workloads import Method
from siliang.config import RunConfig
from siliang.data.prepared import PreparedData


def swift_trainer(config: RunConfig, method: Method, job: Job, data: PreparedData, folder: Path) -> Trainer:
    """Its Seq2SeqTrainer, without gradient checkpointing, and with the order of rows that all trainers have here.

    Raises:
        ValueError: It has no such method, or no such base.
    """
    from swift.arguments import SftArguments  # pyright: ignore  # only in its own environment
    from swift.pipelines.train.sft import SwiftSft  # pyright: ignore
    from swift.trainers import TrainerFactory  # pyright: ignore

    if method.peft != "LoraConfig" or method.quantized:
        raise ValueError(f"{method.label} is not measured with ms-swift")
    setting, values = job.setting, method.arguments
    arguments = SftArguments(
        **arguments_of(config, setting, folder),
        model=config.model,
        model_type="llama",
        template="dummy",  # not used: rows are tokens
        torch_dtype="bfloat16" if setting.dtype == "bf16 weights" else "float32",
        max_length=config.data.max_length,
        tuner_type="lora",
        lora_rank=values["r"],
        lora_alpha=values["lora_alpha"],
        lora_dropout=0.0,
        target_modules=values["target_modules"],
        dataset=[config.data.train],  # read by nobody; it wants one
        gradient_accumulation_steps=1,
        adam_beta2=0.999,  # torch's; its own is 0.95
        gradient_checkpointing=False,
        dataloader_num_workers=0,  # of another process the tokens could not be counted
        check_model=False,
        add_version=False,
    )
    pipeline = SwiftSft(arguments)
    model: Any = pipeline.prepare_model(arguments, pipeline.model, template=pipeline.template, train_dataset=None)
    trainer = TrainerFactory.get_trainer_cls(arguments)(
        model=model, args=arguments.training_args, template=pipeline.template, train_dataset=token_rows(data)
    )
    trainer.get_train_dataloader = MethodType(Trainer.get_train_dataloader, trainer)
    return trainer
