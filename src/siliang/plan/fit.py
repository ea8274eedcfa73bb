"""The smallest set of changes with which a run fits; changes that keep the result come first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from siliang.config import QuantizationConfig, RunConfig
from siliang.data.batch import Batch
from siliang.engine.recompute import layers_to_recompute
from siliang.language import Bilingual
from siliang.memory.track import Peak
from siliang.plan.fake_run import FakeRun
from siliang.plan.rows import StepRows, cut
from siliang.plan.steps import Measured
from siliang.records import Change, Fit

FULL_CALLS = 1024  # tokens: smaller batches do not fill the processor, so that splitting them costs time
SHORTEST = 64  # tokens: no shorter data.max_length is proposed
DEQUANTIZE = 1.1  # time of a step on a 4-bit base model relative to an unquantized one, measured on the CPU


class MemoryLimit:
    """The memory that a run may take.

    Attributes:
        limit_bytes: For the tensors, without the overhead.
        room: The bytes that a run with train.memory_budget=auto leaves for activations.
    """

    def __init__(self, limit_bytes: int, room: Callable[[FakeRun, Measured], float], work_bytes: int = 0) -> None:
        """work_bytes: The part of the overhead that steps need and loading does not."""
        self.limit_bytes, self.room = limit_bytes, room
        self._work_bytes = work_bytes

    def can_load(self, fake_run: FakeRun) -> bool:
        """Whether the model can be loaded; true for a model that is loaded into main memory."""
        return fake_run.loads_on_host or fake_run.loading_bytes <= self.limit_bytes + self._work_bytes

    def with_recomputing(self, fake_run: FakeRun, batches: list[Batch]) -> tuple[int, Peak] | None:
        """(layers, peak): the layers that the run recomputes, and its peak with these; None if it does not fit."""
        measured = fake_run.measure(batches)
        count = recomputed_layers(measured, self.room(fake_run, measured))
        peak = (fake_run.measure(batches, recomputed=count) if count else measured).peaks["train"]
        return (count, peak) if peak.nbytes <= self.limit_bytes else None


def recomputed_layers(measured: Measured, room: float) -> int:
    """The layers that the engine recomputes.

    Args:
        measured: Without recomputing.
        room: Bytes for the activations.
    """
    return layers_to_recompute(measured.layer_bytes, measured.boundary_bytes, room)


def estimate_recomputing(measured: Measured, count: int) -> Peak:
    """An estimate of the peak with `count` layers recomputing, by the activations of each layer.

    Args:
        measured: Without recomputing.
    """
    peak = measured.peaks["train"]
    if not count or not sum(peak.layers):  # the peak is that of the optimizer's step
        return peak
    # when a lower layer recomputes, the upper layers are done, and their activations are freed
    kept = count * measured.boundary_bytes + max(sum(peak.layers[count:]), max(peak.layers[:count]))
    freed = max(0, sum(peak.layers) - kept)
    return replace(
        peak, nbytes=peak.nbytes - freed, parts=peak.parts | {"activations": peak.parts["activations"] - freed}
    )


def find_fit(
    limit: MemoryLimit,
    config: RunConfig,
    fake_run: FakeRun,
    step: StepRows,
    quantized: Callable[[QuantizationConfig], FakeRun] | None,
) -> Fit | None:
    """The cheapest changes with which the run fits; None if no change helps.

    Args:
        fake_run: The run as configured.
        step: Its heaviest step.
        quantized: Makes the run on a quantized base model; None if the method trains the base, or if it is quantized.
    """
    same_result = _fit_with_same_result(limit, config, fake_run, step)
    if same_result is not None:
        return same_result
    if quantized is not None:
        quantized_run = quantized(QuantizationConfig())
        change = Change(
            setting="quantization",
            before="null",
            after="{bits: 4}",
            price=Bilingual(
                f"results differ a little; about {DEQUANTIZE:.1f} times the time",
                f"结果略有不同；用时约为 {DEQUANTIZE:.1f} 倍",
            ),
        )
        if (fit := _fit_with_same_result(limit, config, quantized_run, step)) is not None:
            return Fit(
                changes=[change, *fit.changes],
                peak_bytes=fit.peak_bytes,
                parts=fit.parts,
                time_factor=fit.time_factor * DEQUANTIZE,
            )
        fake_run, changes_so_far = quantized_run, [change]
    else:
        changes_so_far = []
    length = config.data.max_length // 2 if limit.can_load(fake_run) else 0
    while length >= SHORTEST:
        rows = [cut(row, length) for row in step.rows[:1]]
        if (found := limit.with_recomputing(fake_run, fake_run.batches(rows, 1))) is not None:
            price = Bilingual("longer rows are cut", "更长的样本会被截断")
            if step.windows:
                price = Bilingual("texts become more windows", "文本会切成更多窗口")
            elif step.lengths is not None:
                n_cut = step.cut_by(length)
                price = Bilingual(f"{n_cut:,} rows are cut", f"{n_cut:,} 条样本会被截断")
            shorter = Change(
                setting="data.max_length",
                before=str(config.data.max_length),
                after=str(length),
                price=price,
            )
            split, recompute = _split_change(config, 1), _recompute_change(config, fake_run, found[0])
            changes = [*changes_so_far, *split, *recompute, shorter]
            return Fit(
                changes=changes,
                peak_bytes=found[1].nbytes,
                parts=found[1].parts,
                time_factor=fake_run.time_factor(found[0]),
            )
        length //= 2
    return None


def _fit_with_same_result(limit: MemoryLimit, config: RunConfig, fake_run: FakeRun, step: StepRows) -> Fit | None:
    """The fastest fit with smaller batches and recomputed layers, which do not change the result; None if none fits."""
    if not limit.can_load(fake_run):
        return None
    full_size = config.train.batch_size
    best: Fit | None = None
    for size in (n for n in range(full_size, 0, -1) if full_size % n == 0):
        rows = step.rows if size == full_size else step.rows[: 2 * size]
        if (found := limit.with_recomputing(fake_run, fake_run.batches(rows, size))) is not None:
            count, peak = found
            changes = [*_split_change(config, size), *_recompute_change(config, fake_run, count)]
            fit = Fit(
                changes=changes, peak_bytes=peak.nbytes, parts=peak.parts, time_factor=fake_run.time_factor(count)
            )
            if best is None or fit.time_factor < best.time_factor:
                best = fit
            if count == 0 or sum(len(row["input_ids"]) for row in rows[:size]) < 2 * FULL_CALLS:
                break
    return best


def _split_change(config: RunConfig, size: int) -> list[Change]:
    t = config.train
    if size == t.batch_size:
        return []
    parts = -(-t.batch_size // size)
    return [
        Change(
            setting="train.batch_size",
            before=str(t.batch_size),
            after=str(size),
            price=Bilingual("none: the same rows make a step, in smaller parts", "无：每步样本不变，只是分成小批"),
        ),
        Change(
            setting="train.gradient_accumulation",
            before=str(t.gradient_accumulation),
            after=str(t.gradient_accumulation * parts),
            price=Bilingual("none", "无"),
        ),
    ]


def _recompute_change(config: RunConfig, fake_run: FakeRun, count: int) -> list[Change]:
    before = config.train.memory_budget
    if not count or config.train.gradient_checkpointing or before == "auto":
        return []  # the run chooses the layers itself
    more = 100 * (fake_run.time_factor(count) - 1)
    return [
        Change(
            setting="train.memory_budget",
            before="null" if before is None else str(before),
            after="auto",
            price=Bilingual(
                f"{count} of {fake_run.layers} layers compute twice: {more:.0f}% more time",
                f"{fake_run.layers} 层中有 {count} 层重新计算激活值：用时增加 {more:.0f}%",
            ),
        )
    ]
