"""What a run needs before its first step: data, model and method, checked, and the record that says what they are."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import set_seed

from siliang.capabilities import why_missing
from siliang.check import Subject, find, look_at, stop_on_errors
from siliang.config import RunConfig, differences
from siliang.data.hashes import joined, weights_sha256
from siliang.data.load import Examples
from siliang.data.prepared import EvalRows, has_unanswered
from siliang.data.tokens import TokenSet
from siliang.distributed.deepspeed import require_deepspeed
from siliang.distributed.ranks import Ranks, find_ranks
from siliang.distributed.sharding import fake_mesh, rank_mesh, shard
from siliang.engine.attach import attach
from siliang.files import absolute
from siliang.hardware import Choice, choose_precision, describe_device, find_device, machine, versions
from siliang.language import both, local
from siliang.memory.free import free_memory
from siliang.memory.peak import PeakMemory
from siliang.methods import Method, find_method
from siliang.models.own_code import code_of
from siliang.peft_api.model import PeftModel
from siliang.records import Counts, Predicted, Record, Rows, Seconds
from siliang.run_folder import changed_base, hashes, load_base, sources_of, weight_dtype
from siliang.tasks import TASKS
from siliang.tasks.prepare import prepare_data
from siliang.train.lines import say_data, say_model
from siliang.train.log import Progress
from siliang.train.optimizer import check_optimizer_runs
from siliang.train.resume import Begun
from siliang.train.start_adapter import find_start_adapter
from siliang.train.tracking import check_trackers
from siliang.types import ConfigError, ModelError, OutputError, nearest

# Looks at a run's config and data before its model is loaded, and says what it will take: the config, which may come
# back changed, and what it predicts. It is `plan.preflight.Planner`; plan/ knows this room, not the other way.
Planner = Callable[[RunConfig, Subject, Callable[[str], None], DeviceMesh | None], tuple[RunConfig, Predicted]]


@dataclass
class Listener:
    """Who hears of a run while it is trained; only the command prints.

    Attributes:
        say: One line about what is being done.
        progress: After every step.
        trained: With the trained model, when it has been measured and saved.
    """

    say: Callable[[str], None] = lambda line: None
    progress: Callable[[Progress], None] = lambda progress: None
    trained: Callable[[Run], None] = lambda run: None


@dataclass
class Run:
    """A run that is ready for its first step."""

    config: RunConfig
    listener: Listener
    folder: Path
    method: Method
    model: Any
    tokenizer: Any
    examples: Examples
    train_set: TokenSet
    eval_set: TokenSet
    precision: Choice
    record: Record
    ranks: Ranks
    device: torch.device

    @property
    def eval_rows(self) -> EvalRows:
        """The rows of evaluations."""
        examples = self.examples
        unanswered = self.record.unanswered or has_unanswered(examples.eval)
        step = self.config.train.rows_per_step
        return EvalRows(self.eval_set, examples.eval, examples.labels or [], unanswered=unanswered, step=step)

    @property
    def steps_per_epoch(self) -> int:
        return self.config.train.steps_per_epoch(len(self.train_set))

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.train.steps(len(self.train_set))

    @property
    def epochs(self) -> float:
        """Passes over the rows of the whole run."""
        t = self.config.train
        return t.max_steps / self.steps_per_epoch if t.max_steps else t.epochs

    @property
    def zero_stage(self) -> int:
        """Of DeepSpeed's ZeRO; 0 where it is not in use."""
        return zero_stage(self.config, self.ranks)

    def write_record(self) -> None:
        """Writes run.json, once, however many processes train."""
        if self.ranks.is_main:
            self.record.write(self.folder)


def zero_stage(config: RunConfig, ranks: Ranks) -> int:
    """Of DeepSpeed's ZeRO; 0 where it is not in use, as with a single process."""
    return config.distributed.stage if ranks.size > 1 else 0


