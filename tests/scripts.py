"""Runs scripts in separate processes, in which the slow imports are done already."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

SLOW = ["datasets", "transformers.trainer", "transformers.models.auto.modeling_auto", "siliang.peft_api.model"]


def run_script(script: Path, *arguments: object, folder: Path) -> str:
    """Runs `script` in `folder` and returns what it printed; fails with the end of its stderr."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW)
    process = context.Process(target=_main, args=(script, [str(a) for a in arguments], folder))
    process.start()
    process.join()
    assert process.exitcode == 0, (folder / "stderr").read_text()[-3000:]
    return (folder / "stdout").read_text()


def _main(script: Path, arguments: list[str], folder: Path) -> None:
    gc.freeze()  # as conftest.py does
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
