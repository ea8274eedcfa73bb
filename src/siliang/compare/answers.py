"""What a trained model says to the same questions and the same held-out rows as every other run's."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from siliang.data.examples import Conversation, Example, Labelled, SourceTarget, Span, Tagged, Text
from siliang.data.words import join_words
from siliang.records import Answer, Answers
from siliang.run_folder import OpenedRun
from siliang.secrets import part
from siliang.train import metrics
from siliang.train.run import Run
from siliang.types import TaskType
from siliang.use import engine_of, generate, predict, rouge_l, spans_of, sums_of

ROWS = 500  # held-out rows whose answers are kept, where an answer takes one forward pass
WRITTEN_ROWS = 4  # ... and where it is written word by word
BEGINNING = 60  # characters of a text without a question, which is then continued; and of a context beside its answer


def collect(run: Run, prompts: list[str], max_new_tokens: int, *, base: bool = False) -> Answers:
    """What the run's model says.

    Args:
        prompts: Texts to classify, or instructions, as the user gave them.
        base: Ask the base model, without the adapter.
    """
    opened = OpenedRun(run.folder, run.config, run.record, run.model.eval(), run.tokenizer, precision=run.precision)
    match run.config.task:
        case TaskType.SEQ_CLS:
            return _classes(run, opened, prompts)
        case TaskType.TOKEN_CLS:
            return _tags(run, opened)
        case TaskType.QUESTION_ANS:
            return _spans(run, opened)
        case _:
            return _texts(run, opened, prompts, max_new_tokens, base=base)


def sample(n: int, size: int) -> list[int]:
    """Numbers of some of `n` rows, the same each time, in order."""
    return sorted(random.Random(0).sample(range(n), min(size, n)))


def _sampled(run: Run, opened: OpenedRun) -> Iterator[tuple[str, Example, int, Any]]:
    """(place, example, entry, what the model says) of some held-out rows."""
    chosen, numbers = sample(len(run.eval_set), ROWS), run.eval_set.column("row")
    with engine_of(opened) as engine:
        reader = metrics.MEASURES[run.config.task].reader
        found = sums_of(opened, engine, run.eval_set.select(chosen), reader).found
    for entry, said in zip(chosen, found.values(), strict=True):
        number = int(numbers[entry])
        yield run.examples.eval.where(number), run.examples.eval[number], entry, said


def _classes(run: Run, opened: OpenedRun, prompts: list[str]) -> Answers:
    labels = run.examples.labels or []
    right = run.eval_set.column("labels").tolist()
    shares = Counter(right)
    rows: list[Answer] = []
    for place, example, entry, (number, p) in _sampled(run, opened):
        assert isinstance(example, Labelled)
        asked = example.text if example.pair is None else f"{example.text}\n{example.pair}"
        rows.append(
            Answer(
                where=place,
                asked=asked,
                right=labels[right[entry]],
                given=labels[number],
                correct=right[entry] == number,
                probability=round(p, 4),
            )
        )
    said = [Answer(asked=p.text, given=p.label, probability=round(p.probability, 4)) for p in predict(opened, prompts)]
    return Answers(
        prompts=said,
        rows=rows,
        majority=max(shares.values()) / shares.total() if shares else None,
        classes=len(labels),
    )


def _tags(run: Run, opened: OpenedRun) -> Answers:
    labels = run.examples.labels or []
    rows: list[Answer] = []
    for place, example, entry, numbers in _sampled(run, opened):
        assert isinstance(example, Tagged)
        read = run.eval_set.table[entry]["words"]  # without those that were cut off, or of which no token is left
        words = [example.tokens[word] for word in read]
        given, gold = (
            ", ".join(f"{span.text} {span.tag}" for span in spans_of(words, tags, example.tokens))
            for tags in ([labels[n] for n in numbers], [example.tags[word] for word in read])
        )
        rows.append(
            Answer(
                where=place,
                asked=join_words(example.tokens),
                right=gold,
                given=given,
                correct=given == gold,
            )
        )
    return Answers(rows=rows)


def _spans(run: Run, opened: OpenedRun) -> Answers:
    """Each question is answered with words of its context, and one of several answers may be right."""
    numbers, examples = run.eval_set.column("row"), run.examples.eval
    asked = np.unique(numbers)
    chosen = asked[sample(len(asked), ROWS)]
    windows = run.eval_set.select(np.flatnonzero(np.isin(numbers, chosen)).tolist())
    with engine_of(opened) as engine:
        found = sums_of(opened, engine, windows, metrics.MEASURES[run.config.task].reader).found
    answers = metrics.best_answers(found, replace(run.held_out, tokens=windows))
    rows: list[Answer] = []
    for number in chosen.tolist():
        example, given = examples[number], answers[number].text
        assert isinstance(example, Span)
        rows.append(
            Answer(
                where=examples.where(number),
                asked=f"{example.question}\n{_surroundings(example)}",
                right=" / ".join(dict.fromkeys(example.answers)),
                given=given,
                correct=metrics.squad([given], [example.answers])["exact_match"] == 1,
            )
        )
    return Answers(rows=rows)


def _surroundings(example: Span) -> str:
    """The context as far as it stands around the answer."""
    at = example.starts[0] if example.starts else 0
    start = max(0, at - BEGINNING)
    end = at + (len(example.answers[0]) if example.answers else 0) + BEGINNING
    shown = part(example.context, start, end)
    return f"{'…' if start else ''}{shown}{'…' if end < len(example.context) else ''}"


def _texts(run: Run, opened: OpenedRun, prompts: list[str], max_new_tokens: int, *, base: bool) -> Answers:
    found = Answers()
    for prompt in prompts:
        given = generate(opened, prompt, up_to=max_new_tokens, base=base)
        found.prompts.append(Answer(asked=prompt, given=given))
    for number in sample(len(run.examples.eval), WRITTEN_ROWS):
        if (asked := _question(run.examples.eval[number])) is None:
            continue
        instruction, input, right, plain = asked
        given = generate(opened, instruction, input, up_to=max_new_tokens, base=base, plain=plain)
        place, shown = run.examples.eval.where(number), f"{instruction}\n{input}".strip()
        if plain:  # a text that was cut in two, perhaps within a secret
            at = len(instruction)
            shown = part(instruction + right, 0, at).strip()
            given, right = part(instruction + given, at), part(instruction + right, at)
        found.rows.append(Answer(where=place, asked=shown, right=right, given=given))
    if run.config.task is TaskType.SEQ_2_SEQ_LM:
        with run.model.disable_adapter() if base else nullcontext():
            found.figures["rouge_l"] = rouge_l(opened, run.held_out)
    return found


def _question(example: Example) -> tuple[str, str, str, bool] | None:
    """(instruction, input, right answer, whether it is a text to be continued); None where a line does not show it."""
    match example:
        case Conversation():
            asked = [m for m in example.messages if m.role == "user"]
            answered = [m for m in example.messages if m.role == "assistant"]
            if len(asked) != 1 or len(answered) != 1 or answered[0].calls:
                return None
            return asked[0].content, asked[0].input, answered[0].text, False
        case SourceTarget():
            return example.source, "", example.target, False
        case Text():
            return example.text[:BEGINNING], "", example.text[BEGINNING:], True
        case _:
            return None
