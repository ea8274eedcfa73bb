"""What a row means: a conversation, answers in their order, a text, a class, tagged words, a question on a context,
texts that belong together."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from siliang.language import Bilingual
from siliang.secrets import shortened

IGNORED = -100  # the label of a token that is not learned
Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Call:
    """A tool that the assistant calls; `arguments` is JSON text, `id` what its answer refers to."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        input: The input of an Alpaca instruction; templates without a separate field append it to the content.
        calls: The called tools; `content` is often empty then.
        reasoning: The assistant's reasoning before its answer, if the data separates it from `content`.
        trained: The data wants this answer learned; False where it marks the turn as one that is not.
        name: Of the tool that answers.
        call_id: The `id` of the call that is answered.
    """

    role: Role
    content: str
    input: str = ""
    calls: tuple[Call, ...] = ()
    reasoning: str = ""
    trained: bool = True
    name: str = ""
    call_id: str = ""

    @property
    def text(self) -> str:
        """Content and input in one, as the seeds join them."""
        return f"{self.content}\n{self.input}".strip() if self.input else self.content


@dataclass(frozen=True)
class PromptAndTarget:
    """What a model that writes can be asked in one line, and the right answer.

    Attributes:
        input: What the instruction is about; often empty.
        plain: The instruction is the beginning of a text, which is continued.
    """

    instruction: str
    input: str
    target: str
    plain: bool = False


@dataclass(frozen=True)
class Example(ABC):
    """What a row means. Each kind is a frozen dataclass of what the row holds, and a row of `KINDS`.

    Attributes:
        task: The number of its task, for methods that train several at once; None where the data does not say.
    """

    task: int | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def texts(self) -> list[str]:
        """Every text in it."""

    @property
    @abstractmethod
    def input_text(self) -> str:
        """What is given, without what is to be learned; two examples that ask the same have the same text here."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of classes in it, each as often as it occurs; none for a kind without classes."""
        return ()

    def with_classes(self, names: tuple[str, ...]) -> Example:
        """The same with other names in the place of `classes`."""
        return self

    @property
    def problem(self) -> str | None:
        """What is wrong with it although the row can be read; None if nothing is."""
        return None

    def prompt(self, beginning: int) -> PromptAndTarget | None:
        """What a model can be asked with it; None where one line does not show it.

        Args:
            beginning: Characters of a text without a question, which is then continued.
        """
        return None

    def values(self) -> dict[str, object]:
        """Its fields for JSON, without the task."""
        own = dict(vars(self))  # dataclasses.asdict copies deeply, which takes longer than all the rest
        del own["task"]
        return own

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Example:
        """The example whose `values` these are, after JSON."""
        own: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**own)


@dataclass(frozen=True)
class Conversation(Example):
    """Turns of a user and an assistant, whose words are learned; `tools` is a JSON list of what it may call."""

    messages: tuple[Message, ...]
    tools: str = ""

    @property
    def texts(self) -> list[str]:
        return [part for m in self.messages for part in (m.content, m.input, m.reasoning) if part]

    @property
    def input_text(self) -> str:
        return json.dumps([[m.role, m.text] for m in self.messages[:-1]], ensure_ascii=False)

    def prompt(self, beginning: int) -> PromptAndTarget | None:
        questions = [m for m in self.messages if m.role == "user"]
        answered = [m for m in self.messages if m.role == "assistant"]
        if len(questions) != 1 or len(answered) != 1 or answered[0].calls:
            return None
        return PromptAndTarget(questions[0].content, questions[0].input, answered[0].text)

    def values(self) -> dict[str, object]:
        messages = [{**vars(m), "calls": [vars(c) for c in m.calls]} for m in self.messages]
        return {"messages": messages, "tools": self.tools}

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Conversation:
        messages = (Message(**{**m, "calls": tuple(Call(**c) for c in m["calls"])}) for m in values["messages"])
        return cls(tuple(messages), values["tools"])


