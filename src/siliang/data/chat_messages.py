"""A conversation as transformers' messages, with its texts and with placeholders for them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from siliang.data.examples import Conversation
from siliang.safety.safe_json import JsonError, parse_json

OPEN, CLOSE = "\uf8f0", "\uf8f1"  # private characters around the number of a text in `TalkWithPlaces.words`
ChatMessage = dict[str, object]  # as transformers has it: role, content, tool_calls ...
Tools = list[dict[str, object]] | None
THOUGHT = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)


@dataclass
class TalkWithPlaces:
    """A conversation for transformers, once with its texts and once with placeholders.

    White space around a text stays outside of its placeholder, and so do the tags of reasoning inside an answer: many
    templates strip the former and split at the latter.

    Attributes:
        messages: transformers' messages.
        holders: The same, with a placeholder for each of `words`.
        words: The text for each placeholder.
        numbers: The numbers of each message's placeholders.
        needed: The numbers of texts that the template must write. Many leave out the reasoning of earlier turns.
    """

    messages: list[ChatMessage] = field(default_factory=list)
    holders: list[ChatMessage] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    numbers: list[list[int]] = field(default_factory=list)
    needed: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, talk: Conversation, reasoning: str) -> TalkWithPlaces:
        """
        Args:
            reasoning: The field in which the template looks for it.
        """
        made = cls()
        for m in talk.messages:
            made.numbers.append([])
            message: ChatMessage = {"role": m.role}
            holder = dict(message)
            if m.reasoning:
                message[reasoning], holder[reasoning] = m.reasoning, made._hold(m.reasoning, needed=False)
            message["content"] = m.text
            thought = THOUGHT.fullmatch(m.text) if m.role == "assistant" else None
            if thought is not None:
                opening, inside, closing, answer = thought.groups()
                held = made._hold(inside, needed=False)
                holder["content"] = f"{opening}{held}{closing}{made._hold(answer)}"
            else:
                holder["content"] = made._hold(m.text)
            for name, value in (("name", m.name), ("tool_call_id", m.call_id)):
                if value:
                    message[name] = holder[name] = value
            if m.calls:
                message["tool_calls"] = holder["tool_calls"] = [
                    {
                        "type": "function",
                        **({"id": c.id} if c.id else {}),
                        "function": {"name": c.name, "arguments": _arguments(c.arguments)},
                    }
                    for c in m.calls
                ]
            made.messages.append(message)
            made.holders.append(holder)
        return made

    def _hold(self, text: str, *, needed: bool = True) -> str:
        """The text with a placeholder in its place; white space around it stays."""
        core = text.strip()
        if not core:
            return text
        number = len(self.words)
        self.words.append(core)
        self.numbers[-1].append(number)
        if needed:
            self.needed.append(number)
        start = text.index(core)
        return f"{text[:start]}{OPEN}{number}{CLOSE}{text[start + len(core) :]}"


def _arguments(text: str) -> object:
    try:
        return parse_json(text, foreign=True)
    except JsonError:
        return text
