"""siliang eval: a run's metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from siliang.cli.console import print_json


def evaluate(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    data: Annotated[str | None, typer.Option(help="Other data than the run's held-out rows.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure a run: loss, and accuracy or perplexity, on its held-out rows or on --data."""
    from siliang.cli.show import quiet_loading

    quiet_loading()
    from siliang.hardware import find_device
    from siliang.run_folder import open_run
    from siliang.use import evaluate as measure

    metrics = measure(open_run(run, device=find_device()), data)
    if json:
        print_json(metrics)
    else:
        print("  ".join(f"{k} {v:.0f}" if k == "rows" else f"{k} {v:.4f}" for k, v in metrics.items()))
