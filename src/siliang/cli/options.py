"""Options of several commands."""

from __future__ import annotations

from typing import Annotated

import typer

from siliang.language import both

Model = Annotated[
    str | None,
    typer.Option(help=both("Base model: a folder, or a name on the Hub.", "基座模型：文件夹，或 Hub 上的名称。")),
]
Data = Annotated[str | None, typer.Option(help=both("Training data.", "训练数据。"))]
Task = Annotated[
    str | None,
    typer.Option(
        help=both(
            "causal_lm, seq_cls, token_cls, seq_2_seq_lm or question_ans.",
            "causal_lm、seq_cls、token_cls、seq_2_seq_lm 或 question_ans。",
        )
    ),
]
Method = Annotated[
    str | None, typer.Option(help=both("The method: see `siliang methods`.", "微调方法：见 `siliang methods`。"))
]
Lang = Annotated[
    str | None,
    typer.Option(
        help=both(
            "The language of the report: en or zh. Default: that of SILIANG_LANG.",
            "报告的语言：en 或 zh。默认由 SILIANG_LANG 决定。",
        )
    ),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, help=both("0: always the most probable token.", "0：总是取概率最大的词元。"))
]
Json = Annotated[bool, typer.Option("--json", help=both("One JSON object.", "输出一个 JSON 对象。"))]
