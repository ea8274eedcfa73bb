"""The tokens of the task embedding: the texts of a row as sequences, one entry for each positive."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from siliang.config import DataConfig, EmbeddingConfig
from siliang.data.entries import Rows, TokenEntry, dropped
from siliang.data.example import Example
from siliang.data.examples import Labelled, Related, Scored, Text
from siliang.data.pairs import CodedText, coded_texts
from siliang.data.spec import Encode
from siliang.language import Bilingual
from siliang.models.tokenizer import Tokenizer
from siliang.tasks.embeddings.base_vectors import check_settled
from siliang.tasks.embeddings.end_token import with_end
from siliang.tasks.task import Shown


@dataclass(frozen=True)
class TextEncoder:
    """Makes the function that turns examples into entries."""

    settings: EmbeddingConfig

    def __call__(self, tokenizer: Tokenizer, data: DataConfig, labels: list[str]) -> Encode:
        check_settled(self.settings)
        ending = with_end(tokenizer) if self.settings.pooling == "last" else tokenizer
        return partial(encode, ending, data, self.settings)


def encoded_with(settings: EmbeddingConfig) -> str:
    """The settings on which the tokens depend."""
    read = settings.model_dump(include={"query_prompt", "document_prompt", "prompt_name", "negatives"})
    return json.dumps(read | {"ends": settings.pooling == "last"}, sort_keys=True)


def encode(
    tokenizer: Tokenizer, data: DataConfig, settings: EmbeddingConfig, examples: Sequence[Example]
) -> list[Rows]:
    """The texts of each example as sequences: for each positive the anchor, the positive and the negatives; the two
    texts of a scored pair; or a single text.
    """
    groups = [texts_of(example, settings) for example in examples]
    prompts = prompts_of(settings)
    prompted = [
        prompts[settings.prompt_name if len(texts) == 1 else "document" if i else "query"] + text
        for entries in groups
        for texts in entries
        for i, text in enumerate(texts)
    ]
    coded = iter(coded_texts(tokenizer, prompted, [None] * len(prompted), data.max_length) if prompted else ())
    rows: list[Rows] = []
    for example, entries in zip(examples, groups, strict=True):
        found = [[next(coded) for _ in texts] for texts in entries]
        if data.too_long == "drop" and any(text.lost for texts in found for text in texts):
            rows.append(dropped(labels=0))
        else:
            rows.append([_entry(texts, example) for texts in found])
    return rows


def prompts_of(settings: EmbeddingConfig) -> dict[str, str]:
    """What is put in front of a text, by the name of the prompt."""
    named = {"query": settings.query_prompt or "", "document": settings.document_prompt or "", "none": ""}
    return named | ({} if any(named.values()) else {"auto": ""})  # with no prompts it does not matter which


def texts_of(example: Example, settings: EmbeddingConfig) -> list[tuple[str, ...]]:
    """The texts of each entry of an example."""
    match example:
        case Related():
            negatives = example.negatives[: settings.negatives]
            return [(example.anchor, positive, *negatives) for positive in example.positives]
        case Scored():
            return [(example.text, example.pair)]
        case _:
            assert isinstance(example, Labelled | Text)
            return [(example.text,)]


def adapt(settings: EmbeddingConfig, example: Example) -> Example | str:
    """The example, or what its loss lacks in it."""
    if settings.loss == "triplet" and isinstance(example, Related) and not example.negatives[: settings.negatives]:
        return Bilingual(
            "has no negative, which embedding.loss = triplet needs: use multiple_negatives",
            "没有负例，而 embedding.loss = triplet 需要负例：请用 multiple_negatives",
        )
    if settings.loss == "cosine" and isinstance(example, Scored) and not -1.0 <= example.score <= 1.0:
        return Bilingual(
            f"has the score {example.score:g}, and embedding.loss = cosine takes -1 to 1: divide the scores, or use "
            "cosent, which takes their order alone",
            f"的分数是 {example.score:g}，而 embedding.loss = cosine 只接受 -1 到 1：请缩放分数，"
            "或改用只看高低顺序的 cosent",
        )
    return example


def _entry(texts: list[CodedText], example: Example) -> TokenEntry:
    label: list[float] = [0.0, 0.0]
    if isinstance(example, Scored):
        label[0] = example.score
    elif isinstance(example, Labelled):
        label = parts_of(hashlib.blake2b(example.label.encode("utf-8", "surrogatepass")).digest())
    entry: Any = {
        "input_ids": [token for text in texts for token in text.ids],
        "sequences": [len(text.ids) for text in texts],
        "labels": label[0],
        "labels_low": label[1],
        "lost": sum(text.lost for text in texts),
    }
    return entry


def parts_of(key: bytes) -> list[float]:
    """The first bytes of a hash as two numbers that fp32 holds exactly."""
    return [float(int.from_bytes(key[i : i + 3], "little")) for i in (0, 3)]


def synthetic_row(length: int, target_length: int) -> dict[str, Any]:
    """A pair of so many tokens each."""
    labels = {"labels": 0.0, "labels_low": 0.0}
    return {"input_ids": [1] * 2 * length, "sequences": [length, length], **labels}


def show(row: Mapping[str, Any], labels: list[str]) -> Shown:
    """The first text, and the others behind it."""
    first = row["sequences"][0]
    return Shown(row["input_ids"][:first], target=row["input_ids"][first:] or None)
