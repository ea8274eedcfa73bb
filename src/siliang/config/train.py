"""The settings of training: its length, its speed, the optimizer, checkpoints and limits."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, NewType

from pydantic import BeforeValidator, Field

from siliang.config.section import Section, Seed, as_names
from siliang.language import Bilingual, together
from siliang.types import ConfigError
from siliang.units import parse_bytes, parse_duration

Bytes = NewType("Bytes", int)  # written as 12GB
TrackerName = Literal["tensorboard", "wandb", "swanlab", "mlflow", "trackio"]
Seconds = NewType("Seconds", float)  # written as 8h

PROJECT = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"  # a project name that every tracker accepts


def _budget(value: object) -> object:
    """A memory size in bytes."""
    if value is None or value == "auto":
        return value
    try:
        found = parse_bytes(value) if isinstance(value, str) else value
    except ConfigError as error:
        raise ConfigError(together("train.memory_budget", Bilingual(": ", "："), error.text)) from None
    if isinstance(found, float) and found.is_integer():  # 4e9
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, int) or found <= 0:
        raise ConfigError(
            Bilingual(
                f"train.memory_budget = {value!r}: write it as 12GB or 800MB (a bare number is bytes), auto, or null.",
                f"train.memory_budget = {value!r}：应写成 12GB 或 800MB（只写数字则单位是字节）、auto 或 null。",
            )
        )
    return found


def _seconds(value: object) -> object:
    """A time in seconds."""
    if value is None:
        return value
    try:
        found = parse_duration(value) if isinstance(value, str) else value
    except ConfigError as error:
        raise ConfigError(together("train.max_time", Bilingual(": ", "："), error.text)) from None
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
        raise ConfigError(
            Bilingual(
                f"train.max_time = {value!r}: write it as 8h, 90m or 1:30:00 (a bare number is seconds).",
                f"train.max_time = {value!r}：应写成 8h、90m 或 1:30:00（只写数字则单位是秒）。",
            )
        )
    return float(found)


def _on_nan(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"stop|skip [1-9]\d{0,8}", value):
        raise ConfigError(
            Bilingual(
                f"train.on_nan = {value!r}: must be `stop`, or `skip` and a number of steps, as in `skip 5`.",
                f"train.on_nan = {value!r}：应为 `stop`，或 `skip` 加步数，如 `skip 5`。",
            )
        )
    return value


class TrainConfig(Section):
    """The length of training, its speed, the optimizer, checkpoints and limits."""

    epochs: Annotated[float, Field(gt=0, le=1e6)] = 3.0
    """Passes over the training rows.

    遍历训练样本的轮数。"""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; if set, `epochs` has no effect.

    优化器的步数；设置后 `epochs` 不起作用。"""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows that go through the model at once.

    一次送入模型的样本数。"""
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    """Batches per optimizer step, on all devices together. The number of devices does not change the result.

    累积多少个批次走一步优化器，所有设备合计。设备的个数不影响结果。"""
    tokens_at_once: Annotated[int, Field(ge=8)] | None = None
    """The maximum number of tokens that go through the model at once, in addition to batch_size. The rows of a step are
    split accordingly: this changes the memory, not the result. None: no limit on a GPU; on a CPU 4,096 tokens in bf16
    and 2,048 in fp32.

    除 batch_size 之外，一次送入模型的词元数上限。一步的样本据此拆分，只影响内存，不影响结果。None：GPU 上不限；CPU 上
    bf16 为 4,096 个词元，fp32 为 2,048 个。"""
    packing: bool = True
    """Run the model's layers without padding. The results are the same. Models that do not support it are padded.

    模型各层计算时不含填充。结果相同。不支持的模型仍使用填充。"""
    share_beginnings: bool = True
    """Compute what rows of a batch have in common at their beginning once: a system prompt, an instruction, the prompt
    of a pair of answers. The results are the same. For causal models that run without padding; with dropout only in
    evaluations. Texts that are generated at once share the beginning of their prompts.

    同一批次的样本开头相同时（系统提示、指令、一对回答的提示），相同的部分只计算一次。结果相同。用于不含填充计算的因果
    模型；有 dropout 时只用于评估。同时生成的文本共用提示的开头。"""
    group_by_length: bool | None = None
    """Give each step rows of similar length, with the steps in random order: less padding, or fewer attention sizes.
    None: on for seq_cls, reranker and question_ans, unless the labels depend on the length, so that a step would have
    nearly the same labels; the log says so. It is off for tasks with one loss per token, where grouping would give the
    tokens of short rows more weight.

    同一步的样本长度相近，步的顺序随机：填充更少，或注意力的尺寸种类更少。None：在 seq_cls、reranker
    和 question_ans 中开启；但若标签与长度有关，同一步的标签会几乎相同，则不开启，日志会写明。在逐词元计算损失的任务中关
    闭，因为分组会让短样本的词元权重变大。"""
    group_by_beginnings: bool = False
    """Give each step rows that begin alike, with the steps in random order, so that share_beginnings computes less: for
    data of several system prompts, passages with several questions, several answers to one prompt. The rows of a step
    are then no random sample, which changes what is learned. With group_by_length, those of similar length among
    them. `siliang check` and `siliang plan` say how much less is computed.

    同一步的样本开头相同，步的顺序随机，这样 share_beginnings 的计算更少：适用于有多种系统提示、一篇文章带多个问题、一个
    提示有多个回答的数据。这时一步的样本不再是随机抽取的，训练结果会不同。与 group_by_length 同用时，再从中取长度相近
    的。`siliang check` 和 `siliang plan` 会说明能少算多少。"""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate. None: the method's default (`siliang methods`).

    峰值学习率。None：该方法的默认值（`siliang methods`）。"""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "lion", "muon"] = "adamw"
    """adamw_8bit: AdamW with 8-bit moments (bitsandbytes). paged_adamw_8bit: the same, paged out when the GPU is full.
    adafactor: needs hardly any memory. lion: one moment; use a third to a tenth of AdamW's learning rate. muon: Muon
    for matrices, AdamW for embeddings, the output layer and all other parameters.

    adamw_8bit：AdamW，动量为 8 位（bitsandbytes）；paged_adamw_8bit：同上，显存用满时换出到内存。adafactor：几乎不占内
    存。lion：只有一个动量；学习率取 AdamW 的三分之一到十分之一。muon：矩阵用 Muon，嵌入、输出层和其余参数用 AdamW。"""
    schedule: Literal[
        "linear",
        "cosine",
        "constant",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "linear"
    """The learning rate schedule after the warm-up, with the names of transformers. cosine_with_min_lr ends at a tenth
    of the peak; warmup_stable_decay decays in the last tenth of the steps.

    预热之后学习率如何下降，名称与 transformers 相同。cosine_with_min_lr 降到峰值的十分之一为止；warmup_stable_decay 只
    在最后十分之一的步数里下降。"""
    loraplus_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA+: the ratio of the learning rate of LoRA's B to that of A. The paper uses 16.

    LoRA+：LoRA 中 B 与 A 的学习率之比。论文取 16。"""
    layerwise_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Layer-wise decay: the ratio of a layer's learning rate to that of the layer above, such as 0.9. The head has the
    peak learning rate.

    逐层衰减：每一层的学习率与上一层之比，如 0.9。任务头用峰值学习率。"""
    warmup_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.06
    """The share of the steps in which the learning rate rises from zero.

    学习率从零开始上升的步数占总步数的比例。"""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight decay of the optimizer.

    优化器的权重衰减。"""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Label smoothing in training: the share of each label that is spread over all classes or tokens, such as 0.1.
    Evaluations use the loss without it. Not for question_ans.

    训练时把每个标签的多大比例平均分给所有类别或词元，如 0.1；评估给出的仍是不加平滑的损失。不能用于 question_ans。"""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune: the size of the noise that is added to the embeddings in training; the paper uses 5 to 15. None: no
    noise. Not for seq_2_seq_lm.

    NEFTune：训练时给嵌入加上的噪声大小；论文取 5 到 15。None：不加。不能用于 seq_2_seq_lm。"""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient norm is clipped to this value.

    梯度裁剪：范数超过此值时按比例缩小到此值。"""
    precision: Literal["auto", "fp32", "bf16", "fp16", "pure-bf16", "pure-fp16"] = "auto"
    """The number format of the computation. auto: bf16 if the hardware supports it, fp16 on older GPUs, otherwise fp32.
    Trained parameters are kept in fp32, except with pure-. docs/precision.md lists the bytes of each format.

    计算所用的数值格式。auto：硬件支持时用 bf16，较旧的 GPU 用 fp16，其余用 fp32。可训练参数保持 fp32，pure- 除外。各种
    格式的字节数见 docs/precision.md。"""
    frozen_weights: Literal["auto", "converted"] = "auto"
    """The format of frozen weights where a CPU computes in fp32, and with BitFit and head in any precision. auto: large
    matrices that the model's files have in bf16 or fp16 stay so, in the mapped file, and are converted where they are
    multiplied: half of the memory, the same results, bit for bit. converted: all are converted to fp32 when they are
    loaded, which is a little faster.

    CPU 以 fp32 计算时（BitFit 和 head 为任何精度时）冻结权重的格式。auto：模型文件中为 bf16 或 fp16 的大矩阵保持原样，
    留在映射的文件里，相乘时才转换：内存减半，结果逐位相同。converted：加载时全部转换为 fp32，略快一些。"""
    memory_budget: Annotated[Bytes | Literal["auto"] | None, BeforeValidator(_budget)] = "auto"
    """The memory that training may use, such as 12GB. To stay below it, as many layers as necessary recompute their
    activations in the backward pass. auto: most of the free memory. null: no limit.

    训练可以占用的内存，如 12GB。为了不超过它，必要的那些层在反向传播时重新计算激活值，而不保存。auto：空闲内存的大部
    分。null：不限。"""
    keep_frozen: bool = True
    """Cache the outputs of frozen lower layers (layers_to_transform) without dropout. They are computed in the first
    epoch. The cache uses up to a quarter of the memory that memory_budget leaves, and then of the free disk.

    较低的层冻结（layers_to_transform）且没有 dropout 时，在第一轮算出它们对每条样本的输出并缓存。缓存先用 memory_budget
    所余内存的至多四分之一，再用至多四分之一的空闲磁盘。"""
    gradient_checkpointing: bool = False
    """All layers recompute their activations, even if the memory suffices: least memory, about a third more time.

    所有层都重新计算激活值，不论内存是否够用：内存最省，时间约多三分之一。"""
    seed: Seed = 42
    """The seed of all random numbers: data order, held-out rows, new weights, dropout.

    所有随机数的种子：数据顺序、验证集的划分、新建的权重、dropout。"""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between two lines of the log.

    每隔多少步写一行日志。"""
    trackers: Annotated[list[TrackerName], BeforeValidator(as_names)] = Field(default_factory=list)
    """Experiment trackers that receive the log: tensorboard, wandb, swanlab, mlflow, trackio. They write into
    `trackers` in the run's folder. Nothing is sent unless an environment variable names a server (docs/tracking.md).

    实时接收日志的实验跟踪工具：tensorboard、wandb、swanlab、mlflow、trackio。它们写入运行文件夹中的 `trackers`；除非
    环境变量指定了服务器，否则不向外发送任何内容（docs/tracking.md）。"""
    tracker_project: Annotated[str, Field(pattern=PROJECT)] = "siliang"
    """The project of the run in the trackers (MLflow's experiment). The run has the name of its folder.

    跟踪工具把运行归入的项目，在 MLflow 中是 experiment。运行以其文件夹命名。"""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two evaluations on the held-out rows. None: only at the end.

    每隔多少步在验证集上评估一次。None：只在结束时评估。"""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two checkpoints. None: only when interrupted.

    每隔多少步保存一个检查点。None：只在中断时保存。"""
    save_every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes between two checkpoints, in addition to save_every.

    除 save_every 之外，每隔多少分钟保存一个检查点。"""
    keep: Annotated[int, Field(ge=1)] = 2
    """The number of checkpoints to keep. Older ones are deleted, except the best one if `best` is set.

    保留的检查点个数。较旧的会删除，但设置了 `best` 时不删除最好的那一个。"""
    max_time: Annotated[Seconds | None, BeforeValidator(_seconds)] = None
    """The maximum wall-clock time of the run, loading included, such as 8h, 90m or 1:30:00. The run saves a checkpoint
    and stops before the time is over; --resume continues it.

    运行的时限，如 8h、90m 或 1:30:00，加载的时间也算在内。到时之前保存检查点并停止；用 --resume 继续。"""
    best: str | None = None
    """A metric of the held-out rows (loss, accuracy, f1, ...). The final weights are those of the step with its best
    value, among the evaluations of eval_every and the last step.

    验证集上的一个指标（loss、accuracy、f1 ……）。最后保留该指标最好的那一步的权重，在 eval_every 的各次评估和最后一步之
    中选取。"""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Early stopping: the run ends after this number of evaluations in a row without a new best value of `best`, or of
    the loss if `best` is not set. Needs eval_every.

    早停：连续这么多次评估都没有超过最好的一次时结束运行，按 `best` 比较，没有设置时按损失比较。需要设置 eval_every。"""
    on_nan: Annotated[str, BeforeValidator(_on_nan)] = "stop"
    """What to do at a step with a non-finite loss or gradient (NaN or infinite). stop: end the run. `skip 5`: skip up
    to 5 such steps.

    某一步的损失或梯度不是有限值（NaN 或无穷大）时：stop 是停止运行；`skip 5` 是最多跳过 5 个这样的步。"""
    fit: bool = False
    """If the run does not fit the memory, split its batches and recompute more instead of stopping. The result stays
    the same, except with a method that takes a mean over each batch (LILY, VeLoRA). With several devices this happens
    only before the first step, by the plan.

    运行放不下时，拆分批次并更多地重新计算，而不是停止。结果不变，但对每个批次取平均的方法（LILY、VeLoRA）除外。多个设备
    时只在第一步之前按预估进行。"""

    @property
    def rows_per_step(self) -> int:
        """Rows per optimizer step, on all devices together."""
        return self.batch_size * self.gradient_accumulation

    @property
    def saves(self) -> bool:
        """Whether checkpoints are saved during the run."""
        return bool(self.save_every or self.save_every_minutes or self.best)

    @property
    def nan_skips(self) -> int:
        """The number of steps with a non-finite loss or gradient that may be skipped."""
        return int(self.on_nan.removeprefix("skip")) if self.on_nan != "stop" else 0

    def steps_per_epoch(self, rows: int) -> int:
        """Optimizer steps of one pass over `rows` rows."""
        return math.ceil(rows / self.rows_per_step)

    def steps(self, rows: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps or math.ceil(self.steps_per_epoch(rows) * self.epochs)

    def disk_bytes(self, trained: int) -> int:
        """The bytes that a run writes: the adapter, and checkpoints with the weights and two Adam moments each.

        Args:
            trained: The number of trained parameters.
        """
        checkpoints = self.keep + 1 + bool(self.best) if self.saves else 1
        return 4 * trained * (1 + 3 * checkpoints) + 2**20
