"""`siliang train` in a separate process, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from siliang.records import Record


def train(
    settings: Mapping[str, Any],
    folder: Path,
    *,
    ranks: int = 1,
    within: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> tuple[Record, str]:
    """What the run has recorded, and what it printed.

    Args:
        settings: Of run.yaml; its output goes into `folder`, which is made.
        within: A command that runs this one.
        env: Added to this process's own.

    Raises:
        RuntimeError: The run failed.
    """
    folder.mkdir(parents=True)
    run = folder / "run.yaml"
    run.write_text(yaml.safe_dump({**settings, "output": str(folder / "run")}), encoding="utf-8")
    command = [*within, sys.executable, "-m", "siliang", "train", str(run)]
    command += ["--devices", str(ranks)] if ranks > 1 else []
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **on_cpu, **(env or {})})
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or done.stdout.strip())
    return Record.read(folder / "run"), done.stdout
