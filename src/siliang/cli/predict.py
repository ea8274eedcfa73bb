"""siliang predict: classes, tags or answers for texts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from siliang.cli.console import as_text, command_line, input_lines, print_json
from siliang.cli.options import NewTokens, RepetitionPenalty, Seed, Stop, System, Temperature, TopK, TopP, sampling_of
from siliang.cli.used_run import Base, Force, Run, TaskId, check_folders, show_notes
from siliang.environment import importing
from siliang.language import Bilingual, both
from siliang.terminal import one_line
from siliang.types import ConfigError

if TYPE_CHECKING:
    from siliang.run_folder import OpenedRun
    from siliang.tasks import Prediction, Task
    from siliang.use.predict import Input


def predict(
    run: Run,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help=both(
                "Texts, or data files (.csv, .jsonl, ...). Default: standard input, one text per line.",
                "文本，或数据文件（.csv、.jsonl ……）；都没有给出时，从标准输入读取，每行一条文本。",
            )
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help=both(
                "For a run of question_ans: the context of all given questions.",
                "用于 question_ans 的运行：给出的所有问题所针对的段落。",
            )
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help=both(
                "A data file whose rows are predicted and written to --output.",
                "数据文件：逐行预测，结果写入 --output。",
            )
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help=both(
                "For --data: a new .csv, .tsv, .jsonl or .parquet file, with all columns and the predictions. The same "
                "command resumes where it was stopped.",
                "配合 --data：新的 .csv、.tsv、.jsonl 或 .parquet 文件，含全部原有的列和预测结果。中断后再次运行"
                "同一命令即可继续。",
            )
        ),
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            min=1, help=both("The most probable classes to list, with probabilities.", "列出概率最高的几个类别。")
        ),
    ] = 1,
    min_confidence: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help=both(
                'Below this probability a prediction is "no label". Default: classification.min_confidence of the run.',
                "概率低于此值时预测为“无标签”。默认为该运行的 classification.min_confidence。",
            ),
        ),
    ] = None,
    prompt_name: Annotated[
        str | None,
        typer.Option(
            help=both(
                "For a run that gives vectors: the prompt of single texts, query, document or none. Default: "
                "embedding.prompt_name of the run.",
                "用于给出向量的运行：单段文本所用的提示，query、document 或 none。默认为该运行的 "
                "embedding.prompt_name。",
            )
        ),
    ] = None,
    max_new_tokens: NewTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    system: System = "",
    seed: Seed = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=both(
                "Texts that are generated at once. Default: that of the training.", "同时生成的文本数。默认与训练相同。"
            ),
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help=both("One JSON object per line.", "每行输出一个 JSON 对象。"))
    ] = False,
    task_id: TaskId = None,
    base: Base = None,
    force: Force = False,
) -> None:
    """Predict with a trained run: the class, the labels or the number of a text, the tagged spans in it, the answer to
    a question, the reward of an answer; with --data, also the texts that a run generates, by the options of sampling.

    A file must have the columns that the run was trained on. A tab separates the two texts of a pair, or a question and
    its context. An empty line, or a row without text, gives an empty line.
    """
    check_folders(run, or_models=True)
    if (data is None) != (output is None) or (data is not None and (texts or context is not None)):
        raise ConfigError(
            Bilingual(
                "--data and --output belong together, without other texts: siliang predict RUN --data a.csv --output "
                "b.csv.",
                "--data 和 --output 须一起使用，且不能再给出其他文本："
                "siliang predict RUN --data a.csv --output b.csv。",
            )
        )
    with importing():
        from siliang.cli.show import quiet_loading
        from siliang.data.cells import is_blank
        from siliang.hardware import find_device
        from siliang.run_folder import find_run_or_model, open_trained
        from siliang.types import DataError
        from siliang.use.predict import check_predicts, predict_tasks
        from siliang.use.predict import predict as make
        from siliang.use.predict_file import check_no_writing, check_output, predict_file

        quiet_loading()
    if output is not None:
        check_output(output)
    opened = open_trained(find_run_or_model(run, base=base, force=force), device=find_device())
    opened.task_id, opened.top, opened.min_confidence = task_id, top, min_confidence
    opened.prompt_name = prompt_name
    show_notes(opened.trained.notes if opened.trained else ())
    how = sampling_of(max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed)
    system = as_text(system, "--system")
    if data is not None and output is not None:
        rows = predict_file(
            opened,
            str(data),
            output,
            sampling=how,
            system=system,
            batch_size=batch_size,
            progress=_show_progress(),
        )
        print(both(f"saved      {output}: {rows:,} rows", f"已保存     {output}：{rows:,} 行"))
        return
    check_predicts(opened)
    check_no_writing(opened, how, system, batch_size)
    task = opened.task
    given: list[Input] = list(input_lines()) if not texts else []
    tasks: list[int | None] = [None] * len(given)
    if texts:
        given, tasks = _given(opened, [as_text(text, Bilingual("a text", "文本")) for text in texts])
    if context is not None:
        if "context" not in task.inputs:
            raise ConfigError(
                Bilingual(
                    "--context is only for runs of question_ans, and this run is not one.",
                    "--context 只用于 question_ans 的运行，而这次运行不是。",
                )
            )
        given = [(text, context) if isinstance(text, str) and not is_blank(text) else text for text in given]
    wanted = [i for i, text in enumerate(given) if not isinstance(text, str) or not is_blank(text)]
    asked = [given[i] for i in wanted]
    if not asked:
        raise DataError(
            Bilingual(
                f"no text given: {command_line('predict', run, 'a text')}, or one text per line on standard input.",
                f"没有给出文本：{command_line('predict', run, '一段文本')}，或从标准输入每行读入一段。",
            )
        )
    of_tasks = [tasks[i] for i in wanted]
    found = predict_tasks(opened, asked, of_tasks) if any(t is not None for t in of_tasks) else make(opened, asked)
    for text in given:
        blank = isinstance(text, str) and is_blank(text)
        _show(None if blank else next(found), task, as_json=json)


def _show_progress() -> Callable[[int], None] | None:
    """Shows the rows that are done on a terminal; None where there is no terminal."""
    if not sys.stderr.isatty():
        return None
    started = time.monotonic()
    before: list[int] = []  # rows of an earlier run are there at once

    def show(rows: int) -> None:
        before.append(rows)
        rate = (rows - before[0]) / max(time.monotonic() - started, 1e-9)
        print(
            both(f"predict    {rows:,} rows, {rate:,.0f} a second", f"预测       {rows:,} 行，每秒 {rate:,.0f} 行"),
            file=sys.stderr,
        )

    return show


def _given(run: OpenedRun, arguments: list[str]) -> tuple[list[Input], list[int | None]]:
    """The texts of the arguments, and of the data files among them, each with its task where a file has a column of
    tasks. An argument that looks like a data file must exist."""
    from siliang.data.text_files import FILE_KINDS, kind_of
    from siliang.types import DataError
    from siliang.use.predict import read_rows

    found: list[Input] = []
    tasks: list[int | None] = []
    for argument in arguments:
        is_file_name = kind_of(Path(argument)) in FILE_KINDS and len(argument.splitlines()) == 1
        if is_file_name and os.path.isfile(os.path.expanduser(argument)):  # noqa: PTH113, PTH111 (not always a path)
            rows = list(read_rows(run, argument))
            found, tasks = [*found, *(row.input for row in rows)], [*tasks, *(row.task for row in rows)]
        elif is_file_name and len(argument.split()) == 1:
            raise DataError(Bilingual(f"There is no data file {argument}.", f"找不到数据文件 {argument}。"))
        else:
            found.append(argument)
            tasks.append(None)
    return found, tasks


def _show(p: Prediction | None, task: Task, *, as_json: bool) -> None:
    """Prints one line; an empty line for an empty text."""
    if as_json:
        print_json(dict(task.blank) if p is None else p.values())
        return
    cells = [""]
    if p is not None:
        probability = [] if p.probability is None else [f"{p.probability:.2f}"]
        cells = [p.predicted, *probability, *p.inputs]
    print("\t".join(map(one_line, cells)))
