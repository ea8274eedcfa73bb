"""The common options of the commands that use a trained run: the location of its base model, and --force."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperCommand

from siliang.language import both, local
from siliang.terminal import one_line

if TYPE_CHECKING:
    from typer._click import Context

Run = Annotated[
    Path,
    typer.Argument(help=both("The run's folder, or one of its checkpoints.", "运行的文件夹，或其中的一个检查点。")),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="FOLDER_OR_NAME",
        help=both("The new location of the run's base model, if it was moved.", "基座模型移动过时，给出它现在的位置。"),
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help=both(
            "Continue even if the base model or the data have changed since training.",
            "基座模型或数据在训练之后变过也继续。",
        ),
    ),
]


TaskId = Annotated[
    int | None,
    typer.Option(
        "--task-id",
        min=0,
        help=both(
            "The number of the task, for a run that trained several at once (poly, multitask_prompt_tuning).",
            "任务的编号，用于同时训练多个任务的运行（poly、multitask_prompt_tuning）。",
        ),
    ),
]


class BaseOption(TyperCommand):
    """Allows --base without a value: the next word is a model only if it is a folder or looks like a model's name."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        given: list[str] = []
        words = iter(enumerate(args))
        for i, word in words:
            after = args[i + 1] if i + 1 < len(args) else ""
            if word == "--" or word != "--base":
                given += args[i:] if word == "--" else [word]
                if word == "--":
                    break
            elif _names_a_model(after):
                given.append(f"--base={after}")
                next(words)
            else:
                given.append("--base=")
        return super().parse_args(ctx, given)


def _names_a_model(text: str) -> bool:
    return bool(text) and (
        Path(text).is_dir() or text.startswith(("/", "./", "../")) or bool(re.fullmatch(r"[\w.-]+/[\w.-]+", text))
    )


def check_folders(*runs: Path, or_models: bool = False) -> None:
    """Checks the folders before the import of torch and transformers, which takes seconds.

    Args:
        or_models: A model or an adapter alone will do.

    Raises:
        ConfigError: A folder is not a run's folder.
    """
    from siliang.run_place import find_place, is_model_alone

    for run in runs:
        if not (or_models and is_model_alone(run)):
            find_place(run)


def show_hint(run: Path, hint: str) -> None:
    """Prints how a run is used, where a user may not expect it."""
    print(f"{one_line(str(run))}{both(': ', '：')}{local(hint)}", file=sys.stderr)


def show_notes(notes: Iterable[str]) -> None:
    """Prints as warnings what --force has accepted."""
    for note in notes:
        print(f"{both('warning: ', '警告：')}{local(note)}", file=sys.stderr)
