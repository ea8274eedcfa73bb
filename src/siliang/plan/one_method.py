"""The plan of one method: its peak memory by phase, whether that fits, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from siliang.config import MethodConfig, RunConfig
from siliang.language import Bilingual
from siliang.methods import find_method
from siliang.plan.device import Device
from siliang.plan.fake_run import Baseline, FakeRun
from siliang.plan.fit import MemoryLimit, find_fit
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
        loading_bytes=device.process_bytes + (measured.peaks["loaded"].nbytes if on_host else fake_run.loading_bytes),
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
