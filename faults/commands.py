"""Runs siliang's commands in this process, on a terminal or a pipe of any encoding."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from typing import NamedTuple
from unittest import mock

from siliang.cli.main import main


class Ended(NamedTuple):
    """A command that has ended: its exit code, and what it wrote, decoded."""

    code: int
    out: str
    err: str


class _Stream(io.TextIOWrapper):
    """A terminal or a pipe."""

    def __init__(self, encoding: str, *, terminal: bool, content: bytes = b"") -> None:
        super().__init__(io.BytesIO(content), encoding=encoding, errors="strict", write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


def run(
    *arguments: object, encoding: str = "utf-8", terminal: bool = False, stdin: bytes = b"", asked: bool = False
) -> Ended:
    """Runs a command.

    Args:
        asked: A person sits before it: standard input and error are a terminal.
    """
    out, err = (_Stream(encoding, terminal=terminal or by_error) for by_error in (False, asked))
    code: object = 0
    shown = warnings.showwarning
    with (
        mock.patch.object(sys, "argv", ["siliang", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", _Stream(encoding, terminal=asked, content=stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
    warnings.showwarning = shown
    assert isinstance(code, int)
    return Ended(code, out.text, err.text)
