"""One run, from config to record: data, model, method, steps, evaluation, files."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from siliang.capabilities import why_missing
from siliang.check import Subject, find, look_at, stop_on_errors
from siliang.config import RunConfig, differences
from siliang.data.collate import PadCollator
from siliang.data.hashes import joined, weights_sha256
from siliang.data.jinja import with_chat_template
from siliang.data.load import Examples
from siliang.data.prepared import EvalRows, has_unanswered
from siliang.data.tokens import TokenSet
from siliang.disk_errors import telling
from siliang.distributed.deepspeed import gather_by_layer, require_deepspeed, trainer_arguments
from siliang.distributed.ranks import Ranks, find_ranks, translate_rank_errors
from siliang.distributed.sharding import fake_mesh, ignore_frozen_in_ddp, is_sharded, rank_mesh, shard
from siliang.engine.attach import attach
from siliang.engine.batches import StepCollator, most_tokens
from siliang.engine.order import Order
from siliang.engine.step import Engine
from siliang.files import absolute, damage, remove_tree, replacing_folder
from siliang.hardware import Choice, choose_precision, describe_device, find_device, machine, versions
from siliang.memory.free import free_memory
from siliang.memory.peak import PeakMemory
from siliang.methods import Method, find_method
from siliang.models.own_code import code_of
from siliang.models.save import save_model
from siliang.peft_model import PeftModel
from siliang.records import Counts, Memory, Predicted, Record, Rows, Seconds
from siliang.run_folder import (
    ADAPTER,
    CHECKPOINTS,
    MODEL,
    changed_base,
    claim,
    hashes,
    load_base,
    sources_of,
    weight_dtype,
    write_config,
)
from siliang.start_adapter import find_start_adapter
from siliang.tasks import TASKS, Task
from siliang.tasks.prepare import prepare_data
from siliang.terminal import pasted
from siliang.train.endings import does_not_fit, interrupted, no_number
from siliang.train.resume import Begun, take_up
from siliang.train.saving import (
    adapter_together,
    checkpoints,
    is_dealt_out,
    read_weights,
    whole_weights,
)
from siliang.train.trainer import Handlers, SiliangTrainer
from siliang.train.watcher import Limits, Progress, Watcher, stopping_on_signal
from siliang.types import (
    ConfigError,
    InterruptedRunError,
    ModelError,
    OutputError,
    SiliangError,
    first_line,
    nearest,
)

SLOW_DISK_BYTES_PER_S = 50e6  # for a checkpoint before the first one was timed


# Looks at a run's config and data before its model is loaded, and tells what it will take: the config, which may come
# back changed, and what it predicts. It is `plan.preflight.Planner`; plan/ knows this room, not the other way.
Planner = Callable[[RunConfig, Subject, Callable[[str], None], DeviceMesh | None], tuple[RunConfig, Predicted]]


@dataclass
class Listener:
    """Who hears of a run while it goes on; only the command prints.

    Attributes:
        say: One line about what is being done.
        progress: After every step.
        trained: With the trained model, when it has been measured and saved.
    """

    say: Callable[[str], None] = lambda line: None
    progress: Callable[[Progress], None] = lambda progress: None
    trained: Callable[[Run], None] = lambda run: None


def train(
    config: RunConfig,
    listener: Listener | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    base: Callable[..., Any] = load_base,
    planner: Planner | None = None,
) -> Record:
    """Trains as `config` says and leaves a run folder.

    Args:
        resume: Go on from the last checkpoint in the output folder. A run that is finished is left as it is.
        force: Go on also where the base model or the data have changed since the run began.
        base: What gives the base model, called as `load_base` is, for whoever has it loaded already.
        planner: Asked before the model is loaded; None for no plan.

    Raises:
        SiliangError: Something that the user can mend; nothing is left behind then if no step was made.
        InterruptedRunError: Ctrl-C or SIGTERM came, or train.max_time is over; a checkpoint was saved.
    """
    started = time.monotonic()
    ranks = find_ranks()
    listener = listener or Listener()
    if not ranks.is_main:
        listener = Listener()
    folder = Path(config.output)
    begun: Begun | None = None
    if resume:
        begun = ranks.from_main(lambda: take_up(config, folder, listener.say, force=force))
        if begun.finished:
            assert begun.record is not None
            listener.say(f"finished   {folder} was finished before: {_steps_made(begun.record)}, nothing is left to do")
            return begun.record
        config = begun.config
    new = not resume and ranks.from_main(lambda: claim(folder, for_run=True))
    try:
        run = prepare(config, listener, folder, base=base, planner=planner, begun=begun, force=force)
        run.record.changed += begun.changed if begun else []
    except BaseException:
        if new and ranks.is_main:
            remove_tree(folder)
        raise
    try:
        with (
            telling(folder),
            translate_rank_errors(f"What was saved is whole: {pasted('siliang', 'train', '--resume', folder)}"),
        ):
            return _train(run, started, checkpoint=begun.checkpoint if begun else None)
    except InterruptedRunError:
        raise
    except BaseException as error:
        if not ranks.is_main:
            raise
        run.record.status, run.record.error = "failed", first_line(error, kind=True)
        _try_to_write(run.record, folder)
        if new and not checkpoints(folder / CHECKPOINTS) and isinstance(error, OSError | SiliangError):
            remove_tree(folder)
        raise


@dataclass
class Run:
    """What `prepare` has made ready."""

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

    @property
    def held_out(self) -> EvalRows:
        """The rows of evaluations."""
        examples = self.examples
        unanswered = self.record.unanswered or has_unanswered(examples.eval)
        return EvalRows(self.eval_set, examples.eval, examples.labels or [], unanswered=unanswered)

    def write_record(self) -> None:
        """Once, however many processes train."""
        if self.ranks.is_main:
            self.record.write(self.folder)


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
    ranks = find_ranks()
    asked, before = config, begun.record if begun else None
    config = _as_launched(config, ranks, listener)
    set_seed(config.train.seed)
    method = find_method(config.method.name)
    device = find_device()
    precision = choose_precision(config.train.precision, device)
    if _stage(config, ranks):
        require_deepspeed(device, half=precision.autocast)
    with ranks.main_first():
        data = prepare_data(config)
        subject = look_at(config, machine(), data)
        findings = find(subject, stop_early=True)
        stop_on_errors(findings)
    for finding in findings:
        listener.say(f"warning    {finding.code} {finding.title}: {finding.message}")
    start = _start(config, begun, force=force)
    sets = [data.train, data.eval]
    tokenizer, examples = data.tokenizer, data.examples
    truncated, skipped = int((sets[0].column("lost") > 0).sum()), data.skipped
    windowed = "" if sets[0].last_windows.all() else f" (windows of {len(examples.train):,})"
    listener.say(
        f"data       {len(sets[0]):,} rows to train on{windowed}, {len(sets[1]):,} held out"
        + (f", {len(skipped):,} skipped" if skipped else "")
        + (f", {truncated:,} cut to {config.data.max_length} tokens" if truncated else "")
    )
    listener.say(f"columns    {examples.says_columns}")
    for line in examples.notes:
        listener.say(f"           {line}")
    for line in skipped:
        listener.say(f"           skipped {line}")
    _check_best(config, len(sets[1]))
    if config.quantization and not method.config:
        raise ConfigError("quantization is for a base model that stays as it is: full fine-tuning needs all its bits.")
    predicted = Predicted()
    if planner is not None:
        with torch.random.fork_rng(devices=[]):
            config, predicted = _plan(planner, config, subject, ranks, listener)
    mesh = rank_mesh(device) if ranks.size > 1 and config.distributed.strategy == "fsdp" else None
    # in turn: the machine may not hold it whole more than once
    with ranks.one_by_one() if mesh is not None else nullcontext(), PeakMemory(device) as loading:
        # what is saved names the base model by its whole path
        place = config.model_copy(update={"model": absolute(config.model)})
        model = base(place, examples.labels, tokenizer, dtype=weight_dtype(method, precision), device=device)
        model, trained, total = attach(model, method, config, precision, start=start)
        if mesh is not None:
            shard(model, mesh, device, trained_too=not isinstance(model, PeftModel))
            free_memory()
    if config.adapter and begun is None:
        listener.say(f"adapter    starts from {config.adapter}")
    listener.say(
        f"model      {config.model}: {total:,} parameters, "
        f"{method.name} trains {trained:,} ({100 * trained / total:.3g}%)"
    )
    listener.say(f"precision  {precision.precision} ({precision.reason}), on {describe_device(device).name}")
    if precision.adam_eps != TrainingArguments.adam_epsilon:
        listener.say(
            f"           Adam's eps is {precision.adam_eps:g}, at some cost of stability: "
            f"the usual {TrainingArguments.adam_epsilon:g} is 0 in fp16, and would divide by zero"
        )
    files, data_files = ranks.from_main(lambda: hashes(config))
    adjusted = differences(asked.model_dump(mode="json"), config.model_dump(mode="json"))
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
        rows=Rows(train=len(sets[0]), eval=len(sets[1]), skipped=skipped, truncated=truncated),
        seconds=Seconds(load=round(time.perf_counter() - started, 3)),
    )
    memory = record.memory
    memory.loading_bytes, memory.predicted_loading_bytes = loading.peak_bytes, predicted.loading_bytes or None
    memory.predicted_bytes, memory.predicted_parts = predicted.peak_bytes, predicted.parts
    _check_space(folder, model, config)
    return Run(config, listener, folder, method, model, tokenizer, examples, sets[0], sets[1], precision, record, ranks)


def _start(config: RunConfig, begun: Begun | None, *, force: bool) -> Path | None:
    """The adapter folder that the run starts from, or, where it goes on, its own checkpoint.

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