def prepare(
    config: RunConfig,
    listener: Listener,
    folder: Path,
    *,
    base: Callable[..., Any] = load_base,
    planner: Planner | None = None,
    begun: Begun | None = None,
    force: bool = False,
) -> Run:
    """Data, model and method of a run, ready for its first step.

    Args:
        base: What gives the base model, called as `load_base` is.
        planner: Asked before the model is loaded.
        begun: What was made of the run already.
        force: The adapter to start from may be of another base model than this one.

    Raises:
        SiliangError: Something that the user can mend.
    """
    started = time.perf_counter()
    ranks, device = find_ranks(), find_device()
    check_trackers(config.train.trackers)
    asked, before = config, begun.record if begun else None
    config = _as_launched(config, ranks, listener)
    set_seed(config.train.seed)
    method = find_method(config.method.name)
    precision = choose_precision(config.train.precision, device)
    if zero_stage(config, ranks):
        require_deepspeed(device, half=precision.autocast)
    subject = _check(config, ranks, listener)
    data = subject.prepared
    start = _start(config, begun, force=force)
    say_data(data, listener.say)
    _check_best(config, len(data.eval))
    _check_patience(config, len(data.eval))
    if config.quantization and not method.config:
        raise ConfigError("quantization is for a base model that stays as it is: full fine-tuning needs all its bits.")
    predicted = Predicted()
    if planner is not None:
        with torch.random.fork_rng(devices=[]):
            config, predicted = _plan(planner, config, subject, ranks, listener)
    mesh = rank_mesh(device) if ranks.size > 1 and config.distributed.strategy == "fsdp" else None
    check_optimizer_runs(config.train, device, sharded=mesh is not None and method.config is None)
    _check_terms(method, sharded=mesh is not None or zero_stage(config, ranks) > 0)
    # one by one: the machine may not hold the whole model more than once
    with ranks.one_by_one() if mesh is not None else nullcontext(), PeakMemory(device) as loading:
        # what is saved names the base model by its whole path
        place = config.model_copy(update={"model": absolute(config.model)})
        model = base(place, data.examples.labels, data.tokenizer, dtype=weight_dtype(method, precision), device=device)
        model, trained, total = attach(model, method, config, precision, start=start)
        if mesh is not None:
            shard(model, mesh, device, trained_too=not isinstance(model, PeftModel))
            free_memory()
    if config.adapter and begun is None:
        listener.say(both(f"adapter    starts from {config.adapter}", f"适配器     从 {config.adapter} 开始训练"))
    say_model(config, method, precision, trained, total, device, listener.say)
    files, data_files = ranks.from_main(lambda: hashes(config))
    adjusted = differences(asked.model_dump(mode="json"), config.model_dump(mode="json"))
    examples, train_set, eval_set = data.examples, data.train, data.eval
    record = Record(
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        config=config.resolved().model_dump(mode="json"),
        adjusted={name: was for name, (was, _) in adjusted.items()} | (before.adjusted if before else {}),
        changed=list(before.changed) if before else [],
        seed=config.train.seed,
        versions=versions(),
        device=describe_device(device),
        precision=precision.precision,
        learning_rate=config.train.learning_rate or method.learning_rate,
        model_sha256=weights_sha256(config.model, files),
        model_files=files,
        code_sha256=code.sha256 if (code := code_of(model.config)) else None,
        data_sha256=joined(f.sha256 for f in data_files[: len(sources_of(config))]),
        data_files=data_files,
        adapter_sha256=_adapter_sha256(config, before),
        labels=examples.labels,
        layout=examples.layout,
        columns=examples.columns,
        unanswered=data.unanswered,
        parameters=Counts(trained=trained, total=total),
        rows=Rows(train=len(train_set), eval=len(eval_set), skipped=data.skipped, truncated=_truncated(train_set)),
        seconds=Seconds(load=round(time.perf_counter() - started, 3)),
    )
    memory = record.memory
    memory.loading_bytes, memory.predicted_loading_bytes = loading.peak_bytes, predicted.loading_bytes or None
    memory.predicted_bytes, memory.predicted_parts = predicted.peak_bytes, predicted.parts
    _check_space(folder, model, config)
    return Run(
        config,
        listener,
        folder,
        method,
        model,
        data.tokenizer,
        examples,
        train_set,
        eval_set,
        precision,
        record,
        ranks,
        device,
    )


def _as_launched(config: RunConfig, ranks: Ranks, listener: Listener) -> RunConfig:
    """With the strategy of an accelerate config, where the run itself leaves it open."""
    if not ranks.asked or config.distributed.strategy != "auto":
        return config
    strategy = ranks.asked["strategy"]
    listener.say(
        both(
            f"strategy   {strategy}, as accelerate's configuration says",
            f"并行策略   {strategy}（取自 accelerate 的配置）",
        )
    )
    values = config.model_dump(mode="json") | {"distributed": dict(ranks.asked)}
    return RunConfig.build(values, source="accelerate's configuration")


