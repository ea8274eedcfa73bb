"""The smallest set of changes with which a run fits; changes that keep the result come first."""

from __future__ import annotations

from collections.abc import Callable

from siliang.config import QuantizationConfig, RunConfig
from siliang.data.batch import Batch
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
    """

    def __init__(self, limit_bytes: int, work_bytes: int = 0) -> None:
        """work_bytes: The part of the overhead that steps need and loading does not."""
        self.limit_bytes = limit_bytes
        self._work_bytes = work_bytes

    def can_load(self, fake_run: FakeRun) -> bool:
        """Whether the model can be loaded; true for a model that is loaded into main memory."""
        return fake_run.loads_on_host or fake_run.loading_bytes <= self.limit_bytes + self._work_bytes

    def fewest_recomputed(
        self, fake_run: FakeRun, batches: list[Batch], measured: Measured | None = None
    ) -> tuple[int, Peak] | None:
        """(layers, peak): the smallest number of recomputed layers that fits; None if no number does.

        Args:
            measured: The measurement without recomputing, if it is known.
        """
        measured = measured or fake_run.measure(batches)
        first = measured.peaks["train"]
        if first.nbytes <= self.limit_bytes:
            return 0, first
        guess = self.estimate(measured)
        for count in range(guess[0] if guess else fake_run.layers, fake_run.layers + 1):
            peak = fake_run.measure(batches, recomputed=count).peaks["train"]
            if count and peak.nbytes <= self.limit_bytes:
                return count, peak
        return None

    def estimate(self, measured: Measured) -> tuple[int, Peak] | None:
        """An estimate of `fewest_recomputed` from one measurement, by the activations of each layer."""
        peak = measured.peaks["train"]
        other = peak.nbytes - sum(peak.layers)
        for count in range(1, len(peak.layers) + 1):
            inputs = count * measured.boundary_bytes
            # when a lower layer recomputes, the upper layers are done, and their activations are freed
            reduced = other + inputs + max(sum(peak.layers[count:]), max(peak.layers[:count]))
            if reduced <= self.limit_bytes:
                parts = dict(peak.parts)
                parts["activations"] -= peak.nbytes - reduced
                return count, Peak(reduced, parts)
        return None


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
        if (fewest := limit.fewest_recomputed(fake_run, fake_run.batches(rows, 1))) is not None:
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
            split, recompute = _split_change(config, 1), _recompute_change(config, fake_run, fewest[0])
            changes = [*changes_so_far, *split, *recompute, shorter]
            return Fit(
                changes=changes,
                peak_bytes=fewest[1].nbytes,
                parts=fewest[1].parts,
                time_factor=fake_run.time_factor(fewest[0]),
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
        if (fewest := limit.fewest_recomputed(fake_run, fake_run.batches(rows, size))) is not None:
            count, peak = fewest
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
