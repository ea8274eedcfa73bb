"""Our optimizer and schedule beside those of transformers' Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make
from transformers import Trainer, TrainingArguments

from siliang import LoraConfig, get_peft_model
from siliang.train.optimizer import make_optimizer, make_schedule


def model_of(kind: str, tuned: str) -> Any:
    model: Any = make(kind)
    if tuned == "lora":
        return get_peft_model(model, LoraConfig(r=2, bias="all", target_modules="all-linear"))
    return model


@pytest.mark.parametrize("kind", ["llama", "bert", "bloom", "t5", "gpt2"])
@pytest.mark.parametrize("tuned", ["full", "lora"])
def test_the_groups_are_the_trainers(kind: str, tuned: str, tmp_path: Path) -> None:
    model = model_of(kind, tuned)
    args = TrainingArguments(str(tmp_path), learning_rate=3e-3, weight_decay=0.1, use_cpu=True, report_to=[])
    theirs = Trainer(model=model, args=args).create_optimizer()
    ours = make_optimizer(model, learning_rate=3e-3, weight_decay=0.1, eps=1e-8)
    assert type(ours) is type(theirs)
    filled = [group for group in theirs.param_groups if group["params"]]
    assert len(ours.param_groups) == len(filled) > 0
    for own, other in zip(ours.param_groups, filled, strict=True):
        assert [id(p) for p in own["params"]] == [id(p) for p in other["params"]]
        assert {k: v for k, v in own.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", None)])
@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.5])
def test_the_learning_rates_are_the_trainers(name: str, theirs: str | None, warmup: float, tmp_path: Path) -> None:
    steps = 37
    args = TrainingArguments(
        str(tmp_path),
        learning_rate=3e-3,
        lr_scheduler_type=theirs or "constant_with_warmup",
        warmup_steps=math.ceil(steps * warmup),
        use_cpu=True,
        report_to=[],
    )
    model = torch.nn.Linear(2, 2)
    trainer = Trainer(model=model, args=args)
    trainer.create_optimizer_and_scheduler(steps)
    assert trainer.lr_scheduler is not None and trainer.optimizer is not None
    optimizer = make_optimizer(model, learning_rate=3e-3, weight_decay=0.0, eps=1e-8)
    schedule = make_schedule(optimizer, name, warmup_fraction=warmup, steps=steps)
    for _ in range(steps):
        assert schedule.get_last_lr()[0] == trainer.lr_scheduler.get_last_lr()[0]
        for o, s in ((optimizer, schedule), (trainer.optimizer, trainer.lr_scheduler)):
            o.step()
            s.step()
