"""Runs the phases of a run on fake tensors and counts their memory: training step, evaluation, generation, merge."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from transformers import DynamicCache, PreTrainedModel

from siliang.adapters.active_rows import trial_inputs
from siliang.config import TrainConfig
from siliang.data.batch import Batch
from siliang.distributed.sharding import reshard
from siliang.engine.step import Engine
from siliang.engine.wide_heads import heads_in_fp32
from siliang.hardware import Choice
from siliang.memory.track import Peak, Tracker
from siliang.models.introspect import cache_argument
from siliang.models.quantized import held_tensors
from siliang.ops.lora_linear import lora_linear_as
from siliang.peft_api.model import PeftModel
from siliang.plan.optimizer import make_planned_optimizer
from siliang.train.optimizer import state_tensors

Phase = Literal["loaded", "train", "evaluate", "generate", "merge"]
Model = PreTrainedModel | PeftModel
Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Measured:
    """The counts of a measurement.

    Attributes:
        peaks: The peak of each phase that the model has.
        flops: Floating-point operations of the forward and backward passes of the batches.
        layer_flops: Those of the layers' forward passes.
        tokens: Tokens of the batches, without padding.
        boundary_bytes: Size of a layer's input.
        layer_bytes: Activations of each layer, of the batch with the most.
        token_bytes: The same per token of a batch without padding.
    """

    peaks: dict[Phase, Peak] = field(default_factory=dict)
    flops: int = 0
    layer_flops: int = 0
    tokens: int = 0
    boundary_bytes: int = 0
    layer_bytes: tuple[int, ...] = ()
    token_bytes: float = 0.0


def measure(
    model: Model,
    engine: Engine,
    batches: list[Batch],
    precision: Choice,
    settings: TrainConfig,
    *,
    block_bytes: int = 1,
    phases: tuple[Phase, ...] = ("train",),
    step: Callable[[Model, list[Batch]], None] | None = None,
    in_buckets: bool = False,
) -> Measured:
    """Runs the phases of a prepared model; the tensors may be fake or real.

    An optimizer allocates its state in its first step. That step runs first, on gradients of zero, so that the counted
    step is like every later one.

    Args:
        batches: The batches of one optimizer step.
        settings: The training settings, which choose the optimizer.
        block_bytes: A tensor's size is rounded up to a multiple of it.
        step: Forward and backward of the batches; None for the engine's own.
        in_buckets: Count DDP's buckets, which hold the gradients once more.
    """
    autocast = partial(torch.autocast, "cpu", precision.dtype, enabled=precision.autocast)
    if step is None:
        weight = float(max(sum(batch.weight for batch in batches), 1))
        step = partial(_own_step, engine, weight, autocast)
    reshard(model)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    tracker = Tracker(block_bytes, vocabulary if engine.task.writes else None)
    trained = [p for p in model.parameters() if p.requires_grad]
    peaks: dict[Phase, Peak] = {}
    token_bytes, layer_bytes = 0.0, tuple[int, ...]()
    with tracker.tracking(model, list(engine.recompute.layers)):
        tracker.categorize((x for x in held_tensors(model)), "weights")
        if isinstance(model, PeftModel):  # weights that an adapter's start replaces, which are kept
            tracker.categorize(model.injection.attachments.parked_parameters(), "weights")
        tracker.categorize(trained, "trained" if isinstance(model, PeftModel) else "weights")
        for batch in batches:
            tracker.categorize(_tensors(batch), "workspace")
        peaks["loaded"] = tracker.peak()
        if "train" in phases:
            optimizer = make_planned_optimizer(model, settings, engine.task.model.heads)
            for p in trained:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
            tracker.categorize(state_tensors(optimizer), "optimizer")
            buckets = [torch.empty_like(p) for p in trained] if in_buckets else []
            tracker.categorize(buckets, "gradients")
            tracker.restart()
            model.train()
            tracker.counting = True
            step(model, batches)
            tracker.counting = False
            layer_bytes = tracker.layer_bytes
            token_bytes = tracker.boundary_bytes / max(batches[-1].distinct_tokens, 1)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            peaks["train"] = tracker.peak()
            del buckets
        model.eval()
        for phase, run in AFTER_TRAINING.items():
            if phase in phases:
                tracker.restart()
                with torch.no_grad():
                    if run(model, engine, batches, autocast):
                        peaks[phase] = tracker.peak()
    tokens = sum(batch.tokens for batch in batches)
    return Measured(
        peaks,
        flops=tracker.flops,
        layer_flops=tracker.layer_flops,
        tokens=tokens,
        boundary_bytes=tracker.boundary_bytes,
        layer_bytes=layer_bytes,
        token_bytes=token_bytes,
    )


def baseline_step(model: Model, batches: list[Batch]) -> None:
    """The step of transformers.Trainer on these batches: padded, with all logits, LoRA by PEFT's expression."""
    with lora_linear_as("peft"):
        for batch in batches:
            inputs: dict[str, object] = {**_more(model), **batch.inputs}
            if batch.targets is not None:
                inputs |= {"labels": inputs["input_ids"], "use_cache": False}
            model(**inputs).loss.backward()


def _own_step(
    engine: Engine,
    weight: float,
    autocast: Autocast,
    model: Model,
    batches: list[Batch],
) -> None:
    engine.run(model, batches, weight, autocast=autocast)


def _evaluate(model: Model, engine: Engine, batches: list[Batch], autocast: Autocast) -> bool:
    running = engine.loss if engine.task.step_loss is None else engine.values
    with heads_in_fp32(model, engine.task.model.heads), autocast(), running(model, batches[0]):
        pass
    return True


def _generate(model: Model, engine: Engine, batches: list[Batch], autocast: Autocast) -> bool:
    """Generates one token after each row of the batch, which is the peak of `generate`."""
    if not engine.task.writes or engine.task.has_encoder:
        return False
    rows = {name: x for name, x in batches[0].inputs.items() if name in ("input_ids", "attention_mask")}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with autocast():
        output = model(
            **_more(model), **rows, **{cache_argument(base): DynamicCache()}, use_cache=True, logits_to_keep=1
        )
    del output
    return True


def _more(model: Model) -> dict[str, int]:
    return trial_inputs(model.injection) if isinstance(model, PeftModel) else {}


def _merge(model: Model, engine: Engine, batches: list[Batch], autocast: Autocast) -> bool:
    if not isinstance(model, PeftModel) or not hasattr(model, "merge_adapter"):
        return False
    try:
        model.merge_adapter()
    except Exception:  # prompts and quantized bases cannot be merged in place
        return False
    model.unmerge_adapter()
    return True


# Each returns whether the model has the phase.
AFTER_TRAINING: dict[Phase, Callable[[Model, Engine, list[Batch], Autocast], bool]] = {
    "evaluate": _evaluate,
    "generate": _generate,
    "merge": _merge,
}


def _tensors(batch: Batch) -> list[torch.Tensor]:
    return [*batch.inputs.values(), *([] if batch.targets is None else [batch.targets])]
