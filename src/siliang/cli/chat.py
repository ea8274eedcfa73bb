"""siliang chat: the answers of the base model and of runs to the same questions, side by side."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from siliang.cli.console import as_text, input_lines, rich_console
from siliang.cli.options import Temperature
from siliang.cli.used_run import Base, Force, TaskId, check_folders, show_hint, show_notes
from siliang.environment import importing
from siliang.language import Bilingual, both, local
from siliang.terminal import StreamedText, clean_standard_streams, one_line, raw_stream
from siliang.types import OutputError, near

if TYPE_CHECKING:
    from siliang.use.chat import Chat

MAX_COLUMNS = 4  # side by side; further ones are below
MIN_WIDTH = 28  # characters of a column


def chat(
    runs: Annotated[
        list[Path],
        typer.Argument(help=both("Folders of runs, or of their checkpoints.", "运行的文件夹，或其中检查点的文件夹。")),
    ],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=both(
                "Maximum tokens of an answer. Default: 128, or the positions that the model has left.",
                "每个回答最多的词元数。默认 128，或模型剩余的位置数。",
            ),
        ),
    ] = None,
    temperature: Temperature = 0.0,
    task_id: TaskId = None,
    base: Base = None,
    force: Force = False,
) -> None:
    """Ask the base model and any number of runs the same questions, and show the answers side by side.

    Each model keeps its own conversation. /reset begins a new one, /system TEXT sets the system message, /save FILE
    writes the conversations. Without a terminal, questions are read from standard input. An empty line ends the chat.
    """
    check_folders(*runs, or_models=True)
    with importing():
        from siliang.cli.show import quiet_loading
        from siliang.hardware import find_device
        from siliang.use.chat import Chat

        quiet_loading()
    opened = Chat(list(dict.fromkeys(runs)), find_device(), base=base, force=force, task_id=task_id)
    show_notes(opened.notes)
    for run, how in opened.how.items():
        show_hint(run, how)
    side_by_side = sys.stdout.isatty()
    for prompt in _prompts():
        if not sys.stdin.isatty():
            print(f"> {prompt}", flush=True)
        if _obeyed(opened, prompt):
            continue
        answer = _columns if side_by_side else _one_by_one
        answer(opened, prompt, max_new_tokens=max_new_tokens, temperature=temperature)


COMMANDS = ("/reset", "/system", "/save")


def _obeyed(opened: Chat, line: str) -> bool:
    """Follows a command; False for a question."""
    command, _, rest = line.partition(" ")
    match command:
        case "/reset":
            opened.reset()
            print(both("a new conversation begins", "开始新的对话"))
        case "/system":
            opened.system = rest.strip()
            opened.reset()
            if opened.system:
                print(both("the system message is set, and a new conversation begins", "已设置系统消息，开始新的对话"))
            else:
                print(both("the system message is gone, and a new conversation begins", "已去掉系统消息，开始新的对话"))
        case "/save" if rest.strip():
            path = Path(rest.strip()).expanduser()
            try:
                opened.save(path)
            except OutputError as error:  # the chat continues
                print(local(error.args[0]), file=sys.stderr)
            else:
                print(both(f"saved      {path}", f"已保存     {path}"))
        case _ if command in COMMANDS or (re.fullmatch("/[a-z]+", command) and near(command, COMMANDS)):
            print(
                both(
                    f"{command} is not a command, or lacks its text: /system TEXT, /reset, /save FILE.jsonl.",
                    f"{command} 不是命令，或缺少内容：/system 文本、/reset、/save 文件.jsonl。",
                ),
                file=sys.stderr,
            )
        case _:
            return False
    return True


def _prompts() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.strip() for line in input_lines() if line.strip())
        return
    while True:
        try:
            prompt = as_text(input("> ").strip(), Bilingual("the question", "问题"))
        except EOFError:
            print()
            return
        if not prompt:
            return
        yield prompt


def _one_by_one(opened: Chat, prompt: str, *, max_new_tokens: int | None, temperature: float) -> None:
    """Prints each answer on a line after its name, for a pipe or a file."""
    for name in opened.names:
        _write(f"{one_line(name)}: ")
        pieces = StreamedText()

        def on_text(text: str, pieces: StreamedText = pieces) -> None:
            _write(pieces.add(text))

        opened.answer(name, prompt, on_text, max_new_tokens=max_new_tokens, temperature=temperature)
        _write(f"{pieces.end()}\n")
    _write("\n")


def _write(text: str) -> None:
    """Prints a text that is already cleaned."""
    print(text, end="", file=raw_stream(sys.stdout), flush=True)


def _columns(opened: Chat, prompt: str, *, max_new_tokens: int | None, temperature: float) -> None:
    """Prints one column per answer, updated during generation."""
    from rich.console import Group
    from rich.live import Live
    from rich.segment import Segment, Segments
    from rich.table import Table
    from rich.text import Text

    console = rich_console()
    n_columns = max(1, min(MAX_COLUMNS, console.width // MIN_WIDTH, len(opened.names)))
    answers = {name: Text() for name in opened.names}

    def drawn() -> Group:
        grids = []
        for start in range(0, len(opened.names), n_columns):
            names = opened.names[start : start + n_columns]
            grid = Table(box=None, expand=True, padding=(0, 1), pad_edge=False, header_style="bold")
            for name in names:
                grid.add_column(Text(one_line(name)), ratio=1, overflow="fold")
            grid.add_row(*(answers[name] for name in names))
            grids.append(grid)
        return Group(*grids)

    def last_lines() -> Segments:
        """The lines that fit the terminal: lines that have scrolled out of it cannot be redrawn."""
        lines = console.render_lines(drawn(), pad=False)[1 - console.height :]
        return Segments([segment for line in lines for segment in (*line, Segment.line())])

    with Live(last_lines(), console=console, refresh_per_second=10) as live:
        clean_standard_streams()
        for name in opened.names:
            pieces = StreamedText()

            def on_text(text: str, shown: Text = answers[name], pieces: StreamedText = pieces) -> None:
                shown.append(pieces.add(text))
                live.update(last_lines())

            opened.answer(name, prompt, on_text, max_new_tokens=max_new_tokens, temperature=temperature)
            answers[name].append(pieces.end())
        live.update(drawn())
    print()
