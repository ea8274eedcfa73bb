"""siliang check: what would be learned, and everything that is wrong with it, before anything is trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from siliang.check import Finding, Subject

SHOWN_TOKENS = 400


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
    from siliang.cli.train import gather
    from siliang.config import RunConfig
    from siliang.types import ConfigError

    values = gather(settings, {"model": model, "task": task, "method": method}, data, set_ or [])
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
    readable = not any(f.code == "SL027" for f in findings)
    counts = count(subject) if readable else {}
    if json:
        from json import dumps

        shown = {"findings": [f.as_dict() for f in findings], "counts": counts}
        print(dumps(shown, ensure_ascii=False, indent=1))
    else:
        _show(subject if readable else None, findings, counts, examples)
    bad = [f for f in findings if f.severity == "error" or (strict and not f.accepted)]
    raise typer.Exit(1 if bad else 0)


def _page(code: str) -> str:
    from siliang.check import RULES, find_rule

    rules = RULES.values() if code.lower() == "all" else [find_rule(code)]
    return "\n\n".join(f"{rule.code} ({rule.severity}): {rule.page}" for rule in rules)


def _show(subject: Subject | None, findings: list[Finding], counts: dict[str, Any], examples: int) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if subject is not None:
        _show_examples(console, subject, examples)
        for name, value in counts.items():
            console.print(f"{name.replace('_', ' '):<18}{_plain(value)}", markup=False)
        console.print()
    for f in findings:
        style = "bold red" if f.severity == "error" else "yellow"
        head = Text(f"{f.code} {'accepted' if f.accepted else f.severity}", style=style)
        console.print(head + Text(f"  {f.title}: {f.message}", style=""))
        if f.rows and f.code != "SL001":
            more = f" and {f.count - len(f.rows):,} more" if f.count > len(f.rows) else ""
            console.print(f"      rows   {'; '.join(f.rows)}{more}", markup=False)
        console.print(f"      cause  {f.cause}\n      fix    {f.fix}", markup=False)
    errors = sum(f.severity == "error" for f in findings)
    warnings = sum(f.severity == "warning" and not f.accepted for f in findings)
    console.print(f"{_n(errors, 'error')}, {_n(warnings, 'warning')}" if findings else "Nothing found.")


def _show_examples(console: Console, subject: Subject, n: int) -> None:
    from siliang.data.encode import IGNORED

    tokens = subject.train
    per_token = "labels" in tokens.table.column_names and len(tokens) and isinstance(tokens[0]["labels"], list)
    if not per_token or not n:
        return
    colours = console.is_terminal
    how = "green: learned, grey: not, reverse: special tokens" if colours else "[[...]]: learned; <...> special tokens"
    console.print(f"Examples ({how})", markup=False)
    for i in range(min(n, len(tokens))):
        row = tokens[i]
        console.print(f"{subject.entries([i])[0]}:", markup=False)
        if len(row["labels"]) != len(row["input_ids"]):  # encoder and decoder
            pairs = [(t, False) for t in row["input_ids"]] + [(t, True) for t in row["labels"]]
        else:
            pairs = [(t, x != IGNORED) for t, x in zip(row["input_ids"], row["labels"], strict=True)]
        console.print(_coloured(subject.tokenizer, pairs[:SHOWN_TOKENS], colours))
        if len(pairs) > SHOWN_TOKENS:
            console.print(f"... {len(pairs) - SHOWN_TOKENS:,} more tokens")
        console.print()


def _coloured(tokenizer: Any, pairs: list[tuple[int, bool]], colours: bool) -> Text:
    from rich.text import Text

    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    out = Text()
    at = 0
    while at < len(pairs):
        learned, is_special = pairs[at][1], pairs[at][0] in special
        end = at + 1
        # stretches and not single tokens: a character may be made of several
        while not is_special and end < len(pairs) and pairs[end][1] == learned and pairs[end][0] not in special:
            end += 1
        text = tokenizer.decode([t for t, _ in pairs[at:end]], clean_up_tokenization_spaces=False)
        if colours:
            style = ("green" if learned else "bright_black") + (" reverse" if is_special else "")
            out.append(text, style=style)
        else:
            before = learned and (at == 0 or not pairs[at - 1][1])
            after = learned and (end == len(pairs) or not pairs[end][1])
            out.append(("[[" if before else "") + text + ("]]" if after else ""))
        at = end
    return out


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{100 * value:.2f}%"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _n(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
