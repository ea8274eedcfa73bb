"""The better of two answers: a model that writes learns which of them is preferred.

Loss: one of `preferences/losses.LOSSES`, of the log-probabilities of both answers, and mostly of those that the base
model gives. Metrics: the share of pairs of which the chosen answer has the higher reward, and by how much. A reward is
beta times the log-probability that the answer has gained over the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from siliang.config import PreferenceConfig, RunConfig
from siliang.data.prepared import EvalRows
from siliang.data.spec import LABELS, NUMBERS, DataSpec
from siliang.language import Bilingual
from siliang.models.spec import ModelSpec
from siliang.records import Classification, Verdict
from siliang.tasks.causal_lm import prompt
from siliang.tasks.metrics import ACCURACY
from siliang.tasks.preferences.ranked import answers_of, encoder, log_probabilities, show, synthetic_row
from siliang.tasks.preferences.rated import with_ratings
from siliang.tasks.task import EntryValues, HeldOutAnswers, Metric, Reply, StepLoss, Task
from siliang.types import TaskType

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

    from siliang.tasks.preferences.losses import Pairs

MARGIN = Metric("margin")
CHANCE = 0.5


# ---- loss ----


def step_loss(settings: PreferenceConfig) -> StepLoss:
    """The loss of these settings."""
    from siliang.tasks.preferences.losses import LOSSES, Pairs, likelihood

    row = LOSSES[settings.loss]

    def loss(values: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        pairs = Pairs.of(values, reference)
        found = row.loss(pairs, settings).sum()
        return found + len(values) * settings.nll_weight * likelihood(pairs) if settings.nll_weight else found

    separable, reference = not settings.nll_weight, settings.compares
    return StepLoss(log_probabilities, loss, reference=reference, separable=separable, compares=False)


def with_settings(task: Task, config: RunConfig, learned: Classification | None) -> Task:
    """The task with the loss of a run."""
    settings = config.preference or PreferenceConfig()
    return with_ratings(task, settings) if settings.loss == "kto" else with_loss(task, settings)


def with_loss(task: Task, settings: PreferenceConfig) -> Task:
    """The task with the loss of these settings, and the rewards that follow from it."""
    return replace(
        task, step_loss=step_loss(settings), measure=partial(measure, settings), replies=partial(replies, settings)
    )


# ---- metrics ----


def rewards(settings: PreferenceConfig, found: Mapping[int, EntryValues]) -> tuple[Tensor, Tensor]:
    """The rewards of the chosen and of the rejected answers, (N,) each."""
    from siliang.tasks.preferences.losses import LOSSES

    row, pairs = LOSSES[settings.loss], _pairs(found)
    chosen, rejected = pairs.mean_gains if row.by_tokens else pairs.gains
    return settings.beta * chosen, settings.beta * rejected


def _pairs(found: Mapping[int, EntryValues]) -> Pairs:
    from siliang.tasks.preferences.losses import Pairs

    return Pairs.of(
        [v.values for v in found.values()], [v.reference for v in found.values() if v.reference is not None]
    )


def measure(settings: PreferenceConfig, found: Mapping[int, EntryValues], rows: EvalRows) -> dict[str, float]:
    """The share of pairs in the right order, and the rewards."""
    chosen, rejected = rewards(settings, found)
    metrics = {
        ACCURACY.name: float(((chosen - rejected).sign() + 1).mean()) / 2,  # a tie is half right, as before training
        MARGIN.name: float((chosen - rejected).mean()),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
    }
    return metrics | distance(_pairs(found)) if settings.compares else metrics


def distance(pairs: Pairs) -> dict[str, float]:
    """How far the model is from the base model on the answers of the data: log p - log p', summed over an answer and
    meaned over answers (the objective/kl of TRL's online trainers, which take it on the model's own answers), and
    meaned over tokens. It is below 0 where the answers have become less likely."""
    gained = sum(float(part.sum()) for part in pairs.gains)
    tokens = float(pairs.chosen_tokens.sum() + pairs.rejected_tokens.sum())
    return {"kl": gained / (2 * len(pairs.chosen)), "kl_per_token": gained / max(tokens, 1.0)}


def replies(
    settings: PreferenceConfig, found: Mapping[int, EntryValues], rows: EvalRows
) -> Iterator[tuple[int, Reply]]:
    """The answer that the model prefers in each pair."""
    chosen, rejected = rewards(settings, found)
    for (number, example, good, bad), better, worse in zip(
        answers_of(found, rows), chosen.tolist(), rejected.tolist(), strict=True
    ):
        correct = better > worse
        yield number, Reply(example.prompt_messages[-1].text, good, good if correct else bad, correct)


def verdict(final: Mapping[str, float], base: Mapping[str, float], answers: HeldOutAnswers | None) -> Verdict | None:
    """The chosen answers have not gained on the rejected ones."""
    return "not above chance" if final.get("accuracy", 1.0) <= CHANCE else None


_WITHOUT_LOSS = Task(
    name=TaskType.PREFERENCE,
    adapter_type=TaskType.CAUSAL_LM,
    data=DataSpec(
        name="preference",
        layouts=("chosen-rejected", "messages-rejected", "rejected-messages", "responses", "output-list"),
        columns={"input_ids": NUMBERS, "labels": LABELS},
        encoder=encoder,
        label_per_token=True,
        next_token=True,
        templated=True,
        sequences=True,
    ),
    model=ModelSpec(task="preference", auto_class="AutoModelForCausalLM"),
    legend=(
        Bilingual("green: the chosen answer, after ->: the rejected one", "绿色：所选的回答；-> 之后：被拒绝的回答"),
        Bilingual(
            "[[...]]: the chosen answer, after ->: the rejected one", "[[...]]：所选的回答；-> 之后：被拒绝的回答"
        ),
    ),
    show=show,
    synthetic_row=synthetic_row,
    writes=True,
    with_settings=with_settings,
    metrics=(ACCURACY, MARGIN),
    quality=ACCURACY,
    verdict=verdict,
    inputs_layouts=("prompt-completion", "alpaca", "messages", "sharegpt"),
    prompt=prompt,
    example_prompt="an instruction",
)
PREFERENCE = with_loss(_WITHOUT_LOSS, PreferenceConfig())
