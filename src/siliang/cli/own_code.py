"""Asks the user in a terminal, once, whether a model's custom code may run."""

from __future__ import annotations

import os
import sys

from siliang.language import both
from siliang.terminal import one_line
from siliang.types import ConfigError, OwnCodeError


def may_run(error: OwnCodeError) -> bool:
    """Shows the model's code files and asks. The answer yes is saved in the user's file. Returns False if nobody can be
    asked: in a pipe, and in a process of a distributed training."""
    from siliang.safety.permissions import allow_code, keep_allowed

    if not (sys.stdin.isatty() and sys.stderr.isatty()) or "RANK" in os.environ:
        return False
    lines = [
        both(
            f"{error.model} has custom Python code, which can do anything that you can do. Read it first:",
            f"{error.model} 自带 Python 代码，运行后能做你能做的一切。请先阅读：",
        ),
        *(f"  {error.folder}/{file}" for file in error.files),
        both(f"SHA-256 of the folder: {error.sha256}", f"文件夹的 SHA-256：{error.sha256}"),
    ]
    print("\n".join(one_line(line) for line in lines), file=sys.stderr)
    question = both("Allow this code to run, now and later? [y/N] ", "现在和以后都允许运行这份代码吗？[y/N] ")
    print(question, end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        return False
    try:
        path = keep_allowed(error.sha256, error.folder)
        print(both(f"saved in {path}", f"已记录在 {path}"), file=sys.stderr)
    except (OSError, ConfigError) as problem:
        print(both(f"warning: not saved for later: {problem}", f"警告：未能记录下来：{problem}"), file=sys.stderr)
        allow_code(error.sha256)
    return True
