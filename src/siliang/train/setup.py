"""What a training runs on: the engine around its model, the collator of its batches, and accelerate."""

from __future__ import annotations

from functools import partial

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from siliang.data.collate import PadCollator
from siliang.data.row_beginnings import row_beginnings
from siliang.distributed import deepspeed
from siliang.distributed.sharding import ignore_frozen_in_ddp, is_sharded
from siliang.engine.batches import EVERYWHERE, SEPARATE, StepCollator, distinct_tokens, most_tokens
from siliang.engine.step import Engine
from siliang.language import Bilingual, local
from siliang.train.optimizer import OPTIMIZERS
from siliang.train.types import Run


def make_engine(run: Run) -> Engine:
    """The engine of the run's model, which is on its device then."""
    t, stage = run.config.train, run.zero_stage
    if stage == 3:
        deepspeed.gather_by_layer(run.model)
    elif run.ranks.size > 1 and not stage and not is_sharded(run.model):
        ignore_frozen_in_ddp(run.model)
    _move(run.model, run.device)
    engine = Engine(
        run.model,
        run.task,
        packing=t.packing,
        share=EVERYWHERE if t.share_beginnings else SEPARATE,
        memory_budget=t.memory_budget,
        checkpointing=t.gradient_checkpointing,
        # a rank's rows change, and a stream's may never come again
        keep_frozen=t.keep_frozen and run.epochs > 1 and run.ranks.size == 1 and run.stream is None,
        keep_reference=run.ranks.size == 1,
        frozen_tokens=partial(distinct_tokens, run.train_set),
        memory_share=1 / run.ranks.local_size,
        state_share=OPTIMIZERS[t.optimizer].state_share,
        label_smoothing=t.label_smoothing,
        neftune_alpha=t.neftune_alpha,
        gradients=stage != 3 and not is_sharded(run.model),
        all_logits="ZeRO-3 gathers its weights in its own forward alone" if stage == 3 else None,
    )
    for note in engine.notes:
        run.listener.say(f"           {local(note)}")
    if t.group_by_beginnings and (note := _without_effect(run, engine)) is not None:
        run.listener.say(f"           {local(note)}")
    run.model.config.use_cache = False  # keys and values of earlier tokens are of no use in training
    return engine


def _without_effect(run: Run, engine: Engine) -> Bilingual | None:
    """Why grouping by beginnings saves nothing; None if it does."""
    if not engine.shares.training:
        return Bilingual(
            "train.group_by_beginnings saves nothing: training computes each row by itself",
            "train.group_by_beginnings 不会减少计算：训练时每条样本各自计算",
        )
    if run.stream is None and not row_beginnings(run.train_set).worth:
        return Bilingual(
            "train.group_by_beginnings has no effect: the rows have too little in common at their beginning",
            "train.group_by_beginnings 不起作用：样本开头相同的部分太少",
        )
    return None


def make_collator(run: Run, engine: Engine) -> StepCollator:
    """Makes the batches of a step."""
    t = run.config.train
    return StepCollator(
        PadCollator(run.tokenizer.pad_token_id),
        run.task,
        t.batch_size,
        most_tokens(t.tokens_at_once, run.device.type, run.precision.dtype),
        packed=engine.padding is not None,
        shares=engine.shares,
    )


def make_accelerator(run: Run) -> Accelerator:
    """accelerate, for the run's device, number format and strategy.

    accelerate keeps its state for the whole process, in which another run may have had other settings.
    """
    half = run.precision.compute if run.precision.autocast else "no"
    if run.zero_stage:
        return Accelerator(mixed_precision=half, deepspeed_plugin=deepspeed.make_plugin(run.config, run.ranks.size))
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=half, cpu=run.device.type == "cpu")


def _move(model: nn.Module, device: torch.device) -> None:
    model.to(device)  # as of any module: transformers wraps its own `to` so that its type is lost
