"""Options of several commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from siliang.language import both

if TYPE_CHECKING:  # slow to import
    from siliang.use.sampling import Sampling

Model = Annotated[
    str | None,
    typer.Option(help=both("Base model: a folder, or a name on the Hub.", "基座模型：文件夹，或 Hub 上的名称。")),
]
Data = Annotated[str | None, typer.Option(help=both("Training data.", "训练数据。"))]
Task = Annotated[
    str | None,
    typer.Option(
        help=both(
            "causal_lm, preference, reward, seq_cls, token_cls, seq_2_seq_lm, question_ans, embedding or reranker.",
            "causal_lm、preference、reward、seq_cls、token_cls、seq_2_seq_lm、question_ans、embedding 或 reranker。",
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
TopP = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help=both(
            "Draw from the most probable tokens that together have this probability.",
            "只从累计概率达到该值的最可能的词元中抽取。",
        ),
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(min=1, help=both("Draw from so many of the most probable tokens.", "只从概率最大的若干词元中抽取。")),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        help=both("Above 1: tokens that are there already are less probable.", "大于 1 时，已出现的词元概率降低。")
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help=both(
            "The text ends in front of this word; may be given several times.", "遇到这个词时在它之前结束；可多次给出。"
        )
    ),
]
System = Annotated[str, typer.Option(help=both("A system message.", "系统消息。"))]
Seed = Annotated[
    int | None,
    typer.Option(min=0, help=both("The same seed draws the same text.", "相同的种子抽取相同的文本。")),
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        min=1,
        help=both(
            "Maximum tokens to generate. Default: 128, or the positions that the model has left.",
            "最多生成的词元数。默认 128，或模型剩余的位置数。",
        ),
    ),
]
Json = Annotated[bool, typer.Option("--json", help=both("One JSON object.", "输出一个 JSON 对象。"))]


def sampling_of(
    max_new_tokens: int | None,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    stop: list[str] | None,
    seed: int | None,
) -> Sampling:
    """The options of generating as one value."""
    from siliang.use.sampling import Sampling

    return Sampling(
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
