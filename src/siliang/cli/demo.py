"""siliang demo: a small comparison on the included model and data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from siliang.cli.console import command_line
from siliang.cli.options import Lang
from siliang.language import both, language


def demo(
    output: Annotated[
        Path,
        typer.Option(
            help=both(
                "Folder for the runs; a number is appended if it exists.",
                "存放运行的文件夹；已存在时在名称后加上编号。",
            )
        ),
    ] = Path("siliang-demo"),
    lang: Lang = None,
) -> None:
    """Compare five methods on included reviews: a table and a page in under 5 minutes, without network or GPU."""
    from siliang.cli.compare import run
    from siliang.cli.show import duration
    from siliang.demo import demo_config, encoder_folder
    from siliang.report.words import words

    lang = lang or language()
    words(lang)
    encoder_folder()
    started = time.perf_counter()
    folder = _fresh(output)
    print(
        both(
            "Is a review positive or negative? The base model is all-MiniLM-L6-v2, an encoder of 22.7 million "
            "parameters.",
            "判断评论是正面还是负面。基座模型是 all-MiniLM-L6-v2，一个有 2270 万参数的编码器。",
        )
    )
    result = run(demo_config(folder), jobs=1, language=lang)
    best = next((group for group in result.groups if group.label == "LoRA" and group.finished), None)
    took = duration(time.perf_counter() - started)
    print(
        both(
            f"           {took} in all; open it in a browser. The runs are in {folder}.",
            f"           共用时 {took}；请用浏览器打开。各次运行在 {folder} 中。",
        )
    )
    if best is None:
        raise typer.Exit(1)
    print(both("Ask one of them:", "向其中一个提问："))
    print(f'  echo "Not what I paid for." | {command_line("chat", best.finished[0].folder)}')
    print(both("Do the same on your own data:", "在自己的数据上做同样的比较："))
    own = ("--model", "MODEL_FOLDER", "--data", "reviews.csv", "--task", "seq_cls", "--output", "my-comparison")
    print(f"  {command_line('compare', *own)}")


def _fresh(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that does not exist: nothing is overwritten."""
    for name in (folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 10_000))):
        if not name.exists():
            return name
    raise AssertionError("ten thousand demos")
