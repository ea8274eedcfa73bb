"""siliang chat: the answers of the base model and of runs to the same questions, side by side."""

from __future__ import annotations

import os
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
from siliang.types import OutputError

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

    Each model keeps its own conversation. /reset begins a new one, /system TEXT sets the system message, /save
    FILE.jsonl writes the conversations, /help lists the commands. Without a terminal, questions are read from standard
    input. An empty line, or /exit, ends the chat.
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
    for line in _lines():
        prompt = line.strip()
        if not sys.stdin.isatty():
            print(f"> {prompt}", flush=True)
        if (command := COMMAND.match(line)) is not None:
            if command["name"].lower() in ENDS and not command["rest"]:
                return
            _obey(opened, command["name"], command["rest"])
            continue
        answer = _columns if side_by_side else _one_by_one
        answer(opened, prompt, max_new_tokens=max_new_tokens, temperature=temperature)


# A word of a slash and letters at the beginning of the line: neither a path (/usr/bin) nor " /help" behind a blank.
COMMAND = re.compile(r"(?P<name>/[^\W\d_]+)(?:\s+|$)(?P<rest>.*)", re.DOTALL)
ENDS = ("/exit", "/quit")
COMMANDS = Bilingual(
    "/system TEXT, /reset, /save FILE.jsonl, /help, /exit and /quit",
    "/system 文本、/reset、/save 文件.jsonl、/help、/exit 和 /quit",
)


def _obey(opened: Chat, name: str, rest: str) -> None:
    """Follows a command, or refuses it."""
    rest = rest.strip()
    match name.lower():
        case "/system":
            opened.system = rest
            opened.reset()
            if opened.system:
                print(both("the system message is set, and a new conversation begins", "已设置系统消息，开始新的对话"))
            else:
                print(both("the system message is gone, and a new conversation begins", "已去掉系统消息，开始新的对话"))
        case "/save" if rest:
            path = Path(os.path.expanduser(rest))  # noqa: PTH111 (which fails where there is no such user)
            try:
                opened.save(path)
            except OutputError as error:  # the chat continues
                print(local(error.args[0]), file=sys.stderr)
            else:
                print(both(f"saved      {path}", f"已保存     {path}"))
        case "/save":
            _refuse(Bilingual(f"{name} lacks the name of a file.", f"{name} 缺少文件名。"))
        case "/reset" | "/help" | "/exit" | "/quit" if rest:
            _refuse(Bilingual(f"{name} takes no words behind it.", f"{name} 之后不能有其他内容。"))
        case "/reset":
            opened.reset()
            print(both("a new conversation begins", "开始新的对话"))
        case "/help":
            print(
                both(
                    "/system TEXT      sets the system message, or takes it out, and begins a new conversation\n"
                    "/reset            begins a new conversation\n"
                    "/save FILE.jsonl  writes the conversation with each model as a row of data\n"
                    "/help             shows this list\n"
                    "/exit, /quit      end the chat, as an empty line does\n"
                    "A blank in front of a line sends it to the models as it is.",
                    "/system 文本      设置系统消息（不写文本则去掉），并开始新的对话\n"
                    "/reset            开始新的对话\n"
                    "/save 文件.jsonl  把与每个模型的对话保存为一行数据\n"
                    "/help             显示本列表\n"
                    "/exit、/quit      结束对话，与空行相同\n"
                    "在行首加一个空格，该行就原样发给模型。",
                )
            )
        case _:
            _refuse(Bilingual(f"{name} is not a command.", f"{name} 不是命令。"))


def _refuse(what: Bilingual) -> None:
    """Says, in one line, what is wrong with a command, which there are, and how such a line becomes a question."""
    print(
        both(
            f"{what} There are {COMMANDS}; a blank in front sends the line to the models.",
            f"{what.zh}命令有 {COMMANDS.zh}；在行首加一个空格，该行就发给模型。",
        ),
        file=sys.stderr,
    )


def _lines() -> Iterator[str]:
    """The lines that are not empty, with the blanks in front of them."""
    if not sys.stdin.isatty():
        yield from (line for line in input_lines() if line.strip())
        return
    while True:
        try:
            line = as_text(input("> "), Bilingual("the question", "问题"))
        except EOFError:
            print()
            return
        if not line.strip():
            return
        yield line


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
