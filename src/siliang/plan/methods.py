"""The plan of a run by method: the methods in parallel, one record."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

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
from siliang.tasks import TASKS
from siliang.tasks.prepare import prepare_data
from siliang.types import ConfigError


def plan(
    config: RunConfig,
    device: Device,
    *,
    methods: Sequence[str] = (),
    with_data: bool = True,
    data: PreparedData | None = None,
    invented: Sequence[str] | None = None,
    base_config: Any = None,
    baseline: bool = False,
    timed: bool = True,
    mesh: DeviceMesh | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> PlanRecord:
    """What a run will take, by method.

    Args:
        methods: The methods to plan, each with its defaults; the config's own keeps its settings. None: its own alone.
        with_data: Read the data, for the batch that the run will really see; otherwise rows of max_length are taken.
        data: The run's data, where it has been read already.
        invented: Modules that the model's files lack, where these are known already.
        base_config: The base model's config, where it is known already.
        baseline: Plan also what PEFT with transformers.Trainer would need.
        timed: Measure the speed of a device that is here.
        mesh: The ranks among which the run is shared; the plan is of each.
        say: Takes a line about what is being done.

    Raises:
        ModelError: There is no such model, or its config is not whole.
        DataError: The data cannot be read.
        ConfigError: It is sharded by DeepSpeed, whose step does not run on fake tensors.
    """
    if mesh is not None and config.distributed.strategy == "deepspeed":
        raise ConfigError(
            Bilingual(
                "What each device holds under DeepSpeed is not planned. Plan strategy fsdp, which shards as "
                "much as its "
                "stage 3, or ddp.",
                "不预算 DeepSpeed 下每个设备的占用。请改为预算 strategy fsdp（与它的第 3 阶段分片相同）或 ddp。",
            )
        )
    data = data or prepare_data(config)
    base_config = base_config or model_config(config)
    task = TASKS[config.task]
    labels = data.labels if with_data else None
    if (outputs := task.model.columns(labels)) is not None:
        base_config.num_labels = outputs
    names = list(methods) or [config.method.name]
    ranks = mesh.size() if mesh is not None else 1
    configs = [config]
    if mesh is not None and config.distributed.strategy == "auto":  # sharding costs time: only where it must
        configs = [config.with_strategy("ddp"), config.with_strategy("fsdp")]
    new_tokens = len(config.data.add_tokens)
    if with_data and new_tokens:  # those that the tokenizer lacks, and for which the embeddings have no room
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
    # every method's batches are those of the first, which is packed if any is
    most = most_tokens(config.train.tokens_at_once, device.kind, device.precision.dtype)
    collator = StepCollator(PadCollator(0), task, config.train.batch_size, most)
    step = heaviest_step(config, data.train, collator, ranks) if with_data else synthetic_rows(config, ranks)
    step.windows = with_data and data.in_windows
    work = partial(
        plan_method,
        configs,
        device,
        make_run,
        step,
        baseline=baseline,
        thorough=len(names) == 1,
        distributed=mesh is not None,
    )
    found = list(_in_parallel(work, names, say))
    first = next((one for one in found if not one.error), None)
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
        batch_source="data" if with_data else "max_length",
        tokens_per_epoch=step.tokens_per_epoch,
        methods=found,
    )
    if timed:
        say(Bilingual("the speed of this device", "本机的速度"))
        add_times(record, device, base_config)
    say("")
    return record


def _in_parallel(
    work: Callable[[str], MethodPlan], names: Sequence[str], say: Callable[[str], None]
) -> Iterator[MethodPlan]:
    """A process for each core: fake tensors need Python alone. Fork, because everything is imported already, and
    nothing has computed in threads yet. A process that has begun to use CUDA cannot be forked: it plans one method
    after the other, which takes less time than to import everything in new processes."""
    workers = min(len(names), os.cpu_count() or 1)
    cannot_fork = "fork" not in multiprocessing.get_all_start_methods() or torch.cuda.is_initialized()
    if workers == 1 or cannot_fork:
        for name in names:
            say(name)
            yield work(name)
        return
    say(Bilingual(f"{len(names)} methods", f"{len(names)} 种方法"))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(work, names)


def _in_words(wanted: QuantizationConfig | None) -> str:
    if wanted is None:
        return "none"
    return f"{wanted.bits}-bit" + (f" {wanted.type}" if wanted.bits == 4 else "")
