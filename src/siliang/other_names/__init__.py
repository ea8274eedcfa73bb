"""What LLaMA-Factory, ms-swift, Unsloth, axolotl, transformers' Trainer, TRL and PEFT call siliang's settings.

One table. The error for such a name in run.yaml, after --set or as an option says the setting, and the value where it
is written otherwise. Nothing is accepted under a second name: run.yaml has one spelling. docs/names.md is made from
here, by `python -m siliang.other_names`.
"""

from __future__ import annotations

import re

from siliang.other_names import missing, model, training
from siliang.other_names.row import Row
from siliang.other_names.training import MEASURED
from siliang.other_names.values import METHOD_VALUES, TASK_VALUES

__all__ = [
    "MEASURED",
    "METHOD_VALUES",
    "NAMES",
    "TABLE",
    "TASK_VALUES",
    "Row",
    "as_markdown",
    "assignments",
    "find",
    "is_method",
    "plain",
    "split",
    "written",
]

TABLE: tuple[Row, ...] = (*model.ROWS, *training.ROWS, *missing.ROWS)
NAMES: dict[str, Row] = {name: row for row in TABLE for name in row.names}


def plain(name: str) -> str:
    """A name as the table has it: --Per-Device-Train-Batch-Size becomes per_device_train_batch_size."""
    return name.strip().lstrip("-").lower().replace("-", "_").replace(" ", "_")


def find(name: str) -> Row | None:
    """The table's row for a name of another tool."""
    return NAMES.get(plain(name))


def is_method(name: str) -> bool:
    """Whether a name is a method's, of ours or another tool's, as others write it after `adapter`."""
    return plain(name) in METHOD_VALUES or plain(name) == "lora"


def assignments(row: Row, value: object) -> list[str] | None:
    """How the row's setting is written with `value`, as for --set; empty where nothing has to be set, None where the
    value has no counterpart."""
    text = written(value)
    if text.lower() in row.lacks:
        return None
    if text.lower() in row.values:
        found = row.values[text.lower()]
        return [] if found is None else split(found)
    if not row.any_value or not row.setting:
        return None
    return [f"{row.setting}={text}"]


def split(assignments: str) -> list[str]:
    """`a.b=1 c=2` as [a.b=1, c=2]."""
    return re.split(r" (?=[a-z_.]+=)", assignments)


def written(value: object) -> str:
    """A value as --set takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {written(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list | tuple | set):
        return f"[{', '.join(written(inner) for inner in value)}]"
    return str(value)


def as_markdown() -> str:
    """docs/names.md."""
    parts = [
        "# Names from other tools",
        "",
        "Made by `make docs` from `src/siliang/other_names/`. LLaMA-Factory, ms-swift, Unsloth, axolotl,",
        "transformers' Trainer, TRL and PEFT have other names for siliang's settings. Write one of them in `run.yaml`,",
        "after `--set`, or as an option, and the error says what it is here; nothing is accepted under a second name.",
        "",
        "| here | elsewhere | what is written otherwise |",
        "| --- | --- | --- |",
    ]
    for row in TABLE:
        if row.setting:
            other = "; ".join(
                f"{theirs}: " + (", ".join(f"`{a}`" for a in split(ours)) if ours else "leave it out")
                for theirs, ours in row.values.items()
            )
            lacking = "; ".join(f"{theirs}: {reason.rstrip('.')}" for theirs, reason in row.lacks.items())
            note = ". ".join(part for part in (other, lacking, row.note.rstrip(".")) if part)
            parts.append(f"| `{row.setting}` | {', '.join(row.names)} | {note} |")
    parts += ["", "These have no setting here:", "", "| elsewhere | here |", "| --- | --- |"]
    parts += [f"| {', '.join(row.names)} | {row.note} |" for row in TABLE if not row.setting]
    parts += ["", "Names of methods and tasks:", "", "| elsewhere | here |", "| --- | --- |"]
    parts += [f"| method {name} | `{ours}` |" for name, ours in METHOD_VALUES.items()]
    parts += [f"| task {name} | `task={ours}` |" for name, ours in TASK_VALUES.items()]
    return "\n".join(parts) + "\n"