def _steps_made(record: Record) -> str:
    made = record.steps[-1].step if record.steps else 0
    return f"{made:,} steps"


def _as_launched(config: RunConfig, ranks: Ranks, listener: Listener) -> RunConfig:
    """With the strategy of an accelerate config, where the run itself leaves it open."""
    if not ranks.asked or config.distributed.strategy != "auto":
        return config
    listener.say(f"strategy   {ranks.asked['strategy']}, as accelerate's configuration says")
    values = config.model_dump(mode="json") | {"distributed": dict(ranks.asked)}
    return RunConfig.build(values, source="accelerate's configuration")


def _plan(
    planner: Planner, config: RunConfig, subject: Subject, ranks: Ranks, listener: Listener
) -> tuple[RunConfig, Predicted]:
    """What the first rank's planner says."""
    if stage := _stage(config, ranks):
        listener.say(f"memory     what a rank takes under ZeRO-{stage} is not planned")
        return config, Predicted()
    if ranks.size > 1 and (missing := why_missing("ranks that do not exist")) is not None:
        listener.say(f"memory     not planned: {missing}")
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
    if not held_out or not t.eval_every:
        missing = "held-out rows (data.eval, or data.test_size)" if not held_out else "train.eval_every"
        raise ConfigError(f"train.best = {t.best!r} needs {missing}: it chooses among evaluations.")


