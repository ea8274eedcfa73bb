"""siliang predict: classes for texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from siliang.cli.console import as_text, input_lines, print_json


def predict(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; without any, one a line from standard input.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Classify texts with a trained run."""
    from siliang.cli.show import quiet_loading

    quiet_loading()
    from siliang.hardware import find_device
    from siliang.run_folder import open_run
    from siliang.types import DataError
    from siliang.use import predict as classify

    opened = open_run(run, device=find_device())
    given = [as_text(text, "a text") for text in texts] if texts else list(input_lines())
    if not given:
        raise DataError(f'no text given: siliang predict {run} "a text", or one text a line on standard input.')
    for p in classify(opened, given):
        if json:
            print_json({"text": p.text, "label": p.label, "probability": round(p.probability, 4)})
        else:
            print(f"{p.label}\t{p.probability:.2f}\t{p.text}")
