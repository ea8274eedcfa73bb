"""What a trained model is measured by, each task by its field's usual figures.

Classes: accuracy and macro F1 (scikit-learn). Tags: precision, recall and F1 over whole spans (seqeval). Text from
text: ROUGE-L (rouge-score), over characters where a language writes no spaces. Answers in a context: exact match and
F1, as SQuAD's own script defines them; the libraries that hold it would bring their own framework with them.

`MEASURES` has a row for each task: what is kept of the model's output for each row of a batch, and the figures that are
made of it. `engine/evaluate.py` does the rest.
"""

from __future__ import annotations

import collections
import math
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from siliang.data.encode import IGNORED
from siliang.data.examples import Example, Span
from siliang.data.tokens import TokenSet
from siliang.data.words import stands_alone, whole_characters
from siliang.engine.batches import Batch
from siliang.engine.evaluate import Reader, Sums
from siliang.types import DataError, TaskType

ZERO: Any = 0  # for a class that is nowhere found; both libraries declare only the text "warn"
MAX_ANSWER_TOKENS = 30  # of a span that is taken for an answer, as in BERT's run_squad
MOST_PERPLEXITY = 700.0  # exp of more is no double


@dataclass(frozen=True)
class Rows:
    """What was evaluated.

    Attributes:
        examples: The rows before tokens; `tokens` may hold several entries of one, or none.
        labels: The names of classes or tags, by number.
        unanswered: A question may have no answer in its context.
    """

    tokens: TokenSet
    examples: Sequence[Example]
    labels: Sequence[str] = ()
    unanswered: bool = False


@dataclass(frozen=True)
class Measure:
    """How a task is measured.

    Attributes:
        names: The figures beside the loss by which a run may choose its best step.
        reader: What is kept of the model's output; None where the loss says it all.
        figures: Of what was kept, by entry.
    """

    names: tuple[str, ...] = ()
    reader: Reader | None = None
    figures: Callable[[Mapping[int, Any], Rows], dict[str, float]] | None = None


def figures_of(task: TaskType, sums: Sums, rows: Rows) -> dict[str, float]:
    """The mean loss, and the task's own figures.

    Raises:
        DataError: Nothing in the rows has a label.
    """
    if not sums.weight:
        raise DataError(nothing_to_measure(len(rows.tokens)))
    found, measure = {"loss": sums.mean}, MEASURES[task]
    return found | measure.figures(sums.found, rows) if measure.figures else found


def nothing_to_measure(rows: int) -> str:
    """What is said of rows of which none has a label."""
    return (
        f"nothing can be measured: of {rows:,} rows not one token has a label.\n"
        "The rows need an answer, a target or tags within data.max_length tokens; `siliang check` shows their labels."
    )


def all_dropped(rows: int, max_length: int) -> str:
    """What is said where no row is left to measure."""
    return (
        f"there is nothing to measure: all {rows:,} rows are longer than data.max_length = {max_length:,}, and "
        'data.too_long = "drop" leaves them out.\nRaise data.max_length, or set data.too_long=cut.'
        if rows
        else "there is not one row to measure."
    )


def perplexity(loss: float) -> float:
    """exp of a mean loss over tokens."""
    return math.exp(min(loss, MOST_PERPLEXITY))


# ---- classes ----


def read_classes(output: Any, batch: Batch, tokens: TokenSet) -> list[tuple[int, float]]:
    """(number of the most probable class, its probability) of each row."""
    probabilities, numbers = output.logits.float().softmax(-1).max(-1)
    return list(zip(numbers.tolist(), probabilities.tolist(), strict=True))


def _class_figures(found: Mapping[int, Any], rows: Rows) -> dict[str, float]:
    right = rows.tokens.column("labels").tolist()
    return classification([number for number, _ in found.values()], [right[i] for i in found])


def classification(predicted: Sequence[int], right: Sequence[int]) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur (macro)."""
    from sklearn.metrics import accuracy_score, f1_score

    f1: Any = f1_score(right, predicted, average="macro", zero_division=ZERO)
    return {"accuracy": float(accuracy_score(right, predicted)), "f1": float(f1)}


# ---- tags ----


def read_tags(output: Any, batch: Batch, tokens: TokenSet) -> list[np.ndarray]:
    """Of each row, the number of the most probable tag of each token that has one."""
    numbers = output.logits.argmax(-1).cpu().numpy().astype(np.int32)
    kept = (batch.inputs["labels"] != IGNORED).cpu().numpy()
    return [row[k] for row, k in zip(numbers, kept, strict=True)]


def _tag_figures(found: Mapping[int, Any], rows: Rows) -> dict[str, float]:
    def named(numbers: np.ndarray) -> list[str]:
        return [str(rows.labels[n]) for n in numbers]

    right = dict(enumerate(rows.tokens.lists("labels")))
    gold = [named(right[i][right[i] != IGNORED]) for i in found]
    return spans_of_tags([named(numbers) for numbers in found.values()], gold)


def spans_of_tags(predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over spans, and the share of right tags."""
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    guess, gold = ([[as_iobes(tag) for tag in row] for row in rows] for rows in (predicted, right))
    found: dict[str, Any] = {
        "f1": f1_score(gold, guess, zero_division=ZERO),
        "precision": precision_score(gold, guess, zero_division=ZERO),
        "recall": recall_score(gold, guess, zero_division=ZERO),
        "accuracy": accuracy_score(gold, guess),
    }
    return {name: float(value) for name, value in found.items()}


