"""The kinds of examples: a text, a class, tagged words, a question on a context, texts that belong together; and the
conversations of messages.py."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from siliang.data.example import IGNORED, Example, PromptAndTarget
from siliang.data.messages import Conversation, Ranked, Rated
from siliang.language import Bilingual
from siliang.secrets import shortened


@dataclass(frozen=True)
class Text(Example):
    """A text that is learned whole."""

    text: str

    @property
    def texts(self) -> list[str]:
        return [self.text]

    @property
    def input_text(self) -> str:
        return self.text

    def prompt(self, beginning: int) -> PromptAndTarget:
        return PromptAndTarget(self.text[:beginning], "", self.text[beginning:], plain=True)


@dataclass(frozen=True)
class Labelled(Example):
    """A text, or a pair of texts, and the name of its class."""

    text: str
    label: str
    pair: str | None = None

    @property
    def texts(self) -> list[str]:
        return _texts(self.text, self.pair)

    @property
    def input_text(self) -> str:
        return _input_text(self.text, self.pair)

    @property
    def classes(self) -> tuple[str, ...]:
        return (self.label,)

    def with_classes(self, names: tuple[str, ...]) -> Labelled:
        return replace(self, label=names[0])


@dataclass(frozen=True)
class SeveralLabels(Example):
    """A text, or a pair of texts, and the names of its labels, which may be none."""

    text: str
    labels: tuple[str, ...]
    pair: str | None = None

    @property
    def texts(self) -> list[str]:
        return _texts(self.text, self.pair)

    @property
    def input_text(self) -> str:
        return _input_text(self.text, self.pair)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.labels

    def with_classes(self, names: tuple[str, ...]) -> SeveralLabels:
        return replace(self, labels=names)


@dataclass(frozen=True)
class Tagged(Example):
    """Words and a tag for each."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def texts(self) -> list[str]:
        return [" ".join(self.tokens)]

    @property
    def input_text(self) -> str:
        return "\0".join(self.tokens)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.tags

    def with_classes(self, names: tuple[str, ...]) -> Tagged:
        return replace(self, tags=names)


@dataclass(frozen=True)
class Span(Example):
    """A question, and where in its context the answers begin (characters)."""

    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]

    @property
    def texts(self) -> list[str]:
        return [self.question, self.context]

    @property
    def input_text(self) -> str:
        return f"{self.question}\0{self.context}"

    @property
    def problem(self) -> str | None:
        for text, start in zip(self.answers, self.starts, strict=True):
            if start < 0 or self.context[start : start + len(text)] != text:
                answer = shortened(text, 40)
                return Bilingual(
                    f"has the answer {answer!r}, which is not at its start ({start})",
                    f"的答案 {answer!r} 不在标明的起始位置（{start}）",
                )
        return None


@dataclass(frozen=True)
class SourceTarget(Example):
    """A text and what is written from it."""

    source: str
    target: str

    @property
    def texts(self) -> list[str]:
        return [self.source, self.target]

    @property
    def input_text(self) -> str:
        return self.source

    def prompt(self, beginning: int) -> PromptAndTarget:
        return PromptAndTarget(self.source, "", self.target)


@dataclass(frozen=True)
class Related(Example):
    """A text, such as a query, texts that belong to it, and texts that do not."""

    anchor: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        return [self.anchor, *self.positives, *self.negatives]

    @property
    def input_text(self) -> str:
        return self.anchor


@dataclass(frozen=True)
class Scored(Example):
    """Two texts, and how near they are.

    Attributes:
        comma: The score as it was written, where that was with a decimal comma.
    """

    text: str
    pair: str
    score: float
    comma: str = ""

    @property
    def texts(self) -> list[str]:
        return _texts(self.text, self.pair)

    @property
    def input_text(self) -> str:
        return _input_text(self.text, self.pair)


@dataclass(frozen=True)
class Prepared(Example):
    """Tokens that were made elsewhere, and their labels; without any, every token is learned."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def texts(self) -> list[str]:
        return []

    @property
    def input_text(self) -> str:
        return str([i for i, x in zip(self.input_ids, self.labels, strict=False) if x == IGNORED] or self)


KINDS: dict[str, type[Example]] = {
    kind.__name__: kind
    for kind in (
        *(Conversation, Ranked, Rated, Text, Labelled, SeveralLabels, Tagged),
        *(Span, SourceTarget, Related, Scored, Prepared),
    )
}


def to_json(example: Example) -> str:
    """An example as one line of JSON, its kind with it, and its task where it has one."""
    task = () if example.task is None else (example.task,)
    return json.dumps([type(example).__name__, example.values(), *task], ensure_ascii=False)


def from_json(line: str) -> Example:
    """The example that `to_json` wrote."""
    kind, values, *task = json.loads(line)
    made = KINDS[kind].from_values(values)
    return replace(made, task=task[0]) if task else made


def _texts(text: str, pair: str | None) -> list[str]:
    return [text, pair] if pair else [text]


def _input_text(text: str, pair: str | None) -> str:
    return f"{text}\0{pair or ''}"
