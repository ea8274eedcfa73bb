"""Rules on precision, steps, learning rate and disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from siliang.check.finding import RATE_FACTOR, Problem
from siliang.check.input import CheckInput
from siliang.hardware import FP16_ADAM_EPS
from siliang.language import Bilingual, local
from siliang.methods import METHODS
from siliang.models.quantized import count_parameters
from siliang.types import ConfigError, ModelError, TargetError


def pure_fp16(s: CheckInput) -> Iterator[Problem]:
    """Everything in fp16.

    Cause: Adam divides by the root of the second moment plus 1e-8, and 1e-8 is 0 in fp16, whose smallest number is
    6e-8: the step is divided by zero. An eps of 1e-4 avoids that and costs stability. "Attempting to unscale FP16
    gradients" has the same cause.

    Fix: precision=auto keeps what is trained in fp32; use precision=bf16 where the hardware has it.

    全部使用 fp16

    原因：Adam 要除以二阶矩的平方根加 1e-8，而 fp16 的最小正数是 6e-8，1e-8 会变成 0，于是除以零。把 eps 提高到 1e-4 可
    以避免，但会损失稳定性。报错 "Attempting to unscale FP16 gradients" 也是同一个原因。

    办法：precision=auto 会让参与训练的参数保持 fp32；硬件支持时用 precision=bf16。
    """
    if s.config.train.precision == "pure-fp16":
        yield Problem(
            Bilingual(
                f"weights, gradients and Adam's moments are all fp16; eps is raised to {FP16_ADAM_EPS:g}",
                f"权重、梯度和 Adam 的矩全部是 fp16；eps 提高到 {FP16_ADAM_EPS:g}",
            )
        )


def emulated_precision(s: CheckInput) -> Iterator[Problem]:
    """A precision that this hardware emulates.

    Cause: Without arithmetic in a format, the processor converts to another one and back: fp16 on a CPU is several
    times slower than fp32. And on hardware with bf16, fp16 has a narrower range without any gain.

    Fix: precision=auto.

    硬件不直接支持这种精度

    原因：处理器不支持的运算要用其他格式来回转换：在 CPU 上 fp16 比 fp32 慢数倍。而在原生支持 bf16 的硬件上，fp16 数值范
    围更窄，没有任何好处。

    办法：使用 precision=auto。
    """
    wanted, machine = s.config.train.precision.removeprefix("pure-"), s.machine
    if wanted == "fp16" and machine.kind == "cpu":
        yield Problem(
            Bilingual("fp16 on a CPU is emulated, and slower than fp32", "CPU 上的 fp16 是模拟的，比 fp32 慢")
        )
    elif wanted == "bf16" and not machine.native_bf16:
        yield Problem(
            Bilingual(
                f"bf16 on this {machine.kind} is emulated, and slower than fp32",
                f"这个 {machine.kind} 上的 bf16 是模拟的，比 fp32 慢",
            )
        )
    elif wanted == "fp16" and machine.native_bf16:
        yield Problem(
            Bilingual(
                f"fp16 is used where this {machine.kind} has bf16, which needs no loss scaling and does not overflow",
                f"使用了 fp16，而这个 {machine.kind} 支持 bf16，后者不需要损失缩放，也不会溢出",
            )
        )


def wide_quantized_compute(s: CheckInput) -> Iterator[Problem]:
    """QLoRA that computes in fp32.

    Cause: Each 4-bit weight is converted to quantization.compute_dtype before it is multiplied, and fp32 is
    bitsandbytes' own default. On a GPU that leaves the tensor cores unused, and steps take minutes instead of seconds.

    Fix: quantization.compute_dtype=auto takes bf16, or fp16 on older GPUs.

    QLoRA 以 fp32 计算

    原因：每个 4 位权重在相乘之前先转换为 quantization.compute_dtype，而 bitsandbytes 的默认值是 fp32。在 GPU 上这样用不
    到 Tensor Core，每步从几秒变成几分钟。

    办法：quantization.compute_dtype=auto 会选用 bf16，较旧的 GPU 上选用 fp16。
    """
    wanted, machine = s.config.quantization, s.machine
    if (
        wanted
        and wanted.bits == 4
        and wanted.compute_dtype == "fp32"
        and (machine.native_bf16 or machine.kind == "cuda")
    ):
        native = "bf16" if machine.native_bf16 else "fp16"
        yield Problem(
            Bilingual(
                f"quantization.compute_dtype is fp32, and this {machine.kind} computes {native} several times faster",
                f"quantization.compute_dtype 是 fp32，而这个 {machine.kind} 计算 {native} 要快数倍",
            )
        )


def steps(s: CheckInput) -> Iterator[Problem]:
    """Steps and warm-up that do not fit the data.

    Cause: The learning rate rises for train.warmup_fraction of the steps, which may be most of a short run. With fewer
    steps than train.log_every the log shows nothing, and with a batch larger than the data an epoch is one step.

    Fix: More epochs, a smaller train.batch_size times train.gradient_accumulation, or a smaller warm-up.

    步数、预热与数据量不匹配

    原因：学习率在 train.warmup_fraction 占比的步数内上升；步数很少时，大部分训练都在预热。步数少于 train.log_every 时日
    志中什么也看不到；批次大于数据量时，一个 epoch 只有一步。

    办法：增加 epoch 数，减小 train.batch_size 与 train.gradient_accumulation 的乘积，或缩短预热。
    """
    t = s.config.train
    effective = t.rows_per_step
    if effective > len(s.train):
        yield Problem(
            Bilingual(
                f"one optimizer step takes {effective:,} rows, and there are {len(s.train):,}",
                f"优化器每步需要 {effective:,} 条样本，而总共只有 {len(s.train):,} 条",
            )
        )
    elif s.steps < t.log_every:
        yield Problem(
            Bilingual(
                f"the run has {s.steps:,} steps, fewer than between two lines of the log ({t.log_every:,})",
                f"训练共 {s.steps:,} 步，还不到两行日志之间的间隔（{t.log_every:,} 步）",
            )
        )
    if t.warmup_fraction > 0.5:
        share = 100 * t.warmup_fraction
        yield Problem(
            Bilingual(
                f"the learning rate rises for {share:.0f}% of the run, and is hardly ever at its full value",
                f"学习率有 {share:.0f}% 的步数都在上升，很少处于设定值",
            )
        )
    if t.save_every and t.save_every > s.steps:
        yield Problem(
            Bilingual(
                f"train.save_every = {t.save_every:,} is more than the run's {s.steps:,} steps: "
                "nothing is saved before the end",
                f"train.save_every = {t.save_every:,}，超过了总步数 {s.steps:,}：训练结束前不会保存检查点",
            )
        )


def learning_rate(s: CheckInput) -> Iterator[Problem]:
    """A learning rate for another method.

    Cause: The learning rates of the methods differ by orders of magnitude. Full fine-tuning at LoRA's rate collapses to
    the largest class; prompt tuning at LoRA's rate learns nothing with its few parameters.

    Fix: Leave train.learning_rate out, which uses the method's default (`siliang methods`), or stay within a factor of
    ten of it.

    学习率不适合这种方法

    原因：各种方法适用的学习率相差几个数量级。用 LoRA 的学习率做全参数微调，会退化为只预测最大的类别；用 LoRA 的学习率做
    提示微调，少量参数几乎学不到东西。

    办法：去掉 train.learning_rate，使用该方法的默认值（见 `siliang methods`），或与默认值相差不超过十倍。
    """
    rate, default = s.config.train.learning_rate, s.method.learning_rate
    if rate is None or max(rate / default, default / rate) < RATE_FACTOR * (1 - 1e-9):
        return
    near = min(METHODS.values(), key=lambda m: max(rate / m.learning_rate, m.learning_rate / rate))
    like, like_zh = "", ""
    if near is not s.method and near.learning_rate / rate < 3:
        like, like_zh = f"; {rate:g} is common for {near.name}", f"；{rate:g} 是 {near.name} 常用的学习率"
    source = s.method.learning_rate_source
    yield Problem(
        Bilingual(
            f"{rate:g} for {s.method.name}, whose default is {default:g} ({source}){like}",
            f"{s.method.name} 用了 {rate:g}，而它的默认值是 {default:g}（{local(source, 'zh')}）{like_zh}",
        )
    )


def disk(s: CheckInput) -> Iterator[Problem]:
    """The checkpoints will not fit the disk.

    Cause: Each checkpoint holds the trained weights and Adam's two moments of each. If the disk is full, the run ends
    while it writes a checkpoint.

    Fix: Make room, choose another disk with --output, or lower train.keep.

    磁盘放不下检查点

    原因：每个检查点包含训练的权重以及 Adam 的两个矩。磁盘写满时，训练会在写检查点的中途中止。

    办法：清理磁盘，用 --output 换一个磁盘，或减小 train.keep。
    """
    trained = _trained_parameters(s)
    if trained is None:
        return
    need = s.config.train.disk_bytes(trained)
    folder = Path(s.config.output).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        needed_mb, free_mb = need / 1e6, free / 1e6
        yield Problem(
            Bilingual(
                f"{needed_mb:,.0f} MB are needed in {folder}, and {free_mb:,.0f} MB are free on that disk",
                f"{folder} 需要 {needed_mb:,.0f} MB，而该磁盘只剩 {free_mb:,.0f} MB",
            )
        )


def _trained_parameters(s: CheckInput) -> int | None:
    try:
        if s.method.config is None:
            return count_parameters(s.skeleton())[1]
        return count_parameters(s.attached())[0]
    except (TargetError, ConfigError, ModelError):
        return None
