"""What a trained model says to the same questions and the same held-out rows as every other run's."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch

from siliang.compare.record import Answer, Answers
from siliang.data.collate import PadCollator
from siliang.data.encode import IGNORED
from siliang.data.examples import Conversation, Example, Labelled, SourceTarget, Span, Tagged, Text
from siliang.run_folder import OpenedRun
from siliang.train import metrics
from siliang.train.run import Run
from siliang.types import TaskType
from siliang.use import LABELS, evaluate, find_spans, generate, predict

ROWS = 500  # held-out rows whose answers are kept, where an answer takes one forward pass
WRITTEN_ROWS = 4  # ... and where it is written word by word
BEGINNING = 60  # characters of a text without a question, which is then continued; and of a context beside its answer


def collect(run: Run, prompts: list[str], max_new_tokens: int, *, base: bool = False) -> Answers:
    """What the run's model says.

    Args:
        prompts: Texts to classify, or instructions, as the user gave them.
        base: Ask the base model, without the adapter.
    """
    device = run.model.device
    opened = OpenedRun(run.folder, run.config, run.record, run.model.eval(), run.tokenizer)
    with torch.no_grad(), torch.autocast(device.type, run.precision.dtype, enabled=run.precision.autocast):
        match run.config.task:
            case TaskType.SEQ_CLS:
                found = _classes(run, opened, prompts)
            case TaskType.TOKEN_CLS:
                found = _tags(run)
            case TaskType.QUESTION_ANS:
                found = _spans(run, opened)
            case _:
                found = _texts(run, opened, prompts, max_new_tokens, base=base)
    return found


def sample(n: int, size: int) -> list[int]:
    """Numbers of some of `n` rows, the same each time, in order."""
    return sorted(random.Random(0).sample(range(n), min(size, n)))


def _classes(run: Run, opened: OpenedRun, prompts: list[str]) -> Answers:
    labels = run.examples.labels or []
    shares = Counter(run.eval_set.column("labels").tolist())
    rows: list[Answer] = []
    for place, example, logits, right in _forward(run):
        p, number = logits.softmax(-1).max(-1)
        assert isinstance(example, Labelled)
        asked = example.text if example.pair is None else f"{example.text}\n{example.pair}"
        rows.append(
            Answer(
                where=place,
                asked=asked,
                right=labels[int(right)],
                given=labels[int(number)],
                correct=int(right) == int(number),
                probability=round(float(p), 4),
            )
        )
    said = [Answer(asked=p.text, given=p.label, probability=round(p.probability, 4)) for p in predict(opened, prompts)]
    return Answers(
        prompts=said,
        rows=rows,
        majority=max(shares.values()) / shares.total() if shares else None,
        classes=len(labels),
    )


def _tags(run: Run) -> Answers:
    labels = run.examples.labels or []
    rows: list[Answer] = []
    for place, example, logits, right in _forward(run):
        kept = right != IGNORED
        assert isinstance(example, Tagged)
        space = " " if any(len(token) > 1 for token in example.tokens) else ""
        given, gold = (
            spans(example.tokens, [labels[n] for n in numbers[kept].tolist()], space)
            for numbers in (logits.argmax(-1), right)
        )
        rows.append(
            Answer(
                where=place,
                asked=space.join(example.tokens),
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
    found, _ = find_spans(opened, windows, examples)
    rows: list[Answer] = []
    for number in chosen.tolist():
        example = examples[number]
        assert isinstance(example, Span)
        rows.append(
            Answer(
                where=examples.where(number),
                asked=f"{example.question}\n{_surroundings(example)}",
                right=" / ".join(dict.fromkeys(example.answers)),
                given=found[number],
                correct=metrics.squad([found[number]], [example.answers])["exact_match"] == 1,
            )
        )
    return Answers(rows=rows)


def _surroundings(example: Span) -> str:
    """The context as far as it stands around the answer."""
    at = example.starts[0] if example.starts else 0
    start = max(0, at - BEGINNING)
    end = at + (len(example.answers[0]) if example.answers else 0) + BEGINNING
    return f"{'…' if start else ''}{example.context[start:end]}{'…' if end < len(example.context) else ''}"


def spans(tokens: tuple[str, ...], tags: list[str], space: str) -> str:
    """The tagged spans of a sentence in words: "高勇 NAME, 男 SEX"."""
    from seqeval.metrics.sequence_labeling import get_entities

    found = get_entities([metrics.as_iobes(tag) for tag in tags])
    return ", ".join(f"{space.join(tokens[a : b + 1])} {kind}" for kind, a, b in found)


def _forward(run: Run) -> Iterator[tuple[str, Example, torch.Tensor, torch.Tensor]]:
    """(place, example, logits, label or labels) of the sampled held-out rows, on the CPU."""
    chosen = sample(len(run.eval_set), ROWS)
    collate, numbers = PadCollator(run.tokenizer.pad_token_id), run.eval_set.column("row")
    size = run.config.train.batch_size
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        batch = {k: t.to(run.model.device) for k, t in collate(run.eval_set.__getitems__(part)).items()}
        logits = run.model(**{k: t for k, t in batch.items() if k not in LABELS}).logits.float().cpu()
        right = batch["labels"].cpu()
        for i, entry in enumerate(part):
            number = int(numbers[entry])
            yield run.examples.eval.where(number), run.examples.eval[number], logits[i], right[i]


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
        place = run.examples.eval.where(number)
        found.rows.append(Answer(where=place, asked=f"{instruction}\n{input}".strip(), right=right, given=given))
    if run.config.task is TaskType.SEQ_2_SEQ_LM:
        with run.model.disable_adapter() if base else nullcontext():
            found.figures["rouge_l"] = evaluate(opened)["rouge_l"]
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
