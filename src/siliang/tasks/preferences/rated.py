"""Answers that are marked as good or bad: a model that writes learns from each of them alone.

KTO, Ethayarajh et al. 2024, arXiv 2402.01306, with c: the log-probability of an answer, c' that of the base model, and
z: how far the model is from the base model, estimated on answers to other prompts, (y, y') likewise; z has no gradient.

    good   w+ (1 - sigmoid(beta ((c - c') - z)))         z = max(0, mean(y - y'))
    bad    w- (1 - sigmoid(beta (z - (c - c'))))

An entry is two sequences: a prompt with its answer, and the same prompt with the answer of a row before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from siliang.config import DataConfig, PreferenceConfig
from siliang.data.chat import ChatTemplate
from siliang.data.conversations import writer
from siliang.data.encode import IGNORED, Encoder
from siliang.data.entries import TokenEntry, token_labels
from siliang.data.messages import Ranked, Rated
from siliang.data.prepared import EvalRows
from siliang.data.spec import LABELS, NUMBERS, DataSpec, Encode, TokenColumn
from siliang.language import Bilingual
from siliang.models.tokenizer import Tokenizer
from siliang.records import Verdict
from siliang.tasks.preferences.ranked import encode_ranked, log_probabilities
from siliang.tasks.task import EntryValues, HeldOutAnswers, Metric, Reply, Shown, StepLoss, Task

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

    from siliang.data.batch import Batch

KL = Metric("kl", higher=False)


class RatedEntry(TokenEntry, total=False):
    """An entry, with whether the answer is good for each of its sequences."""

    desirable: list[float]


# ---- tokens ----


def encoder(tokenizer: Tokenizer, data: DataConfig, labels: list[str]) -> Encode:
    """Makes the function that turns examples into entries.

    Raises:
        ConfigError: The tokenizer has no end-of-sequence token.
    """
    made = Encoder(tokenizer)
    made.need_eos()
    return partial(encode_rated, made, writer(data.template, made, data.template_arguments), data)


def encode_rated(
    encoder: Encoder, template: ChatTemplate, data: DataConfig, examples: Sequence[Rated]
) -> list[list[RatedEntry]]:
    """Each answer behind its prompt, and behind it the prompt with an answer to another one, where there is one."""
    own = encode_ranked(encoder, template, data, [example.ranked for example in examples])
    others = [with_other_answer(examples, i) for i in range(len(examples))]
    never_dropped = data.model_copy(update={"too_long": "cut"})
    made = iter(encode_ranked(encoder, template, never_dropped, [other for other in others if other is not None]))
    mismatched = [None if other is None else next(made)[0] for other in others]
    return [
        [_entry(entry, other, example.desirable) for entry in rows]
        for example, rows, other in zip(examples, own, mismatched, strict=True)
    ]


def with_other_answer(examples: Sequence[Rated], i: int) -> Ranked | None:
    """The prompt of an example with the answer of the nearest one before it, in a circle, that has another prompt."""
    one = examples[i]
    before = (examples[i - step] for step in range(1, len(examples)))
    other = next((e for e in before if e.prompt_messages != one.prompt_messages), None)
    return None if other is None else Ranked(one.prompt_messages, (other.answer,), one.tools)


def _entry(own: TokenEntry, other: TokenEntry | None, desirable: bool) -> RatedEntry:
    """Both sequences as one entry. What was cut is counted of the row's own."""
    parts = [own] if other is None or "sequences" not in own else [own, other]  # a row that is dropped stays so
    joined: TokenEntry = {
        **own,
        "input_ids": [x for part in parts for x in part["input_ids"]],
        "labels": [x for part in parts for x in token_labels(part)],
        "sequences": [n for part in parts for n in part.get("sequences", [])],
    }
    return RatedEntry(**joined, desirable=[float(desirable)] * len(joined["sequences"]))


def show(row: Mapping[str, Any], labels: list[str]) -> Shown:
    """The prompt and the answer, and whether it is good."""
    first = row["sequences"][0]
    learned = frozenset(i for i in range(first) if row["labels"][i] != IGNORED)
    target = Bilingual("good", "好") if row["desirable"][0] else Bilingual("bad", "坏")
    return Shown(row["input_ids"][:first], learned=learned, target=target)


def synthetic_row(length: int, target_length: int) -> dict[str, Any]:
    """An answer of so many tokens, and another one."""
    tokens = [1] * 2 * length
    return {"input_ids": tokens, "labels": tokens, "sequences": [length, length], "desirable": [1.0, 1.0]}


# ---- loss ----


