"""Text from text: the model writes on, as in the answers of a conversation.

Loss: cross-entropy of each learned token from the state of the one in front of it. Metrics: perplexity, per token
and per byte of text, and the chosen measures of the texts that the model writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from siliang.config import DataConfig
from siliang.data.conversations import encode, last_answer, prompt_tokens, stop_tokens, writer
from siliang.data.encode import IGNORED, Encoder
from siliang.data.example import Example
from siliang.data.examples import Prepared, Text
from siliang.data.messages import Conversation
from siliang.data.prepared import EvalRows
from siliang.data.spec import LABELS, NUMBERS, DataSpec, Encode, TokenColumn
from siliang.language import Bilingual
from siliang.models.spec import ModelSpec
from siliang.models.tokenizer import Tokenizer
from siliang.records import Verdict
from siliang.tasks.measures import with_measures
from siliang.tasks.metrics import perplexity
from siliang.tasks.task import EVAL_LOSS, HeldOutAnswers, HeldOutQuestion, Metric, Shown, Task
from siliang.types import TaskType

PERPLEXITY = Metric("perplexity", higher=False, of_loss=True)
OF_BYTES = (Metric("byte_perplexity", higher=False, of_loss=True), Metric("bits_per_byte", higher=False, of_loss=True))
HIDDEN = TokenColumn(many=False, hidden=True)
SLACK = 1e-9  # of losses that are equal but for rounding


def encoder(tokenizer: Tokenizer, data: DataConfig, labels: list[str]) -> Encode:
    """Makes the function that turns examples into entries.

    Raises:
        ConfigError: The tokenizer has no end-of-sequence token.
    """
    made = Encoder(tokenizer)
    made.need_eos()
    return partial(encode, made, writer(data.template, made, data.template_arguments), data)


def synthetic_row(length: int, target_length: int) -> dict[str, Any]:
    """An entry of so many tokens, all learned."""
    return {"input_ids": [1] * length, "labels": [1] * length}


def show(row: Mapping[str, Any], labels: list[str]) -> Shown:
    """The tokens, those that are learned marked."""
    return Shown(row["input_ids"], learned=frozenset(i for i, label in enumerate(row["labels"]) if label != IGNORED))


def of_loss(loss: float, rows: EvalRows) -> dict[str, float]:
    """Perplexity per token, which only models with the same tokenizer can be compared by, and per UTF-8 byte of the
    text that is predicted, with the names of lm-evaluation-harness."""
    found, nbytes = {"perplexity": perplexity(loss)}, int(rows.tokens.column("bytes").sum())
    if not nbytes:
        return found
    of_byte = loss * rows.tokens.predicted / nbytes
    return found | {"byte_perplexity": perplexity(of_byte), "bits_per_byte": of_byte / math.log(2)}


def verdict(final: Mapping[str, float], base: Mapping[str, float], answers: HeldOutAnswers | None) -> Verdict | None:
    """The loss is not below that of the base model."""
    if "eval_loss" not in base or "eval_loss" not in final:
        return None
    return "not below the base" if final["eval_loss"] >= base["eval_loss"] - SLACK else None


def question(row: Mapping[str, Any], example: Example, tokenizer: Tokenizer) -> HeldOutQuestion | None:
    """The tokens in front of the last answer that is learned, as the loss reads them, and that answer.

    The right text is that of the answer's tokens before it was cut, with what the template writes into it, such as an
    empty thought; where the tokenizer does not know all of it, the answer in the data.
    """
    if isinstance(example, Text) or (isinstance(example, Prepared) and example.labels in ((), example.input_ids)):
        return None  # learned whole; what a window shares with the one before has no label
    ids = row["input_ids"]
    first, last = last_answer(row["labels"])
    if first == 0 or (row["whole_answer"] and last - first < 2):  # nothing is left of it but its end
        return None
    answer = row["whole_answer"] or ids[first:last]
    # some tokenizers end an answer with their unknown token
    if isinstance(example, Conversation) and tokenizer.unk_token_id in answer[:-1]:
        return HeldOutQuestion(ids[:first], example.messages[row["turn"]].content)
    return HeldOutQuestion(ids[:first], tokenizer.decode(answer, skip_special_tokens=True))


def prompt(tokenizer: Tokenizer, data: DataConfig, talk: Conversation | Text) -> tuple[list[int], list[int]]:
    """The tokens in front of the answer, and those that end it."""
    if isinstance(talk, Text):
        encoder = Encoder(tokenizer)
        ids = encoder.start + tokenizer(talk.text, add_special_tokens=False)["input_ids"]
        return ids, [encoder.need_eos()]
    arguments = data.template_arguments
    return prompt_tokens(talk, tokenizer, template=data.template, arguments=arguments), stop_tokens(
        tokenizer, template=data.template, arguments=arguments
    )


CAUSAL_LM = Task(
    name=TaskType.CAUSAL_LM,
    adapter_type=TaskType.CAUSAL_LM,
    data=DataSpec(
        name="causal_lm",
        layouts=("prepared", "messages", "sharegpt", "alpaca", "prompt-completion", "input-output", "text"),
        columns={
            "input_ids": NUMBERS,
            "labels": LABELS,
            "bytes": HIDDEN,
            "turn": HIDDEN,
            "whole_answer": replace(NUMBERS, hidden=True),
        },
        encoder=encoder,
        label_per_token=True,
        next_token=True,
        templated=True,
    ),
    model=ModelSpec(task="causal_lm", auto_class="AutoModelForCausalLM"),
    legend=(
        Bilingual("green: learned, grey: not", "绿色：参与学习，灰色：不参与"),
        Bilingual("[[...]]: learned", "[[...]]：参与学习"),
    ),
    show=show,
    synthetic_row=synthetic_row,
    writes=True,
    metrics=(PERPLEXITY, *OF_BYTES),
    of_loss=of_loss,
    question=question,
    with_settings=with_measures,
    quality=EVAL_LOSS,
    verdict=verdict,
    judged_by="base",
    prompt=prompt,
    example_prompt="an instruction",
)
