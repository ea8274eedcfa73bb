"""The preparation of a run, in order: check, start adapter, plan, load, attach, shard, record."""

from __future__ import annotations

import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from siliang.capabilities import why_missing
from siliang.check import CheckInput, find, gather_input, stop_on_errors
from siliang.config import RunConfig, differences
from siliang.data.hashes import joined, weights_sha256
from siliang.data.prepared import PreparedData
from siliang.data.vocabulary import token_ids
from siliang.distributed.deepspeed import require_deepspeed
from siliang.distributed.ranks import Ranks, find_ranks
from siliang.distributed.sharding import fake_mesh, rank_mesh, shard
from siliang.engine.attach import attach
from siliang.files import absolute
from siliang.hardware import Choice, Precision, choose_precision, describe_device, find_device, machine, versions
from siliang.language import Bilingual, both, local
from siliang.memory.free import free_memory
from siliang.memory.peak import PeakMemory
from siliang.methods import Method, find_method
from siliang.methods.config import PeftConfig
from siliang.models.own_code import code_of
from siliang.records import Counts, Device, Predicted, Record, Rows, Seconds
from siliang.run_folder import changed_base, hashes, kept_format, kept_weights, load_base, sources_of, weight_dtype
from siliang.tasks import settled, task_of
from siliang.tasks.labels.problems import begin
from siliang.tasks.prepare import prepare_data
from siliang.train.checks import (
    check_evaluation,
    check_held_out,
    check_layerwise,
    check_loraplus,
    check_prefix,
    check_quantization,
    check_ranks,
    check_space,
    check_tasks,
    check_terms,
)
from siliang.train.learned_initialization import Learner, check_whole, learns_initialization
from siliang.train.lines import say_data, say_model, say_order, say_texts
from siliang.train.optimizer import check_optimizer_runs
from siliang.train.resume import Resumed
from siliang.train.start_adapter import find_start_adapter
from siliang.train.tracking import check_trackers
from siliang.train.types import Base, Listener, Planner, Run, zero_stage
from siliang.types import ModelError


