"""The plan of one method: its peak memory by phase, whether it fits, and the changes with which it fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from siliang.config import MethodConfig, QuantizationConfig, RunConfig
from siliang.engine.batches import SEPARATE
from siliang.language import Bilingual
from siliang.methods import find_method
from siliang.plan.budget import cached_outputs, room_for_activations
from siliang.plan.device import Device
from siliang.plan.fake_run import Baseline, FakeRun
from siliang.plan.fit import MemoryLimit, estimate_recomputing, find_fit, recomputed_layers
from siliang.plan.rows import StepRows
from siliang.plan.steps import Measured, Phase
from siliang.records import MethodPlan
from siliang.types import SiliangError, first_line

PHASES: tuple[Phase, ...] = ("train", "evaluate", "generate", "merge")


def plan_method(
    configs: Sequence[RunConfig],
    device: Device,
    make_run: Callable[..., FakeRun],
    step: StepRows,
    name: str,
    *,
    baseline: bool,
    thorough: bool,
    distributed: bool,
    training_only: bool,
) -> MethodPlan:
    """The plan under the first of `configs` that fits, or under the last.

    Args:
        make_run: Makes a run on fake tensors from a config.
        step: The rows of the run's heaviest step.
        name: The method's.
        baseline: Plan PEFT with transformers.Trainer as well.
        thorough: Measure all phases, and propose changes if the run does not fit.
        distributed: The run has several ranks.
        training_only: Leave out the phases after the training.
    """

    def plan_under(config: RunConfig, *, proposing: bool) -> MethodPlan:
        return _plan_config(
            config,
            device,
            partial(make_run, config),
            step,
            name,
            baseline=baseline,
            thorough=thorough,
            distributed=distributed,
            training_only=training_only,
            proposing=proposing,
        )

    *others, last = configs
    for config in others:
        planned = plan_under(config, proposing=False)
        if planned.fits is not False:
            return planned
    return plan_under(last, proposing=True)


def _plan_config(
    config: RunConfig,
    device: Device,
    make_run: Callable[..., FakeRun],
    step: StepRows,
    name: str,
    *,
    baseline: bool,
    thorough: bool,
    distributed: bool,
    training_only: bool,
    proposing: bool,
) -> MethodPlan:
    settings = config.method if name == config.method.name else MethodConfig(name=name)
    method = find_method(name)
    # a method that trains the base model itself has no quantized base
    quantization = config.quantization if method.config is not None else None

    def make(wanted: QuantizationConfig | None) -> FakeRun:
        made = make_run(method=settings, quantization=wanted)
        made.shares = SEPARATE if step.lengths is None else made.engine.shares
        return made

    try:
        fake_run = make(quantization)
        if fake_run.shares.training and step.sharing is not None:
            step = replace(step, rows=step.sharing)
        step = replace(step, rows=fake_run.shortened(step.rows, longest=step.longest))
        batches = fake_run.batches(step.rows)
        always = fake_run.layers if config.train.gradient_checkpointing else 0
        phases = PHASES[:2] if distributed else PHASES  # only one process generates and merges
        phases = PHASES[:1] if training_only or not thorough else phases
        measured = fake_run.measure(batches, recomputed=always, phases=phases)
    except SiliangError as error:
        return MethodPlan(method=name, error=error.text)
    except Exception as error:  # some models need the values of their tensors, and fail in any way
        return MethodPlan(method=name, error=f"not planned: {first_line(error, kind=True)}")
    overhead, peak, on_host = device.overhead_bytes, measured.peaks["train"], fake_run.loads_on_host
    strategy = config.distributed.strategy if distributed else None
    planned = MethodPlan(
        method=name,
        strategy=strategy if strategy in ("ddp", "fsdp") else None,
        trained=fake_run.trained,
        total=fake_run.total,
        adapter_bytes=fake_run.adapter_bytes,
        loaded_bytes=measured.peaks["loaded"].nbytes,
        kept_weights=fake_run.kept_weights,
        overhead_bytes=overhead,
        loading_bytes=device.process_bytes + (measured.peaks["loaded"].nbytes if on_host else fake_run.loading_bytes),
        host_bytes=device.host_bytes + (fake_run.loading_bytes if on_host else 0),
        layers=fake_run.layers,
        recomputed_layers=always,
        batch_rows=len(batches[0].lengths),
        batch_tokens=fake_run.collator().cost(batches[0]),
        flops_per_token=measured.flops / max(measured.tokens, 1),
        notes=list(fake_run.notes),
        evaluate_bytes=_bytes_of(measured, "evaluate", overhead),
        generate_bytes=_bytes_of(measured, "generate", overhead),
        merge_bytes=_bytes_of(measured, "merge", overhead),
    )
    if fake_run.shares.training:
        if step.computed_share is not None:  # the heaviest step may share less than others
            computed = max(sum(batch.distinct_tokens for batch in batches), 1)
            planned.flops_per_token = measured.flops / computed * step.computed_share
        if step.note is not None:
            planned.notes.append(step.note)
    if fake_run.learning_bytes:  # before the first step, as loading is
        learning = planned.loaded_bytes + fake_run.learning_bytes
        planned.loading_bytes = max(planned.loading_bytes, device.process_bytes + learning)
    if config.quantization is not None and quantization is None:
        planned.notes.append(
            Bilingual(
                "the base model is not quantized: quantized weights cannot be trained",
                "基座模型不量化：量化的权重不能训练",
            )
        )
    cached = cached_outputs(config.train, device, fake_run, step, measured)
    planned.frozen_bytes, planned.frozen_disk_bytes = cached.memory_bytes, cached.disk_bytes
    kept = cached.memory_bytes if device.kind == "cpu" else 0  # in the same memory as the step
    planned.host_bytes += cached.memory_bytes - kept
    room = room_for_activations(config.train, device, fake_run, measured, cached_bytes=kept)
    if not always and (count := recomputed_layers(measured, room)):
        planned.recomputed_layers, planned.time_factor = count, fake_run.time_factor(count)
        if thorough:
            peak = fake_run.measure(batches, recomputed=count).peaks["train"]
        else:
            peak = estimate_recomputing(measured, count)
    if device.memory_bytes is not None:
        auto = config.train.model_copy(update={"memory_budget": "auto"})
        limit = MemoryLimit(
            device.memory_bytes - overhead - kept,
            partial(room_for_activations, auto, device, cached_bytes=kept),
            device.work_bytes + kept,  # the cache fills after the loading
        )
        planned.fits = peak.nbytes <= limit.limit_bytes and limit.can_load(fake_run)
        if not planned.fits and thorough and proposing:
            can_quantize = (
                config.quantization is None
                and method.freezes_the_base
                and method.why_settings_not_quantized(settings.arguments) is None
            )
            planned.fit = find_fit(limit, config, fake_run, step, make if can_quantize else None)
            if planned.fit is not None:
                planned.fit.peak_bytes += overhead + kept
                planned.fit.parts["frozen"] += kept
    planned.peak_bytes = peak.nbytes + overhead + kept
    planned.parts, planned.activations_by_layer = dict(peak.parts), list(peak.layers)
    planned.parts["frozen"] = kept
    if baseline and not distributed:
        other = make_run(method=settings, quantization=quantization, baseline=Baseline())
        planned.baseline_bytes = other.measure(other.batches(step.rows)).peaks["train"].nbytes + overhead
    return planned


def _bytes_of(measured: Measured, phase: Phase, overhead: int) -> int:
    return measured.peaks[phase].nbytes + overhead if phase in measured.peaks else 0
