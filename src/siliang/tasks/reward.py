"""A number for an answer: a reward model, which learns from pairs of a better and a worse answer.

Loss: -log sigmoid(r(better) - r(worse)), Bradley and Terry 1952, as Ouyang et al. 2022 (arXiv 2203.02155, eq. 1).
Metrics: the share of pairs whose better answer has the higher reward, and by how much.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from siliang.data.messages import Conversation, Message, Ranked
from siliang.data.prepared import EvalRows
from siliang.data.spec import NUMBERS, DataSpec
from siliang.language import Bilingual
from siliang.models.spec import ModelSpec
from siliang.tasks.losses import WithLogits
from siliang.tasks.metrics import ACCURACY
from siliang.tasks.preference import MARGIN, verdict
from siliang.tasks.preferences.ranked import answers_of, encoder
from siliang.tasks.related_texts import in_one_line, two_texts
from siliang.tasks.task import EntryValues, Reply, Shown, StepLoss, Task, Trained
from siliang.types import TASK_HEADS, DataError, TaskType

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

    from siliang.data.batch import Batch


@dataclass(frozen=True)
class Reward:
    """An answer and its reward."""

    prompt: str
    answer: str
    reward: float
    probability: None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The prompt and the answer."""
        return (self.prompt, self.answer)

    @property
    def predicted(self) -> str:
        """The reward."""
        return f"{self.reward:.4f}"

    def values(self) -> dict[str, object]:
        """The same for JSON."""
        return {"prompt": self.prompt, "answer": self.answer, "reward": round(self.reward, 6)}


# ---- tokens ----


def synthetic_row(length: int, target_length: int) -> dict[str, Any]:
    """A pair of so many tokens each."""
    return {"input_ids": [1] * 2 * length, "sequences": [length, length]}


def show(row: Mapping[str, Any], labels: list[str]) -> Shown:
    """The better answer behind its prompt, and the worse one."""
    first = row["sequences"][0]
    return Shown(row["input_ids"][:first], target=row["input_ids"][first:])


# ---- loss ----


def rewards(output: WithLogits, batch: Batch) -> Tensor:
    """The reward of each sequence, (S,)."""
    return output.logits.float().squeeze(-1)


def loss(values: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """-log sigmoid(r(better) - r(worse)), summed over the pairs, each (2,)."""
    import torch
    import torch.nn.functional as F

    better, worse = torch.stack(list(values)).unbind(1)
    return -F.logsigmoid(better - worse).sum()


# ---- metrics ----


def measure(found: Mapping[int, EntryValues], rows: EvalRows) -> dict[str, float]:
    """The share of pairs in the right order, and the difference of the two rewards."""
    margins = [float(kept.values[0] - kept.values[1]) for kept in found.values()]
    right = sum((margin > 0) + (margin == 0) / 2 for margin in margins)
    return {ACCURACY.name: right / len(margins), MARGIN.name: sum(margins) / len(margins)}


def replies(found: Mapping[int, EntryValues], rows: EvalRows) -> Iterator[tuple[int, Reply]]:
    """The answer with the higher reward of each pair."""
    for (number, example, good, bad), kept in zip(answers_of(found, rows), found.values(), strict=True):
        correct = bool(kept.values[0] > kept.values[1])
        yield number, Reply(example.prompt_messages[-1].text, good, good if correct else bad, correct)


# ---- use ----


def predict(run: Trained, pairs: Iterable[str | tuple[str, str] | Conversation]) -> Iterator[Reward]:
    """The reward of each answer, in order.

    Args:
        pairs: Prompts and answers, or both in one text with a tab between them, or conversations that end with the
            answer.

    Raises:
        DataError: A prompt or an answer is missing.
    """
    for examples, _, found in run.read(_example(run, pair) for pair in pairs):
        for example, kept in zip(examples, found.values(), strict=True):
            assert isinstance(example, Ranked)
            yield Reward(example.prompt_messages[-1].text, example.words[0], float(kept.values[0]))


def _example(run: Trained, pair: str | tuple[str, str] | Conversation) -> Ranked:
    if isinstance(pair, Conversation):
        return Ranked(pair.messages[:-1], (pair.messages[-1:],), pair.tools)
    if (parts := two_texts(pair)) is None:
        given = in_one_line(pair)
        raise DataError(
            Bilingual(
                f"{run.name} rewards answers to prompts, and {given!r} is not both.\n"
                "Give a prompt and an answer with a tab between them, or a file with the columns prompt and "
                "completion: siliang predict RUN a.csv.",
                f"{run.name} 给提问的回答打分，而 {given!r} 不是提问和回答。\n"
                "请用制表符隔开提问和回答，或给出含 prompt 和 completion 两列的文件：siliang predict RUN a.csv。",
            )
        )
    return Ranked((Message("user", parts[0]),), ((Message("assistant", parts[1]),),))


REWARD = Task(
    name=TaskType.REWARD,
    adapter_type=TaskType.SEQ_CLS,
    data=DataSpec(
        name="reward",
        layouts=("chosen-rejected", "messages-rejected", "rejected-messages", "responses", "output-list"),
        columns={"input_ids": NUMBERS},
        encoder=encoder,
        sequences=True,
        templated=True,
    ),
    model=ModelSpec(
        task="reward",
        auto_class="AutoModelForSequenceClassification",
        heads=TASK_HEADS[TaskType.SEQ_CLS],
        outputs=1,
        needs_padding_token=True,
    ),
    legend=(
        Bilingual("grey: the better answer, green: the worse one", "灰色：较好的回答，绿色：较差的回答"),
        Bilingual("->: the worse answer to the text above it", "->：上面文本的较差回答"),
    ),
    show=show,
    synthetic_row=synthetic_row,
    step_loss=StepLoss(rewards, loss, separable=True, compares=False),
    metrics=(ACCURACY, MARGIN),
    measure=measure,
    quality=ACCURACY,
    replies=replies,
    verdict=verdict,
    inputs=("prompt", "completion"),
    inputs_layouts=("prompt-completion",),
    predict=predict,
    blank={"prompt": "", "answer": "", "reward": None},
    example_prompt="a prompt<TAB>an answer",
)
