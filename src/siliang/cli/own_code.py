"""Asks a user in a terminal, once, whether a model's own code may run."""

from __future__ import annotations

import os
import sys

from siliang.terminal import one_line
from siliang.types import ConfigError, OwnCodeError


def may_run(error: OwnCodeError) -> bool:
    """Shows what wants to run and asks; the answer yes is kept in the user's own file. No where nobody can be asked:
    in a pipe, and in one of a training's processes."""
    from siliang.permissions import allow_code, keep_allowed

    if not (sys.stdin.isatty() and sys.stderr.isatty()) or "RANK" in os.environ:
        return False
    lines = [
        f"{error.model} brings Python code of its own, which may do anything that you may do. Read it first:",
        *(f"  {error.folder}/{file}" for file in error.files),
        f"SHA-256 of the folder: {error.sha256}",
    ]
    print("\n".join(one_line(line) for line in lines), file=sys.stderr)
    print("Let this code run, now and later? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        return False
    try:
        print(f"kept in {keep_allowed(error.sha256, error.folder)}", file=sys.stderr)
    except (OSError, ConfigError) as problem:
        print(f"warning: not kept for later: {problem}", file=sys.stderr)
        allow_code(error.sha256)
    return True
