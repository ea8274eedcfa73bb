"""The memory plan: the run's own training step on fake tensors, before anything is loaded, and what to change so that
it fits."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from siliang.config import MethodConfig, QuantizationConfig, RunConfig
from siliang.data.collate import PadCollator
from siliang.data.prepared import PreparedData
from siliang.engine.batches import StepCollator, most_tokens
from siliang.language import Bilingual
from siliang.methods import find_method
from siliang.models.base_config import load_config
from siliang.models.load import find_invented
from siliang.plan.device import EFFICIENCY, Device, find_target, measure_flops
from siliang.plan.fake_run import Baseline, FakeRun
from siliang.plan.fit import MemoryLimit, find_fit
from siliang.plan.rows import StepRows, heaviest, synthetic_rows
from siliang.plan.shapes import SHAPES
from siliang.plan.steps import Measured, Phase
from siliang.records import Change, Fit, MethodPlan, PlanRecord
from siliang.tasks import TASKS
from siliang.tasks.prepare import prepare_data
from siliang.types import ConfigError, SiliangError, first_line

PHASES: tuple[Phase, ...] = ("train", "evaluate", "generate", "merge")


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
            "What each device holds under DeepSpeed is not planned. Plan strategy fsdp, which shards as much as its "
            "stage 3, or ddp."
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
    step = heaviest(config, data.train, collator, ranks) if with_data else synthetic_rows(config, ranks)
    step.windows = with_data and data.in_windows
    work = partial(
        _plan_one,
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
        _add_times(record, device, base_config)
    say("")
    return record


def model_config(config: RunConfig) -> Any:
    """The base model's config: of its folder, of the hub, or of the table of shapes.

    Raises:
        ModelError: There is none.
    """
    shape = SHAPES.get(config.model)
    return shape.config() if shape else load_config(config.model, revision=config.revision)


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


def _plan_one(
    configs: Sequence[RunConfig],
    device: Device,
    make_run: Callable[..., FakeRun],
    step: StepRows,
    name: str,
    **how: bool,
) -> MethodPlan:
    """The first of these that fits, or the last."""
    *others, last = configs
    for config in others:
        one = _plan_as(config, device, partial(make_run, config), step, name, **how, proposing=False)
        if one.fits is not False:
            return one
    return _plan_as(last, device, partial(make_run, last), step, name, **how, proposing=True)


def _plan_as(
    config: RunConfig,
    device: Device,
    make_run: Callable[..., FakeRun],
    step: StepRows,
    name: str,
    *,
    baseline: bool,
    thorough: bool,
    distributed: bool,
    proposing: bool,
) -> MethodPlan:
    own = name == config.method.name
    method = config.method if own else MethodConfig(name=name)
    found = find_method(name)
    # a method that trains the base itself has no quantized base
    bits = config.quantization if found.config is not None else None
    try:
        fake_run = make_run(method=method, quantization=bits)
        step = replace(step, rows=fake_run.shortened(step.rows, longest=step.longest))
        batches = fake_run.batches(step.rows)
        always = fake_run.layers if config.train.gradient_checkpointing else 0
        phases = PHASES[:2] if distributed else PHASES  # one process alone generates and merges
        measured = fake_run.measure(batches, recomputed=always, phases=phases if thorough else PHASES[:1])
    except SiliangError as error:
        return MethodPlan(method=name, error=error.text)
    except Exception as error:  # whatever a model of any kind does when its tensors have no values
        return MethodPlan(method=name, error=f"not planned: {first_line(error, kind=True)}")
    beside, peak, on_host = device.overhead_bytes, measured.peaks["train"], fake_run.loads_on_host
    one = MethodPlan(
        method=name,
        strategy=config.distributed.strategy if distributed else None,  # type: ignore[arg-type]
        trained=fake_run.trained,
        total=fake_run.total,
        adapter_bytes=fake_run.adapter_bytes,
        loaded_bytes=measured.peaks["loaded"].nbytes,
        overhead_bytes=beside,
        loading_bytes=device.beside_bytes + (measured.peaks["loaded"].nbytes if on_host else fake_run.loading_bytes),
        host_bytes=device.host_bytes + (fake_run.loading_bytes if on_host else 0),
        layers=fake_run.layers,
        recomputed_layers=always,
        batch_rows=len(batches[0].lengths),
        batch_tokens=fake_run.collator().cost_of(batches[0].lengths),
        flops_per_token=measured.flops / max(measured.tokens, 1),
        notes=list(fake_run.notes),
        evaluate_bytes=_bytes_of(measured, "evaluate", beside),
        generate_bytes=_bytes_of(measured, "generate", beside),
        merge_bytes=_bytes_of(measured, "merge", beside),
    )
    if config.quantization is not None and bits is None:
        one.notes.append(
            Bilingual("on the whole base: quantized weights cannot be trained", "基座模型不量化：量化的权重不能训练")
        )
    limit = None if device.memory_bytes is None else MemoryLimit(device.memory_bytes - beside, device.work_bytes)
    budget = config.train.memory_budget
    aim = (
        MemoryLimit(budget - device.budgeted_bytes) if isinstance(budget, int) else limit if budget == "auto" else None
    )
    if aim is not None and not always and fake_run.layers and peak.nbytes > aim.limit_bytes:
        fewest = aim.fewest_recomputed(fake_run, batches, measured) if thorough else aim.estimate(measured)
        if fewest is None and isinstance(budget, int):  # the budget is exceeded, and that does not stop the run
            fewest = fake_run.layers, fake_run.measure(batches, recomputed=fake_run.layers).peaks["train"]
        if fewest is not None:
            one.recomputed_layers, peak = fewest
            one.time_factor = fake_run.time_factor(fewest[0])
    if limit is not None:
        one.fits = peak.nbytes <= limit.limit_bytes and limit.loads(fake_run)
        if not one.fits and thorough and proposing:
            can_quantize = config.quantization is None and found.freezes_the_base
            quantized = (lambda wanted: make_run(method=method, quantization=wanted)) if can_quantize else None
            one.fit = find_fit(limit, config, fake_run, step, quantized)
            if one.fit is not None:
                one.fit.peak_bytes += beside
    one.peak_bytes = peak.nbytes + beside
    one.parts, one.activations_by_layer = peak.parts, list(peak.layers)
    if baseline and not distributed:
        other = make_run(method=method, quantization=bits, baseline=Baseline())
        one.baseline_bytes = other.measure(other.batches(step.rows)).peaks["train"].nbytes + beside
    return one


def _bytes_of(measured: Measured, phase: Phase, beside: int) -> int:
    return measured.peaks[phase].nbytes + beside if phase in measured.peaks else 0


def _add_times(record: PlanRecord, device: Device, base_config: Any) -> None:
    """From the products of a step, and the speed of a device that is here or that the user gives."""
    if device.flops:
        flops, source = device.flops, Bilingual("as asked", "按设置")
    elif device.here:
        text = base_config.get_text_config()
        width = text.hidden_size
        inner = getattr(text, "intermediate_size", None) or 4 * width
        rows = min(max(record.batch_tokens, 16), 1024)
        flops = measure_flops(device.precision.dtype, rows, width, int(inner))
        source = Bilingual("measured here", "在本机测得")
    else:
        return
    speed, share = flops / 1e9, 100 * EFFICIENCY
    record.rate = Bilingual(
        f"{speed:,.0f} GFLOP/s {source}, of which a step reaches {share:.0f}%",
        f"{speed:,.0f} GFLOP/s（{source.zh}），训练时按其 {share:.0f}% 计",
    )
    for one in record.methods:
        if one.flops_per_token:
            one.tokens_per_s = flops * EFFICIENCY / (one.flops_per_token * one.time_factor)
            if record.tokens_per_epoch is not None:
                one.epoch_s = record.tokens_per_epoch / one.tokens_per_s


def _in_words(wanted: QuantizationConfig | None) -> str:
    if wanted is None:
        return "none"
    return f"{wanted.bits}-bit" + (f" {wanted.type}" if wanted.bits == 4 else "")


__all__ = [
    "SHAPES",
    "Baseline",
    "Change",
    "Device",
    "FakeRun",
    "Fit",
    "MethodPlan",
    "PlanRecord",
    "find_target",
    "model_config",
    "plan",
]
