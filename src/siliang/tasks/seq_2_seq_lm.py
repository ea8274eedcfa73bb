"""Text from text, by an encoder that reads and a decoder that writes.

Loss: cross-entropy of each token of the target. Metrics: perplexity, and measures of the texts that the model writes:
ROUGE-L, or those that are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from siliang.config import DataConfig
from siliang.data.encode import Encoder
from siliang.data.entries import Rows, dropped
from siliang.data.example import Example
from siliang.data.examples import SourceTarget, Text
from siliang.data.messages import Conversation
from siliang.data.prepared import EvalRows
from siliang.data.spec import LABELS, NUMBERS, DataSpec, Encode
from siliang.language import Bilingual
from siliang.models.spec import ModelSpec
from siliang.models.tokenizer import Tokenizer
from siliang.tasks.causal_lm import PERPLEXITY, verdict
from siliang.tasks.measures import with_measures
from siliang.tasks.metrics import perplexity
from siliang.tasks.task import EVAL_LOSS, HeldOutQuestion, Shown, Task
from siliang.types import TaskType


def as_source_target(made: Example) -> Example | str:
    """A conversation of one round as a source and its target; or what is wrong with it."""
    if not isinstance(made, Conversation):
        return made
    talk = [m for m in made.messages if m.role != "system"]
    if len(talk) != 2:
        return Bilingual(
            f"has {len(talk)} turns; seq_2_seq_lm learns from one question and its answer",
            f"有 {len(talk)} 轮；seq_2_seq_lm 只学习一问一答",
        )
    if len(talk) != len(made.messages):
        return Bilingual(
            "has a system message, for which seq_2_seq_lm has no place: write it into the question",
            "有系统消息，seq_2_seq_lm 没有放它的位置：请写进问题",
        )
    if talk[1].calls or talk[1].reasoning:
        return Bilingual(
            "has a tool call or reasoning, for which seq_2_seq_lm has no place",
            "有工具调用或思考过程，seq_2_seq_lm 没有放它们的位置",
        )
    return SourceTarget(talk[0].text, talk[1].content)


def encoder(tokenizer: Tokenizer, data: DataConfig, labels: list[str]) -> Encode:
    """Makes the function that turns examples into entries."""
    return partial(encode, tokenizer, data)


def encode(tokenizer: Tokenizer, data: DataConfig, examples: Sequence[SourceTarget]) -> list[Rows]:
    """Sources as the encoder's input, targets as labels; both end as the tokenizer ends them (T5: </s>)."""
    sources = tokenizer([e.source for e in examples], verbose=False)["input_ids"]
    targets = tokenizer(text_target=[e.target for e in examples], verbose=False)["input_ids"]
    rows: list[Rows] = []
    for source, target in zip(sources, targets, strict=True):
        eos = tokenizer.eos_token_id
        if eos is not None and target[-1] != eos and target[-1] not in tokenizer.all_special_ids:
            target = [*target, eos]
        lost = max(0, len(source) - data.max_length)
        lost_answer = max(0, len(target) - data.max_target_length)
        if (lost or lost_answer) and data.too_long == "drop":
            rows.append(dropped(labels=[]))
            continue
        source = source[: data.max_length - 1] + source[-1:] if lost else source
        target = target[: data.max_target_length - 1] + target[-1:] if lost_answer else target
        rows.append([{"input_ids": source, "labels": target, "lost": lost + lost_answer, "lost_answer": lost_answer}])
    return rows


def synthetic_row(length: int, target_length: int) -> dict[str, Any]:
    """An entry of so many tokens, with a target as long as it may be."""
    return {"input_ids": [1] * length, "labels": [1] * min(target_length, length)}


def show(row: Mapping[str, Any], labels: list[str]) -> Shown:
    """The source, and the target beneath."""
    return Shown(row["input_ids"], target=row["labels"])


def of_loss(loss: float, rows: EvalRows) -> dict[str, float]:
    """Perplexity."""
    return {"perplexity": perplexity(loss)}


def question(row: Mapping[str, Any], example: Example, tokenizer: Tokenizer) -> HeldOutQuestion | None:
    """The source, and its target, whole."""
    return HeldOutQuestion(row["input_ids"], example.target) if isinstance(example, SourceTarget) else None


def prompt(tokenizer: Tokenizer, data: DataConfig, talk: Conversation | Text) -> tuple[list[int], list[int]]:
    """The tokens of the source, which is the last turn, and the one that ends the target."""
    text = talk.text if isinstance(talk, Text) else talk.messages[-1].text
    return tokenizer(text)["input_ids"], [Encoder(tokenizer).need_eos()]


SEQ_2_SEQ_LM = Task(
    name=TaskType.SEQ_2_SEQ_LM,
    adapter_type=TaskType.SEQ_2_SEQ_LM,
    data=DataSpec(
        name="seq_2_seq_lm",
        layouts=("alpaca", "prompt-completion", "input-output", "source-target"),
        columns={"input_ids": NUMBERS, "labels": LABELS},
        encoder=encoder,
        label_per_token=True,
        adapt=as_source_target,
    ),
    model=ModelSpec(task="seq_2_seq_lm", auto_class="AutoModelForSeq2SeqLM"),
    legend=(
        Bilingual("grey: read, green: learned", "灰色：输入，绿色：参与学习"),
        Bilingual("->: what is learned", "->：要学习的内容"),
    ),
    show=show,
    synthetic_row=synthetic_row,
    writes=True,
    has_encoder=True,
    metrics=(PERPLEXITY,),
    of_loss=of_loss,
    question=question,
    usual_measures=("rouge_l",),
    with_settings=with_measures,
    quality=EVAL_LOSS,
    verdict=verdict,
    judged_by="base",
    prompt=prompt,
    example_prompt="a text",
)
