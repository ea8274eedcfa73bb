"""siliang demo: a small comparison on the embedded default."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from siliang.cli.console import command_line


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the runs; a number is added where it exists.")] = Path(
        "siliang-demo"
    ),
    lang: Annotated[str, typer.Option(help="The report's language: en or zh.")] = "en",
) -> None:
    """Compare five methods on reviews that come along: a table and a page in under 5 minutes, no network, no GPU."""
    from siliang.cli.compare import run
    from siliang.cli.show import duration, quiet_loading
    from siliang.demo import demo_config, encoder_folder
    from siliang.report.words import words

    words(lang)
    encoder_folder()
    quiet_loading()
    started = time.perf_counter()
    folder = _fresh(output)
    print(
        "Is a review positive or negative? The base model is all-MiniLM-L6-v2, an encoder of 22.7 million parameters."
    )
    material = run(demo_config(folder), jobs=1, language=lang)
    best = next((group for group in material.groups if group.label == "LoRA" and group.finished), None)
    print(
        f"           {duration(time.perf_counter() - started)} in all; open it in a browser. The runs are in {folder}."
    )
    if best is None:
        raise typer.Exit(1)
    print("Ask one of them:")
    print(f'  echo "Not what I paid for." | {command_line("chat", best.finished[0].folder)}')
    print("and the same on your own data:")
    own = ("--model", "MODEL_FOLDER", "--data", "reviews.csv", "--task", "seq_cls", "--output", "my-comparison")
    print(f"  {command_line('compare', *own)}")


def _fresh(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that does not exist: nothing is overwritten."""
    for name in (folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 10_000))):
        if not name.exists():
            return name
    raise AssertionError("ten thousand demos")
