"""The plan of a run: one record of all methods, which are planned in parallel."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig

from siliang.config import QuantizationConfig, RunConfig
from siliang.data.collate import PadCollator
from siliang.data.prepared import PreparedData
from siliang.engine.batches import StepCollator, most_tokens
from siliang.language import Bilingual
from siliang.models.load import find_invented
from siliang.plan.device import Device
from siliang.plan.fake_run import FakeRun
from siliang.plan.one_method import plan_method
from siliang.plan.rows import heaviest_step, synthetic_rows
from siliang.plan.shapes import model_config
from siliang.plan.speed import add_times
from siliang.records import MethodPlan, PlanRecord
from siliang.tasks import settled, task_of
from siliang.tasks.prepare import beginnings_note, prepare_data
from siliang.types import ConfigError


def plan(
    config: RunConfig,
    device: Device,
    *,
    methods: Sequence[str] = (),
    with_data: bool = True,
    data: PreparedData | None = None,
    invented: Sequence[str] | None = None,
    base_config: PretrainedConfig | None = None,
    baseline: bool = False,
    timed: bool = True,
    mesh: DeviceMesh | None = None,
    training_only: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> PlanRecord:
    """The memory and time of a run, by method.

    Args:
        methods: The methods to plan, each with its defaults; the config's own method keeps its settings. None: only the
            config's own.
        with_data: Read the data and plan the run's largest batch; otherwise rows of max_length.
        data: The run's data, if it has been read.
        invented: Modules that the model's files lack, if they are known.
        base_config: The base model's config, if it has been read.
        baseline: Plan PEFT with transformers.Trainer as well.
        timed: Measure the speed of a device that is here.
        mesh: The ranks of the run; the plan is for each of them.
        training_only: Leave out the peaks of what may follow a training: evaluation, generation, merging.
        say: Prints a line of progress.

    Raises:
        ModelError: There is no such model, or its config is incomplete.
        DataError: The data cannot be read.
        ConfigError: It is sharded by DeepSpeed, whose step does not run on fake tensors.
    """
    if mesh is not None and config.distributed.strategy == "deepspeed":
        raise ConfigError(
            Bilingual(
                "What each device holds under DeepSpeed is not planned. Plan strategy fsdp, which shards as "
                "much as its "
                "stage 3, or ddp.",
                "不预估 DeepSpeed 下每个设备的占用。请改为预估 strategy fsdp（与它的第 3 阶段分片相同）或 ddp。",
            )
        )
    if data is None:
        config, why = settled(config, with_data=with_data)
        data = prepare_data(config, why)
    base_config = base_config or model_config(config)
    task = task_of(config)
    labels = data.labels if with_data else None
    if (outputs := task.model.columns(labels)) is not None:
        base_config.num_labels = outputs
    names = list(methods) or [config.method.name]
    ranks = mesh.size() if mesh is not None else 1
    configs = [config]
    if mesh is not None and config.distributed.strategy == "auto":  # sharding costs time: only if DDP does not fit
        configs = [config.with_strategy("ddp"), config.with_strategy("fsdp")]
    new_tokens = len(config.data.add_tokens)
    if with_data and new_tokens:  # only those that the tokenizer lacks, beyond the rows of the embeddings
        new_tokens = max(len(data.tokenizer) - base_config.get_text_config().vocab_size, 0)
    if invented is None:
        invented = find_invented(config.model, task.model, labels, revision=config.revision) if with_data else []
    make_run = partial(
        FakeRun,
        base_config=base_config,
        device=device,
        new_tokens=new_tokens,
        invented=invented,
        mesh=mesh,
    )
    # all methods have the batches of the first one, which is packed if any is
    most = most_tokens(config.train.tokens_at_once, device.kind, device.precision.dtype)
    collator = StepCollator(PadCollator(0), task, config.train.batch_size, most)
    known = with_data and not config.data.streaming  # a stream may hold any row of max_length
    step = heaviest_step(config, data.train, collator, ranks, timed=timed) if known else synthetic_rows(config, ranks)
    if known and len(names) == 1 and not training_only:
        step.note = beginnings_note(config, data)
    step.windows = with_data and data.in_windows
    plan_one = partial(
        plan_method,
        configs,
        device,
        make_run,
        step,
        baseline=baseline,
        thorough=len(names) == 1,
        distributed=mesh is not None,
        training_only=training_only,
    )
    planned = list(_in_parallel(plan_one, names, say))
    first = next((one for one in planned if not one.error), None)
    record = PlanRecord(
        model=config.model,
        task=config.task.lower(),
        device=device.kind,
        devices=ranks,
        memory_bytes=device.memory_bytes,
        memory_source=device.memory_source,
        precision=device.precision.precision,
        quantization=_in_words(config.quantization),
        batch_rows=first.batch_rows if first else 0,
        batch_tokens=first.batch_tokens if first else 0,
        batch_source="data" if known else "max_length",
        tokens_per_epoch=step.tokens_per_epoch,
        methods=planned,
    )
    if timed:
        say(Bilingual("the speed of this device", "本机的速度"))
        add_times(record, device, base_config)
    say("")
    return record


def _in_parallel(
    plan_one: Callable[[str], MethodPlan], names: Sequence[str], say: Callable[[str], None]
) -> Iterator[MethodPlan]:
    """Plans the methods in one process per core, since fake tensors run in Python alone.

    The processes are forks, which have everything imported; no thread has computed yet. A process that uses CUDA cannot
    be forked. It plans one method after another, which is faster than to import everything in new processes.
    """
    workers = min(len(names), os.cpu_count() or 1)
    cannot_fork = "fork" not in multiprocessing.get_all_start_methods() or torch.cuda.is_initialized()
    if workers == 1 or cannot_fork:
        for name in names:
            say(name)
            yield plan_one(name)
        return
    say(Bilingual(f"{len(names)} methods", f"{len(names)} 种方法"))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(plan_one, names)


def _in_words(wanted: QuantizationConfig | None) -> str:
    if wanted is None:
        return "none"
    return f"{wanted.bits}-bit" + (f" {wanted.type}" if wanted.bits == 4 else "")
