"""siliang predict: classes for texts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from siliang.cli.console import as_text, command_line, input_lines, print_json
from siliang.cli.used_run import Base, Force, Run, show_notes

if TYPE_CHECKING:
    from siliang.run_folder import OpenedRun
    from siliang.use import Prediction


def predict(
    run: Run,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts, or files of data (.csv, .jsonl, ...); without any, a text a line from standard input."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    base: Base = None,
    force: Force = False,
) -> None:
    """Classify texts with a trained run.

    Of a file the columns are read that the run was trained on. Of pairs of texts, the two have a tab between them. An
    empty line, or a row without a text, keeps its place as an empty line.
    """
    from siliang.cli.show import quiet_loading

    quiet_loading()
    from siliang.hardware import find_device
    from siliang.run_folder import open_run
    from siliang.types import DataError
    from siliang.use import predict as classify

    opened = open_run(run, base=base, force=force, device=find_device())
    show_notes(opened.trained.notes if opened.trained else ())
    given = _given(opened, [as_text(text, "a text") for text in texts]) if texts else list(input_lines())
    asked = [text for text in given if not isinstance(text, str) or text.strip()]
    if not asked:
        raise DataError(
            f"no text given: {command_line('predict', run, 'a text')}, or one text a line on standard input."
        )
    found = classify(opened, asked)
    for text in given:
        blank = isinstance(text, str) and not text.strip()
        _show(None if blank else next(found), as_json=json)


def _given(run: OpenedRun, arguments: list[str]) -> list[str | tuple[str, str]]:
    """The texts, and those in files of data among them: what is named as such a file must be there."""
    from siliang.data.sources import FILE_KINDS
    from siliang.data.text_files import kind_of
    from siliang.types import DataError
    from siliang.use import read_texts

    found: list[str | tuple[str, str]] = []
    for argument in arguments:
        named = kind_of(Path(argument)) in FILE_KINDS and len(argument.splitlines()) == 1
        if named and os.path.isfile(os.path.expanduser(argument)):  # noqa: PTH113, PTH111 (a text may be any)
            found += read_texts(run, argument)
        elif named and len(argument.split()) == 1:
            raise DataError(f"There is no data file {argument}.")
        else:
            found.append(argument)
    return found


def _show(p: Prediction | None, *, as_json: bool) -> None:
    if as_json:
        empty = {"text": "", "label": None, "probability": None}
        pair = {} if p is None or p.pair is None else {"pair": p.pair}
        shown = {"text": p.text, **pair, "label": p.label, "probability": round(p.probability, 4)} if p else empty
        print_json(shown)
    elif p is None:
        print()
    else:
        text = p.text if p.pair is None else f"{p.text}\t{p.pair}"
        print(f"{p.label}\t{p.probability:.2f}\t{text}")
