"""A trained run: found by its folder, checked against its record, and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from siliang.adapters.active_rows import active_rows, of_tasks
from siliang.config import RunConfig
from siliang.data.vocabulary import fit_embeddings, grow_vocabulary
from siliang.engine.kept import KeptEngine
from siliang.files import find_damage
from siliang.hardware import Choice
from siliang.language import Bilingual, local
from siliang.methods import Method, find_method
from siliang.methods.task_ids import TaskIds
from siliang.models.load import load_model
from siliang.models.tokenizers import load_tokenizer
from siliang.paths import check_links
from siliang.peft_api.model import PeftModel
from siliang.records import Record
from siliang.run_folder.changes import changed_base, changed_data
from siliang.run_folder.layout import read_config
from siliang.run_place import ADAPTER, CHECKPOINTS, CONFIG_NAME, MODEL, checkpoints, find_place
from siliang.run_settings import in_words, misplaced_settings
from siliang.secrets import shortened
from siliang.tasks import Task, task_of
from siliang.tasks.record import read_record
from siliang.terminal import shell_command
from siliang.types import ADAPTER_CONFIG, AdapterError, ConfigError, DataError, ModelError

FP32 = Choice("fp32", "as asked")


@dataclass(frozen=True)
class TrainedRun:
    """A trained run whose model is not loaded.

    Attributes:
        folder: The folder that was given: the run's, or that of a checkpoint in it, or of its adapter.
        run: The run's folder.
        weights: The adapter folder, or, after full fine-tuning, the model folder.
        config: The run's config, with the base model's present path.
        notes: Changes since training that `force` has accepted.
    """

    folder: Path
    run: Path
    weights: Path
    config: RunConfig
    record: Record
    force: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def has_adapter(self) -> bool:
        return (self.weights / ADAPTER_CONFIG).is_file()

    def check_base(self) -> None:
        """Checks that the base model's weights, config and tokenizer are those of the training.

        Raises:
            ModelError: The base model is missing or was replaced, and `force` is off.
        """
        model, was = self.config.model, self.record.model_files
        if Path(model).is_absolute() and not Path(model).is_dir():
            raise ModelError(
                Bilingual(
                    f"The base model of {self.folder} is missing: {model}. Give its present place with "
                    "--base FOLDER_OR_NAME.",
                    f"{self.folder} 的基座模型已不在原处：{model}。请用 --base 指明它的文件夹或名称。",
                )
            )
        if (changed := changed_base(model, self.config.revision, was)) is None:
            return
        problem = Bilingual(
            f"{model} is not the base model that {self.folder} was trained on: {changed}.",
            f"{model} 不是训练 {self.folder} 时的基座模型：{local(changed, 'zh')}。",
        )
        if not self.force:
            raise ModelError(
                Bilingual(
                    f"{problem}\nRestore that model, give its place with --base FOLDER_OR_NAME, or continue anyway "
                    "with --force.",
                    f"{problem.zh}\n请恢复原来的模型、用 --base 指明位置，或加 --force 继续。",
                )
            )
        if problem not in self.notes:
            self.notes.append(problem)

    def check_data(self) -> None:
        """Checks that the held-out rows are those of the training. A split depends on all rows.

        Raises:
            DataError: The data is missing or has changed, and `force` is off.
        """
        data = self.config.data
        read = data.eval_sources if data.eval_sources and data.validation_size is None else data.train_sources
        problem = changed_data([s.path for s in read], self.record.data_files)
        if problem is None:
            return
        if not self.force:
            raise DataError(
                Bilingual(
                    f"{problem} since {self.folder} was trained: its held-out rows have changed.\n"
                    "Measure other rows with --data FILE, or these anyway with --force.",
                    f"{self.folder} 训练之后，{local(problem, 'zh')}：验证集已不是原来的样本。\n"
                    "请用 --data FILE 评估其他样本，或加 --force 照样评估这些。",
                )
            )
        self.notes.append(
            Bilingual(f"{problem} since {self.folder} was trained", f"{self.folder} 训练之后，{local(problem, 'zh')}")
        )


@dataclass
class OpenedRun:
    """A trained run, ready to use: the model in eval mode, with its adapter.

    Attributes:
        trained: The run that was opened; None for a run in training.
        task_id: The task of what it is asked, for a method with several; None where the rows say it, or it has one.
        top: So many of the most probable classes are wanted in a prediction.
        min_confidence: Below it a prediction is "no label"; None: as in the run's settings.
        prompt_name: The prompt of texts that stand alone; None: as in the run's settings.
        engine: The engine of its last evaluation or prediction.
    """

    folder: Path
    config: RunConfig
    record: Record
    model: Any  # PeftModel or PreTrainedModel
    tokenizer: Any
    trained: TrainedRun | None = None
    precision: Choice = FP32  # of the computation
    task_id: int | None = None
    top: int = 1
    min_confidence: float | None = None
    prompt_name: str | None = None
    engine: KeptEngine = field(default_factory=KeptEngine, repr=False)

    @property
    def task(self) -> Task:
        """The task, with what the run's settings and its record say of it."""
        task, name = task_of(self.config, self.record.layout, self.record.classification), self.prompt_name
        return task if name is None or task.with_prompt is None else task.with_prompt(task, name)

    @property
    def labels(self) -> list[str]:
        return self.record.labels or []

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within the block the model computes as it did in training, without gradients."""
        with torch.no_grad(), autocast(self.precision, self.model.device), self.of_task():
            yield

    def of_task(self) -> AbstractContextManager[None]:
        """Within the block the model's rows are of `task_id`, unless they say another."""
        return of_tasks(self.model.injection, self.task_id) if isinstance(self.model, PeftModel) else nullcontext()

    @property
    def tasks(self) -> TaskIds | None:
        """What knows the tasks of a method with several; None for other methods."""
        found = active_rows(self.model.injection) if isinstance(self.model, PeftModel) else []
        return next((rows for rows in found if isinstance(rows, TaskIds) and rows.tasks > 1), None)

    def check_task(self) -> None:
        """
        Raises:
            ConfigError: The method has several tasks, and `task_id` is none of them.
        """
        known, task = self.tasks, self.task_id
        if known is None or (task is not None and 0 <= task < known.tasks):
            return
        given, given_zh = ("", "") if task is None else (f", and {task} is none of them", f"，其中没有 {task}")
        raise ConfigError(
            Bilingual(
                f"{self.folder} was trained on {known.tasks} tasks ({known.setting}), 0 to {known.tasks - 1}{given}: "
                "name the one that is meant with --task-id.",
                f"{self.folder} 训练了 {known.tasks} 个任务（{known.setting}），编号 0 到 {known.tasks - 1}{given_zh}："
                "请用 --task-id 指明任务。",
            )
        )


