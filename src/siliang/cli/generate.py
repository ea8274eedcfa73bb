"""siliang generate: text from a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from siliang.cli.console import as_text


def generate(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    instruction: Annotated[str, typer.Argument(help="What to ask, put into the run's own template.")],
    input: Annotated[str, typer.Option(help="What the instruction is about.")] = "",
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text as it is, without a template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most probable token.")] = 0.0,
    base: Annotated[bool, typer.Option("--base", help="Show the base model's answer before the tuned one.")] = False,
) -> None:
    """Write text with a trained run."""
    from siliang.cli.show import quiet_loading

    instruction, input = as_text(instruction, "the instruction"), as_text(input, "--input")
    quiet_loading()
    from siliang.hardware import find_device
    from siliang.run_folder import open_run
    from siliang.use import generate as write

    opened = open_run(run, device=find_device())
    for of_base in (True, False) if base else (False,):
        if base:
            print("base:" if of_base else "\ntuned:")
        print(
            write(
                opened,
                instruction,
                input,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                plain=plain,
                base=of_base,
            )
        )
