"""siliang check: what would be learned, and everything that is wrong with it, before anything is trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siliang.cli.console import print_json, rich_console
from siliang.terminal import shown

if TYPE_CHECKING:
    from rich.console import Console

    from siliang.check import Finding, Subject


def check(
    settings: Annotated[Path | None, typer.Argument(help="run.yaml, as for `siliang train`.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a folder, or a name on the hub.")] = None,
    data: Annotated[str | None, typer.Option(help="Training data.")] = None,
    task: Annotated[
        str | None, typer.Option(help="causal_lm, seq_cls, token_cls, seq_2_seq_lm or question_ans.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="What is tuned: see `siliang methods`.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting by name: --set data.template=chat")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Examples to show.")] = 2,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
    explain: Annotated[str | None, typer.Option(help="Print the page of a rule, such as SL007, or `all`.")] = None,
) -> None:
    """Look at data, template and settings without training: the tokens that are learned, and every known trap.

    Exit code 1 where there are errors (with --strict also warnings), 0 otherwise, 2 where the data cannot be read.
    """
    if explain is not None:
        print(_page(explain))
        return
    from siliang.cli.show import quiet_loading
    from siliang.cli.train import gather, with_adapter
    from siliang.config import RunConfig
    from siliang.types import ConfigError

    values = with_adapter(gather(settings, {"model": model, "task": task, "method": method}, data, set_ or []))
    if not values:
        raise ConfigError("say what to look at: siliang check run.yaml, or --model, --data and --task.")
    values.setdefault("output", "siliang-run")
    config = RunConfig.build(values, source=str(settings or "the flags"))
    quiet_loading()
    from siliang.check import find, look_at
    from siliang.check.counts import count
    from siliang.hardware import machine

    subject = look_at(config, machine())
    findings = find(subject)
    counts = count(subject)
    if json:
        print_json({"findings": [f.as_dict() for f in findings], "counts": counts}, indent=1)
    else:
        _show(subject, findings, counts, examples)
    bad = [f for f in findings if f.severity == "error" or (strict and not f.accepted)]
    raise typer.Exit(1 if bad else 0)


def _page(code: str) -> str:
    from siliang.check import RULES, find_rule

    rules = RULES.values() if code.lower() == "all" else [find_rule(code)]
    return "\n\n".join(f"{rule.code} ({rule.severity}): {rule.page}" for rule in rules)


def _show(subject: Subject, findings: list[Finding], counts: dict[str, Any], examples: int) -> None:
    from siliang.cli.show_examples import show_examples

    console = rich_console(soft_wrap=not sys.stdout.isatty())
    show_examples(console, subject, examples)
    console.print(f"{'columns':<18}{subject.examples.says_columns}", markup=False)
    for line in subject.examples.notes:
        console.print(f"{'note':<18}{line}", markup=False)
    for name, value in counts.items():
        if name in ("layout", "columns", "not_used", "notes"):
            continue
        console.print(f"{name.replace('_', ' '):<18}{_plain(value)}", markup=False)
    console.print()
    for f in findings:
        _show_finding(console, f)
    errors = sum(f.severity == "error" for f in findings)
    warnings = sum(f.severity == "warning" and not f.accepted for f in findings)
    console.print(f"{_n(errors, 'error')}, {_n(warnings, 'warning')}" if findings else "Nothing found.")


def _show_finding(console: Console, f: Finding) -> None:
    from rich.table import Table
    from rich.text import Text

    style = "bold red" if f.severity == "error" else "yellow"
    head = Text(f"{f.code} {'accepted' if f.accepted else f.severity}", style=style)
    console.print(head + Text(shown(f"  {f.title}: {f.message}"), style=""))
    lines = [("cause", f.cause), ("fix", f.fix)]
    if f.rows and f.code not in ("SL001", "SL030"):
        more = f" and {f.count - len(f.rows):,} more" if f.count > len(f.rows) else ""
        lines.insert(0, ("rows", grouped(f.rows) + more))
    if console.is_terminal:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in lines:
            grid.add_row(f"      {name}", Text(shown(text)))
        console.print(grid)
    else:  # a line each, for whoever searches in them
        for name, text in lines:
            console.print(f"      {name:<5}  {text}", markup=False)


def grouped(places: list[str]) -> str:
    """Places of rows, each file named once: a.csv:3, 7; b.csv:1."""
    numbers: dict[str, list[str]] = {}
    for place in places:
        mark = next((m for m in (", row ", ", id ") if m in place), ":")
        source, _, number = place.rpartition(mark)
        numbers.setdefault(f"{source}{mark}", []).append(number)
    return "; ".join(f"{source}{', '.join(found)}" for source, found in numbers.items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{100 * value:.2f}% of the tokens"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _n(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