def autocast(precision: Choice, device: torch.device) -> torch.autocast:
    """The autocast context of a run of this precision."""
    return torch.autocast(device.type, precision.dtype, enabled=precision.autocast)


def weight_dtype(method: Method, precision: Choice) -> torch.dtype:
    """The dtype of the base model's weights: half precision if they are frozen; fp32 under autocast if they are
    trained."""
    return precision.dtype if precision.pure or method.freezes_the_base else torch.float32


def find_run(folder: Path, *, base: str | None = None, force: bool = False) -> TrainedRun:
    """A trained run by its folder, by one of its checkpoints, or by its adapter.

    Args:
        base: The base model's present place: a folder, or a name on the hub.
        force: Use the run even if its base model or its data have changed since its training.

    Raises:
        ConfigError: The folder is not a run, a link in it leads out, the run is not finished, or a setting in run.yaml
            differs from that of the training.
        ModelError: Its base model is missing or was replaced.
        AdapterError: Its adapter is damaged.
    """
    folder = Path(folder)
    run, weights = find_place(folder)
    check_links(run)
    config, record = read_config(run), read_record(run)
    resume = shell_command("siliang", "train", "--resume", run)
    weights = weights or next((run / part for part in (ADAPTER, MODEL) if (run / part).is_dir()), None)
    if weights is None:
        saved = list(checkpoints(run / CHECKPOINTS).values())
        instead, instead_zh = "", ""
        if saved:
            instead, instead_zh = f", or use its last checkpoint: {saved[-1]}", f"，或使用最后的检查点 {saved[-1]}"
        raise ConfigError(
            Bilingual(
                f"{run} is not finished (it is {record.status}): continue with `{resume}`{instead}.",
                f"{run} 没有训练完（状态为 {record.status}）：请用 `{resume}` 继续{instead_zh}。",
            )
        )
    if (problem := find_damage(weights)) is not None:
        raise AdapterError(
            Bilingual(
                f"{weights} is damaged: {problem}.\n"
                f"`{resume}` makes it again from the last undamaged checkpoint, if there is one.",
                f"{weights} 已损坏：{local(problem, 'zh')}。\n如果有完好的检查点，`{resume}` 会从最后一个重新生成它。",
            )
        )
    if changed := misplaced_settings(config, record):
        raise ConfigError(
            Bilingual(
                f"{run} was trained with another setting: {in_words(*next(iter(changed.items())))}. Restore it in "
                f"{run / CONFIG_NAME}: the change has no effect on a trained model.",
                f"{run} 训练时用的是另一个设置：{in_words(*next(iter(changed.items()))).zh}。"
                f"请在 {run / CONFIG_NAME} 中改回：改动不会影响训练好的模型。",
            )
        )
    if base is not None:
        config = config.model_copy(update={"model": base, "revision": None})
    trained = TrainedRun(folder, run, weights, config, record, force)
    if trained.has_adapter:
        trained.check_base()
    if any(f.path == config.data.template for f in record.data_files):
        problem = changed_data([config.data.template], record.data_files)
        if problem is not None and not force:
            raise DataError(
                Bilingual(
                    f"{problem} since {folder} was trained: restore it, or continue anyway with --force.",
                    f"{folder} 训练之后，{local(problem, 'zh')}：请恢复原样，或加 --force 继续。",
                )
            )
        trained.notes.extend([f"{problem} since {folder} was trained"] if problem else [])
    return trained


