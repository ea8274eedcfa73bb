"""siliang check: the tokens that would be learned, and every known problem, before training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from siliang.cli.console import named, print_json, rich_console
from siliang.cli.options import Data, Json, Method, Model, Task
from siliang.language import Bilingual, both, local, padded
from siliang.terminal import shown

if TYPE_CHECKING:
    from pydantic import JsonValue
    from rich.console import Console

    from siliang.check import CheckInput, Finding

# the names of the counts of check/counts.py
NAMES = {
    "rows": Bilingual("rows", "样本"),
    "train": Bilingual("train", "训练"),
    "held_out": Bilingual("held out", "验证"),
    "bad": Bilingual("bad", "有问题"),
    "tokens": Bilingual("tokens", "词元"),
    "length": Bilingual("length", "长度"),
    "target_length": Bilingual("target length", "目标长度"),
    "median": Bilingual("median", "中位数"),
    "longest": Bilingual("longest", "最长"),
    "windows": Bilingual("windows", "窗口"),
    "entries": Bilingual("entries", "条目"),
    "all": Bilingual("all", "全部"),
    "of_rows": Bilingual("of rows", "来自样本"),
    "with_answer": Bilingual("with answer", "含答案"),
    "learned": Bilingual("learned", "参与学习"),
    "truncated": Bilingual("truncated", "截断"),
    "answers": Bilingual("answers", "答案"),
    "dropped": Bilingual("dropped", "去掉"),
    "unknown": Bilingual("unknown", "未知词元"),
    "classes": Bilingual("classes", "类别"),
    "tags": Bilingual("tags", "标注种类"),
    "steps": Bilingual("steps", "步数"),
    "per_epoch": Bilingual("per epoch", "每个 epoch"),
}


def check(
    settings: Annotated[
        Path | None,
        typer.Argument(help=both("run.yaml, as for `siliang train`.", "run.yaml，与 `siliang train` 相同。")),
    ] = None,
    model: Model = None,
    data: Data = None,
    task: Task = None,
    method: Method = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help=both(
                "Any setting by name: --set data.template=chat", "按名称设置任意配置项：--set data.template=chat"
            ),
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help=both("Examples to show.", "显示的示例个数。"))] = 2,
    json: Json = False,
    strict: Annotated[
        bool, typer.Option("--strict", help=both("Warnings count as errors.", "把警告当作错误。"))
    ] = False,
    explain: Annotated[
        str | None,
        typer.Option(
            help=both(
                "Print the page of a rule, such as SL007, or `all`.", "显示一条规则的说明，如 SL007；`all` 显示全部。"
            )
        ),
    ] = None,
) -> None:
    """Check data, template and settings without training: show the tokens that are learned, and find known problems.

    The exit code is 1 if there are errors (with --strict also warnings), 2 if the data cannot be read, and 0 otherwise.
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
        raise ConfigError(
            Bilingual(
                "give the settings to check: siliang check run.yaml, or --model, --data and --task.",
                "请给出要检查的配置：siliang check run.yaml，或 --model、--data 和 --task。",
            )
        )
    values.setdefault("output", "siliang-run")
    config = RunConfig.build(values, source=named(settings))
    quiet_loading()
    from siliang.check import find, gather_input
    from siliang.check.counts import count
    from siliang.hardware import machine

    subject = gather_input(config, machine())
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
    return "\n\n".join(rule.shown_page for rule in rules)


def _show(subject: CheckInput, findings: list[Finding], counts: dict[str, JsonValue], examples: int) -> None:
    from siliang.cli.show_examples import show_examples

    console = rich_console(soft_wrap=not sys.stdout.isatty())
    show_examples(console, subject, examples)
    lines = [(both("columns", "列"), local(subject.examples.says_columns))]
    if (template := subject.prepared.template_in_words) is not None:
        lines.append((both("template", "模板"), local(template)))
    lines += [(both("note", "说明"), local(line)) for line in subject.notes]
    hidden = ("layout", "columns", "more_layouts", "template", "not_used", "notes")
    lines += [(_word(name), _plain(value)) for name, value in counts.items() if name not in hidden]
    for name, text in lines:
        console.print(f"{padded(name, 18)}{text}", markup=False)
    console.print()
    for f in findings:
        _show_finding(console, f)
    console.print(_summary(findings))


def _summary(findings: list[Finding]) -> str:
    if not findings:
        return both("Nothing found.", "没有发现问题。")
    errors = sum(f.severity == "error" for f in findings)
    warnings = sum(f.severity == "warning" and not f.accepted for f in findings)
    return both(
        f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}",
        f"{errors} 个错误，{warnings} 个警告",
    )


def _show_finding(console: Console, f: Finding) -> None:
    from rich.table import Table
    from rich.text import Text

    from siliang.check import SEVERITIES

    style = "bold red" if f.severity == "error" else "yellow"
    head = Text(f"{f.code} {both('accepted', '已接受') if f.accepted else local(SEVERITIES[f.severity])}", style=style)
    console.print(head + Text(shown(f"  {f.headline}"), style=""))
    lines = [(both("cause", "原因"), local(f.cause)), (both("fix", "办法"), local(f.fix))]
    if f.rows and f.code not in ("SL001", "SL030"):
        left = f.count - len(f.rows)
        more = both(f" and {left:,} more", f"；另有 {left:,} 条") if left > 0 else ""
        lines.insert(0, (both("rows", "样本"), grouped(f.rows) + more))
    if console.is_terminal:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in lines:
            grid.add_row(f"      {name}", Text(shown(text)))
        console.print(grid)
    else:  # one line each, for grep
        for name, text in lines:
            console.print(f"      {padded(name, 5)}  {text}", markup=False)


def grouped(places: list[str]) -> str:
    """Places of rows, each file named once: a.csv:3, 7; b.csv:1."""
    numbers: dict[str, list[str]] = {}
    for place in places:
        mark = next((m for m in (", row ", ", id ") if m in place), ":")
        source, _, number = place.rpartition(mark)
        numbers.setdefault(f"{source}{mark}", []).append(number)
    return "; ".join(f"{source}{', '.join(found)}" for source, found in numbers.items())


def _plain(value: JsonValue) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{_word(k)} {_plain(v)}" for k, v in value.items())
    if isinstance(value, float):
        return both(f"{100 * value:.2f}% of the tokens", f"占词元的 {100 * value:.2f}%")
    return f"{value:,}" if isinstance(value, int) else str(value)


def _word(name: str) -> str:
    """The name of a count; the name of a class stays as it is."""
    return local(NAMES.get(name, name.replace("_", " ")))
