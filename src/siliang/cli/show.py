"""What several commands print with: plain lines, a progress bar on a terminal, sizes for people."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from siliang.cli.console import rich_console
from siliang.terminal import cover
from siliang.units import show_bytes as size

if TYPE_CHECKING:
    from rich.progress import TaskID

    from siliang.train.log import Progress

__all__ = ["TrainingDisplay", "duration", "quiet_loading", "size"]


def quiet_loading() -> None:
    """Turns transformers' own loading bars off."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3:05 min, 1:02 h."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60}:{s % 60:02d} min" if s < 3600 else f"{s // 3600}:{s % 3600 // 60:02d} h"


def figures(metrics: dict[str, float]) -> str:
    """Metrics in a line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


class TrainingDisplay:
    """A progress bar on a terminal, a line every few steps elsewhere."""

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
        """Ends the bar, if there is one."""
        from rich.progress import Progress as Bar

        if isinstance(self._bar, Bar):
            self._bar.stop()
            self._bar = None

    def say(self, line: str) -> None:
        """Prints one line."""
        self._print(line)

    def progress(self, p: Progress) -> None:
        """Shows where the training is."""
        text = (
            f"loss {p.loss:.4f}" if p.loss is not None else "loss -"
        ) + f"  lr {p.learning_rate or 0:.2e}  {p.tokens_per_s:,.0f} tokens/s  {size(p.memory_bytes)}"
        if p.measured is not None:
            self._print(f"step {p.step:>6,}/{p.steps:,}  {figures(p.measured)}")
        elif sys.stdout.isatty():
            self._draw(p, text)
        elif p.logged:
            print(f"step {p.step:>6,}/{p.steps:,}  {text}  {duration(p.eta_s)} to go", flush=True)

    def _print(self, line: str) -> None:
        """A line that stays, above the bar where there is one."""
        from rich.progress import Progress as Bar

        if isinstance(self._bar, Bar):
            self._bar.console.print(line, markup=False)
        else:
            print(line, flush=True)

    def _draw(self, p: Progress, text: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        if not isinstance(self._bar, Bar):
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Bar(*columns, console=rich_console(), transient=False)
            self._task = self._bar.add_task("", total=p.steps, text="")
            self._bar.start()
            cover()
        assert self._task is not None
        self._bar.update(self._task, completed=p.step, text=f"{text}  {duration(p.eta_s)} to go")
