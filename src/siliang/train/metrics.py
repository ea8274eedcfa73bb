"""What a trained model is measured by, each task by its field's usual figures.

Classes: accuracy and macro F1 (scikit-learn). Tags: precision, recall and F1 over whole spans (seqeval). Text from
text: ROUGE-L (rouge-score), over characters where a language writes no spaces. Answers in a context: exact match and
F1, as SQuAD's own script defines them; the libraries that hold it would bring their own framework with them.
"""

from __future__ import annotations

import collections
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from siliang.data.encode import IGNORED
from siliang.data.examples import Example, Span
from siliang.data.tokens import TokenSet
from siliang.types import TaskType

ZERO: Any = 0  # for a class that is nowhere found; both libraries declare only the text "warn"
# what is measured beside the loss while a run goes on
MEASURED = {
    TaskType.SEQ_CLS: ("accuracy", "f1"),
    TaskType.TOKEN_CLS: ("f1", "precision", "recall", "accuracy"),
    TaskType.QUESTION_ANS: ("exact_match", "f1"),
}
MAX_ANSWER_TOKENS = 30  # of a span that is taken for an answer, as in BERT's run_squad


def classification(predicted: Sequence[int], right: Sequence[int]) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur (macro)."""
    from sklearn.metrics import accuracy_score, f1_score

    f1: Any = f1_score(right, predicted, average="macro", zero_division=ZERO)
    return {"accuracy": float(accuracy_score(right, predicted)), "f1": float(f1)}


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
    spaced = "".join(f" {c} " if _stands_alone(c) else c if c.isalnum() else " " for c in text.lower())
    return spaced.split()


def _stands_alone(c: str) -> bool:
    return c >= "\u2e80" and c.isalpha() and unicodedata.name(c, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI"))


def squad(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 against the best of each question's answers; an empty list wants an empty answer."""
    exact, f1 = [], []
    for guess, gold in zip(predicted, answers, strict=True):
        exact.append(max(float(_normal(guess) == _normal(a)) for a in (gold or [""])))
        f1.append(max(_overlap(guess, a) for a in (gold or [""])))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


def _normal(text: str) -> list[str]:
    """As SQuAD's script: lower case, no punctuation, no articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return units(re.sub(r"\b(a|an|the)\b", " ", bare))


def _overlap(guess: str, gold: str) -> float:
    a, b = _normal(guess), _normal(gold)
    if not a or not b:
        return float(a == b)
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def best_spans(starts: np.ndarray, ends: np.ndarray, tokens: TokenSet, examples: Sequence[Example]) -> list[str]:
    """The answer to each question: the words of the most probable span over all its windows.

    Args:
        starts: Logits, (windows, tokens); ends alike.
    """
    best: dict[int, tuple[float, str]] = {}
    numbers = tokens.column("row")
    for i, number in enumerate(numbers.tolist()):
        example = examples[number]
        assert isinstance(example, Span)
        offsets = np.array(tokens.table[i]["offsets"]).reshape(-1, 2)
        n = len(offsets)
        inside = np.flatnonzero(offsets[:, 0] >= 0)
        scores = np.full((n, n), -np.inf)
        grid = np.ix_(inside, inside)
        scores[grid] = starts[i, :n][inside][:, None] + ends[i, :n][inside][None, :]
        scores[np.tril_indices(n, -1)] = -np.inf
        scores[np.triu_indices(n, MAX_ANSWER_TOKENS)] = -np.inf
        a, b = np.unravel_index(int(scores.argmax()), scores.shape)
        if number not in best or scores[a, b] > best[number][0]:
            best[number] = float(scores[a, b]), example.context[offsets[a, 0] : offsets[b, 1]]
    return [best[number][1] if number in best else "" for number in range(len(examples))]


def trainer_metrics(
    task: TaskType, labels: list[str], tokens: TokenSet, examples: Sequence[Example]
) -> Callable[[Any], dict[str, float]] | None:
    """What transformers' Trainer computes after each evaluation; None where the loss says it all."""

    def compute(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions
        match task:
            case TaskType.SEQ_CLS:
                logits = logits[0] if isinstance(logits, tuple) else logits
                return classification(np.argmax(logits, axis=-1).tolist(), prediction.label_ids.tolist())
            case TaskType.TOKEN_CLS:
                logits = logits[0] if isinstance(logits, tuple) else logits
                return spans_of_tags(*tag_names(np.argmax(logits, axis=-1), prediction.label_ids, labels))
            case _:
                found = best_spans(logits[0], logits[1], tokens, examples)
                return squad(found, [e.answers for e in examples])  # type: ignore[union-attr]

    return compute if task in MEASURED else None


def tag_names(numbers: np.ndarray, right: np.ndarray, labels: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    """(predicted, right) tags of each sentence, where there is one; both arrays are (sentences, tokens)."""
    kept = right != IGNORED
    return (
        [[labels[n] for n in row[k]] for row, k in zip(numbers, kept, strict=True)],
        [[labels[n] for n in row[k]] for row, k in zip(right, kept, strict=True)],
    )
