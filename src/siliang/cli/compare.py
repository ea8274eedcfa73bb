"""siliang compare: compares methods on the user's data."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from siliang.cli.console import named, rich_console
from siliang.cli.options import Data, Lang, Model, Task
from siliang.environment import importing
from siliang.language import both, language, local
from siliang.terminal import one_line, raw_stream

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from typer._click import Context

    from siliang.compare.run import CompareListener
    from siliang.config.comparison import CompareConfig
    from siliang.records import Record, Trial
    from siliang.report.gather import ReportData
    from siliang.report.table import Cell, Column


class RayOption(TyperCommand):
    """Allows --ray without a value: the next word is an address only if it is not an option or a settings file."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        given = list(args)
        for i, word in enumerate(args):
            after = args[i + 1] if i + 1 < len(args) else "-"
            if word == "--ray" and (after.startswith("-") or after.endswith((".yaml", ".yml")) or Path(after).exists()):
                given[i] = "--ray=local"
        return super().parse_args(ctx, given)


def compare(
    settings: Annotated[
        Path | None,
        typer.Argument(
            help=both(
                "compare.yaml: run.yaml without `method`, with `methods`, `seeds`, `search`, `minutes` ...",
                "compare.yaml：即没有 `method` 的 run.yaml，另有 `methods`、`seeds`、`search`、`minutes` 等。",
            )
        ),
    ] = None,
    model: Model = None,
    data: Data = None,
    task: Task = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help=both(
                "The methods, separated by commas: full,bitfit,lora,ia3,prompt,p-tuning,prefix.",
                "各种方法，用逗号分隔：full,bitfit,lora,ia3,prompt,p-tuning,prefix。",
            )
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help=both("The number of seeds.", "随机种子的个数。"))] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help=both(
                "The folder of the comparison; an unfinished one is resumed.", "比较的文件夹；未完成的比较会继续。"
            )
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help=both("Any setting by name: --set train.epochs=1", "按名称设置任意配置项：--set train.epochs=1"),
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1,
            help=both(
                "Runs at the same time on a machine, each with its own GPU or CPU threads.",
                "一台机器上同时进行几次运行，每次有自己的显卡或 CPU 线程。",
            ),
        ),
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help=both(
                "Run on a Ray cluster: HOST:PORT or auto. Without an address, Ray is started on this machine.",
                "在 Ray 集群上运行：HOST:PORT 或 auto；不给地址时，在本机启动 Ray。",
            ),
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help=both(
                "Resume even if the base model or the data have changed since the comparison was started.",
                "基座模型或数据在比较开始之后变过也继续。",
            ),
        ),
    ] = False,
    lang: Lang = None,
) -> None:
    """Train several methods with several seeds on the same rows, and show which is best: one table, one page.

    After an interruption, the same command resumes the comparison. The exit code is 1 if no run was completed.
    """
    from siliang.cli.train import gather
    from siliang.config.comparison import CompareConfig
    from siliang.paths import check_links
    from siliang.records import COMPARISON_NAME
    from siliang.report.words import words

    if output is None and settings is not None and (settings.parent / COMPARISON_NAME).is_file():
        check_links(settings.parent)
        output = str(settings.parent)  # a comparison's own compare.yaml: resume in its folder, even if it was moved
    flags = {"model": model, "task": task, "output": output}
    values = gather(settings, flags, data, set_ or [])
    values |= {k: v for k, v in {"methods": methods, "seeds": seeds}.items() if v is not None}
    lang = lang or language()
    words(lang)
    config = CompareConfig.build(values, source=named(settings))
    result = run(config, jobs=jobs, ray=ray, language=lang, force=force)
    if not result.records:
        raise typer.Exit(1)


def run(config: CompareConfig, *, jobs: int, language: str, ray: str | None = None, force: bool = False) -> ReportData:
    """Runs a comparison, shows its progress, prints its table, and writes its page."""
    from siliang.compare.pool import Pool
    from siliang.records import COMPARISON_NAME

    folder = Path(config.run.output)
    pool = Pool(jobs, folder / "logs") if ray is None else None
    display = Display()
    try:
        if pool is not None and not (folder / COMPARISON_NAME).is_file():  # of one that is resumed, all may be finished
            pool.start(len(config.settings.methods) * len(config.seeds))  # they import while this process does
        with importing():
            from siliang.cli.show import quiet_loading
            from siliang.compare.run import compare as run_all
            from siliang.report.gather import gather
            from siliang.report.page import write_page

            quiet_loading()
        run_all(config, display.listener(), jobs=jobs, ray=ray, force=force, pool=pool)
    finally:
        if pool is not None:
            pool.close()
        display.close()
    data = gather([folder])
    print()
    show(data, language)
    write_page(data, folder / "report.html", language=language)
    print(both("\npage       ", "\n报告       ") + str(folder / "report.html"))
    return data


