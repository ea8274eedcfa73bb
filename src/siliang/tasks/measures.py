"""Measures of written texts against the right ones: `MEASURES` is the table of them.

ROUGE is rouge-score's, over the units of `metrics.units`: words in lower case, and single characters of scripts without
blanks. BLEU and chrF are sacrebleu's, over the whole corpus, from 0 to 100 as papers report them; ROUGE and exact match
are means over the texts, from 0 to 1. A score comes with its signature: what another computation of it has to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

from siliang.config import BleuTokenizer, EvaluationConfig, MeasureName, RunConfig
from siliang.data.words import stands_alone, whole_characters
from siliang.language import Bilingual
from siliang.records import Classification
from siliang.tasks.metrics import rouge
from siliang.tasks.task import Metric, Task
from siliang.types import ConfigError

EXTRA = "measures"  # of pyproject.toml, with sacrebleu


class Score(NamedTuple):
    """A measure of some texts, and how it was computed."""

    value: float
    signature: str


@dataclass(frozen=True)
class Measure:
    """A measure of written texts.

    Attributes:
        score: From the written texts, the right ones, and the setting of BLEU's tokenizer.
        package: What has to be installed for it beside siliang; None for nothing.
        higher: More of it is better.
    """

    score: Callable[[Sequence[str], Sequence[str], BleuTokenizer], Score]
    package: str | None = None
    higher: bool = True


def rouge_score(kind: str, written: Sequence[str], references: Sequence[str], tokenizer: BleuTokenizer) -> Score:
    """Mean F1 of ROUGE.

    Args:
        kind: As rouge-score calls it.
    """
    signature = f"mean:F1|tok:words+characters|case:lc|rouge-score:{version('rouge-score')}"
    return Score(rouge(kind, written, references), signature)


def bleu(written: Sequence[str], references: Sequence[str], tokenizer: BleuTokenizer) -> Score:
    """BLEU of the corpus."""
    from sacrebleu.metrics.bleu import BLEU

    chosen = tokenizer_of(references) if tokenizer == "auto" else tokenizer
    metric = BLEU(tokenize=chosen, force=True)  # whether the texts look tokenized is not asked
    found = metric.corpus_score(list(written), [list(references)])
    return Score(float(found.score), str(metric.get_signature()))


def chrf(written: Sequence[str], references: Sequence[str], tokenizer: BleuTokenizer) -> Score:
    """chrF2 of the corpus."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    found = metric.corpus_score(list(written), [list(references)])
    return Score(float(found.score), str(metric.get_signature()))


def exact_match(written: Sequence[str], references: Sequence[str], tokenizer: BleuTokenizer) -> Score:
    """The share of texts that are the right ones, but for blanks."""
    same = [one_spacing(a) == one_spacing(b) for a, b in zip(written, references, strict=True)]
    return Score(sum(same) / len(same), "case:mixed|blanks:single, none beside characters of scripts without blanks")


MEASURES: dict[MeasureName, Measure] = {
    "rouge_1": Measure(partial(rouge_score, "rouge1")),
    "rouge_2": Measure(partial(rouge_score, "rouge2")),
    "rouge_l": Measure(partial(rouge_score, "rougeL")),
    "bleu": Measure(bleu, package="sacrebleu"),
    "chrf": Measure(chrf, package="sacrebleu"),
    "exact_match": Measure(exact_match),
}


def score_texts(
    names: Sequence[MeasureName], written: Sequence[str], references: Sequence[str], tokenizer: BleuTokenizer = "auto"
) -> dict[str, Score]:
    """The measures of these names, for at least one text."""
    return {name: MEASURES[name].score(written, references, tokenizer) for name in names}


def tokenizer_of(references: Sequence[str]) -> BleuTokenizer:
    """sacrebleu's tokenizer for the script of most letters."""
    letters = [c for text in references for c in text if c.isalpha()]
    alone = [c for c in letters if stands_alone(c)]
    if 2 * len(alone) < len(letters) or not alone:
        return "13a"
    return "zh" if sum(map(_is_han, alone)) >= 0.9 * len(alone) else "char"  # Japanese has kana between them


def _is_han(c: str) -> bool:
    return ("\u2e80" <= c <= "\u9fff" and not "\u3040" <= c <= "\u30ff") or "\U00020000" <= c <= "\U0003ffff"


def one_spacing(text: str) -> str:
    """The text with single blanks, and none beside a character of a script without blanks: some tokenizers write them
    there."""
    words = text.split()
    out = words[:1]
    for word in words[1:]:
        touches = stands_alone(whole_characters(out[-1])[-1][0]) or stands_alone(word[0])
        out.append(word if touches else f" {word}")
    return "".join(out)


# ---- what a run measures ----


def with_measures(task: Task, config: RunConfig, learned: Classification | None) -> Task:
    """The task with the measures that a run's settings choose for each evaluation: those of evaluation.measures, and
    that of train.best."""
    known: dict[str | None, MeasureName] = {name: name for name in MEASURES}
    chosen = list((config.evaluation or EvaluationConfig()).measures)
    if config.train.best in known:
        chosen.append(known[config.train.best])
    return measuring(task, chosen)


def measuring(task: Task, names: Sequence[MeasureName]) -> Task:
    """The task with these measures of the texts that its model writes."""
    names = tuple(dict.fromkeys(names))
    known = {metric.name for metric in task.metrics}
    added = tuple(Metric(name, MEASURES[name].higher) for name in names if name not in known)
    return replace(task, measures=names, metrics=(*task.metrics, *added))


def check_measures(task: Task, config: RunConfig) -> None:
    """
    Args:
        task: With the measures that the run will compute.

    Raises:
        ConfigError: The task writes nothing that is measured, or a package is missing.
    """
    chosen = (config.evaluation or EvaluationConfig()).measures
    if chosen and task.question is None:
        raise ConfigError(
            Bilingual(
                f"evaluation.measures = {chosen}: they measure the texts that a model writes, and {task.title} has "
                "other metrics: leave them out.",
                f"evaluation.measures = {chosen}：这些是所写文本的指标，而 {task.title} 有自己的指标：请去掉。",
            )
        )
    for name in task.measures:
        need_package(name)


def need_package(name: MeasureName) -> None:
    """
    Raises:
        ConfigError: The measure's package is not installed.
    """
    package = MEASURES[name].package
    if package is not None and find_spec(package) is None:
        raise ConfigError(
            Bilingual(
                f"{name} needs {package}, which is not installed: pip install 'siliang[{EXTRA}]'.",
                f"{name} 需要 {package}，而它没有安装：pip install 'siliang[{EXTRA}]'。",
            )
        )