def prepare(
    config: RunConfig,
    listener: Listener,
    folder: Path,
    *,
    base: Base = load_base,
    planner: Planner | None = None,
    resumed: Resumed | None = None,
    force: bool = False,
) -> Run:
    """Checks, loads and records what a run needs before its first step.

    Args:
        base: Gives the base model; called as `load_base` is.
        planner: Plans the run before the model is loaded; None for no plan.
        resumed: What is known of the run, if it is resumed.
        force: Start also from an adapter of another base model than this one.

    Raises:
        SiliangError: Something that the user can correct.
    """
    started = time.perf_counter()
    ranks, device = find_ranks(), find_device()
    check_trackers(config.train.trackers)
    config, why = ranks.from_main(lambda: settled(config))
    given, config = config, _with_accelerate_strategy(config, ranks, listener)
    set_seed(config.train.seed)
    check_evaluation(task_of(config), config, ranks)
    method = find_method(config.method.name)
    check_quantization(config, method)
    precision = choose_precision(config.train.precision, device)
    if zero_stage(config, ranks):
        require_deepspeed(device, half=precision.autocast)
    subject = _check_data(config, ranks, listener, why)
    data = subject.prepared
    start = _start_folder(config, method, resumed, force=force)
    say_data(data, listener.say)
    say_order(config, data.train, listener.say)
    config = config if data.template is None else config.with_template(data.template)
    config.check_evaluations(held_out=len(data.eval) > 0)
    say_texts(config, check_held_out(config, data), len(data.eval), listener.say)
    check_loraplus(config, method)
    config, predicted = _plan(planner, config, subject, ranks, listener)
    mesh = rank_mesh(device) if ranks.size > 1 and config.distributed.strategy == "fsdp" else None
    check_optimizer_runs(config.train, device, sharded=mesh is not None and method.config is None)
    own = None if method.config is None else method.config(**config.method.arguments)
    own = own if start is None else PeftConfig.from_pretrained(start)
    check_terms(method, own, sharded=mesh is not None or zero_stage(config, ranks) > 0)
    check_prefix(own, zero_stage(config, ranks))
    check_ranks(own, ranks.size)
    check_whole(config, method, sharded=mesh is not None)
    if resumed is not None and resumed.record is not None and resumed.record.classification is not None:
        why = resumed.record.classification.why
    learned = begin(task_of(config), config, why, data.labels, data.train, len(data.eval))
    learner = Learner(config, method, task_of(config, data.examples.layout, learned), data, precision, device, ranks)
    # one by one: the machine may not hold the whole model more than once
    with ranks.one_by_one() if mesh is not None else nullcontext(), PeakMemory(device) as loading:
        model = _load(base, config, method, precision, data, device)
        added = token_ids(data.tokenizer, config.data.add_tokens)
        steps = config.train.steps(len(data.train))
        model, trained, total = attach(
            model, method, config, precision, start=start, new_tokens=added, steps=steps, learn=learner
        )
        check_layerwise(model, config.train, method)
        check_tasks(model, config, data.train, data.eval)
        if mesh is not None:
            _shard(model, mesh, device)
    if config.adapter and resumed is None:
        listener.say(both(f"adapter    starts from {config.adapter}", f"适配器     从 {config.adapter} 开始训练"))
    if learner.learned is not None:
        listener.say(learner.in_words())
    described, kept = describe_device(device), kept_weights(model)
    say_model(config, method, precision, trained, total, described.name, kept, listener.say)
    record = _record(
        config,
        given,
        resumed.record if resumed else None,
        data,
        model,
        ranks,
        device=described,
        precision=precision.precision,
        learning_rate=config.train.learning_rate or method.learning_rate,
        parameters=Counts(trained=trained, total=total),
    )
    record.classification = learned
    record.learned = learner.learned or (resumed.record.learned if resumed and resumed.record else None)
    record.seconds = Seconds(load=round(time.perf_counter() - started, 3))
    memory = record.memory
    memory.loading_bytes, memory.predicted_loading_bytes = loading.peak_bytes, predicted.loading_bytes or None
    memory.predicted_bytes, memory.predicted_parts = predicted.peak_bytes, predicted.parts
    memory.kept_weights = kept
    check_space(folder, model, config)
    return Run(
        config=config,
        listener=listener,
        folder=folder,
        method=method,
        model=model,
        tokenizer=data.tokenizer,
        examples=data.examples,
        train_set=data.train,
        eval_set=data.eval,
        precision=precision,
        record=record,
        ranks=ranks,
        device=device,
        stream=data.stream(config.train.rows_per_step),
    )


# ---- check ----


def _with_accelerate_strategy(config: RunConfig, ranks: Ranks, listener: Listener) -> RunConfig:
    """The config with the strategy of an accelerate config, if the run's own is `auto`."""
    if not ranks.accelerate_settings or config.distributed.strategy != "auto":
        return config
    strategy = ranks.accelerate_settings["strategy"]
    listener.say(
        both(
            f"strategy   {strategy}, as accelerate's configuration says",
            f"并行策略   {strategy}（取自 accelerate 的配置）",
        )
    )
    values = config.model_dump(mode="json") | {"distributed": dict(ranks.accelerate_settings)}
    return RunConfig.build(values, source="accelerate's configuration")


def _check_data(config: RunConfig, ranks: Ranks, listener: Listener, why: str) -> CheckInput:
    """The run's data, checked as by `siliang check`; its warnings are printed.

    Args:
        why: The labels were taken for what the settings say.

    Raises:
        DataError: An error was found.
    """
    with ranks.main_first():
        subject = gather_input(config, machine(), prepare_data(config, why))
        findings = find(subject, stop_early=True)
        stop_on_errors(findings)
    for finding in findings:
        listener.say(both("warning    ", "警告       ") + f"{finding.code} {finding.headline}")
    return subject


