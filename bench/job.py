"""One job in a process of its own: python -m bench.job RECORD SCRATCH STARTED

The process imports what the job's library needs, as a user's does, and fills the record. In a peer's own environment
the peer is imported before everything else, which it patches.
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
import traceback
from pathlib import Path


def run_job(path: Path, scratch: Path, started: float) -> None:
    """Reads the record's job, trains, fills the record.

    Args:
        path: The record's file.
        scratch: The folder of models and data.
        started: When the process began, by time.time().
    """
    import torch

    from bench.record import Measurement
    from siliang.environment import bound_kernel_caches

    found = Measurement.model_validate_json(path.read_text(encoding="utf-8"))
    bound_kernel_caches()  # as the command does; peers have their own number in the environment
    if found.job.smoke:
        torch.set_num_threads(1)  # work so small is only held up by threads that wait for each other
        gc.freeze()  # and by looking through all that was imported, each time that garbage is collected
    try:
        measure = importlib.import_module("bench.ours" if found.job.library == "siliang" else "bench.peer").measure
        if found.job.purpose == "time":
            found.imports_s = time.time() - started
        torch.manual_seed(0)
        measure(found, scratch, started)
    except Exception as error:  # a setting that a peer cannot do is a result
        traceback.print_exc()
        found.error = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    path.write_text(found.model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    record, folder, begun, *first = sys.argv[1:]
    for name in first:
        importlib.import_module(name)
    run_job(Path(record), Path(folder), float(begun))
