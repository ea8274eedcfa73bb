"""The better of two answers: a model that writes learns which of them is preferred.

Loss: one of `preference_losses.LOSSES`, of the log-probabilities of both answers, and mostly of those that the base
model gives. Metrics: the share of pairs of which the chosen answer has the higher reward, and by how much. A reward is
beta times the log-probability that the answer has gained over the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from siliang.config import DataConfig, PreferenceConfig, RunConfig
from siliang.data.chat import ChatTemplate
from siliang.data.conversations import encode, writer
from siliang.data.encode import IGNORED, Encoder
from siliang.data.entries import Rows, TokenEntry, dropped
from siliang.data.examples import Conversation, Ranked
from siliang.data.prepared import EvalRows
from siliang.data.spec import LABELS, NUMBERS, DataSpec, Encode
from siliang.data.templates import Template
from siliang.language import Bilingual
from siliang.models.spec import ModelSpec
from siliang.models.tokenizer import Tokenizer
from siliang.records import Verdict
from siliang.tasks.causal_lm import prompt
from siliang.tasks.task import EntryValues, Metric, Reply, Said, Shown, StepLoss, Task
from siliang.types import TaskType

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

    from siliang.data.batch import Batch

ACCURACY, MARGIN = Metric("accuracy"), Metric("margin")
CHANCE = 0.5
NO_LIMIT = 2**31 - 1  # of tokens


# ---- tokens ----


def encoder(tokenizer: Tokenizer, data: DataConfig, labels: list[str]) -> Encode:
    """Makes the function that turns examples into entries.

    Raises:
        ConfigError: The tokenizer has no end-of-sequence token.
    """
    made = Encoder(tokenizer)
    made.need_eos()
    return partial(encode_ranked, made, writer(data.template, made), data)


def encode_ranked(
    encoder: Encoder, template: Template | ChatTemplate, data: DataConfig, examples: Sequence[Ranked]
) -> list[Rows]:
    """Each answer behind its prompt, as one sequence; an entry is a pair of them, the better one first."""
    whole = data.model_copy(update={"max_length": NO_LIMIT})

    def written(talks: list[Conversation]) -> list[TokenEntry]:
        return [entries[0] for entries in encode(encoder, template, whole, talks)]

    rows: list[Rows] = []
    sequences = iter(written([talk for example in examples for talk in example.conversations]))
    for example in examples:
        answers = [next(sequences) for _ in example.answers]
        before = [len(answer["input_ids"]) for answer in answers]
        if max(before) > data.max_length and data.too_long == "drop":
            rows.append(dropped(labels=[]))
            continue
        shorter: Ranked | None = example
        while max(len(answer["input_ids"]) for answer in answers) > data.max_length:
            if (shorter := shorter.without_oldest_round()) is None:
                break
            answers = written(shorter.conversations)
        pairs = [(i, j) for i in range(len(answers)) for j in range(i + 1, len(answers))]
        keep = len(encoder.start)
        rows.append([_pair(answers[i], answers[j], before[i] + before[j], data.max_length, keep) for i, j in pairs])
    return rows


def _pair(chosen: TokenEntry, rejected: TokenEntry, before: int, limit: int, keep: int) -> TokenEntry:
    """An entry of two sequences of at most `limit` tokens.

    Both keep the same part of their prompt, which loses its beginning behind the first `keep` tokens. The longer answer
    has at least half of the room; an answer that needs more loses its end, but not its last token.

    Args:
        before: Tokens of both before anything was cut.
    """
    parts = [(part["input_ids"], _labels(part)) for part in (chosen, rejected)]
    firsts = [next((i for i, x in enumerate(labels) if x != IGNORED), len(labels)) for _, labels in parts]
    longest = max(len(ids) - first for (ids, _), first in zip(parts, firsts, strict=True))
    room = limit - min(longest, limit // 2)
    input_ids, learned, sequences, lost = list[int](), list[int](), list[int](), 0
    for (ids, labels), first in zip(parts, firsts, strict=True):
        head = min(keep, room)
        prompt = ids[:first] if first <= room else ids[:head] + ids[first - (room - head) : first]
        answer, marks, left = ids[first:], labels[first:], limit - len(prompt)
        if len(answer) > left:
            lost += sum(x != IGNORED for x in marks[left - 1 : -1])
            answer, marks = answer[: left - 1] + answer[-1:], marks[: left - 1] + marks[-1:]
        input_ids += prompt + answer
        learned += [IGNORED] * len(prompt) + marks
        sequences.append(len(prompt) + len(answer))
    return {
        "input_ids": input_ids,
        "labels": learned,
        "sequences": sequences,
        "lost": before - len(input_ids),
        "lost_answer": lost,
    }


def _labels(entry: TokenEntry) -> list[int]:
    labels = entry.get("labels")
    assert isinstance(labels, list)
    return labels


def synthetic_row(length: int, target_length: int) -> dict[str, Any]:
    """A pair of so many tokens each, all learned."""
    return {"input_ids": [1] * 2 * length, "labels": [1] * 2 * length, "sequences": [length, length]}


def show(row: Mapping[str, Any], labels: list[str]) -> Shown:
    """The prompt and the chosen answer, with the rejected one behind them."""
    first = row["sequences"][0]
    learned = frozenset(i for i in range(first) if row["labels"][i] != IGNORED)
    rejected = [x for i, x in enumerate(row["input_ids"]) if i >= first and row["labels"][i] != IGNORED]
    return Shown(row["input_ids"][:first], learned=learned, target=rejected)


# ---- loss ----


def log_probabilities(output: Tensor, batch: Batch) -> Tensor:
    """(log-probability of the labelled tokens, their number) of each sequence, (S, 2)."""
    import torch

    assert batch.targets is not None
    zero = output.new_zeros(len(batch.lengths))
    sums = (zero.index_add(0, batch.targets[1], x) for x in (output, torch.ones_like(output)))
    return torch.stack(tuple(sums), -1)


def step_loss(settings: PreferenceConfig) -> StepLoss:
    """The loss of these settings."""
    from siliang.tasks.preference_losses import LOSSES, Pairs, likelihood

    row = LOSSES[settings.loss]

    def loss(values: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        pairs = Pairs.of(values, reference)
        found = row.loss(pairs, settings).sum()
        return found + len(values) * settings.likelihood * likelihood(pairs) if settings.likelihood else found

    return StepLoss(log_probabilities, loss, reference=row.reference, separable=not settings.likelihood)


def with_settings(task: Task, config: RunConfig) -> Task:
    """The task with the loss of a run."""
    settings = config.preference or PreferenceConfig()
    return replace(
        task, step_loss=step_loss(settings), measure=partial(measure, settings), replies=partial(replies, settings)
    )


# ---- metrics ----


def rewards(settings: PreferenceConfig, found: Mapping[int, EntryValues]) -> tuple[Tensor, Tensor]:
    """The rewards of the chosen and of the rejected answers, (N,) each."""
    from siliang.tasks.preference_losses import LOSSES, Pairs

    row = LOSSES[settings.loss]
    pairs = Pairs.of(
        [v.values for v in found.values()], [v.reference for v in found.values() if v.reference is not None]
    )
    chosen, rejected = pairs.mean_gains if row.by_tokens else pairs.gains
    return settings.strength * chosen, settings.strength * rejected


def measure(settings: PreferenceConfig, found: Mapping[int, EntryValues], rows: EvalRows) -> dict[str, float]:
    """The share of pairs in the right order, and the rewards."""
    chosen, rejected = rewards(settings, found)
    return {
        ACCURACY.name: float((chosen > rejected).float().mean()),
        MARGIN.name: float((chosen - rejected).mean()),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
    }


def replies(
    settings: PreferenceConfig, found: Mapping[int, EntryValues], rows: EvalRows
) -> Iterator[tuple[int, Reply]]:
    """The answer that the model prefers in each pair."""
    numbers = rows.tokens.column("row").tolist()
    chosen, rejected = rewards(settings, found)
    for (entry, better), worse in zip(zip(found, chosen.tolist(), strict=True), rejected.tolist(), strict=True):
        example = rows.examples[numbers[entry]]
        assert isinstance(example, Ranked)
        right, wrong = example.words[0], example.words[-1]
        yield numbers[entry], Reply(example.asked[-1].text, right, right if better > worse else wrong, better > worse)


def verdict(final: Mapping[str, float], base: Mapping[str, float], said: Said | None) -> Verdict | None:
    """The chosen answers have not gained on the rejected ones."""
    return "not above chance" if final.get("accuracy", 1.0) <= CHANCE else None


PREFERENCE = Task(
    name=TaskType.PREFERENCE,
    adapter_type=TaskType.CAUSAL_LM,
    data=DataSpec(
        name="preference",
        layouts=("chosen-rejected", "messages-rejected"),
        columns={"input_ids": NUMBERS, "labels": LABELS},
        encoder=encoder,
        label_per_token=True,
        next_token=True,
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
    step_loss=step_loss(PreferenceConfig()),
    with_settings=with_settings,
    metrics=(ACCURACY, MARGIN),
    measure=partial(measure, PreferenceConfig()),
    replies=partial(replies, PreferenceConfig()),
    quality=ACCURACY,
    verdict=verdict,
    prompt=prompt,
    example_prompt="an instruction",
)
