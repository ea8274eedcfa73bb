"""The errors that end a run before its last step: what went wrong, where, and what to do."""

from __future__ import annotations

import torch

from siliang.check import RATE_FACTOR
from siliang.engine.splits import mixing, result_of_a_split
from siliang.engine.step import Engine
from siliang.language import Bilingual, local, together
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
    if saved:
        kept = Bilingual(f"{saved[-1]} is kept", f"已保留 {saved[-1]}")
    elif every:
        kept = Bilingual(
            f"no checkpoint was made: train.save_every is {every:,}", f"没有检查点：train.save_every 是 {every:,}"
        )
    else:
        kept = Bilingual("no checkpoint was made: train.save_every is not set", "没有检查点：没有设置 train.save_every")
    since = Bilingual("", "")
    if bad.value == 0:
        since = Bilingual(f" in {USELESS_STEPS} steps one after the other", f"，已连续 {USELESS_STEPS} 步")
        if run.record.steps and run.record.steps[-1].step < USELESS_STEPS:  # the run is over, and was nothing else
            since = Bilingual(" in every step", "，每一步都如此")
    places, cause = _places(run, bad), _cause(run, bad)
    what = Bilingual(bad.what, {"loss": "损失", "gradient": "梯度"}[bad.what])
    return TrainingError(
        Bilingual(
            f"Step {bad.step:,}: the {what} is {bad.value:g}{since}, in a batch of {places}.\nLikely {cause}; {kept}.",
            f"第 {bad.step:,} 步：{what.zh}为 {bad.value:g}{since.zh}，批次含 {places.zh}。\n"
            f"可能的原因：{cause.zh}；{kept.zh}。",
        )
    )


def _places(run: Run, bad: BadStep) -> Bilingual:
    """Files and lines of the step's first rows."""
    places = [run.where(row).rpartition(":") for row in bad.rows[:3]]  # file, ":", line
    shown = ", ".join("".join(place[i > 0 and place[0] == places[0][0] :]) for i, place in enumerate(places))
    if len(bad.rows) <= 3:
        return Bilingual(shown, shown)
    return Bilingual(f"{shown} and {len(bad.rows) - 3:,} more", f"{shown} 等 {len(bad.rows):,} 条样本")


def _cause(run: Run, bad: BadStep) -> Bilingual:
    rate, default = run.record.learning_rate, run.method.learning_rate
    quantized = {f"{name}.weight" for name, m in run.model.named_modules() if hasattr(m, "quant_state")}
    frozen = (
        (n, p)
        for n, p in run.model.named_parameters()
        if not p.requires_grad and p.is_floating_point() and n not in quantized
    )
    if (broken := next((n for n, p in frozen if not torch.isfinite(p).all()), None)) is not None:
        return Bilingual(
            f"the base model's {broken} holds nan or inf. Load sound weights",
            f"基座模型的 {broken} 含有 nan 或 inf。请加载完好的权重",
        )
    if rate >= RATE_FACTOR * default:
        factor = f"{rate / default:,.3g}"
        return Bilingual(
            f"train.learning_rate = {rate:g} is {factor} times {run.method.name}'s own {default:g}. Lower it",
            f"train.learning_rate = {rate:g} 是 {run.method.name} 默认值 {default:g} 的 {factor} 倍。请降低学习率",
        )
    if bad.value == 0:
        return Bilingual(
            "nothing of these rows reaches what is trained: they have no label, or all their texts are alike. `siliang "
            "check` shows what is learned",
            "这些样本没有一处传到所训练的参数：没有标签，或文本全都一样。`siliang check` 会显示学习哪些内容",
        )
    if run.precision.compute == "fp16":
        return Bilingual(
            "fp16 ends at 65,504. Use train.precision=bf16 where the hardware has it, or fp32",
            "fp16 最大只到 65,504。硬件支持时请用 train.precision=bf16，否则用 fp32",
        )
    return Bilingual(
        f"the steps are too large. Lower train.learning_rate = {rate:g}, or raise train.warmup_fraction",
        f"步子太大。请降低 train.learning_rate = {rate:g}，或增大 train.warmup_fraction",
    )


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
    about, about_zh = (
        (f" about {each * tokens / 1e9:,.2f} GB", f"约占 {each * tokens / 1e9:,.2f} GB") if each else ("", "")
    )
    batch: str = Bilingual(f", a batch of {tokens:,} tokens{about}", f"，{tokens:,} 个词元的批次{about_zh}")
    if planned := sum(run.record.memory.predicted_parts.values()):
        gb = f"{planned / 1e9:,.2f} GB"
        batch = together(batch, Bilingual(f"; {gb} were planned in all", f"；预估总共 {gb}"))
    alone, result = run.ranks.size == 1, result_of_a_split(mixing(run.model))
    ways: list[str] = []
    if alone and not t.fit:
        ways = [Bilingual(f"train.fit=true (smaller batches, {result})", f"train.fit=true（拆分批次，{result.zh}）")]
    if not alone and t.batch_size > 1:  # in the middle of a step ranks cannot split it
        fewer = -(-t.batch_size // 2)
        more = t.gradient_accumulation * -(-t.batch_size // fewer)
        both_set = f"train.batch_size={fewer}", f"train.gradient_accumulation={more}"
        ways = [Bilingual(f"{' with '.join(both_set)} ({result})", f"{' 和 '.join(both_set)}（{result.zh}）")]
    ways += [] if t.gradient_checkpointing or (t.fit and alone) else ["train.gradient_checkpointing=true"]
    ways += [f"data.max_length={run.config.data.max_length // 2}"]
    ways += [] if run.config.quantization or not run.method.freezes_the_base else ["quantization.bits=4"]
    ways_zh = [local(way, "zh") for way in ways]
    return DeviceMemoryError(
        Bilingual(
            f"Step {step:,} does not fit the memory of this {device.kind} ({device.memory_bytes / 1e9:,.1f} GB): the "
            f"weights take {held / 1e9:,.2f} GB, gradients and {optimizer.title} {taken / 1e9:,.2f} GB{batch}.\n"
            f"Set {', or '.join(ways)}.",
            f"第 {step:,} 步超出这台设备（{device.kind}）的内存 {device.memory_bytes / 1e9:,.1f} GB：权重占 "
            f"{held / 1e9:,.2f} GB，梯度和 {optimizer.title} 占 {taken / 1e9:,.2f} GB{local(batch, 'zh')}。\n"
            f"请设置 {'，或 '.join(ways_zh)}。",
        )
    )


def interrupted_error(run: Run, why: str, step: int, steps: int) -> InterruptedRunError:
    """For a run that was stopped by a signal or by train.max_time."""
    reason, reason_zh = (
        (": train.max_time is nearly over", "（train.max_time 即将用完）") if why == "out of time" else ("", "")
    )
    command = shell_command("siliang", "train", "--resume", run.folder)
    return InterruptedRunError(
        Bilingual(
            f"Stopped at step {step} of {steps}{reason}; that step is saved.\nResume with: {command}",
            f"已停在第 {step} 步（共 {steps} 步）{reason_zh}，这一步已保存。\n继续训练：{command}",
        )
    )
