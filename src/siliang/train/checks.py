"""What a run refuses before its model is loaded, and before its first step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from siliang.adapters.active_rows import active_rows
from siliang.config import EvaluationConfig, RunConfig, TrainConfig
from siliang.data.prepared import EvalRows, PreparedData
from siliang.data.task_column import TASK_IDS
from siliang.data.tokens import TokenSet
from siliang.distributed.ranks import Ranks
from siliang.engine.written import questions
from siliang.language import Bilingual, local
from siliang.methods import AnyMethod, Method
from siliang.methods.config import PeftConfig
from siliang.methods.lora_config import LoraConfig
from siliang.methods.task_ids import TaskIds, no_such_task
from siliang.peft_api.model import PeftModel
from siliang.tasks import Task, task_of
from siliang.tasks.measures import MEASURES, check_measures
from siliang.train.optimizer import rate_factors
from siliang.train.types import zero_stage
from siliang.types import ConfigError, OutputError, nearest


def check_quantization(config: RunConfig, method: Method) -> None:
    """Raises ConfigError where quantized weights would be trained, or changed by an initialization."""
    if config.quantization is None:
        return
    if (why := method.why_settings_not_quantized(config.method.arguments)) is not None:
        bits = config.quantization.bits
        raise ConfigError(
            Bilingual(f"quantization.bits = {bits}: {why}", f"不能设置 quantization.bits = {bits}：{local(why, 'zh')}")
        )


def check_evaluation(task: Task, config: RunConfig, ranks: Ranks) -> None:
    """Raises ConfigError where the metric of train.best, or a measure, cannot be measured."""
    check_best(config, task)
    check_measures(task, config)
    if task.measures and zero_stage(config, ranks) == 3:
        raise ConfigError(
            Bilingual(
                f"{', '.join(task.measures)}: with distributed.zero_stage = 3 no text can be written in training. Use "
                "distributed.strategy=fsdp, or a lower zero_stage.",
                f"{'、'.join(task.measures)}：distributed.zero_stage = 3 时，训练中不能生成文本。"
                "请用 distributed.strategy=fsdp，或较低的 zero_stage。",
            )
        )


def check_held_out(config: RunConfig, data: PreparedData) -> int:
    """The number of held-out rows for which texts are written at each evaluation.

    Raises:
        ConfigError: The metric of train.best is that of a class or tag that no held-out row has.
        DataError: Texts are to be measured, and no held-out row has an answer.
    """
    task = task_of(config, data.examples.layout)
    wanted = task.of_labels is not None and config.train.best is not None
    check_best(config, task, sorted({name for e in data.examples.eval for name in e.classes}) if wanted else None)
    if not task.measures or not len(data.eval):
        return 0
    rows = (config.evaluation or EvaluationConfig()).rows
    return len(questions(task, data.tokenizer, EvalRows(data.eval, data.examples.eval), rows))


def check_best(config: RunConfig, task: Task, labels: Sequence[str] | None = None) -> None:
    """Raises ConfigError where the metric of train.best is never measured.

    Args:
        labels: The classes or tags of the held-out rows. None: not known yet, so that the metrics of single ones pass.
    """
    best = config.train.best
    allowed = ["loss", *(metric.name for metric in task.metrics)]
    if task.of_labels is not None and labels is None:
        return
    allowed += [metric.name for metric in task.of_labels(labels or [])] if task.of_labels else []
    allowed += [name for name in MEASURES if name not in allowed] if task.question else []
    if best is not None and best not in allowed:
        raise ConfigError(
            Bilingual(
                f"train.best = {best!r} is not measured for {task.title}.{nearest(best, allowed)} "
                f"Allowed: {', '.join(allowed)}.",
                f"{task.title} 不测 train.best = {best!r}。{nearest(best, allowed).zh}可用：{'、'.join(allowed)}。",
            )
        )


def check_terms(method: AnyMethod, config: PeftConfig | None, *, sharded: bool) -> None:
    """Raises ConfigError where the backward pass of a method's loss term would be wrong: DeepSpeed's makes a step of
    its own; and where layers that are sharded apart share their weights.

    Args:
        config: The adapter's; None for full fine-tuning.
    """
    if sharded and getattr(config, "layer_replication", None):
        raise ConfigError(
            Bilingual(
                "layer_replication is not for FSDP and DeepSpeed, which shard each layer by itself: set "
                "distributed.strategy=ddp.",
                "layer_replication 不能用于 FSDP 和 DeepSpeed，它们逐层切分权重：请设置 distributed.strategy=ddp。",
            )
        )
    if sharded and config is not None and method.adds_to_the_loss(config):
        raise ConfigError(
            Bilingual(
                f"{method.name} adds a term to the loss, which FSDP and DeepSpeed do not support: set "
                "distributed.strategy=ddp.",
                f"{method.name} 在损失中加了一项，FSDP 和 DeepSpeed 不支持：请设置 distributed.strategy=ddp。",
            )
        )


def check_prefix(config: PeftConfig | None, stage: int) -> None:
    """Raises ConfigError for a prefix under ZeRO-3: with DeepSpeed 0.19.8 a run waits forever behind its third step.

    Args:
        config: The adapter's; None for full fine-tuning.
        stage: Of ZeRO.
    """
    if stage == 3 and config is not None and config.is_prefix:
        raise ConfigError(
            Bilingual(
                "distributed.zero_stage = 3: prefix tuning does not work with ZeRO-3. Use a lower zero_stage, or "
                "distributed.strategy=fsdp.",
                "distributed.zero_stage = 3：前缀微调不能与 ZeRO-3 一起使用。请用较低的 zero_stage，或 "
                "distributed.strategy=fsdp。",
            )
        )


def check_ranks(config: PeftConfig | None, ranks: int) -> None:
    """Raises ConfigError where each rank would keep something of its own first batch: a checkpoint has one rank's.

    Args:
        config: The adapter's; None for full fine-tuning.
    """
    velora = config.velora_config if isinstance(config, LoraConfig) else None
    if ranks > 1 and velora is not None and velora.init_type == "batch_average_once":
        raise ConfigError(
            Bilingual(
                "velora_config: init_type = 'batch_average_once' keeps the mean of the first batch, and each of "
                f"{ranks} ranks has another: use 'batch_average' or 'random', or one device.",
                "velora_config：init_type = 'batch_average_once' 保留第一个批次的平均值，"
                f"而 {ranks} 个进程的各不相同：请用 'batch_average' 或 'random'，或只用一个设备。",
            )
        )


def check_tasks(model: nn.Module, config: RunConfig, *sets: TokenSet) -> None:
    """Raises ConfigError where the method has several tasks and the data does not say which a row is of, or names
    others."""
    found = active_rows(model.injection) if isinstance(model, PeftModel) else []
    for tasks in (rows for rows in found if isinstance(rows, TaskIds)):
        if config.data.columns.task_id is None:
            if tasks.tasks > 1:
                raise ConfigError(
                    Bilingual(
                        f"method.{tasks.setting} = {tasks.tasks}, and nothing says which task a row is of: name the "
                        "data's column with data.columns.task_id.",
                        f"method.{tasks.setting} = {tasks.tasks}，却没有说明每条样本属于哪个任务："
                        "请用 data.columns.task_id 指定数据中的列。",
                    )
                )
            continue
        last = max(int(tokens.column(TASK_IDS).max(initial=0)) for tokens in sets)
        if last >= tasks.tasks:
            raise no_such_task(last, tasks.tasks, f"method.{tasks.setting}")


def check_loraplus(config: RunConfig, method: Method) -> None:
    """Raises ConfigError where the ratio of LoRA+ would change no learning rate."""
    ratio = config.train.loraplus_ratio
    made = method.config(**config.method.arguments) if method.config is not None else None
    trained = method.has_lora_factors and not (isinstance(made, LoraConfig) and made.initialization.frozen_b)
    if ratio is not None and not trained:
        raise ConfigError(
            Bilingual(
                f"train.loraplus_ratio = {ratio:g}: {method.name} has no B that would train faster; leave it out.",
                f"train.loraplus_ratio = {ratio:g}：{method.name} 没有可以用更高学习率的 B；请去掉。",
            )
        )


def check_layerwise(model: nn.Module, settings: TrainConfig, method: Method) -> None:
    """Raises ConfigError where train.layerwise_decay would change no learning rate.

    Args:
        model: With the method on it.
    """
    decay = settings.layerwise_decay
    if decay is None:
        return
    lowered = rate_factors(model, settings.model_copy(update={"loraplus_ratio": None}))
    if not any(p.requires_grad and name in lowered for name, p in model.named_parameters()):
        raise ConfigError(
            Bilingual(
                f"train.layerwise_decay = {decay:g}: what {method.name} trains is above all layers, at the peak rate; "
                "leave it out.",
                f"train.layerwise_decay = {decay:g}：{method.name} 训练的部分在所有层之上，都用最高学习率；请去掉。",
            )
        )


def check_space(folder: Path, model: nn.Module, config: RunConfig) -> None:
    """Raises OutputError where the disk has no room for the run's checkpoints."""
    need = config.train.disk_bytes(sum(p.numel() for p in model.parameters() if p.requires_grad))
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OutputError(
            Bilingual(
                f"{folder}: {free / 1e6:,.0f} MB are free on that disk, and the run needs {need / 1e6:,.0f} MB for its "
                "checkpoints.\nMake room, choose another disk with --output, or set train.keep=1.",
                f"{folder}：该磁盘剩余 {free / 1e6:,.0f} MB，而这次运行的检查点需要 {need / 1e6:,.0f} MB。"
                "\n"
                "请腾出空间、用 --output 换一个磁盘，或设置 train.keep=1。",
            )
        )