def _train(run: Run, started: float, *, checkpoint: Path | None) -> Record:
    config, record, folder = run.config, run.record, run.folder
    t = config.train
    if run.ranks.is_main:
        write_config(folder, config.resolved())
    run.write_record()
    limits = Limits(
        save_every_s=t.save_every_minutes * 60 if t.save_every_minutes else None,
        stop_at=started + t.max_time if t.max_time else None,
        save_s=12 * record.parameters.trained / SLOW_DISK_BYTES_PER_S,
        best="loss" if t.best == "perplexity" else t.best,  # the same step is the best
    )
    with stopping_on_signal() as stop, PeakMemory(find_device(), sum(record.memory.predicted_parts.values())) as memory:
        watcher = Watcher(memory, run.listener.progress, stop, limits)
        trainer = make_trainer(run, watcher)
        watcher.watch(trainer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        record.seconds.train = round(watcher.train_s, 3)
        record.steps, record.tokens_trained = watcher.steps, trainer.tokens_trained
        record.passed_over = trainer.guard.passed_over
        record.memory.loaded_bytes = memory.start_bytes
        _measured(record.memory, memory)
        record.memory.recomputed_layers = trainer.engine.recompute.most
        if watcher.stopped and trainer.state.global_step < trainer.state.max_steps:
            interrupted(run, watcher.stopped, trainer.state.global_step, trainer.state.max_steps)
        if (trouble := trainer.guard.never_more_than_zero()) is not None:
            raise no_number(run, trouble)
        start = time.perf_counter()
        if len(run.eval_set):
            record.final = _final_metrics(_at_best(run, trainer, limits), TASKS[config.task])
            record.seconds.eval = round(time.perf_counter() - start, 3)
        _measured(record.memory, memory)
        if run.ranks.size > 1:
            record.memory.peak_bytes_by_rank = run.ranks.gather(record.memory.peak_bytes)
            record.memory.peak_bytes = max(record.memory.peak_bytes_by_rank)
    trainer.engine.close()
    if record.steps and record.steps[-1].loss is not None:
        record.final["train_loss"] = record.steps[-1].loss
    elif losses := [s.loss for s in record.steps if s.loss is not None]:
        record.final["train_loss"] = losses[-1]
    weights = whole_weights(run.model) if is_dealt_out(run.model) else None
    with adapter_together(run.model):
        record.parameters.adapter_bytes = run.ranks.from_main(lambda: _save(run, weights))
    run.listener.trained(run)
    record.status = "completed"
    run.write_record()
    return record


def _measured(found: Memory, memory: PeakMemory) -> None:
    found.steps_bytes = memory.update()
    found.peak_bytes = max(found.loading_bytes, found.steps_bytes)


def _at_best(run: Run, trainer: SiliangTrainer, limits: Limits) -> dict[str, float]:
    """The metrics at the end; where an earlier step was better and `best` is set, the model is as it was then."""
    state, best = trainer.state, limits.best
    before = state.best_metric
    metrics = trainer.metrics_now()
    if best is None:
        return metrics
    run.record.best_step = state.best_global_step
    if before is None or state.best_global_step is None or state.best_global_step == state.global_step:
        return metrics
    saved = checkpoints(run.folder / CHECKPOINTS).get(state.best_global_step)
    if saved is None or damage(saved) is not None:
        run.listener.say(
            f"warning    the checkpoint of step {state.best_global_step:,}, the best one, is gone or damaged: the last "
            "step is kept"
        )
        run.record.best_step = state.global_step
        return metrics
    read_weights(saved, run.model)
    metrics = trainer.evaluate()
    del run.record.steps[-1]  # the log has this evaluation already, at its own step
    return metrics


def make_trainer(run: Run, *callbacks: TrainerCallback) -> SiliangTrainer:
    """The trainer of a prepared run."""
    t, stage = run.config.train, _stage(run.config, run.ranks)
    if stage == 3:
        gather_by_layer(run.model)
    elif run.ranks.size > 1 and not stage and not is_sharded(run.model):
        ignore_frozen_in_ddp(run.model)
    run.model.to(find_device())
    engine = Engine(
        run.model,
        TASKS[run.config.task],
        packing=t.packing,
        memory_budget=t.memory_budget,
        checkpointing=t.gradient_checkpointing,
        keep_frozen=t.keep_frozen and _epochs(run) > 1 and run.ranks.size == 1,  # a rank's rows change
        memory_share=1 / run.ranks.local_size,
        all_logits="ZeRO-3 puts its weights together in its own forward alone" if stage == 3 else None,
    )
    for note in engine.notes:
        run.listener.say(f"           {note}")
    trainer = SiliangTrainer(
        model=run.model,
        args=_arguments(run, run.folder / CHECKPOINTS),
        train_dataset=run.train_set.number(),
        eval_dataset=run.eval_set if len(run.eval_set) else None,
        data_collator=StepCollator(
            PadCollator(run.tokenizer.pad_token_id),
            TASKS[run.config.task],
            t.batch_size,
            most_tokens(t.tokens_at_once, find_device().type, run.precision.dtype),
            packed=engine.padding is not None,
        ),
        engine=engine,
        order=Order.of(run.config, run.train_set.lengths.tolist()),
        ranks=run.ranks,
        held_out=run.held_out,
        callbacks=list(callbacks),
        handlers=Handlers(partial(no_number, run), partial(does_not_fit, run, engine), run.listener.say),
        skips=t.nan_skips,
        fit=t.fit,
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log as a dict; our listener says it better
    return trainer


def _stage(config: RunConfig, ranks: Ranks) -> int:
    """Of DeepSpeed's ZeRO; 0 where it is not at work, as with a single process."""
    return config.distributed.stage if ranks.size > 1 else 0


def _arguments(run: Run, checkpoints: Path) -> TrainingArguments:
    t, record = run.config.train, run.record
    has_eval = len(run.eval_set) > 0
    steps = t.max_steps or math.ceil(_steps_per_epoch(run) * t.epochs)
    of_zero: dict[str, Any] = trainer_arguments(run.config) if _stage(run.config, run.ranks) else {}
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=t.epochs,
        max_steps=t.max_steps or -1,
        per_device_train_batch_size=t.batch_size * t.gradient_accumulation,  # which the collator splits again
        per_device_eval_batch_size=t.batch_size,
        learning_rate=record.learning_rate,
        lr_scheduler_type=t.schedule if t.schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(steps * t.warmup_fraction),
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        bf16=run.precision.autocast and run.precision.compute == "bf16",
        fp16=run.precision.autocast and run.precision.compute == "fp16",
        adam_epsilon=run.precision.adam_eps,
        seed=t.seed,
        data_seed=t.seed,
        logging_steps=t.log_every,
        eval_strategy="steps" if t.eval_every and has_eval else "no",
        eval_steps=t.eval_every,
        save_strategy="steps" if t.save_every else "no",
        save_steps=t.save_every or 500,
        save_total_limit=t.keep,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=find_device().type == "cuda",
        ddp_find_unused_parameters=False,
        use_cpu=find_device().type == "cpu" and not of_zero,  # with which accelerate would leave DeepSpeed out
        **of_zero,
    )


def _steps_per_epoch(run: Run) -> int:
    return math.ceil(len(run.train_set) / (run.config.train.batch_size * run.config.train.gradient_accumulation))


def _epochs(run: Run) -> float:
    t = run.config.train
    return t.max_steps / _steps_per_epoch(run) if t.max_steps else t.epochs


def _final_metrics(metrics: dict[str, float], task: Task) -> dict[str, float]:
    """The last evaluation's figures, as the record names them."""
    named = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    final = {"eval_loss": named.pop("loss")} | named
    return final | task.of_loss(final["eval_loss"])


def _save(run: Run, weights: dict[str, Any] | None) -> int:
    """Writes the adapter, or the whole model, under a temporary name and then its own; returns its bytes."""
    final = run.folder / (ADAPTER if isinstance(run.model, PeftModel) else MODEL)
    with replacing_folder(final) as temporary:
        if final.name == ADAPTER:
            run.model.save_pretrained(temporary)
        else:
            tokenizer, data = run.tokenizer, run.config.data
            if TASKS[run.config.task].decoder_only:  # what serves it writes conversations as training did
                tokenizer, _ = with_chat_template(tokenizer, data.template, run.examples.layout)
            save_model(temporary, run.model, tokenizer, state_dict=weights)
    return sum(p.stat().st_size for p in final.rglob("*") if p.suffix == ".safetensors")


def _check_space(folder: Path, model: nn.Module, config: RunConfig) -> None:
    """Refuses to start where the checkpoints to come will not fit the disk: weights and two Adam moments each."""
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    copies = config.train.keep + 1 + bool(config.train.best) if config.train.saves else 1
    need, free = trained * (1 + 3 * copies) + 2**20, shutil.disk_usage(folder).free
    if free < need:
        raise OutputError(
            f"{folder}: {free / 1e6:,.0f} MB are free on that disk, and the run needs {need / 1e6:,.0f} MB for its "
            "checkpoints.\nMake room, choose another disk with --output, or set train.keep=1."
        )


def _try_to_write(record: Record, folder: Path) -> None:
    with suppress(OSError):  # OutputError is one too: the disk that failed the run
        record.write(folder)
