"""The answer to a question: a span of its context, or that there is none.

Loss: cross-entropy over the places of the answer's first and last token. Metrics: exact match and F1, as SQuAD's.
A context that is too long is read in windows that overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from siliang.data.example import Example
from siliang.data.examples import Span
from siliang.data.prepared import EvalRows
from siliang.data.spec import LABEL, NUMBERS, DataSpec, TokenColumn
from siliang.language import Bilingual, both
from siliang.models.spec import ModelSpec
from siliang.records import Verdict
from siliang.secrets import redacted_part
from siliang.tasks.context_windows import encoder
from siliang.tasks.losses import WithEndLogits, cross_entropy_of_ends
from siliang.tasks.metrics import F1, squad, squad_by_kind
from siliang.tasks.related_texts import in_one_line
from siliang.tasks.task import HeldOutAnswers, Metric, Reply, Shown, Task, Trained
from siliang.types import TASK_HEADS, DataError, TaskType

if TYPE_CHECKING:  # slow to import
    import torch

    from siliang.data.batch import Batch
    from siliang.data.tokens import TokenSet

MAX_ANSWER_TOKENS = 30  # of a span that is taken for an answer, as in BERT's run_squad
AROUND = 60  # characters of a context that are shown on both sides of an answer


@dataclass(frozen=True)
class AnsweredQuestion:
    """The answer to a question; its text is empty where the context has none.

    Attributes:
        begin: Its first character in the context, None where there is no answer; `end` is behind its last.
        probability: Of these words, or of there being no answer.
    """

    question: str
    context: str
    text: str
    begin: int | None
    end: int | None
    probability: float

    @property
    def inputs(self) -> tuple[str, ...]:
        """The question."""
        return (self.question,)

    @property
    def predicted(self) -> str:
        """The answer, or that there is none."""
        return self.text if self.begin is not None else "(no answer)"

    def values(self) -> dict[str, object]:
        """The same for JSON."""
        return {
            "question": self.question,
            "context": self.context,
            "answer": self.text,
            "start": self.begin,
            "end": self.end,
            "probability": round(self.probability, 4),
        }


# ---- tokens ----


def synthetic_row(length: int, target_length: int) -> dict[str, Any]:
    """An entry of so many tokens."""
    return {"input_ids": [1] * length, "start_positions": 1, "end_positions": 2}


def show(row: Mapping[str, Any], labels: list[str]) -> Shown:
    """The tokens, those of the answer marked."""
    first, last = row["start_positions"], row["end_positions"]
    if not last:  # both are the first token, as for SQuAD 2
        return Shown(row["input_ids"], target=both("no answer in here", "这里没有答案"))
    return Shown(row["input_ids"], learned=frozenset(range(first, last + 1)))


# ---- metrics ----


@dataclass(frozen=True)
class FoundSpan:
    """The best answer in one window of a context, and the evidence against it.

    Attributes:
        score: Logit of the first token plus that of the last; -inf where the window holds no context.
        begin: Its first character in the context; `end` is behind its last.
        probability: Of the first token times that of the last, among the window's tokens.
        no_score: Of no answer in this window: the same sum for the window's first token ([CLS]).
        no_probability: Likewise.
    """

    score: float
    begin: int
    end: int
    probability: float
    no_score: float
    no_probability: float


@dataclass(frozen=True)
class FoundAnswer:
    """The answer to a question; all but the probability is empty where it is that there is none.

    Attributes:
        begin: Its first character in the context; `end` is behind its last.
        probability: In the window in which it was found; of no answer, where the context has none at all.
    """

    text: str
    begin: int | None
    end: int | None
    probability: float


def read(output: WithEndLogits, batch: Batch, tokens: TokenSet) -> list[FoundSpan]:
    """The best span of each window, at most MAX_ANSWER_TOKENS long."""
    offsets = tokens.table.select_columns(["offsets"])[list(batch.entries)]["offsets"]
    starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()
    return [
        _best_span(start[:n], end[:n], np.array(places).reshape(-1, 2))
        for start, end, places, n in zip(starts, ends, offsets, batch.lengths, strict=True)
    ]


def _best_span(start_N: torch.Tensor, end_N: torch.Tensor, offsets: np.ndarray) -> FoundSpan:
    import torch

    outside = torch.from_numpy(offsets[:, 0] < 0)
    first, last = (logits.masked_fill(outside, -math.inf) for logits in (start_N, end_N))
    best, a, b = -math.inf, 0, 0
    for more in range(min(MAX_ANSWER_TOKENS, len(first))):  # tokens behind the first
        score, at = (first[: len(first) - more] + last[more:]).max(0)
        if float(score) > best:
            best, a, b = float(score), int(at), int(at) + more
    p_start, p_end = start_N.softmax(0), end_N.softmax(0)
    found = math.isfinite(best)
    return FoundSpan(
        score=best,
        begin=int(offsets[a, 0]) if found else 0,
        end=int(offsets[b, 1]) if found else 0,
        probability=float(p_start[a] * p_end[b]) if found else 0.0,
        no_score=float(start_N[0] + end_N[0]),
        no_probability=float(p_start[0] * p_end[0]),
    )


def best_answers(found: Mapping[int, FoundSpan], rows: EvalRows) -> list[FoundAnswer]:
    """The answer to each question: the best span over all its windows.

    With `rows.unanswered`, there is none where [CLS] scores higher, as in BERT's run_squad for SQuAD 2: in the window
    where that scores least, since a window that does not hold the answer is trained on [CLS], too. A question without a
    window has no answer.
    """
    numbers = rows.tokens.column("row").tolist()
    spans: dict[int, list[FoundSpan]] = {}
    for entry, span in found.items():
        spans.setdefault(numbers[entry], []).append(span)
    answers: list[FoundAnswer] = []
    for number, example in enumerate(rows.examples):
        assert isinstance(example, Span)
        here = spans.get(number)
        if not here:
            answers.append(FoundAnswer("", None, None, 1.0))
            continue
        best, nothing = max(here, key=lambda s: s.score), min(here, key=lambda s: s.no_score)
        if not math.isfinite(best.score) or (rows.unanswered and nothing.no_score > best.score):
            answers.append(FoundAnswer("", None, None, nothing.no_probability))
        else:
            text = example.context[best.begin : best.end]
            answers.append(FoundAnswer(text, best.begin, best.end, best.probability))
    return answers


def measure(found: Mapping[int, FoundSpan], rows: EvalRows) -> dict[str, float]:
    """Exact match and F1 of the best span over all windows of each question."""
    gold = [example.answers for example in rows.examples if isinstance(example, Span)]
    return squad_by_kind([answer.text for answer in best_answers(found, rows)], gold)


def replies(found: Mapping[int, FoundSpan], rows: EvalRows) -> Iterator[tuple[int, Reply]]:
    """The answer to each question that has a window among the entries; one of several answers may be right."""
    answers = best_answers(found, rows)
    for number in sorted(set(rows.tokens.column("row").tolist())):
        example, predicted = rows.examples[number], answers[number].text
        assert isinstance(example, Span)
        question = f"{example.question}\n{_surroundings(example)}"
        expected = " / ".join(dict.fromkeys(example.answers))
        yield number, Reply(question, expected, predicted, squad([predicted], [example.answers])["exact_match"] == 1)


def _surroundings(example: Span) -> str:
    """The part of the context around the answer."""
    at = example.starts[0] if example.starts else 0
    start = max(0, at - AROUND)
    end = at + (len(example.answers[0]) if example.answers else 0) + AROUND
    shown = redacted_part(example.context, start, end)
    return f"{'…' if start else ''}{shown}{'…' if end < len(example.context) else ''}"


def verdict(final: Mapping[str, float], base: Mapping[str, float], answers: HeldOutAnswers | None) -> Verdict | None:
    """No answer has a word that is right."""
    return "no spans" if final.get("f1") == 0 else None


# ---- use ----


def predict(run: Trained, questions: Iterable[str | tuple[str, str]]) -> Iterator[AnsweredQuestion]:
    """The words of its context that answer each question, in order; or that there is no answer, where the run has
    learned from questions without one.

    Args:
        questions: (question, context), or the two in one with a tab between them.

    Raises:
        DataError: A question has no context.
    """
    for examples, tokens, found in run.read(_example(run, question) for question in questions):
        rows = EvalRows(tokens, examples, unanswered=run.unanswered)
        for example, a in zip(examples, best_answers(found, rows), strict=True):
            assert isinstance(example, Span)
            yield AnsweredQuestion(example.question, example.context, a.text, a.begin, a.end, a.probability)


def _example(run: Trained, question: str | tuple[str, str]) -> Span:
    parts: Sequence[str] = question.partition("\t")[::2] if isinstance(question, str) else question
    if isinstance(question, Example) or len(parts) != 2 or not all(part.strip() for part in parts):
        raise DataError(
            Bilingual(
                f"{run.name} answers questions on a context, and {in_one_line(question)!r} is not both.\nGive the "
                "question and its context with a tab between them, the context with --context, or a file "
                "with both columns.",
                f"{run.name} 需要问题和上下文，而 {in_one_line(question)!r} 不是这两段文本。\n"
                "请用制表符隔开问题和上下文、用 --context 给出上下文，或给出含这两列的文件。",
            )
        )
    return Span(parts[0], parts[1], (), ())


QUESTION_ANS = Task(
    name=TaskType.QUESTION_ANS,
    adapter_type=TaskType.QUESTION_ANS,
    data=DataSpec(
        name="question_ans",
        layouts=("squad",),
        columns={
            "input_ids": NUMBERS,
            "token_type_ids": NUMBERS,
            "start_positions": LABEL,
            "end_positions": LABEL,
            "offsets": TokenColumn(
                hidden=True
            ),  # two a token: where it begins and ends in the context; -1 outside of it
        },
        encoder=encoder,
        windows=True,
    ),
    model=ModelSpec(
        task="question_ans",
        auto_class="AutoModelForQuestionAnswering",
        heads=TASK_HEADS[TaskType.QUESTION_ANS],
        outputs=2,  # where an answer begins and where it ends
    ),
    legend=(
        Bilingual("grey: read, green: the answer, whose place is learned", "灰色：输入，绿色：答案（学习其位置）"),
        Bilingual("[[...]]: the answer, whose place is learned", "[[...]]：答案（学习其位置）"),
    ),
    show=show,
    synthetic_row=synthetic_row,
    loss=cross_entropy_of_ends,
    counts_rows=True,
    read=read,
    metrics=(Metric("exact_match"), F1),
    measure=measure,
    quality=F1,
    replies=replies,
    verdict=verdict,
    inputs=("question", "context"),
    predict=predict,
    blank={"question": "", "context": "", "answer": None, "start": None, "end": None, "probability": None},
)
