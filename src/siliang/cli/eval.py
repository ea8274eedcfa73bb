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
                "For how many rows texts are written: a number, or all. Default: evaluation.rows. With --harness: the "
                "rows of each task; default: all.",
                "为多少条样本生成文本：数字或 all。默认为 evaluation.rows。与 --harness 同用时是每个任务的样本数，"
                "默认全部。",
            )
        ),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            help=both(
                "Tasks of lm-eval instead of held-out rows: names, .yaml files or folders, with commas between them. "
                "Their code runs.",
                "用 lm-eval 的任务代替验证集：任务名、.yaml 文件或文件夹，用逗号隔开。其中的代码会运行。",
            )
        ),
    ] = None,
    few_shot: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=both(
                "With --harness: examples in front of each question. Default: the task's own number.",
                "与 --harness 同用：每个问题前的示例数。默认由任务决定。",
            ),
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            help=both("With --harness: ask in the run's template.", "与 --harness 同用：用运行的模板提问。"),
        ),
    ] = False,
    json: Json = False,
    base: Base = None,
    force: Force = False,
) -> None:
    """Evaluate a run on its held-out rows, on --data, or on tasks of lm-eval (--harness); for labels, also each class,
    the confusion matrix and the most confident mistakes."""
    if data is not None and (not data.strip() or "\0" in data):
        raise ConfigError(
            Bilingual(
                f"--data {data!r}: give a file, a folder, or the name of a dataset on the Hub.",
                f"--data {data!r}：请给出文件、文件夹或 Hub 上的数据集名。",
            )
        )
    settings = _settings(measures, rows)
    for option, given in {"--few-shot": few_shot is not None, "--chat": chat}.items():
        if given and harness is None:
            raise ConfigError(
                Bilingual(
                    f"{option} goes with --harness: name its tasks, or leave {option} out.",
                    f"{option} 与 --harness 同用：请写明任务，或去掉 {option}。",
                )
            )
    for option, value in {"--data": data, "--measures": measures}.items():
        if harness is not None and value is not None:
            raise ConfigError(
                Bilingual(
                    f"{option} does not go with --harness, whose tasks have their own data and metrics: leave one out.",
                    f"{option} 不能与 --harness 同用，因为后者的任务有自己的数据和指标：请去掉其中一个。",
                )
            )
    check_folders(run)
    with importing():
        from siliang.cli.show import metrics_line, quiet_loading
        from siliang.data.example_set import SHOWN_BAD_ROWS, first_rows
        from siliang.hardware import find_device
        from siliang.run_folder import open_run
        from siliang.use.evaluate import evaluation, with_evaluation

        quiet_loading()
    opened = open_run(run, base=base, force=force, device=find_device())
    if harness is not None:
        from siliang.config.section import split_names
        from siliang.use.harness import keep_in_record, run_harness

        most = settings.get("rows")
        result = run_harness(
            opened, split_names(harness), rows=most if isinstance(most, int) else None, few_shot=few_shot, chat=chat
        )
        lost = keep_in_record(opened, result, few_shot=few_shot, chat=chat)
        show_notes([*(opened.trained.notes if opened.trained else []), *([lost] if lost else [])])
        if json:
            print_json({**result.metrics, "rows": result.rows, "versions": result.versions})
            return
        width = max(map(len, result.metrics), default=0)
        for name, value in result.metrics.items():
            n, version = result.rows.get(name.partition("/")[0]), result.versions.get(name.partition("/")[0])
            of, of_zh = ("", "") if version is None else (f", version {version}", f"，版本 {version}")
            print(f"{name:<{width}}  {value:.4f}  " + both(f"{n} rows{of}", f"{n} 条{of_zh}"))
        return
    found = evaluation(with_evaluation(opened, settings) if settings else opened, data)
    notes = list(opened.trained.notes) if opened.trained else []
    if data is None and not opened.record.rows.eval:
        notes.append(
            both(
                "the run has no held-out rows: these metrics are on its training rows",
                "这次训练没有验证集：以下指标是在训练样本上测得的",
            )
        )
    if bad := found.skipped:
        shown = first_rows(bad, SHOWN_BAD_ROWS)
        notes.append(
            both(
                f"{len(bad):,} rows cannot be used and are not measured (data.skip_bad_rows): {shown}",
                f"{len(bad):,} 条样本无法使用，未参与评估（data.skip_bad_rows）：{shown.zh}",
            )
        )
    metrics = [metric.name for metric in opened.task.metrics if metric.name in opened.record.final]
    if absent := [name for name in metrics if name not in found.metrics]:
        notes.append(
            both(
                f"not measured: {', '.join(absent)}, for which these rows are not enough",
                f"未测 {'、'.join(absent)}：这些样本不足以计算",
            )
        )
    learned = opened.record.classification
    if data is None and learned is not None and learned.chosen_on is not None:
        notes.append(
            both(
                "temperature or thresholds were chosen on these rows: expect a little less on new ones (--data); the "
                "metrics in run.json are without them",
                "温度或阈值就是在这些样本上选取的：在新样本（--data）上效果会略低；run.json 中的指标没有使用它们",
            )
        )
    show_notes(notes)
    if json:
        extra: dict[str, object] = {"signatures": found.signatures} if found.signatures else {}
        extra |= {"classes": found.report.model_dump(mode="json")} if found.report is not None else {}
        print_json({**found.metrics, **extra})
        return
    print(metrics_line(found.metrics))
    for name, signature in found.signatures.items():
        print(f"{name:<12}{signature}")
    if found.report is not None:
        from siliang.cli.show_classes import show_classes

        show_classes(found.report, learned)


def _settings(measures: str | None, rows: str | None) -> dict[str, object]:
    """The settings of evaluations that the options name."""
    settings: dict[str, object] = {} if measures is None else {"measures": measures}
    if rows is not None:
        if rows != "all" and not (rows.isascii() and rows.isdecimal() and 0 < int(rows[:19]) < 2**31):
            raise ConfigError(
                Bilingual(
                    f"--rows {rows!r}: give a number from 1 on, or all.",
                    f"--rows {rows!r}：请给出 1 以上的数字，或 all。",
                )
            )
        settings["rows"] = None if rows == "all" else int(rows)
    return settings
