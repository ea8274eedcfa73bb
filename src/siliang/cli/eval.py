"""siliang eval: a run's metrics."""

from __future__ import annotations

from typing import Annotated

import typer

from siliang.cli.console import print_json
from siliang.cli.options import Json
from siliang.cli.used_run import Base, Force, Run, check_folders, show_notes
from siliang.environment import importing
from siliang.language import Bilingual, both
from siliang.types import ConfigError


def evaluate(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(help=both("Other data than the run's held-out rows.", "代替运行的验证集的其他数据。")),
    ] = None,
    json: Json = False,
    base: Base = None,
    force: Force = False,
) -> None:
    """Measure a run: loss, and accuracy or perplexity, on its held-out rows or on --data."""
    if data is not None and (not data.strip() or "\0" in data):
        raise ConfigError(
            Bilingual(
                f"--data {data!r}: name a file, a folder, or a data set on the hub.",
                f"--data {data!r}：请给出文件、文件夹或 Hub 上的数据集名。",
            )
        )
    check_folders(run)
    with importing():
        from siliang.cli.show import figures, quiet_loading
        from siliang.hardware import find_device
        from siliang.run_folder import open_run
        from siliang.use.evaluate import evaluate as measure

        quiet_loading()
    opened = open_run(run, base=base, force=force, device=find_device())
    metrics = measure(opened, data)
    notes = list(opened.trained.notes) if opened.trained else []
    if data is None and not opened.record.rows.eval:
        notes.append(
            both(
                "the run has no held-out rows: these figures are of the rows that it was trained on",
                "这次训练没有验证集：以下指标是在训练样本上测得的",
            )
        )
    show_notes(notes)
    if json:
        print_json(metrics)
    else:
        print(figures(metrics))