def _check(config: RunConfig, ranks: Ranks, listener: Listener) -> Subject:
    """The run's data, which `siliang check` has found no error in.

    Raises:
        CheckError: It has.
    """
    with ranks.main_first():
        subject = look_at(config, machine(), prepare_data(config))
        findings = find(subject, stop_early=True)
        stop_on_errors(findings)
    for finding in findings:
        listener.say(both("warning    ", "警告       ") + f"{finding.code} {finding.headline}")
    return subject


def _start(config: RunConfig, begun: Begun | None, *, force: bool) -> Path | None:
    """The adapter folder that the run starts from, or, where it is resumed, its own checkpoint.

    Raises:
        ModelError: The adapter was trained on another base model.
    """
    if config.adapter is None:
        return None
    if begun is not None and begun.checkpoint is not None:
        return begun.checkpoint
    found = find_start_adapter(config.adapter)
    was = found.record.model_files if found.record is not None else {}
    changed = changed_base(config.model, config.revision, was)
    if changed is not None and not force:
        raise ModelError(
            f"{config.model} is not the base model that {config.adapter} was trained on: {changed}.\n"
            "Name that one with --model, or go on all the same with --force."
        )
    return found.folder


def _adapter_sha256(config: RunConfig, before: Record | None) -> str | None:
    """Of the adapter that the run began with."""
    if config.adapter is None:
        return None
    return before.adapter_sha256 if before else find_start_adapter(config.adapter).sha256


def _truncated(tokens: TokenSet) -> int:
    """Entries that were cut."""
    return int((tokens.column("lost") > 0).sum())


def _plan(
    planner: Planner, config: RunConfig, subject: Subject, ranks: Ranks, listener: Listener
) -> tuple[RunConfig, Predicted]:
    """What the planner of rank 0 says."""
    if stage := zero_stage(config, ranks):
        listener.say(
            both(
                f"memory     what a rank takes under ZeRO-{stage} is not planned",
                f"内存       ZeRO-{stage} 下每个进程的用量不做预估",
            )
        )
        return config, Predicted()
    if ranks.size > 1 and (missing := why_missing("ranks that do not exist")) is not None:
        listener.say(both(f"memory     not planned: {missing}", f"内存       无法预估：{local(missing)}"))
        return config, Predicted()
    with fake_mesh(ranks.size) as mesh:
        return ranks.from_main(lambda: planner(config, subject, listener.say, mesh))


def _check_best(config: RunConfig, held_out: int) -> None:
    t, task = config.train, TASKS[config.task]
    allowed = ("loss", *(figure.name for figure in task.figures))
    if t.best is None:
        return
    if t.best not in allowed:
        raise ConfigError(
            f"train.best = {t.best!r} is not measured for {task.title}.{nearest(t.best, allowed)} "
            f"Allowed: {', '.join(allowed)}."
        )
    if missing := _missing_for_evaluations(config, held_out):
        raise ConfigError(f"train.best = {t.best!r} needs {missing}: it chooses among evaluations.")


def _check_patience(config: RunConfig, held_out: int) -> None:
    if config.train.patience and (missing := _missing_for_evaluations(config, held_out)):
        raise ConfigError(f"train.patience = {config.train.patience} needs {missing}: it counts evaluations.")


def _check_terms(method: Method, *, sharded: bool) -> None:
    """Refuses a term of the loss where its backward pass would be wrong: DeepSpeed's makes a step of its own."""
    if sharded and method.adds_to_the_loss:
        raise ConfigError(
            f"{method.name} adds a term to the loss, which FSDP and DeepSpeed do not support: set "
            "distributed.strategy=ddp."
        )


def _missing_for_evaluations(config: RunConfig, held_out: int) -> str | None:
    """What there is not, without which nothing is evaluated during training."""
    if not held_out:
        return "held-out rows (data.eval, or data.test_size)"
    return None if config.train.eval_every else "train.eval_every"


def _check_space(folder: Path, model: nn.Module, config: RunConfig) -> None:
    """Refuses to start where the checkpoints to come will not fit the disk."""
    need = config.train.disk_bytes(sum(p.numel() for p in model.parameters() if p.requires_grad))
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OutputError(
            f"{folder}: {free / 1e6:,.0f} MB are free on that disk, and the run needs {need / 1e6:,.0f} MB for its "
            "checkpoints.\nMake room, choose another disk with --output, or set train.keep=1."
        )
