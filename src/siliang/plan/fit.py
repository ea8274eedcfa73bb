"""The smallest set of changes with which a run fits: first those that leave its result as it is."""

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

FULL_CALLS = 1024  # tokens: batches that are smaller than it do not fill the processor, so splitting stops to be free
SHORTEST = 64  # tokens, below which nothing is proposed
DEQUANTIZE = 1.1  # time of a step on a 4-bit base, compared to one on the whole base: measured on the CPU


class MemoryLimit:
    """The memory that a run may take, and what fits into it.

    Attributes:
        limit_bytes: For the tensors alone.
    """

    def __init__(self, limit_bytes: int, work_bytes: int = 0) -> None:
        """work_bytes: What steps take beside their tensors, and loading does not."""
        self.limit_bytes = limit_bytes
        self._work_bytes = work_bytes

    def loads(self, fake_run: FakeRun) -> bool:
        """Whether the model can be loaded at all. A model that is loaded in the host's memory always can."""
        return fake_run.loads_on_host or fake_run.loading_bytes <= self.limit_bytes + self._work_bytes

    def fewest_recomputed(
        self, fake_run: FakeRun, batches: list[Batch], measured: Measured | None = None
    ) -> tuple[int, Peak] | None:
        """(layers, peak): the fewest layers that have to recompute; None where all of them are too few.

        Args:
            measured: With none that does, where that is known.
        """
        measured = measured or fake_run.measure(batches)
        first = measured.peaks["train"]
        if first.nbytes <= self.limit_bytes:
            return 0, first
        guess = self.estimate(measured)
        for count in range(guess[0] if guess else fake_run.layers, fake_run.layers + 1):
            found = fake_run.measure(batches, recomputed=count).peaks["train"]
            if count and found.nbytes <= self.limit_bytes:
                return count, found
        return None

    def estimate(self, measured: Measured) -> tuple[int, Peak] | None:
        """The same without another run, from what each layer keeps: (layers, peak); None where all are too few."""
        peak = measured.peaks["train"]
        beside = peak.nbytes - sum(peak.layers)
        for count in range(1, len(peak.layers) + 1):
            inputs = count * measured.boundary_bytes
            # the layers that keep theirs are done, and their memory is free, when a lower one recomputes
            left = beside + inputs + max(sum(peak.layers[count:]), max(peak.layers[:count]))
            if left <= self.limit_bytes:
                parts = dict(peak.parts)
                parts["activations"] -= peak.nbytes - left
                return count, Peak(left, parts)
        return None


def find_fit(
    limit: MemoryLimit,
    config: RunConfig,
    fake_run: FakeRun,
    step: StepRows,
    quantized: Callable[[QuantizationConfig], FakeRun] | None,
) -> Fit | None:
    """What to change, the cheapest change first; None where nothing helps.

    Args:
        fake_run: The run as it is configured.
        step: Its heaviest step.
        quantized: Makes the run on a quantized base; None where the method trains the base, or it is quantized now.
    """
    found = _smaller(limit, config, fake_run, step)
    if found is not None:
        return found
    if quantized is not None:
        in_4 = quantized(QuantizationConfig())
        change = Change(
            setting="quantization",
            before="null",
            after="{bits: 4}",
            price=Bilingual(
                f"results differ a little; about {DEQUANTIZE:.1f} times the time",
                f"结果略有不同；用时约为 {DEQUANTIZE:.1f} 倍",
            ),
        )
        if (fit := _smaller(limit, config, in_4, step)) is not None:
            return Fit(
                changes=[change, *fit.changes],
                peak_bytes=fit.peak_bytes,
                parts=fit.parts,
                time_factor=fit.time_factor * DEQUANTIZE,
            )
        fake_run, more = in_4, [change]
    else:
        more = []
    length = config.data.max_length // 2 if limit.loads(fake_run) else 0
    while length >= SHORTEST:
        rows = [cut(row, length) for row in step.rows[:1]]
        if (fewest := limit.fewest_recomputed(fake_run, fake_run.batches(rows, 1))) is not None:
            price = Bilingual("longer rows are cut", "更长的样本会被截断")
            if step.windows:
                price = Bilingual("texts become more windows", "文本会切成更多窗口")
            elif step.lengths is not None:
                rows = step.cut_by(length)
                price = Bilingual(f"{rows:,} rows are cut", f"{rows:,} 条样本会被截断")
            shorter = Change(
                setting="data.max_length",
                before=str(config.data.max_length),
                after=str(length),
                price=price,
            )
            changes = [*more, *_split_change(config, 1), *_recompute_change(config, fake_run, fewest[0]), shorter]
            return Fit(
                changes=changes,
                peak_bytes=fewest[1].nbytes,
                parts=fewest[1].parts,
                time_factor=fake_run.time_factor(fewest[0]),
            )
        length //= 2
    return None


def _smaller(limit: MemoryLimit, config: RunConfig, fake_run: FakeRun, step: StepRows) -> Fit | None:
    """Smaller batches and recomputed layers, which change no result."""
    if not limit.loads(fake_run):
        return None
    whole = config.train.batch_size
    best: Fit | None = None
    for size in (n for n in range(whole, 0, -1) if whole % n == 0):
        rows = step.rows if size == whole else step.rows[: 2 * size]
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
        return []  # it chooses the layers by itself
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
