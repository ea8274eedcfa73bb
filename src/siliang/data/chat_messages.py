"""A conversation as transformers' messages, with its texts and with placeholders for them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from siliang.data.messages import Conversation, Message
from siliang.language import Bilingual, local
from siliang.safety.safe_json import JsonError, parse_json
from siliang.secrets import shortened
from siliang.types import DataError, message_of

OPEN, CLOSE = "\uf8f0", "\uf8f1"  # private characters around the number of a text in `TalkWithPlaces.words`
ChatMessage = dict[str, object]  # as transformers has it: role, content, tool_calls ...
Tools = list[dict[str, object]] | None
NINE = "alphanumeric strings with length 9!"  # of Mistral's templates, which refuse other ids of tool calls
THOUGHT = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)


@dataclass
class TalkWithPlaces:
    """A conversation for transformers, once with its texts and once with placeholders.

    White space around a text stays outside of its placeholder, and so do the tags of reasoning inside an answer: many
    templates strip the former and split at the latter. In tools and calls, only special tokens become placeholders.

    Attributes:
        messages: transformers' messages.
        holders: The same, with a placeholder for each of `words`.
        words: The text for each placeholder.
        numbers: The numbers of each message's placeholders.
        needed: The numbers of texts that the template must write. Many leave out the reasoning of earlier turns.
        thoughts: By message, the number of its reasoning.
        tools: What may be called.
        held_tools: The same, with placeholders.
        strips: The template may strip texts; otherwise a placeholder represents a text with its white space.
        named: What a template that writes tools and calls must write: their names.
    """

    messages: list[ChatMessage] = field(default_factory=list)
    holders: list[ChatMessage] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    numbers: list[list[int]] = field(default_factory=list)
    needed: list[int] = field(default_factory=list)
    thoughts: dict[int, int] = field(default_factory=dict)
    tools: object = None
    held_tools: object = None
    strips: bool = True
    named: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        talk: Conversation,
        reasoning: str,
        reserved: re.Pattern[str] | None,
        *,
        with_input: bool = False,
        strips: bool = True,
    ) -> TalkWithPlaces:
        """
        Args:
            reasoning: The field in which the template looks for it.
            reserved: Finds the special tokens in a text.
            strips: The template may strip texts.
            with_input: The template has a place for the input of an instruction.

        Raises:
            DataError: Its tools are not JSON.
        """
        tools = tools_of(talk.tools)
        made = cls(tools=tools, strips=strips)
        for m in talk.messages:
            made._add(m, reasoning, reserved, with_input=with_input)
        made.held_tools = made._held(made.tools, reserved)
        made.named += [str(_function(tool).get("name", "")) for tool in tools or []]
        return made

    def _add(self, m: Message, reasoning: str, reserved: re.Pattern[str] | None, *, with_input: bool) -> None:
        self.numbers.append([])
        message: ChatMessage = {"role": m.role}
        holder = dict(message)
        if m.reasoning:
            message[reasoning], holder[reasoning] = m.reasoning, self._hold_thought(m.reasoning)
        message["content"] = m.text
        thought = THOUGHT.fullmatch(m.text) if m.role == "assistant" else None
        if thought is not None:
            opening, inside, closing, answer = thought.groups()
            holder["content"] = f"{opening}{self._hold_thought(inside)}{closing}{self._hold(answer)}"
        elif m.input and with_input:
            message |= {"instruction": m.content, "input": m.input}
            holder |= {"instruction": self._hold(m.content), "input": self._hold(m.input)}
            holder["content"] = f"{holder['instruction']}\n{holder['input']}"
        else:
            holder["content"] = self._hold(m.text)
        for name, value in (("name", m.name), ("tool_call_id", m.call_id)):
            if value:
                message[name] = holder[name] = value
        if m.calls:
            calls: list[object] = [
                {
                    "type": "function",
                    **({"id": c.id} if c.id else {}),
                    "function": {"name": c.name, "arguments": _arguments(c.arguments)},
                }
                for c in m.calls
            ]
            message["tool_calls"], holder["tool_calls"] = calls, self._held(calls, reserved)
            self.named += [c.name for c in m.calls]
        self.messages.append(message)
        self.holders.append(holder)

    def _hold(self, text: str, *, needed: bool = True) -> str:
        """The text with a placeholder in its place; white space around it stays."""
        if not text.strip():
            return text
        core = text.strip() if self.strips else text
        place, start = self._place(core), text.index(core)
        self.numbers[-1].append(len(self.words) - 1)
        if needed:
            self.needed.append(len(self.words) - 1)
        return f"{text[:start]}{place}{text[start + len(core) :]}"

    def _place(self, text: str) -> str:
        self.words.append(text)
        return f"{OPEN}{len(self.words) - 1}{CLOSE}"

    def _hold_thought(self, text: str) -> str:
        held = self._hold(text, needed=False)
        if held != text:
            self.thoughts[len(self.messages)] = self.numbers[-1][-1]
        return held

    def _held(self, value: object, reserved: re.Pattern[str] | None) -> object:
        """JSON with placeholders for the special tokens in it."""
        if reserved is None or not reserved.search(json.dumps(value, ensure_ascii=False)):
            return value
        if isinstance(value, str):
            return reserved.sub(lambda found: self._place(found[0]), value)
        if isinstance(value, list):
            return [self._held(one, reserved) for one in value]
        if isinstance(value, dict):
            return {str(self._held(key, reserved)): self._held(one, reserved) for key, one in value.items()}
        return value


def tools_of(text: str) -> Tools:
    """The tools of a conversation, each as {"type": "function", "function": {...}}.

    Raises:
        DataError: They are not JSON.
    """
    if not text:
        return None
    try:
        tools = parse_json(text, foreign=True)
    except JsonError as error:
        raise DataError(
            Bilingual(
                f"has tools that are not JSON: {shortened(text, 60)!r} ({error})",
                f"的工具不是 JSON：{shortened(text, 60)!r}（{local(message_of(error), 'zh')}）",
            )
        ) from None
    tools = tools if isinstance(tools, list) else [tools]
    return [
        t if isinstance(t, dict) and "function" in t else {"type": "function", "function": t} for t in tools
    ] or None


def check_call_ids(talk: Conversation, template: Callable[[], str], called: Bilingual) -> None:
    """Refuses ids of tool calls that Mistral's templates do not take.

    The templates themselves look at the length alone; mistral-common, which writes the models' prompts, also refuses
    other characters. It changes no id, and neither is one changed here: the model would learn ids that the data lacks.

    Args:
        template: Returns its text.
        called: Its name, for the error.

    Raises:
        DataError: There is such an id, or none at all.
    """
    for turn, m in enumerate(talk.messages, start=1):
        ids = [call.id for call in m.calls] + ([m.call_id] if m.role == "tool" else [])
        wrong = next((own for own in ids if not re.fullmatch(r"[a-zA-Z0-9]{9}", own)), None)
        if wrong is None or NINE not in template():
            continue
        has = Bilingual("no id for the tool call", "的工具调用没有 id")
        if wrong:
            shown = repr(shortened(wrong, 40))
            has = Bilingual(f"the tool call id {shown}", f"的工具调用 id 是 {shown}")
        raise DataError(
            Bilingual(
                f"has {has} in turn {turn}, and {called} takes nine letters or digits (a-z, A-Z, 0-9): write such an "
                "id into the call and into its result, or use another template",
                f"第 {turn} 轮{has.zh}，而{called.zh}只接受九个字母或数字（a-z、A-Z、0-9）：请在调用和它的结果中写入"
                "这样的 id，或换一个模板",
            )
        )


def _function(tool: dict[str, object]) -> dict[str, object]:
    function = tool.get("function")
    return function if isinstance(function, dict) else {}


def _arguments(text: str) -> object:
    try:
        return parse_json(text, foreign=True)
    except JsonError:
        return text
