"""Output helpers of several commands: plain lines, a progress bar on a terminal, readable sizes and times."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from siliang.cli.console import rich_console
from siliang.language import both
from siliang.terminal import clean_standard_streams
from siliang.units import show_bytes as size

if TYPE_CHECKING:
    from rich.progress import TaskID

    from siliang.train.log import Progress

__all__ = ["TrainingDisplay", "duration", "quiet_loading", "size"]


def quiet_loading() -> None:
    """Turns off the loading bars of transformers."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def duration(seconds: float) -> str:
    """A readable time: 42 s, 3:05 min, 1:02 h; in Chinese 42 秒, 3 分 05 秒, 1 小时 02 分."""
    s = round(seconds)
    if s < 60:
        return both(f"{s} s", f"{s} 秒")
    if s < 3600:
        return both(f"{s // 60}:{s % 60:02d} min", f"{s // 60} 分 {s % 60:02d} 秒")
    return both(f"{s // 3600}:{s % 3600 // 60:02d} h", f"{s // 3600} 小时 {s % 3600 // 60:02d} 分")


def metrics_line(metrics: dict[str, float]) -> str:
    """Metrics in one line, with the names of the records; counts are integers."""
    counts = ("rows", "dropped", "skipped", "written")
    return "  ".join(
        f"{name} {value:.0f}" if name in counts else f"{name} {value:.4f}" for name, value in metrics.items()
    )


def _moment(p: Progress) -> str:
    """Loss, learning rate, speed, memory, and the remaining time."""
    loss = "-" if p.loss is None else f"{p.loss:.4f}"
    rate, speed, memory, left = p.learning_rate or 0.0, p.tokens_per_s, size(p.memory_bytes), duration(p.eta_s)
    return both(
        f"loss {loss}  lr {rate:.2e}  {speed:,.0f} tokens/s  {memory}  {left} to go",
        f"损失 {loss}  学习率 {rate:.2e}  {speed:,.0f} 词元/秒  {memory}  剩余 {left}",
    )


class TrainingDisplay:
    """A progress bar on a terminal; elsewhere one line every few steps."""

    def __init__(self) -> None:
        self._bar: object | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the progress bar."""
        from rich.progress import Progress as Bar

        if isinstance(self._bar, Bar):
            self._bar.stop()
            self._bar = None

    def say(self, line: str) -> None:
        """Prints one line."""
        self._print(line)

    def progress(self, p: Progress) -> None:
        """Shows the progress of training."""
        step = both(f"step {p.step:>6,}/{p.steps:,}", f"步 {p.step:>6,}/{p.steps:,}")
        if p.measured is not None:
            self._print(f"{step}  {metrics_line(p.measured)}")
        elif sys.stdout.isatty():
            self._draw(p)
        elif p.logged:
            print(f"{step}  {_moment(p)}", flush=True)

    def _print(self, line: str) -> None:
        """Prints a line, above the progress bar if it is shown."""
        from rich.progress import Progress as Bar

        if isinstance(self._bar, Bar):
            self._bar.console.print(line, markup=False)
        else:
            print(line, flush=True)

    def _draw(self, p: Progress) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        if not isinstance(self._bar, Bar):
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Bar(*columns, console=rich_console(), transient=False)
            self._task = self._bar.add_task("", total=p.steps, text="")
            self._bar.start()
            clean_standard_streams()
        assert self._task is not None
        self._bar.update(self._task, completed=p.step, text=_moment(p))
