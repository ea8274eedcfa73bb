"""siliang report: the table and the page of runs that are there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from siliang.language import Bilingual, both, language


def report(
    runs: Annotated[
        list[Path], typer.Argument(help=both("Folders of runs, or of a comparison.", "运行的文件夹，或比较的文件夹。"))
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help=both(
                "The page, a new file. Default: report.html in the folder of the comparison, which replaces its page; "
                "for runs, in the current folder.",
                "网页文件，须是新文件。默认为 report.html：比较时在它的文件夹中，并替换其中的网页；"
                "运行时在当前文件夹。",
            )
        ),
    ] = None,
    lang: Annotated[
        str | None,
        typer.Option(help=both("en or zh. Default: that of SILIANG_LANG.", "en 或 zh。默认由 SILIANG_LANG 决定。")),
    ] = None,
) -> None:
    """Make the table and the page of a comparison, or of any runs on the same data, from their records."""
    from siliang.cli.compare import show
    from siliang.report.gather import gather
    from siliang.report.page import write_page
    from siliang.types import OutputError

    data = gather(runs)
    own = runs[0] / "report.html" if data.is_comparison else None  # a comparison's page is made again from its records
    page = output or own or Path("report.html")
    if page.is_dir() or not page.parent.is_dir():
        raise OutputError(
            Bilingual(
                f"--output {page}: give a file name in an existing folder, such as report.html.",
                f"--output {page}：请给出已有文件夹中的文件名，例如 report.html。",
            )
        )
    if page != own and os.path.lexists(page):  # a broken link too
        raise OutputError(
            Bilingual(
                f"{page} exists already: remove it, or choose another name with --output.",
                f"{page} 已存在：请删除，或用 --output 换个名称。",
            )
        )
    lang = lang or language()
    show(data, lang)
    write_page(data, page, language=lang)
    print(both(f"\npage       {page}", f"\n报告       {page}"))
