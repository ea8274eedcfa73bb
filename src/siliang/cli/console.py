"""Console input and output. Output: secrets are hidden, control characters are escaped, and characters that the
encoding lacks are replaced; JSON stays valid. Input must be text."""

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
from siliang.types import ConfigError, DataError, SiliangError

if TYPE_CHECKING:
    from rich.console import Console

HANDLER = "siliang.replace"
# Replacements for characters that siliang prints. Each is one character wide, so that columns stay aligned.
PLAIN = {
    "★": "*", "⚠": "!", "±": "~", "–": "-", "—": "-", "…": ".", "·": ".", "×": "x", "✓": "v", "✗": "x", "“": '"',
    "”": '"', "‘": "'", "’": "'", "█": "#", "▓": "%", "▒": "+", "░": ":", "━": "=",
    "╸": "=", "╺": "-", "─": "-", "│": "|",
}  # fmt: skip


@contextmanager
def prepared_console() -> Iterator[None]:
    """Within the block, standard output and error are cleaned (terminal.py), and characters that their encoding lacks
    are replaced.

    Without it, a run on a Windows console (GBK, cp1252), or in a pipe with LC_ALL=C, fails at the first emoji of its
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
    """A Rich console on standard output. Only Rich's own terminal escapes reach the terminal."""
    from siliang.cli.shown_console import ShownConsole

    return ShownConsole(file=raw_stream(sys.stdout), highlight=False, **settings)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = "".join(PLAIN.get(character, "?") for character in error.object[error.start : error.end])
    return shown, error.end


codecs.register_error(HANDLER, _replace)


def print_json(value: object, indent: int | None = None) -> None:
    """Prints a value as portable JSON: NaN and infinity as null, and escapes for control characters and for characters
    that the encoding lacks. Texts are unchanged except for secrets."""
    unicode = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "").startswith("utf")
    value = redacted(_finite(value))
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    if not unicode or any("\ud800" <= c <= "\udfff" for c in text):
        text = json.dumps(value, indent=indent)
    print(json_escaped(text), file=raw_stream(sys.stdout))


def print_product(text: str) -> None:
    """Prints the result of a command: on a terminal as any other text, to a file or a pipe through `clean_output`."""
    print(shown(text) if sys.stdout.isatty() else clean_output(text), file=raw_stream(sys.stdout))


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def input_lines() -> Iterator[str]:
    """The lines of standard input, without line breaks.

    Raises:
        DataError: The input cannot be decoded.
    """
    number = 0
    try:
        for line in sys.stdin:
            number += 1
            what = Bilingual(f"line {number} of standard input", f"标准输入第 {number} 行")
            yield as_text(line.rstrip("\r\n"), what, DataError)
    except UnicodeDecodeError as error:
        raise DataError(
            Bilingual(
                f"standard input is not {error.encoding} after line {number}: convert it to UTF-8, "
                "or set its encoding with PYTHONIOENCODING, such as PYTHONIOENCODING=gbk.",
                f"标准输入在第 {number} 行之后不是 {error.encoding} 编码：请转换为 UTF-8，"
                "或用 PYTHONIOENCODING 指明编码，例如 PYTHONIOENCODING=gbk。",
            )
        ) from None


def as_text(text: str, what: str, kind: type[SiliangError] = ConfigError) -> str:
    """Returns `text` if it could be decoded.

    Args:
        kind: Of the error.

    Raises:
        ConfigError: Some bytes could not be decoded.
    """
    if any("\ud800" <= c <= "\udfff" for c in text):
        encoding = sys.getfilesystemencoding()
        raise kind(
            Bilingual(
                f"{what} has bytes that are not {encoding}: {shortened(text, 80)!r}. Convert it to UTF-8.",
                f"{local(what, 'zh')}含有不属于 {encoding} 的字节：{shortened(text, 80)!r}。请转换为 UTF-8。",
            )
        )
    return text


def named(settings: Path | None) -> str:
    """The source of the settings, for errors: their file, or the command line."""
    return str(settings) if settings else Bilingual("the flags", "命令行参数")


def command_line(*words: object) -> str:
    """A siliang command that can be pasted into this shell, even if siliang is not on the PATH."""
    started = Path(sys.argv[0])
    if shutil.which("siliang") or not sys.argv[0]:
        program: tuple[object, ...] = ("siliang",)
    elif started.name == "__main__.py":
        program = (sys.executable, "-P", "-m", "siliang")  # -P: import nothing from the current folder
    else:
        program = (started if started.name == "siliang" and len(started.parts) > 1 else ".venv/bin/siliang",)
    return shell_command(*program, *words)
