"""The errors that end a run before its last step: what went wrong, where, and what to do."""

from __future__ import annotations

import torch

from siliang.check import RATE_FACTOR
from siliang.engine.step import Engine
from siliang.language import Bilingual
from siliang.run_folder import CHECKPOINTS, checkpoints
from siliang.terminal import shell_command
from siliang.train.guard import USELESS_STEPS, BadStep
from siliang.train.optimizer import OPTIMIZERS
from siliang.train.types import Run
from siliang.types import DeviceMemoryError, InterruptedRunError, TrainingError


def bad_step_error(run: Run, bad: BadStep) -> TrainingError:
    """For a loss or gradient that is non-finite or zero: which step, which rows, the likely cause, what is left."""
    saved = list(checkpoints(run.folder / CHECKPOINTS).values())
    every = run.config.train.save_every
    kept = (
        f"{saved[-1]} is kept"
        if saved
        else "no checkpoint was made: train.save_every" + (f" is {every:,}" if every else " is not set")
    )
    since = ""
    if bad.value == 0:
        over = run.record.steps and run.record.steps[-1].step < USELESS_STEPS  # the run is over, and was nothing else
        since = " in every step" if over else f" in {USELESS_STEPS} steps one after the other"
    return TrainingError(
        f"Step {bad.step:,}: the {bad.what} is {bad.value:g}{since}, in a batch of {_places(run, bad)}.\n"
        f"Likely {_cause(run, bad)}; {kept}."
    )


def _places(run: Run, bad: BadStep) -> str:
    """Files and lines of the step's first rows."""
    places = [run.examples.train.where(row).rpartition(":") for row in bad.rows[:3]]  # file, ":", line
    shown = ", ".join("".join(place[i > 0 and place[0] == places[0][0] :]) for i, place in enumerate(places))
    return shown + (f" and {len(bad.rows) - 3:,} more" if len(bad.rows) > 3 else "")


def _cause(run: Run, bad: BadStep) -> str:
    rate, default = run.record.learning_rate, run.method.learning_rate
    quantized = {f"{name}.weight" for name, m in run.model.named_modules() if hasattr(m, "quant_state")}
    frozen = (
        (n, p)
        for n, p in run.model.named_parameters()
        if not p.requires_grad and p.is_floating_point() and n not in quantized
    )
    if (broken := next((n for n, p in frozen if not torch.isfinite(p).all()), None)) is not None:
        return f"the base model's {broken} holds nan or inf. Load sound weights"
    if rate >= RATE_FACTOR * default:
        factor = f"{rate / default:,.3g}"
        return f"train.learning_rate = {rate:g} is {factor} times {run.method.name}'s own {default:g}. Lower it"
    if bad.value == 0:
        return "no label of these rows reaches what is trained. `siliang check` shows what is learned"
    if run.precision.compute == "fp16":
        return "fp16 ends at 65,504. Use train.precision=bf16 where the hardware has it, or fp32"
    return f"the steps are too large. Lower train.learning_rate = {rate:g}, or raise train.warmup_fraction"


def out_of_memory_error(run: Run, engine: Engine, step: int, tokens: int) -> DeviceMemoryError:
    """For a step that does not fit the device: what it took, and what to change.

    Args:
        step: From 1.
        tokens: Of the step's largest batch.
    """
    device, t = run.record.device, run.config.train
    held = sum(p.nbytes for p in run.model.parameters())
    trained = sum(p.nbytes for p in run.model.parameters() if p.requires_grad)
    optimizer = OPTIMIZERS[t.optimizer]
    taken = trained * (1 + optimizer.state_share)
    each = sum(engine.recompute.bytes_per_token)
    batch = f", a batch of {tokens:,} tokens" + (f" about {each * tokens / 1e9:,.2f} GB" if each else "")
    planned = sum(run.record.memory.predicted_parts.values())
    batch += f"; {planned / 1e9:,.2f} GB were planned in all" if planned else ""
    alone = run.ranks.size == 1
    ways = ["train.fit=true (smaller batches, the same result)"] if alone and not t.fit else []
    if not alone and t.batch_size > 1:  # in the middle of a step ranks cannot split it
        fewer = -(-t.batch_size // 2)
        more = t.gradient_accumulation * -(-t.batch_size // fewer)
        ways = [f"train.batch_size={fewer} with train.gradient_accumulation={more} (the same result)"]
    ways += [] if t.gradient_checkpointing or (t.fit and alone) else ["train.gradient_checkpointing=true"]
    ways += [f"data.max_length={run.config.data.max_length // 2}"]
    ways += [] if run.config.quantization or not run.method.freezes_the_base else ["quantization.bits=4"]
    return DeviceMemoryError(
        f"Step {step:,} does not fit the memory of this {device.kind} ({device.memory_bytes / 1e9:,.1f} GB): the "
        f"weights take {held / 1e9:,.2f} GB, gradients and {optimizer.title} {taken / 1e9:,.2f} GB{batch}.\n"
        f"Set {', or '.join(ways)}."
    )


def interrupted_error(run: Run, why: str, step: int, steps: int) -> InterruptedRunError:
    """For a run that was stopped by a signal or by train.max_time."""
    reason, reason_zh = (
        (": train.max_time is nearly over", "（train.max_time 即将用完）") if why == "out of time" else ("", "")
    )
    command = shell_command("siliang", "train", "--resume", run.folder)
    return InterruptedRunError(
        Bilingual(
            f"Stopped at step {step} of {steps}{reason}; that step is saved.\nGo on with: {command}",
            f"已停在第 {step} 步（共 {steps} 步）{reason_zh}，这一步已保存。\n继续训练：{command}",
        )
    )
