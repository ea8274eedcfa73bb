"""The tokenizer's own chat template (Jinja, in transformers' sandbox) as pieces, like a named template's.

A chat template is a program that writes one text; which of it are words of the data is not said. So it is run on
placeholders in the words' place, which shows where they go, and again on the words themselves, which proves it: only if
both agree are the words kept apart from the template's own text. What the model learns are the template's
{% generation %} spans where it has them; otherwise what it writes between the prompt of an answer and the answer's end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from siliang.data.encode import Encoder
from siliang.data.examples import Conversation
from siliang.data.templates import Piece
from siliang.limits import limited
from siliang.types import DataError

OPEN, CLOSE = "\uf8f0", "\uf8f1"  # private characters, around the number of the message whose words stand there
PLACE = re.compile(f"{OPEN}(\\d+){CLOSE}")


class ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        DataError: It has none.
    """

    name = "chat"

    def __init__(self, encoder: Encoder) -> None:
        if not getattr(encoder.tokenizer, "chat_template", None):
            raise DataError(
                "The tokenizer has no chat template: use a named one, such as data.template=human-assistant."
            )
        self._encoder = encoder
        template = encoder.tokenizer.get_chat_template()
        self._marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))
        self._template = template
        self._frames: dict[str, list[Piece] | None] = {}

    def pieces(
        self, talk: Conversation, *, train_on: Literal["all", "last"] = "all", prompt: bool = False
    ) -> list[Piece]:
        """The conversation as pieces; see Template.pieces.

        Raises:
            DataError: The template refuses the conversation, or its answers cannot be told from the rest.
        """
        messages, words = _as_dicts(talk)
        tools = _tools(talk.tools)
        frame = self._frame(talk, messages, words, tools, train_on, prompt)
        whole = self._render(messages, tools, prompt=prompt)
        if frame is not None:
            for change in (str, str.strip, str.rstrip):
                filled = [_fill(piece, words, change) for piece in frame]
                if "".join(p.text for p in filled) == whole:
                    return filled
        return self._without_frame(messages, words, tools, train_on, prompt)

    # ---- with placeholders ----

    def _frame(
        self,
        talk: Conversation,
        messages: list[dict[str, Any]],
        words: list[str],
        tools: Any,
        train_on: str,
        prompt: bool,
    ) -> list[Piece] | None:
        shape = json.dumps([[m["role"], bool(m["content"]), m.get("tool_calls")] for m in messages])
        key = f"{shape}|{talk.tools}|{train_on}|{prompt}"
        if key not in self._frames:
            if len(self._frames) > 1000:
                self._frames.clear()
            holders = [m | ({"content": f"{OPEN}{i}{CLOSE}"} if m["content"] else {}) for i, m in enumerate(messages)]
            try:
                self._frames[key] = self._pieces(holders, tools, train_on, prompt)
            except DataError:
                self._frames[key] = None
        return self._frames[key]

    def _pieces(self, messages: list[dict[str, Any]], tools: Any, train_on: str, prompt: bool) -> list[Piece]:
        """The template's text on these messages, cut where learning begins and ends and where a placeholder stands."""
        whole, spans = self._spans(messages, tools, prompt)
        pieces: list[Piece] = []
        at = 0
        for number, (start, end) in enumerate(spans, start=1):
            trained = not prompt and (train_on == "all" or number == len(spans))
            pieces += _places(Piece(whole[at:start]))
            answer, marker, at = self._end(whole, start, end)
            pieces += _places(Piece(answer, trained=trained, answer=True))
            pieces.append(Piece(marker, trained=trained, end=True))
        pieces += _places(Piece(whole[at:]))
        return [p for p in pieces if p.text or p.end]

    def _spans(self, messages: list[dict[str, Any]], tools: Any, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and where in it each answer begins and ends (its end marker inside or right behind)."""
        if self._marked:
            whole, spans = self._render_marked(messages, tools, prompt)
            spans = [s for s in spans if s[0] is not None and s[1] > s[0]]
            if spans:
                return whole, spans
        whole = self._render(messages, tools, prompt=prompt)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], tools, prompt=True)
            until = self._render(messages[: i + 1], tools)
            if whole.startswith(before) and whole.startswith(until):
                spans.append((len(before), len(until)))
                continue
            # a template that writes history otherwise than the last turn: only the words themselves are sure
            place = f"{OPEN}{i}{CLOSE}"
            at = whole.find(place)
            if at < 0:
                raise DataError(
                    "The tokenizer's chat template does not continue its own prompt, so the answers cannot be told "
                    "from the rest: use a named template, such as data.template=chatml."
                )
            spans.append((at, at + len(place)))
        return whole, spans

    def _end(self, whole: str, start: int, end: int) -> tuple[str, str, int]:
        """(an answer's words, the marker that ends it, where the text goes on)."""
        answer = whole[start:end]
        inside = self._encoder.markers_in(answer)
        bare = answer.rstrip()
        if inside and bare.endswith(inside[-1]):
            return bare[: -len(inside[-1])], inside[-1], start + len(bare)
        rest = whole[end:]
        behind = self._encoder.markers_in(rest)
        if behind and rest.lstrip().startswith(behind[0]) and behind[0] != self._encoder.tokenizer.bos_token:
            return answer, behind[0], end + rest.index(behind[0]) + len(behind[0])
        return bare, "", start + len(bare)  # no marker of its own: the tokenizer's end of sequence

    # ---- without ----

    def _without_frame(
        self, messages: list[dict[str, Any]], words: list[str], tools: Any, train_on: str, prompt: bool
    ) -> list[Piece]:
        """For templates that change the words: the words cannot be kept apart, so there must be no markers in them."""
        for text in words:
            if found := self._encoder.markers_in(text):
                raise DataError(
                    f"holds the special token {found[0]!r} in its text, where this chat template cannot keep it from "
                    "acting as one"
                )
        return self._pieces(messages, tools, train_on, prompt)

    # ---- transformers ----

    def _render(self, messages: list[dict[str, Any]], tools: Any, *, prompt: bool = False) -> str:
        with _refusals():
            return self._encoder.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )

    def _render_marked(
        self, messages: list[dict[str, Any]], tools: Any, prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        names = self._encoder.tokenizer.special_tokens_map
        with _refusals():
            rendered, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **names,
            )
        return rendered[0], spans[0]  # type: ignore[index]


@contextmanager
def _refusals() -> Iterator[None]:
    """A template is a stranger's program: transformers runs it in Jinja's sandbox, this bounds its time and memory."""
    try:
        with limited():
            yield
    except Exception as error:  # whatever a template raises: jinja's errors, or its own raise_exception
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"is refused by the chat template: {text}") from None


