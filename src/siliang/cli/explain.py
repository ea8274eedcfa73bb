"""siliang explain: the meaning of a code."""

from __future__ import annotations

from typing import Annotated

import typer

from siliang.language import both


def explain(
    code: Annotated[
        str,
        typer.Argument(
            help=both(
                "The code of an error, such as SLE03, or of a finding of `siliang check`, such as SL007.",
                "错误的编号，如 SLE03；或 `siliang check` 检查结果的编号，如 SL007。",
            )
        ),
    ],
) -> None:
    """Explain an error or a finding: its meaning, its cause, and what to do."""
    from siliang.errors import explain as explain_error
    from siliang.language import language

    if code.upper().startswith("SLE"):
        print(explain_error(code, language()))
        return
    from siliang.check import find_rule

    print(find_rule(code).shown_page)
