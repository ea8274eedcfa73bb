"""siliang eval: the metrics of a run."""

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
        typer.Option(
            help=both("Data to evaluate on. Default: the run's held-out rows.", "评估所用的数据。默认为运行的验证集。")
        ),
    ] = None,
    measures: Annotated[
        str | None,
        typer.Option(
            help=both(
                "Measures of written texts, such as rouge_l,bleu,chrf. Default: evaluation.measures.",
                "所写文本的指标，如 rouge_l,bleu,chrf。默认为 evaluation.measures。",
            )
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help=both(
                "For how many rows texts are written: a number, or all. Default: evaluation.rows.",
                "为多少条样本生成文本：数字或 all。默认为 evaluation.rows。",
            )
        ),
    ] = None,
    json: Json = False,
    base: Base = None,
    force: Force = False,
) -> None:
    """Evaluate a run on its held-out rows or on --data: loss, and accuracy or perplexity."""
    if data is not None and (not data.strip() or "\0" in data):
        raise ConfigError(
            Bilingual(
                f"--data {data!r}: give a file, a folder, or the name of a dataset on the Hub.",
                f"--data {data!r}：请给出文件、文件夹或 Hub 上的数据集名。",
            )
        )
    settings = _settings(measures, rows)
    check_folders(run)
    with importing():
        from siliang.cli.show import metrics_line, quiet_loading
        from siliang.hardware import find_device
        from siliang.run_folder import open_run
        from siliang.use.evaluate import evaluation, with_evaluation

        quiet_loading()
    opened = open_run(run, base=base, force=force, device=find_device())
    found = evaluation(with_evaluation(opened, settings) if settings else opened, data)
    notes = list(opened.trained.notes) if opened.trained else []
    if data is None and not opened.record.rows.eval:
        notes.append(
            both(
                "the run has no held-out rows: these metrics are on its training rows",
                "这次训练没有验证集：以下指标是在训练样本上测得的",
            )
        )
    show_notes(notes)
    if json:
        print_json({**found.metrics, **({"signatures": found.signatures} if found.signatures else {})})
    else:
        print(metrics_line(found.metrics))
        for name, signature in found.signatures.items():
            print(f"{name:<12}{signature}")


def _settings(measures: str | None, rows: str | None) -> dict[str, object]:
    """The settings of evaluations that the options name."""
    settings: dict[str, object] = {} if measures is None else {"measures": measures}
    if rows is not None:
        if rows != "all" and not rows.isdecimal():
            raise ConfigError(
                Bilingual(f"--rows {rows!r}: give a number, or all.", f"--rows {rows!r}：请给出数字，或 all。")
            )
        settings["rows"] = None if rows == "all" else int(rows)
    return settings
