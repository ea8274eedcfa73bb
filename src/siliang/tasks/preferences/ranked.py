"""Answers to one prompt as sequences of one entry, for tasks that compare them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from siliang.config import DataConfig
from siliang.data.chat import ChatTemplate
from siliang.data.conversations import encode, writer
from siliang.data.encode import IGNORED, Encoder
from siliang.data.entries import Rows, TokenEntry, dropped, token_labels
from siliang.data.messages import Conversation, Ranked
from siliang.data.prepared import EvalRows
from siliang.data.spec import Encode
from siliang.models.tokenizer import Tokenizer
from siliang.tasks.task import Shown

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

    from siliang.data.batch import Batch

NO_LIMIT = 2**31 - 1  # of tokens


def encoder(tokenizer: Tokenizer, data: DataConfig, labels: list[str]) -> Encode:
    """Makes the function that turns examples into entries.

    Raises:
        ConfigError: The tokenizer has no end-of-sequence token.
    """
    made = Encoder(tokenizer)
    made.need_eos()
    return partial(encode_ranked, made, writer(data.template, made, data.template_arguments), data)


def encode_ranked(encoder: Encoder, template: ChatTemplate, data: DataConfig, examples: Sequence[Ranked]) -> list[Rows]:
    """Each answer behind its prompt, as one sequence. An entry is a pair of them, the better one first, or one answer
    alone.
    """
    whole = data.model_copy(update={"max_length": NO_LIMIT})

    def written(talks: list[Conversation]) -> list[TokenEntry]:
        return [entries[0] for entries in encode(encoder, template, whole, talks, split=False)]

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
        groups: list[tuple[int, ...]] = [*example.pairs] or [(0,)]
        rows.append(
            [
                _entry([answers[i] for i in group], sum(before[i] for i in group), data.max_length, len(encoder.start))
                for group in groups
            ]
        )
    return rows


def _entry(answers: list[TokenEntry], before: int, limit: int, keep: int) -> TokenEntry:
    """An entry of sequences of at most `limit` tokens.

    All keep the same part of their prompt, which loses its beginning behind the first `keep` tokens. The longest answer
    has at least half of the room; an answer that needs more loses its end, but not its last token.

    Args:
        before: Tokens of all before anything was cut.
    """
    parts = [(part["input_ids"], token_labels(part)) for part in answers]
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


def log_probabilities(output: Tensor, batch: Batch) -> Tensor:
    """(log-probability of the labelled tokens, their number) of each sequence, (S, 2)."""
    import torch

    assert batch.targets is not None
    zero = output.new_zeros(len(batch.lengths))
    sums = (zero.index_add(0, batch.targets[1], x) for x in (output, torch.ones_like(output)))
    return torch.stack(tuple(sums), -1)


def answers_of(found: Iterable[int], rows: EvalRows) -> Iterator[tuple[int, Ranked, str, str]]:
    """(number of the example, the example, the better answer, the worse one) of each entry."""
    numbers: list[int] = rows.tokens.column("row").tolist()
    first: dict[int, int] = {}
    for entry, number in enumerate(numbers):
        first.setdefault(number, entry)
    for entry in found:
        example = rows.examples[numbers[entry]]
        assert isinstance(example, Ranked)
        better, worse = example.pairs[entry - first[numbers[entry]]]
        yield numbers[entry], example, example.words[better], example.words[worse]


def show(row: Mapping[str, Any], labels: list[str]) -> Shown:
    """The prompt and the chosen answer, with the rejected one behind them."""
    first = row["sequences"][0]
    learned = frozenset(i for i in range(first) if row["labels"][i] != IGNORED)
    rejected = [x for i, x in enumerate(row["input_ids"]) if i >= first and row["labels"][i] != IGNORED]
    return Shown(row["input_ids"][:first], learned=learned, target=rejected)


def synthetic_row(length: int, target_length: int) -> dict[str, Any]:
    """A pair of so many tokens each, all of them answers."""
    return {"input_ids": [1] * 2 * length, "labels": [1] * 2 * length, "sequences": [length, length]}
