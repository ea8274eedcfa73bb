"""Runs siliang's commands in this process, including commands that must be refused."""

from __future__ import annotations

from faults.commands import Ended, run

__all__ = ["Ended", "refused", "run"]


def refused(*arguments: object, code: int = 2) -> str:
    """Runs a command that must be refused, in one or two lines; returns them."""
    ended = run(*arguments)
    assert ended.code == code, ended
    assert "Traceback" not in ended.err and "a bug in siliang" not in ended.err, ended.err
    assert 1 <= len(ended.err.strip().splitlines()) <= 2, ended.err
    return ended.err
