"""The memory plan: a run's own training step, made on paper before anything is loaded, and what to change so that it
fits."""

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

from siliang.check import Subject, look_at
from siliang.config import MethodConfig, QuantizationConfig, RunConfig
from siliang.data.collate import PadCollator
from siliang.engine.batches import StepCollator, most_tokens
from siliang.hardware import machine
from siliang.methods import find_method
from siliang.models.load import load_config
from siliang.plan.device import ETA, Device, find_target, measure_flops
from siliang.plan.fit import Room, find_fit
from siliang.plan.rows import StepRows, heaviest, made_up
from siliang.plan.shapes import SHAPES
from siliang.plan.sketch import Sketch, Usual
from siliang.plan.steps import Measured, Phase
from siliang.records import Change, Fit, MethodPlan, PlanRecord
from siliang.types import ConfigError, SiliangError, TaskType, first_line

TOLD: tuple[Phase, ...] = ("train", "evaluate", "generate", "merge")


def plan(
    config: RunConfig,
    device: Device,
    *,
    methods: Sequence[str] = (),
    with_data: bool = True,
    subject: Subject | None = None,
    base_config: Any = None,
    usual: bool = False,
    timed: bool = True,
    mesh: DeviceMesh | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> PlanRecord:
    """What a run will take, by method.

    Args:
        methods: To be compared, each with its defaults; the config's own keeps its settings. None: its own alone.
        with_data: Read the data, for the batch that the run will really see; otherwise rows of max_length are taken.
        subject: The run's data, where it has been read already.
        base_config: The base model's config, where it is known already.
        usual: Say also what PEFT with transformers.Trainer would need.
        timed: Measure the speed of a device that is here.
        mesh: The ranks among which the run is shared; the plan is of each.
        say: Hears what is being done.

    Raises:
        ModelError: There is no such model, or its config is not whole.
        DataError: The data cannot be read.
        ConfigError: DeepSpeed shares it out, whose step cannot be made on paper.
    """
    if mesh is not None and config.distributed.strategy == "deepspeed":
        raise ConfigError(
            "What each device holds under DeepSpeed is not planned. Plan strategy fsdp, which deals out as much as its "
            "stage 3, or ddp."
        )
    subject = subject or look_at(config, machine())
    base_config = base_config or model_config(config)
    labels = subject.examples.labels if with_data else None
    if config.task is TaskType.QUESTION_ANS or labels is not None:
        base_config.num_labels = len(labels) if labels is not None else 2
    names = list(methods) or [config.method.name]
    ranks = mesh.size() if mesh is not None else 1
    configs = [config]
    if mesh is not None and config.distributed.strategy == "auto":  # dealing out costs time: for what does not fit else
        configs = [config.with_strategy("ddp"), config.with_strategy("fsdp")]
    new_tokens = len(config.data.add_tokens)
    if with_data and new_tokens:  # those that the tokenizer lacks, and for which the embeddings have no room
        new_tokens = max(len(subject.tokenizer) - base_config.get_text_config().vocab_size, 0)
    draw = partial(
        Sketch,
        base_config=base_config,
        device=device,
        new_tokens=new_tokens,
        invented=subject.invented if with_data else [],
        mesh=mesh,
    )
    # every method's batches are those of the first, which is packed if any is
    most = most_tokens(config.train.tokens_at_once, device.kind, device.precision.dtype)
    collator = StepCollator(PadCollator(0), config.task, config.train.batch_size, most)
    step = heaviest(config, subject.train, collator, ranks) if with_data else made_up(config, ranks)
    step.windows = with_data and subject.examples.layout == "text" and config.data.long_text == "window"
    work = partial(
        _plan_one, configs, device, draw, step, usual=usual, thorough=len(names) == 1, dealt=mesh is not None
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
        say("the speed of this device")
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
    """A process for each core: on paper there is nothing but Python to run. Fork, because what is to be drawn is here
    already, and nothing has computed in threads yet. A process that has begun to use CUDA cannot be forked: one
    method after the other then, which takes less time than to import everything in new processes."""
    workers = min(len(names), os.cpu_count() or 1)
    cannot_fork = "fork" not in multiprocessing.get_all_start_methods() or torch.cuda.is_initialized()
    if workers == 1 or cannot_fork:
        for name in names:
            say(name)
            yield work(name)
        return
    say(f"{len(names)} methods")
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(work, names)


def _plan_one(
    configs: Sequence[RunConfig], device: Device, draw: Callable[..., Sketch], step: StepRows, name: str, **how: bool
) -> MethodPlan:
    """The first of these that fits, or the last."""
    *others, last = configs
    for config in others:
        one = _plan_as(config, device, partial(draw, config), step, name, **how, proposing=False)
        if one.fits is not False:
            return one
    return _plan_as(last, device, partial(draw, last), step, name, **how, proposing=True)


def _plan_as(
    config: RunConfig,
    device: Device,
    draw: Callable[..., Sketch],
    step: StepRows,
    name: str,
    *,
    usual: bool,
    thorough: bool,
    dealt: bool,
    proposing: bool,
) -> MethodPlan:
    own = name == config.method.name
    method = config.method if own else MethodConfig(name=name)
    found = find_method(name)
    # what trains the base itself has no base in few bits
    bits = config.quantization if found.config is not None else None
    try:
        sketch = draw(method=method, quantization=bits)
        step = replace(step, rows=sketch.shortened(step.rows, longest=step.longest))
        batches = sketch.batches(step.rows)
        always = sketch.layers if config.train.gradient_checkpointing else 0
        told = TOLD[:2] if dealt else TOLD  # generating and merging are one process's
        measured = sketch.measure(batches, recomputed=always, phases=told if thorough else TOLD[:1])
    except SiliangError as error:
        return MethodPlan(method=name, error=str(error))
    except Exception as error:  # whatever a model of any kind does when its tensors have no values
        return MethodPlan(method=name, error=f"not planned: {first_line(error, kind=True)}")
    beside, peak, on_host = device.overhead_bytes, measured.peaks["train"], sketch.loads_on_host
    one = MethodPlan(
        method=name,
        strategy=config.distributed.strategy if dealt else None,  # type: ignore[arg-type]
        trained=sketch.trained,
        total=sketch.total,
        adapter_bytes=sketch.adapter_bytes,
        loaded_bytes=measured.peaks["loaded"].nbytes,
        overhead_bytes=beside,
        loading_bytes=device.beside_bytes + (measured.peaks["loaded"].nbytes if on_host else sketch.loading_bytes),
        host_bytes=device.host_bytes + (sketch.loading_bytes if on_host else 0),
        layers=sketch.layers,
        recomputed_layers=always,
        batch_rows=len(batches[0].lengths),
        batch_tokens=sketch.collator().cost_of(batches[0].lengths),
        flops_per_token=measured.flops / max(measured.tokens, 1),
        notes=list(sketch.notes),
        evaluate_bytes=_bytes_of(measured, "evaluate", beside),
        generate_bytes=_bytes_of(measured, "generate", beside),
        merge_bytes=_bytes_of(measured, "merge", beside),
    )
    if config.quantization is not None and bits is None:
        one.notes.append("on the whole base: weights in few bits cannot be trained")
    room = None if device.memory_bytes is None else Room(device.memory_bytes - beside, device.work_bytes)
    budget = config.train.memory_budget
    aim = Room(budget - device.budgeted_bytes) if isinstance(budget, int) else room if budget == "auto" else None
    if aim is not None and not always and sketch.layers and peak.nbytes > aim.limit_bytes:
        fewest = aim.fewest_recomputed(sketch, batches, measured) if thorough else aim.estimate(measured)
        if fewest is None and isinstance(budget, int):  # which is not kept then, and does not stop the run
            fewest = sketch.layers, sketch.measure(batches, recomputed=sketch.layers).peaks["train"]
        if fewest is not None:
            one.recomputed_layers, peak = fewest
            one.time_factor = sketch.time_factor(fewest[0])
    if room is not None:
        one.fits = peak.nbytes <= room.limit_bytes and room.loads(sketch)
        if not one.fits and thorough and proposing:
            can_quantise = config.quantization is None and found.freezes_the_base
            quantised = (lambda wanted: draw(method=method, quantization=wanted)) if can_quantise else None
            one.fit = find_fit(room, config, sketch, step, quantised)
            if one.fit is not None:
                one.fit.peak_bytes += beside
    one.peak_bytes = peak.nbytes + beside
    one.parts, one.activations_by_layer = peak.parts, list(peak.layers)
    if usual and not dealt:
        other = draw(method=method, quantization=bits, usual=Usual())
        one.usual_bytes = other.measure(other.batches(step.rows)).peaks["train"].nbytes + beside
    return one


def _bytes_of(measured: Measured, phase: Phase, beside: int) -> int:
    return measured.peaks[phase].nbytes + beside if phase in measured.peaks else 0


def _add_times(record: PlanRecord, device: Device, base_config: Any) -> None:
    """From the products of a step, and the speed of a device that is here or that the user has told of."""
    if device.flops:
        flops, source = device.flops, "as asked"
    elif device.here:
        text = base_config.get_text_config()
        width = text.hidden_size
        inner = getattr(text, "intermediate_size", None) or 4 * width
        rows = min(max(record.batch_tokens, 16), 1024)
        flops, source = measure_flops(device.precision.dtype, rows, width, int(inner)), "measured here"
    else:
        return
    record.rate = f"{flops / 1e9:,.0f} GFLOP/s {source}, of which a step reaches {100 * ETA:.0f}%"
    for one in record.methods:
        if one.flops_per_token:
            one.tokens_per_s = flops * ETA / (one.flops_per_token * one.time_factor)
            if record.tokens_per_epoch is not None:
                one.epoch_s = record.tokens_per_epoch / one.tokens_per_s


def _in_words(wanted: QuantizationConfig | None) -> str:
    if wanted is None:
        return "none"
    return f"{wanted.bits}-bit" + (f" {wanted.type}" if wanted.bits == 4 else "")


__all__ = [
    "SHAPES",
    "Change",
    "Device",
    "Fit",
    "MethodPlan",
    "PlanRecord",
    "Sketch",
    "Usual",
    "find_target",
    "model_config",
    "plan",
]
