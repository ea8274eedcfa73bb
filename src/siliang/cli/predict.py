"""siliang predict: classes, tags or answers for texts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from siliang.cli.console import as_text, command_line, input_lines, print_json
from siliang.cli.used_run import Base, Force, Run, show_notes
from siliang.terminal import one_line

if TYPE_CHECKING:
    from siliang.run_folder import OpenedRun
    from siliang.use import Answer, Asked, Prediction, TaggedWords


def predict(
    run: Run,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts, or files of data (.csv, .jsonl, ...); without any, a text a line from standard input."
        ),
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Of a run that answers questions: what all the questions given are about.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    base: Base = None,
    force: Force = False,
) -> None:
    """Predict with a trained run: the class of a text, the tagged spans in it, or the answer to a question.

    Of a file the columns are read that the run was trained on. Of pairs of texts, and of a question and its context,
    the two have a tab between them. An empty line, or a row without a text, keeps its place as an empty line.
    """
    from siliang.cli.show import quiet_loading

    quiet_loading()
    from siliang.hardware import find_device
    from siliang.run_folder import open_run
    from siliang.types import ConfigError, DataError, TaskType
    from siliang.use import check_predicts, predict_any

    opened = open_run(run, base=base, force=force, device=find_device())
    show_notes(opened.trained.notes if opened.trained else ())
    check_predicts(opened)
    given = _given(opened, [as_text(text, "a text") for text in texts]) if texts else list(input_lines())
    if context is not None:
        if opened.config.task is not TaskType.QUESTION_ANS:
            raise ConfigError("--context is for a run that answers questions, and this one does not.")
        given = [(text, context) if isinstance(text, str) and text.strip() else text for text in given]
    asked = [text for text in given if not isinstance(text, str) or text.strip()]
    if not asked:
        raise DataError(
            f"no text given: {command_line('predict', run, 'a text')}, or one text a line on standard input."
        )
    found = predict_any(opened, asked)
    for text in given:
        blank = isinstance(text, str) and not text.strip()
        _show(None if blank else next(found), opened, as_json=json)


def _given(run: OpenedRun, arguments: list[str]) -> list[Asked]:
    """The texts, and those in files of data among them: what is named as such a file must be there."""
    from siliang.data.text_files import FILE_KINDS, kind_of
    from siliang.types import DataError
    from siliang.use import read_texts

    found: list[Asked] = []
    for argument in arguments:
        named = kind_of(Path(argument)) in FILE_KINDS and len(argument.splitlines()) == 1
        if named and os.path.isfile(os.path.expanduser(argument)):  # noqa: PTH113, PTH111 (a text may be any)
            found += read_texts(run, argument)
        elif named and len(argument.split()) == 1:
            raise DataError(f"There is no data file {argument}.")
        else:
            found.append(argument)
    return found


def _show(p: Prediction | TaggedWords | Answer | None, run: OpenedRun, *, as_json: bool) -> None:
    from siliang.types import TaskType
    from siliang.use import Answer, Prediction

    if isinstance(p, Prediction):
        pair = {} if p.pair is None else {"pair": p.pair}
        values = {"text": p.text, **pair, "label": p.label, "probability": round(p.probability, 4)}
        cells = [p.label, f"{p.probability:.2f}", p.text, *pair.values()]
    elif isinstance(p, Answer):
        values = {
            "question": p.question,
            "context": p.context,
            "answer": p.text,
            "start": p.begin,
            "end": p.end,
            "probability": round(p.probability, 4),
        }
        cells = [p.text if p.begin is not None else "(no answer)", f"{p.probability:.2f}", p.question]
    elif p is not None:
        spans = [{"text": s.text, "tag": s.tag, "words": list(s.words)} for s in p.spans]
        values = {"text": p.text, "words": list(p.words), "tags": list(p.tags), "spans": spans}
        cells = [", ".join(f"{s.text} {s.tag}" for s in p.spans), p.text]
    else:
        empty = (
            {"question": "", "answer": None}
            if run.config.task is TaskType.QUESTION_ANS
            else {"text": "", "label": None}
        )
        values, cells = empty | {"probability": None}, [""]
    if as_json:
        print_json(values)
    else:
        print("\t".join(map(one_line, cells)))