def _start_folder(config: RunConfig, method: Method, resumed: Resumed | None, *, force: bool) -> Path | None:
    """The adapter folder that the run starts from; of a resumed run, its own checkpoint, so that what it was started
    from is not read, or learned, again.

    Raises:
        ModelError: The adapter was trained on another base model.
    """
    if resumed is not None and resumed.checkpoint is not None:
        return resumed.checkpoint if config.adapter is not None or learns_initialization(config, method) else None
    if config.adapter is None:
        return None
    found = find_start_adapter(config.adapter)
    was = found.record.model_files if found.record is not None else {}
    changed = changed_base(config.model, config.revision, was)
    if changed is not None and not force:
        raise ModelError(
            Bilingual(
                f"{config.model} is not the base model that {config.adapter} was trained on: {changed}.\n"
                "Name that one with --model, or continue with --force.",
                f"{config.model} 不是训练 {config.adapter} 时的基座模型：{local(changed, 'zh')}。\n"
                "请用 --model 指明那个模型，或加 --force 继续。",
            )
        )
    return found.folder


# ---- plan ----


def _plan(
    planner: Planner | None, config: RunConfig, subject: CheckInput, ranks: Ranks, listener: Listener
) -> tuple[RunConfig, Predicted]:
    """What the planner of rank 0 returns. It does not change the random state."""
    if planner is None:
        return config, Predicted()
    if stage := zero_stage(config, ranks):
        listener.say(
            both(
                f"memory     what a rank takes under ZeRO-{stage} is not planned",
                f"内存       ZeRO-{stage} 下每个进程的用量不做预估",
            )
        )
        return config, Predicted()
    if ranks.size > 1 and (missing := why_missing("fake process groups")) is not None:
        listener.say(both(f"memory     not planned: {missing}", f"内存       无法预估：{local(missing)}"))
        return config, Predicted()
    with torch.random.fork_rng(devices=[]), fake_mesh(ranks.size) as mesh:
        return ranks.from_main(lambda: planner(config, subject, listener.say, mesh))


# ---- load, attach, shard ----


def _load(
    base: Base, config: RunConfig, method: Method, precision: Choice, data: PreparedData, device: torch.device
) -> PreTrainedModel:
    """The base model. What is saved later names it by its absolute path."""
    absolute_config = config.model_copy(update={"model": absolute(config.model)})
    dtype = weight_dtype(method, precision)
    kept = kept_format(config, method, dtype, device.type)
    return base(absolute_config, data.examples.labels, data.tokenizer, dtype=dtype, device=device, kept=kept)


def _shard(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Shards the model over the ranks (FSDP2)."""
    shard(model, mesh, device)
    free_memory()


# ---- record ----


def _record(
    config: RunConfig,
    given: RunConfig,
    before: Record | None,
    data: PreparedData,
    model: nn.Module,
    ranks: Ranks,
    *,
    device: Device,
    precision: Precision,
    learning_rate: float,
    parameters: Counts,
) -> Record:
    """The run's record before its first step.

    Args:
        config: As the run uses it.
        given: As the user gave it.
        before: The record of the run that is resumed.
    """
    files, data_files = ranks.from_main(lambda: hashes(config))
    adjusted = differences(given.model_dump(mode="json"), config.model_dump(mode="json"))
    examples, code, t = data.examples, code_of(model.config), config.train
    rows = t.steps(len(data.train)) * t.rows_per_step if config.data.streaming else len(data.train)
    return Record(
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        config=config.resolved().model_dump(mode="json"),
        adjusted={name: was for name, (was, _) in adjusted.items()} | (before.adjusted if before else {}),
        changed=list(before.changed) if before else [],
        seed=config.train.seed,
        versions=versions(),
        device=device,
        precision=precision,
        learning_rate=learning_rate,
        model_sha256=weights_sha256(config.model, files),
        model_files=files,
        code_sha256=code.sha256 if code else None,
        data_sha256=joined(f.sha256 for f in data_files[: len(sources_of(config))]),
        data_files=data_files,
        adapter_sha256=_adapter_sha256(config, before),
        labels=examples.labels,
        layout=examples.layout,
        columns=examples.columns,
        more_layouts={name: columns for name, columns in examples.layouts.items() if name != examples.layout},
        unanswered=data.unanswered,
        parameters=parameters,
        rows=Rows(train=rows, eval=len(data.eval), skipped=data.skipped, truncated=data.train.truncated),
    )


def _adapter_sha256(config: RunConfig, before: Record | None) -> str | None:
    """The hash of the adapter that the run starts from."""
    if config.adapter is None:
        return None
    return before.adapter_sha256 if before else find_start_adapter(config.adapter).sha256
