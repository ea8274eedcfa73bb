"""Conversations: their messages, and answers to one that are better or worse."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from siliang.data.example import Example, PromptAndTarget

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


def conversation(instruction: str, output: str, input: str = "", system: str = "") -> Conversation:
    """A conversation of one question and its answer."""
    start = (Message("system", system),) if system else ()
    return Conversation((*start, Message("user", instruction, input), Message("assistant", output)))
