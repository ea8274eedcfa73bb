"""The one door of all that is printed: secrets are hidden, control characters escaped, what the encoding cannot show is
replaced; JSON stays JSON, and what comes in must be text."""

from __future__ import annotations

import codecs
import json
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siliang.language import Bilingual, local
from siliang.secrets import redacted, shortened
from siliang.terminal import clean_output, clean_standard_streams, json_escaped, raw_stream, shell_command, shown
from siliang.types import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

HANDLER = "siliang.replace"
# For characters that siliang itself prints; each stands for one character, so that columns stay columns.
PLAIN = {
    "★": "*", "⚠": "!", "±": "~", "–": "-", "—": "-", "…": ".", "·": ".", "×": "x", "✓": "v", "✗": "x", "“": '"',
    "”": '"', "‘": "'", "’": "'", "█": "#", "▓": "%", "▒": "+", "░": ":", "━": "=",
    "╸": "=", "╺": "-", "─": "-", "│": "|",
}  # fmt: skip


@contextmanager
def prepared_console() -> Iterator[None]:
    """Within the block standard output and error are screens (terminal.py), and show every text: a character that their
    encoding lacks becomes another one.

    Without it a run on a Windows console (GBK, cp1252), or behind a pipe with LC_ALL=C, ends at the first emoji of its
    data.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors=HANDLER)
    clean_standard_streams()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def rich_console(**settings: Any) -> Console:
    """A console of Rich's that writes its own escapes to standard output, and those of nobody else."""
    from siliang.cli.shown_console import ShownConsole

    return ShownConsole(file=raw_stream(sys.stdout), highlight=False, **settings)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = "".join(PLAIN.get(character, "?") for character in error.object[error.start : error.end])
    return shown, error.end


codecs.register_error(HANDLER, _replace)


def print_json(value: object, indent: int | None = None) -> None:
    """Prints a value as JSON that every reader takes: nan and infinity as null, and escapes where the encoding lacks a
    character or a terminal would obey it. Its texts keep their content, but for secrets."""
    unicode = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "").startswith("utf")
    value = redacted(_finite(value))
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    if not unicode or any("\ud800" <= c <= "\udfff" for c in text):
        text = json.dumps(value, indent=indent)
    print(json_escaped(text), file=raw_stream(sys.stdout))


def print_product(text: str) -> None:
    """Prints a text that the command was run for: on a terminal as all others, into a file or a pipe `clean_output`."""
    print(shown(text) if sys.stdout.isatty() else clean_output(text), file=raw_stream(sys.stdout))


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def input_lines() -> Iterator[str]:
    """The lines of standard input, without their ends.

    Raises:
        ConfigError: They are not in its encoding.
    """
    number = 0
    try:
        for line in sys.stdin:
            number += 1
            yield as_text(line.rstrip("\r\n"), Bilingual(f"line {number} of standard input", f"标准输入第 {number} 行"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            Bilingual(
                f"standard input is not {error.encoding} after line {number}: convert it to UTF-8, "
                "or say what it is with PYTHONIOENCODING, such as PYTHONIOENCODING=gbk.",
                f"标准输入在第 {number} 行之后不是 {error.encoding} 编码：请转换为 UTF-8，"
                "或用 PYTHONIOENCODING 指明编码，例如 PYTHONIOENCODING=gbk。",
            )
        ) from None


def as_text(text: str, what: str) -> str:
    """`text`, if all of it is text.

    Raises:
        ConfigError: Some bytes of it were none.
    """
    if any("\ud800" <= c <= "\udfff" for c in text):
        encoding = sys.getfilesystemencoding()
        raise ConfigError(
            Bilingual(
                f"{what} holds bytes that are not {encoding}: {shortened(text, 80)!r}. Convert it to UTF-8.",
                f"{local(what, 'zh')}含有不属于 {encoding} 的字节：{shortened(text, 80)!r}。请转换为 UTF-8。",
            )
        )
    return text


def named(settings: Path | None) -> str:
    """Where settings come from, for the errors: their file, or the command line."""
    return str(settings) if settings else Bilingual("the flags", "命令行参数")


def command_line(*words: object) -> str:
    """A siliang command as it can be pasted into a shell from here, where siliang may be on no path."""
    started = Path(sys.argv[0])
    if shutil.which("siliang") or not sys.argv[0]:
        program: tuple[object, ...] = ("siliang",)
    elif started.name == "__main__.py":
        program = (sys.executable, "-P", "-m", "siliang")  # -P: no module of the folder at hand
    else:
        program = (started if started.name == "siliang" and len(started.parts) > 1 else ".venv/bin/siliang",)
    return shell_command(*program, *words)
