"""What labels and numbers of rows share: their logits and texts, their mistakes, and what is predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from siliang.data.example import Example
from siliang.data.example_set import ExampleSet
from siliang.data.examples import Labelled, SeveralLabels
from siliang.data.prepared import EvalRows
from siliang.language import Bilingual
from siliang.records.classes import ERRORS, Mistake
from siliang.secrets import shortened
from siliang.tasks.related_texts import in_one_line, one_text, two_texts
from siliang.tasks.task import Reply, Trained
from siliang.types import DataError

if TYPE_CHECKING:  # slow to import
    from siliang.data.batch import Batch
    from siliang.data.tokens import TokenSet
    from siliang.tasks.losses import WithLogits

LONGEST = 300  # characters of a mistake's text


def read_logits(output: WithLogits, batch: Batch, tokens: TokenSet) -> list[np.ndarray]:
    """The logits of each row, (C,)."""
    return list(output.logits.float().cpu().numpy())


def stacked(found: Mapping[int, np.ndarray]) -> np.ndarray:
    """The logits of all rows, (N, C)."""
    return np.stack(list(found.values()))


# The right answer, the model's, whether it counts as right, and its probability: those of a `Reply`.
Answer = tuple[str, str, bool | None, float | None]


def replies_of(
    found: Mapping[int, np.ndarray], rows: EvalRows, answers: Iterable[Answer]
) -> Iterator[tuple[int, Reply]]:
    """The answer to the text of each entry, or to both texts of a pair, one below the other, with its row's number."""
    numbers = rows.tokens.column("row").tolist()
    for entry, answer in zip(found, answers, strict=True):
        example = rows.examples[numbers[entry]]
        assert isinstance(example, Labelled | SeveralLabels)
        text = example.text if example.pair is None else f"{example.text}\n{example.pair}"
        yield numbers[entry], Reply(text, *answer)


def inputs_of(text: str, pair: str | None) -> tuple[str, ...]:
    """The text that a prediction is for, or the two of a pair."""
    return (text,) if pair is None else (text, pair)


def input_values(text: str, pair: str | None) -> dict[str, object]:
    """The same for JSON."""
    return {"text": text} if pair is None else {"text": text, "pair": pair}


def mistakes(replies: Iterable[tuple[int, Reply]], rows: EvalRows, order: Sequence[float]) -> list[Mistake]:
    """The first of the wrong replies in the order of these keys, the largest first.

    Args:
        order: A key for each reply: how sure the model is of its mistake, or by how much it is wrong.
    """
    wrong = [(key, number, reply) for key, (number, reply) in zip(order, replies, strict=True) if not reply.correct]
    places = rows.examples
    return [
        Mistake(
            where=places.where(number) if isinstance(places, ExampleSet) else "",
            text=shortened(reply.input, LONGEST),
            expected=reply.expected,
            predicted=reply.predicted,
            probability=None if reply.probability is None else round(min(key, 1.0), 4),
        )
        for key, number, reply in sorted(wrong, key=lambda item: -item[0])[:ERRORS]
    ]


def most_probable(run: Trained, chances: np.ndarray) -> tuple[tuple[str, float], ...]:
    """The most probable labels with their probabilities, where more than one was asked for."""
    if run.top < 2:
        return ()
    return tuple((run.labels[i], float(chances[i])) for i in np.argsort(-chances, kind="stable")[: run.top].tolist())


def in_brackets(top: Sequence[tuple[str, float]]) -> str:
    """The same in one line; empty for none."""
    return f" ({' '.join(f'{name}={p:.2f}' for name, p in top)})" if top else ""


def top_values(top: Sequence[tuple[str, float]]) -> dict[str, object]:
    """The same for JSON; empty for none."""
    return {"top": [{"label": name, "probability": round(p, 4)} for name, p in top]} if top else {}


def asked(
    run: Trained, texts: Iterable[str | tuple[str, str]], make: Callable[[str, str | None], Example]
) -> Iterator[tuple[Labelled | SeveralLabels, np.ndarray]]:
    """(example, its logits) of each text that is to be predicted.

    Args:
        texts: Where the model was trained on pairs of texts, such pairs, or the two in one with a tab between them.
        make: An example of a text and the second of its pair.

    Raises:
        DataError: The model is for pairs, and a text is alone.
    """
    for examples, _, found in run.read(make(*_parts(run, text)) for text in texts):
        for example, logits in zip(examples, found.values(), strict=True):
            assert isinstance(example, Labelled | SeveralLabels)
            yield example, logits


def _parts(run: Trained, text: str | tuple[str, str]) -> tuple[str, str | None]:
    if run.layout != "sentence-pair":
        if (one := one_text(text)) is None:
            shown = in_one_line(text)
            raise DataError(
                Bilingual(
                    f"{run.name} was trained on texts alone, and {shown!r} is not one text.",
                    f"{run.name} 是用单独的文本训练的，而 {shown!r} 不是一段文本。",
                )
            )
        return one, None
    if (parts := two_texts(text)) is None:
        first, second = run.columns["text"], run.columns["text_pair"]
        given = in_one_line(text)
        raise DataError(
            Bilingual(
                f"{run.name} was trained on pairs of texts, {first!r} and {second!r}, and {given!r} is no "
                "pair.\nGive both with a tab between them, or a file with both columns: siliang "
                "predict RUN a.csv.",
                f"{run.name} 是用成对的文本 {first!r} 和 {second!r} 训练的，而 {given!r} 不是两段文本。"
                "\n"
                "请用制表符隔开两段文本，或给出含这两列的文件：siliang predict RUN a.csv。",
            )
        )
    return parts