@dataclass(frozen=True)
class Ranked(Example):
    """A question, or a conversation up to it, and answers to it, the best first.

    Attributes:
        prompt_messages: The turns that all answers follow, of which nothing is learned.
        answers: Each the turns of an answer.
        tools: As a conversation has it.
        places: Of each answer, from 0 on, where some are equally good; () where each is better than the next.
    """

    prompt_messages: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    tools: str = ""
    places: tuple[int, ...] = ()

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The numbers of two answers, the better one first, for each two that differ in place and in text."""
        places, numbers = self.places or range(len(self.answers)), range(len(self.answers))
        texts = [tuple((m.text, m.calls, m.reasoning) for m in answer) for answer in self.answers]
        return [(i, j) for i in numbers for j in numbers if places[i] < places[j] and texts[i] != texts[j]]

    @property
    def conversations(self) -> list[Conversation]:
        """The conversation with each answer, which alone is learned of it."""
        prompt = tuple(replace(m, trained=m.role != "assistant") for m in self.prompt_messages)
        return [Conversation((*prompt, *answer), self.tools) for answer in self.answers]

    def without_oldest_round(self) -> Ranked | None:
        """The same without the first question and its answer; None where there is but one."""
        users = [i for i, m in enumerate(self.prompt_messages) if m.role == "user"]
        if len(users) < 2:
            return None
        system = tuple(m for m in self.prompt_messages[: users[0]] if m.role == "system")
        return replace(self, prompt_messages=(*system, *self.prompt_messages[users[1] :]))

    @property
    def texts(self) -> list[str]:
        return [text for talk in self.conversations for text in talk.texts]

    @property
    def input_text(self) -> str:
        return json.dumps([[m.role, m.text] for m in self.prompt_messages], ensure_ascii=False)

    @property
    def words(self) -> list[str]:
        """The text of each answer."""
        return ["\n".join(m.text for m in answer if m.role == "assistant") for answer in self.answers]

    def prompt(self, beginning: int) -> PromptAndTarget | None:
        return self.conversations[0].prompt(beginning)

    def values(self) -> dict[str, object]:
        prompt, *answers = (Conversation(turns).values()["messages"] for turns in (self.prompt_messages, *self.answers))
        return {"prompt": prompt, "answers": answers, "tools": self.tools, "places": list(self.places)}

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Ranked:
        prompt, *answers = (
            Conversation.from_values({"messages": turns, "tools": ""}).messages
            for turns in (values["prompt"], *values["answers"])
        )
        return cls(prompt, tuple(answers), values["tools"], tuple(values["places"]))


@dataclass(frozen=True)
class Rated(Example):
    """A conversation that ends with an answer, which is good or bad.

    Attributes:
        prompt_messages: The turns that the answer follows, of which nothing is learned.
        answer: Its turns.
        tools: As a conversation has it.
    """

    prompt_messages: tuple[Message, ...]
    answer: tuple[Message, ...]
    desirable: bool
    tools: str = ""

    @property
    def ranked(self) -> Ranked:
        """The prompt with its one answer."""
        return Ranked(self.prompt_messages, (self.answer,), self.tools)

    @property
    def texts(self) -> list[str]:
        return self.ranked.texts

    @property
    def input_text(self) -> str:
        return self.ranked.input_text

    def prompt(self, beginning: int) -> PromptAndTarget | None:
        return self.ranked.prompt(beginning) if self.desirable else None

    def values(self) -> dict[str, object]:
        return {**self.ranked.values(), "desirable": self.desirable}

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Rated:
        ranked = Ranked.from_values({name: value for name, value in values.items() if name != "desirable"})
        return cls(ranked.prompt_messages, ranked.answers[0], values["desirable"], ranked.tools)


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
        return [self.text] + ([self.pair] if self.pair else [])

    @property
    def input_text(self) -> str:
        return f"{self.text}\0{self.pair or ''}"

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
        return [self.text] + ([self.pair] if self.pair else [])

    @property
    def input_text(self) -> str:
        return f"{self.text}\0{self.pair or ''}"

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
    """Two texts, and how near they are."""

    text: str
    pair: str
    score: float

    @property
    def texts(self) -> list[str]:
        return [self.text, self.pair]

    @property
    def input_text(self) -> str:
        return f"{self.text}\0{self.pair}"


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


def conversation(instruction: str, output: str, input: str = "", system: str = "") -> Conversation:
    """A conversation of one question and its answer."""
    start = (Message("system", system),) if system else ()
    return Conversation((*start, Message("user", instruction, input), Message("assistant", output)))


def to_json(example: Example) -> str:
    """An example as one line of JSON, its kind with it, and its task where it has one."""
    task = () if example.task is None else (example.task,)
    return json.dumps([type(example).__name__, example.values(), *task], ensure_ascii=False)


def from_json(line: str) -> Example:
    """The example that `to_json` wrote."""
    kind, values, *task = json.loads(line)
    made = KINDS[kind].from_values(values)
    return replace(made, task=task[0]) if task else made