def open_run(
    folder: Path,
    *,
    base: str | None = None,
    force: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    quantized: bool = True,
) -> OpenedRun:
    """Opens a finished run, or a checkpoint of one.

    Args:
        base: The base model's present place: a folder, or a name on the hub.
        force: Open the run even if its base model has changed since its training.
        dtype: As for `open_trained`, like `device` and `quantized`.

    Raises:
        ConfigError: The folder is not a run, or the run is not finished.
        ModelError: Its base model is missing or was replaced.
        AdapterError: Its adapter is damaged.
    """
    return open_trained(find_run(folder, base=base, force=force), dtype=dtype, device=device, quantized=quantized)


def open_trained(
    trained: TrainedRun,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    quantized: bool = True,
) -> OpenedRun:
    """Loads the model and tokenizer of a run.

    Args:
        dtype: The dtype of all weights, for merging. None: the run's own precision, so that metrics and predictions are
            those of the training.
        quantized: Quantize the base model if it was quantized in training. False: load it in `dtype`, for merging.

    Raises:
        ModelError: Its base model is missing or was replaced.
        AdapterError: Its adapter is damaged.
    """
    tokenizer = load_run_tokenizer(trained)
    config, record = trained.config, trained.record
    precision = FP32 if dtype is not None else Choice(record.precision, "as in training")  # type: ignore[arg-type]
    dtype = dtype or weight_dtype(find_method(config.method.name), precision)
    if trained.has_adapter:
        base_model = load_base(config, record.labels, tokenizer, dtype=dtype, device=device, quantized=quantized)
        if not Path(config.model).is_dir():  # loading has fetched the files from the hub
            trained.check_base()
        model: Any = PeftModel.from_pretrained(base_model, trained.weights, is_trainable=precision.pure)
        if precision.pure:  # the adapter was trained in 16 bits
            for p in (p for p in model.parameters() if p.requires_grad):
                p.data = p.data.to(precision.dtype)
                p.requires_grad_(False)
    else:
        model = load_model(str(trained.weights), task_of(config).model, dtype=dtype, labels=record.labels)
    _check_finite(trained, model)
    if not (quantized and config.quantization):
        model.to(device or torch.device("cpu"))
    return OpenedRun(trained.folder, config, record, model.eval(), tokenizer, trained, precision)


def _check_finite(trained: TrainedRun, model: nn.Module) -> None:
    """Checks the trained weights: with a NaN, a model generates empty texts and its metrics mean nothing.

    Raises:
        AdapterError: A weight is not finite.
    """
    weights = model.adapter_state("default").items() if isinstance(model, PeftModel) else model.named_parameters()
    for name, tensor in weights:
        if tensor.is_floating_point() and not torch.isfinite(tensor.detach().sum(dtype=torch.float32)):
            raise AdapterError(
                Bilingual(
                    f"{trained.weights}: {shortened(name, 80)} is not finite (NaN or infinite): this model "
                    "cannot answer."
                    "\nUse an earlier checkpoint of the run, or train again with a lower learning rate.",
                    f"{trained.weights}：{shortened(name, 80)} 不是有限值（NaN 或无穷大）：这个模型无法回答。"
                    "\n"
                    "请用这次运行较早的检查点，或降低学习率重新训练。",
                )
            )


def load_run_tokenizer(trained: TrainedRun) -> Any:
    """The tokenizer of a run's base model; after full fine-tuning, the one saved with the model, if any."""
    config = trained.config
    if not trained.has_adapter and (trained.weights / "tokenizer_config.json").is_file():
        return load_tokenizer(str(trained.weights))
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    grow_vocabulary(tokenizer, config.data.add_tokens)
    return tokenizer


def load_base(
    config: RunConfig,
    labels: list[str] | None,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    quantized: bool = True,
    kept: torch.dtype | None = None,
) -> Any:
    """The run's base model, with its padding token set, and its embeddings grown by the run's new tokens."""
    model = load_model(
        config.model,
        task_of(config).model,
        dtype=dtype,
        labels=labels,
        revision=config.revision,
        seed=config.train.seed,
        quantization=config.quantization if quantized else None,
        shardable=config.distributed.strategy == "fsdp",
        device=device,
        kept=kept,
    )
    if config.data.add_tokens:
        fit_embeddings(model, tokenizer)
    if task_of(config).model.needs_padding_token:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model