def as_iobes(tag: str) -> str:
    """BMES's M- is IOBES's I-, the only one of the two that seqeval knows."""
    return "I-" + tag[2:] if tag.startswith("M-") else tag


# ---- text ----


def rouge_l(predicted: Sequence[str], right: Sequence[str]) -> float:
    """Mean ROUGE-L F1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Units())
    scores = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predicted, right, strict=True)]
    return float(np.mean(scores)) if scores else 0.0


class _Units:
    """rouge-score's own tokenizer drops all that is not a-z0-9; this one keeps words, and each character of Chinese,
    Japanese and their like.
    """

    def tokenize(self, text: str) -> list[str]:
        return units(text)


def units(text: str) -> list[str]:
    """Words in lower case, and single characters of scripts without spaces; no punctuation."""
    plain = unicodedata.normalize("NFC", text.lower())
    return "".join(map(_unit, whole_characters(plain))).split()


def _unit(character: str) -> str:
    """A letter or digit, apart where it is a word of its own; a blank for everything else."""
    if not character[0].isalnum():
        return " "
    bare = "".join(c for c in character if unicodedata.category(c) != "Cf")  # joiners and marks of direction
    return f" {bare} " if bare[0].isalpha() and stands_alone(bare[0]) else bare


# ---- answers in a context ----


def squad(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 against the best of each question's answers; an empty list wants an empty answer."""
    scores = [_against(guess, gold) for guess, gold in zip(predicted, answers, strict=True)]
    exact, f1 = np.mean(scores, axis=0)
    return {"exact_match": float(exact), "f1": float(f1)}


def squad_by_kind(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """The same of all questions, and, where some have no answer, of those that have one and of those that have none, as
    SQuAD 2 is reported."""
    found = squad(predicted, answers)
    if all(answers):
        return found
    for kind, wanted in (("has_answer", True), ("no_answer", False)):
        chosen = [i for i, gold in enumerate(answers) if bool(gold) == wanted]
        if chosen:
            part = squad([predicted[i] for i in chosen], [answers[i] for i in chosen])
            found |= {f"{kind}_{name}": value for name, value in part.items()}
    return found


def _against(guess: str, gold: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) beside the best of the answers."""
    wanted = [answer for answer in gold if _normal(answer)] or [""]
    return max(float(_normal(guess) == _normal(a)) for a in wanted), max(_overlap(guess, a) for a in wanted)


def _normal(text: str) -> list[str]:
    """As SQuAD's script: lower case, no ASCII punctuation, no articles, cut at blanks. A text of a script without
    blanks is cut into its characters, and loses all its punctuation.
    """
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    words = re.sub(r"\b(a|an|the)\b", " ", bare)
    if not any(map(stands_alone, words)):
        return words.split()
    kept = (c for c in whole_characters(words) if unicodedata.category(c[0])[0] != "P")
    return "".join(f" {c} " if stands_alone(c[0]) else c for c in kept).split()


def _overlap(guess: str, gold: str) -> float:
    a, b = _normal(guess), _normal(gold)
    if not a or not b:
        return float(a == b)
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * common / (len(a) + len(b))


@dataclass(frozen=True)
class FoundSpan:
    """The best answer in one window of a context, and what stands against it.

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


def read_spans(output: Any, batch: Batch, tokens: TokenSet) -> list[FoundSpan]:
    """The best span of each window, at most MAX_ANSWER_TOKENS long."""
    offsets = tokens.table.select_columns(["offsets"])[list(batch.entries)]["offsets"]
    starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()
    return [
        _best_span(start[:n], end[:n], np.array(places).reshape(-1, 2))
        for start, end, places, n in zip(starts, ends, offsets, batch.lengths, strict=True)
    ]


def _best_span(start_N: torch.Tensor, end_N: torch.Tensor, offsets: np.ndarray) -> FoundSpan:
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


def best_answers(found: Mapping[int, FoundSpan], rows: Rows) -> list[FoundAnswer]:
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


def _answer_figures(found: Mapping[int, Any], rows: Rows) -> dict[str, float]:
    gold = [example.answers for example in rows.examples if isinstance(example, Span)]
    return squad_by_kind([answer.text for answer in best_answers(found, rows)], gold)


def has_unanswered(examples: Sequence[Example]) -> bool:
    """Whether some question has no answer in its context; False for rows that are no questions."""
    if not len(examples) or not isinstance(examples[0], Span):
        return False
    return any(isinstance(example, Span) and not example.answers for example in examples)


MEASURES: dict[TaskType, Measure] = {
    TaskType.SEQ_CLS: Measure(("accuracy", "f1"), read_classes, _class_figures),
    TaskType.TOKEN_CLS: Measure(("f1", "precision", "recall", "accuracy"), read_tags, _tag_figures),
    TaskType.QUESTION_ANS: Measure(("exact_match", "f1"), read_spans, _answer_figures),
    TaskType.CAUSAL_LM: Measure(("perplexity",)),  # exp of the loss
    TaskType.SEQ_2_SEQ_LM: Measure(("perplexity",)),
}
