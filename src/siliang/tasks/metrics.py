"""Metrics of predictions against references: for each task, those of its field.

Classes: accuracy and macro F1. Numbers: Spearman's rank correlation (scipy). Tags: precision, recall and
F1 over whole spans, and the F1 of each type of span (seqeval). Text: ROUGE (rouge-score), over characters where a
language writes no spaces; the other measures of texts are in measures.py. Answers in a context: exact match and F1, as
SQuAD's own script defines them; the libraries that hold it would bring their own framework with them.
"""

from __future__ import annotations

import collections
import math
import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from siliang.data.words import stands_alone, whole_characters
from siliang.tasks.task import Metric

# metrics of several tasks
ACCURACY, F1, MAE, SPEARMAN = Metric("accuracy"), Metric("f1"), Metric("mae", higher=False), Metric("spearman")
ZERO: Any = 0  # for a type that is nowhere found; seqeval declares only the text "warn"
MOST_PERPLEXITY = 700.0  # exp of more is no double


def perplexity(loss: float) -> float:
    """exp of a mean loss over tokens."""
    return math.exp(min(loss, MOST_PERPLEXITY))


# ---- classes ----


def classification(predicted: Sequence[int], reference: Sequence[int]) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur (macro).

    F1 of a class = 2 both / (predicted + reference): the rows that have it and get it, that get it, and that have it.
    The tests compare it with scikit-learn's, whose import takes longer than many an evaluation.
    """
    guess, gold = np.asarray(predicted), np.asarray(reference)
    classes, numbers = np.unique(np.concatenate([guess, gold]), return_inverse=True)
    either = np.bincount(numbers)
    both = np.bincount(numbers[: len(guess)][guess == gold], minlength=len(classes))
    return {"accuracy": float((guess == gold).mean()), "f1": float((2 * both / either).mean())}


# ---- numbers ----


def spearman(predicted: Sequence[float], reference: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one of both is always the same."""
    from scipy.stats import spearmanr

    if len(set(predicted)) < 2 or len(set(reference)) < 2:
        return 0.0
    found: Any = spearmanr(predicted, reference)
    return float(found.statistic)


# ---- tags ----


def spans_of_tags(predicted: Sequence[Sequence[str]], reference: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over spans, the share of correct tags, and the F1 of each type of span that occurs."""
    from seqeval.metrics import accuracy_score, classification_report, f1_score, precision_score, recall_score

    guess, gold = ([[as_iobes(tag) for tag in row] for row in rows] for rows in (predicted, reference))
    found: dict[str, Any] = {
        "f1": f1_score(gold, guess, zero_division=ZERO),
        "precision": precision_score(gold, guess, zero_division=ZERO),
        "recall": recall_score(gold, guess, zero_division=ZERO),
        "accuracy": accuracy_score(gold, guess),
    }
    if types := types_of(tag for rows in (guess, gold) for row in rows for tag in row):
        report: Any = classification_report(gold, guess, output_dict=True, zero_division=ZERO)
        found |= {f1_of(kind): report[kind]["f1-score"] for kind in types}
    return {name: float(value) for name, value in found.items()}


def f1_of(kind: str) -> str:
    """The name of the F1 of one type of span."""
    return f"f1_{kind}"


def types_of(tags: Iterable[str]) -> list[str]:
    """The types of spans that tags such as B-PER name, in the order of the alphabet; none where tags are bare words."""
    return sorted({tag[2:] for tag in set(tags) if tag[1:2] == "-" and tag[2:]})


def as_iobes(tag: str) -> str:
    """BMES's M- is IOBES's I-, the only one of the two that seqeval knows."""
    return "I-" + tag[2:] if tag.startswith("M-") else tag


# ---- text ----


def rouge(kind: str, predicted: Sequence[str], reference: Sequence[str]) -> float:
    """Mean ROUGE F1.

    Args:
        kind: As rouge-score calls it: rouge1, rouge2, rougeL.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], tokenizer=_Units())
    scores = [scorer.score(r, p)[kind].fmeasure for p, r in zip(predicted, reference, strict=True)]
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
    for kind, answered in (("has_answer", True), ("no_answer", False)):
        chosen = [i for i, gold in enumerate(answers) if bool(gold) == answered]
        if chosen:
            part = squad([predicted[i] for i in chosen], [answers[i] for i in chosen])
            found |= {f"{kind}_{name}": value for name, value in part.items()}
    return found


def _against(guess: str, gold: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) against the best of the answers."""
    answers = [answer for answer in gold if _normal(answer)] or [""]
    return max(float(_normal(guess) == _normal(a)) for a in answers), max(_overlap(guess, a) for a in answers)


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