def values(output: Tensor, batch: Batch) -> Tensor:
    """(log-probability of the labelled tokens, their number, whether the answer is good) of each sequence, (S, 3)."""
    import torch

    return torch.cat((log_probabilities(output, batch), batch.inputs["desirable"][:, None].to(output.dtype)), -1)


def gains(own: Sequence[Tensor], reference: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(c - c', whether the answer is good, z), (N,), (N,) and a scalar without a gradient.

    Args:
        own: Of each entry (1 or 2, 3): its answer, and another prompt's if it has one.
        reference: Likewise, of the base model.
    """
    import torch

    gained = [a[:, 0] - b[:, 0] for a, b in zip(own, reference, strict=True)]
    good = torch.stack([a[0, 2] for a in own]) > 0
    others = [g[1] for g in gained if len(g) > 1]
    z = torch.stack(others).detach().mean().clamp(min=0) if others else gained[0].new_zeros(())
    return torch.stack([g[0] for g in gained]), good, z


def step_loss(s: PreferenceConfig) -> StepLoss:
    """The loss of these settings."""
    import torch

    def loss(own: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        gained, good, z = gains(own, reference)
        over = s.beta * (gained - z)
        losses = torch.where(
            good, s.desirable_weight * (1 - over.sigmoid()), s.undesirable_weight * (1 - (-over).sigmoid())
        )
        return losses.sum()

    return StepLoss(values, loss, reference=True)


# ---- metrics ----


def measure(s: PreferenceConfig, found: Mapping[int, EntryValues], rows: EvalRows) -> dict[str, float]:
    """The share of answers whose gain over z says whether they are good; z, if some answer has another prompt; the mean
    reward of each kind of answer that is there, and the margin between them."""
    gained, good, z = _of(found)
    right = (gained - z).sign() * (2 * good.float() - 1)  # a tie is half right, as before training
    means = {
        name: float((s.beta * gained[where]).mean())
        for name, where in (("chosen_reward", good), ("rejected_reward", ~good))
        if bool(where.any())
    }
    if len(means) == 2:
        means = {"margin": means["chosen_reward"] - means["rejected_reward"], **means}
    is_known = any(len(kept.values) > 1 for kept in found.values())
    return {"accuracy": float((right + 1).mean()) / 2, **means, **({KL.name: float(z)} if is_known else {})}


def replies(s: PreferenceConfig, found: Mapping[int, EntryValues], rows: EvalRows) -> Iterator[tuple[int, Reply]]:
    """Whether the model takes each answer for good."""
    numbers = rows.tokens.column("row").tolist()
    gained, _, z = _of(found)
    words = {True: "good", False: "bad"}
    for entry, over in zip(found, (gained - z).tolist(), strict=True):
        example = rows.examples[numbers[entry]]
        assert isinstance(example, Rated)
        text = f"{example.prompt_messages[-1].text}\n{example.ranked.words[0]}"
        correct = over != 0 and (over > 0) == example.desirable
        yield numbers[entry], Reply(text, words[example.desirable], words[over > 0], correct)


def _of(found: Mapping[int, EntryValues]) -> tuple[Tensor, Tensor, Tensor]:
    return gains([v.values for v in found.values()], [v.reference for v in found.values() if v.reference is not None])


def verdict(final: Mapping[str, float], base: Mapping[str, float], answers: HeldOutAnswers | None) -> Verdict | None:
    """Good answers have not gained on bad ones."""
    return "not above chance" if final.get("margin", 1.0) <= 0 else None


RATED = DataSpec(
    name="preference",
    layouts=("rated-answer", "rated-messages"),
    columns={
        "input_ids": NUMBERS,
        "labels": LABELS,
        "desirable": TokenColumn(kind="float32", target=True),
    },
    encoder=encoder,
    label_per_token=True,
    next_token=True,
    sequences=True,
    neighbours=True,
    templated=True,
)


def with_ratings(task: Task, settings: PreferenceConfig) -> Task:
    """The task of preferences, learned from answers that are good or bad."""
    return replace(
        task,
        data=RATED,
        show=show,
        synthetic_row=synthetic_row,
        legend=(
            Bilingual("green: the answer, after ->: whether it is good", "绿色：回答；-> 之后：好或坏"),
            Bilingual("[[...]]: the answer, after ->: whether it is good", "[[...]]：回答；-> 之后：好或坏"),
        ),
        step_loss=step_loss(settings),
        measure=partial(measure, settings),
        replies=partial(replies, settings),
        metrics=(*task.metrics, KL),
        verdict=verdict,
    )