def _as_dicts(talk: Conversation) -> tuple[list[dict[str, Any]], list[str]]:
    """transformers' messages, and the words of each."""
    messages: list[dict[str, Any]] = []
    for m in talk.messages:
        message: dict[str, Any] = {"role": m.role, "content": m.text}
        if m.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": _arguments(c.arguments)}}
                for c in m.calls
            ]
        messages.append(message)
    return messages, [m["content"] for m in messages]


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _tools(text: str) -> Any:
    if not text:
        return None
    try:
        tools = json.loads(text)
    except ValueError:
        raise DataError(f"has tools that are not JSON: {text[:60]!r}") from None
    tools = tools if isinstance(tools, list) else [tools]
    return [
        t if isinstance(t, dict) and "function" in t else {"type": "function", "function": t} for t in tools
    ] or None


def _places(piece: Piece) -> list[Piece]:
    """A piece cut at its placeholders."""
    parts = PLACE.split(piece.text)
    out: list[Piece] = []
    for i, part in enumerate(parts):
        if i % 2:
            out.append(Piece(f"{OPEN}{part}{CLOSE}", data=True, trained=piece.trained, answer=piece.answer))
        elif part:
            out.append(Piece(part, trained=piece.trained, answer=piece.answer))
    return out


def _fill(piece: Piece, words: list[str], change: Any) -> Piece:
    if not piece.data:
        return piece
    number = PLACE.fullmatch(piece.text)
    assert number is not None
    return Piece(change(words[int(number[1])]), data=True, trained=piece.trained, answer=piece.answer)