def show(data: ReportData, language: str) -> None:
    """Prints the table and the answer."""
    from rich.table import Table
    from rich.text import Text

    from siliang.report.summary import recommend, summarize
    from siliang.report.table import differences, notes, sentences, table
    from siliang.report.words import words

    w = words(language)
    methods = summarize(data)
    columns, rows = table(methods, data, w)
    plain = not sys.stdout.isatty()
    console = rich_console(width=10_000 if plain else None)
    for part in [columns] if plain else _fitting(columns, rows, console.width):
        grid = Table(box=None, padding=(0, 1), pad_edge=False, header_style="" if plain else "bold")
        for column in part:
            grid.add_column(Text(one_line(column.title)), justify="right" if column.numeric else "left", no_wrap=True)
        for cells in rows:
            grid.add_row(*(Text(one_line(cells[columns.index(column)].text)) for column in part))
        for line in _captured(console, grid):
            print(line, file=raw_stream(sys.stdout))
        print()
    for method in methods:
        for note in notes(method, w):
            label, text = one_line(method.label), one_line(note)
            print(f"{label}：{text}" if language == "zh" else f"{label}: {text}")
    if lines := differences(data, w):
        print(w["disagree"])
        for line in lines:
            print(f"  {one_line(line)}")
    if len(methods) > 1:
        print(w["terminal_note"])
    for sentence in sentences(recommend(methods, data), data, w):
        print(sentence)


def _captured(console: Console, grid: Table) -> list[str]:
    with console.capture() as capture:
        console.print(grid)
    return [line.rstrip() for line in capture.get().splitlines()]


def _fitting(columns: list[Column], rows: list[list[Cell]], width: int) -> list[list[Column]]:
    """The columns in groups that fit the terminal, each with the method column first."""
    from rich.cells import cell_len

    def column_width(i: int) -> int:
        return 2 + max(cell_len(columns[i].title), *(cell_len(cells[i].text) for cells in rows))

    parts, left = [[columns[0]]], width - column_width(0)
    for i in range(1, len(columns)):
        if column_width(i) > left and len(parts[-1]) > 1:
            parts.append([columns[0]])
            left = width - column_width(0)
        parts[-1].append(columns[i])
        left -= column_width(i)
    return parts


def _seed(trial: Trial) -> str:
    return both(f", seed {trial.seed}", f"，种子 {trial.seed}")


class Display:
    """Prints a line for each finished run; on a terminal, also a table of the current runs below."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, str]] = {}
        self._rows: dict[str, tuple[str, ...]] = {}  # of the current runs
        self._shown = 0.0
        self._live: Live | None = None

    def listener(self) -> CompareListener:
        """The callbacks for the comparison."""
        from siliang.compare.run import CompareListener

        return CompareListener(self.say, self.began, self.progress, self.ended)

    def close(self) -> None:
        """Removes the table and restores the cursor."""
        self._clear()

    def say(self, line: str) -> None:
        """Prints one line."""
        self._clear()
        print(line, flush=True)

    def began(self, trial: Trial, number: int, of: int) -> None:
        """A trial begins."""
        tried = ", ".join(f"{key} {value}" for key, value in trial.settings.items())
        what = f", {tried}" if tried else ""
        name = one_line(f"{trial.method}{what}{_seed(trial)}")
        self._begun[trial.folder] = (time.perf_counter(), f"{number:>3}/{of}  {name}")
        self._rows[trial.folder] = (self._begun[trial.folder][1], "...")
        self._draw()

    def progress(self, trial: Trial, progress: dict[str, Any]) -> None:
        """A step is done."""
        from siliang.cli.show import duration

        left = duration(progress["eta_s"])
        self._rows[trial.folder] = (
            self._begun[trial.folder][1],
            both("step ", "步 ") + f"{progress['step']:,}/{progress['steps']:,}",
            both("loss ", "损失 ") + f"{progress['loss']:.4f}" if progress["loss"] is not None else "",
            both(f"{left} to go", f"剩余 {left}"),
            both("on ", "在 ") + progress["node"] if "node" in progress else "",
        )
        if time.perf_counter() - self._shown >= 0.2:
            self._draw()

    def ended(self, trial: Trial, record: Record | None) -> None:
        """A trial is completed or has failed."""
        from siliang.cli.show import duration
        from siliang.tasks.record import task_in

        started, name = self._begun.get(trial.folder, (time.perf_counter(), f"{trial.method}{_seed(trial)}"))
        self._rows.pop(trial.folder, None)
        self._clear()
        if record is None:
            error = one_line(local(trial.error or ""))
            print(both(f"{name}  failed: {error}", f"{name}  失败：{error}"), flush=True)
            return
        quality = task_in(record).quality.name
        took = duration(time.perf_counter() - started)
        print(f"{name}  {quality} {record.final[quality]:.4f}  {took}", flush=True)

    def _draw(self) -> None:
        if not sys.stdout.isatty():
            return
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        self._shown = time.perf_counter()
        grid = Table.grid(padding=(0, 2))
        for row in self._rows.values():
            grid.add_row(*map(Text, map(one_line, row)))
        if self._live is None:
            self._live = Live(
                console=rich_console(), auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
        self._live.update(grid, refresh=True)

    def _clear(self) -> None:
        """Removes the table. The next update draws it again."""
        if self._live is not None:
            self._live.stop()
            self._live = None
