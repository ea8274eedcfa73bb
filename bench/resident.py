"""Predicted against measured resident memory of `siliang train` on the CPU, for the bench's workloads.

python -m bench.resident          every method of W1 to W4, and full tuning of W1's model
python -m bench.resident --only W3

Each run is a separate process, and the first of its machine: no earlier run has corrected the constants.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench.command import train
from bench.folders import make_ready
from bench.workloads import ON_CPU, WORKLOADS, Method, Workload, run_config

STEPS = 6


def measure(workload: Workload, method: Method, scratch: Path) -> tuple[int, int]:
    """(predicted, measured) bytes at the peak of a few steps.

    Raises:
        RuntimeError: The run failed.
    """
    make_ready(workload, scratch, smoke=False)
    folder = scratch / "runs" / f"{workload.name}-{method.label}"
    config = run_config(workload, method, scratch, smoke=False, steps=STEPS, log_every=STEPS)
    record, _ = train(config.model_dump(mode="json"), folder, env={"SILIANG_CACHE": str(folder / "cache")})
    return record.memory.predicted_bytes or 0, record.memory.peak_bytes


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser("python -m bench.resident", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ON_CPU, default=ON_CPU, metavar="W")
    names = parser.parse_args().only
    print(
        "| workload | method | predicted, MB | measured, MB | off by |\n| --- | --- | ---: | ---: | ---: |", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="siliang-resident-") as scratch:
        for workload in (WORKLOADS[name] for name in names):
            full = (Method("full", "full", None),) if workload.name == "W1" else ()
            for method in (*workload.methods, *full):
                predicted, measured = measure(workload, method, Path(scratch))
                print(
                    f"| {workload.name} | {method.label} | {predicted / 1e6:,.0f} | {measured / 1e6:,.0f} "
                    f"| {100 * (predicted / measured - 1):+.1f}% |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
