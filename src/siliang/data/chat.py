"""The tokenizer's own chat template (Jinja, in transformers' sandbox) as pieces, like a named template's.

A chat template is a program that writes one text. It does not say which parts of that text come from the data. So it is
run twice: on placeholders, to find the position of each message's text, and on the messages themselves. If the first
result with the placeholders filled in equals the second, the data's text is kept apart from the template's own. The
model learns the template's {% generation %} spans if it has any; otherwise the text from the end of an answer's prompt
to the end of the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from siliang.data.chat_messages import CLOSE, OPEN, ChatMessage, TalkWithPlaces, Tools
from siliang.data.encode import Encoder
from siliang.data.examples import Conversation
from siliang.data.templates import Piece
from siliang.language import Bilingual, local
from siliang.safety.limits import LimitError, RefusedError, render
from siliang.safety.safe_json import JsonError, parse_json
from siliang.secrets import shortened
from siliang.types import DataError, ModelError, first_line, message_of

PLACE = re.compile(f"{OPEN}(\\d+){CLOSE}")
AT_ONCE = 200_000  # characters of conversations that are written in one request


class ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        DataError: It has none.
    """

    name = "chat"

    def __init__(self, encoder: Encoder) -> None:
        if not getattr(encoder.tokenizer, "chat_template", None):
            raise DataError(
                Bilingual(
                    "The tokenizer has no chat template: use a named one, such as data.template=human-assistant.",
                    "分词器没有对话模板：请用一个内置模板，例如 data.template=human-assistant。",
                )
            )
        self._encoder = encoder
        template = _template(encoder)
        self._marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))
        self._template = template
        self._frames: dict[str, list[Piece] | None] = {}

    def pieces(
        self, talk: Conversation, *, train_on: Literal["all", "last"] = "all", prompt: bool = False
    ) -> list[Piece]:
        """The conversation as pieces; see Template.pieces.

        Raises:
            DataError: The template refuses the conversation or leaves out a turn of it, or its answers cannot be
                separated from the rest.
        """
        return self.pieces_of_all([talk], train_on=train_on, prompt=prompt)[0]

    def pieces_of_all(
        self, talks: Sequence[Conversation], *, train_on: Literal["all", "last"] = "all", prompt: bool = False
    ) -> list[list[Piece]]:
        """The pieces of several conversations, which is quicker than one by one.

        Raises:
            DataError: As for `pieces`, of the first that cannot be used.
        """
        written = [TalkWithPlaces.of(talk, self._reasoning_field(talk)) for talk in talks]
        tools = [_tools(talk.tools) for talk in talks]
        wholes = self._texts([_Job(w.messages, t, prompt) for w, t in zip(written, tools, strict=True)])
        out: list[list[Piece]] = []
        for talk, w, t, whole in zip(talks, written, tools, wholes, strict=True):
            learned = _learned(talk, train_on)
            frame = self._frame(talk, w, t, learned, prompt)
            filled = [_fill(piece, w.words) for piece in frame or []]
            if frame is None or "".join(p.text for p in filled) != whole:
                filled = self._without_frame(w, t, learned, prompt)
            out.append(filled)
        return out

    def _reasoning_field(self, talk: Conversation) -> str:
        """The name of the template's field for an answer's reasoning."""
        if not any(m.reasoning for m in talk.messages):
            return ""
        found = next((name for name in ("reasoning_content", "thinking", "reasoning") if name in self._template), None)
        if found is None:
            raise DataError(
                Bilingual(
                    "has reasoning with an answer, which the model's chat template does not support: use a reasoning "
                    "model, or remove the reasoning",
                    "的答案带有思考过程，而模型的对话模板不支持：请用推理模型，或去掉思考过程",
                )
            )
        return found

    # ---- with placeholders ----

    def _frame(
        self, talk: Conversation, written: TalkWithPlaces, tools: Tools, learned: list[bool], prompt: bool
    ) -> list[Piece] | None:
        key = json.dumps([written.holders, talk.tools, learned, prompt])
        if key not in self._frames:
            if len(self._frames) > 1000:
                self._frames.clear()
            try:
                self._frames[key] = self._pieces(written.holders, written, tools, learned, prompt)
            except DataError:
                self._frames[key] = None
        return self._frames[key]

    def _pieces(
        self, messages: list[ChatMessage], written: TalkWithPlaces, tools: Tools, learned: list[bool], prompt: bool
    ) -> list[Piece]:
        """The template's text for these messages, cut at the borders of learned spans and at placeholders."""
        whole, spans = self._spans(messages, written, tools, prompt)
        if messages is written.holders and any(f"{OPEN}{n}{CLOSE}" not in whole for n in written.needed):
            raise DataError(Bilingual("is not written whole", "没有被完整写出"))
        if len(spans) != len(learned):
            if len(set(learned)) > 1 and not prompt:
                raise DataError(
                    Bilingual(
                        f"has {len(learned)} answers, of which some are not learned, and the model's chat "
                        "template marks "
                        f"{len(spans)} stretches as answers: use a named template, such as data.template=chatml",
                        f"有 {len(learned)} 个答案，其中有的不学习，而模型的对话模板标出了 {len(spans)} 段答案："
                        "请用内置模板，例如 data.template=chatml",
                    )
                )
            learned = [any(learned)] * len(spans)
        pieces: list[Piece] = []
        at = 0
        for (start, end), wanted in zip(spans, learned, strict=True):
            trained = wanted and not prompt
            pieces += _places(Piece(whole[at:start]))
            answer, marker, at = self._end(whole, start, end)
            pieces += _places(Piece(answer, trained=trained, answer=True))
            pieces.append(Piece(marker, trained=trained, end=True))
        pieces += _places(Piece(whole[at:]))
        return [p for p in pieces if p.text or p.end]

    def _spans(
        self, messages: list[ChatMessage], written: TalkWithPlaces, tools: Tools, prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and (begin, end) of each answer in it; the end marker is inside or directly behind."""
        if self._marked:
            ((whole, spans),) = self._rendered([_Job(messages, tools, prompt)], marked=True)
            spans = [(start, end) for start, end in spans if end > start]
            if spans:
                return whole, spans
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        parts = [_Job(messages[:end], tools, before) for i in answers for end, before in ((i, True), (i + 1, False))]
        whole, *texts = self._texts([_Job(messages, tools, prompt), *parts])
        spans = []
        for i, before, until in zip(answers, texts[::2], texts[1::2], strict=True):
            message = messages[i]
            places = (
                [whole.find(f"{OPEN}{n}{CLOSE}") for n in written.numbers[i]] if messages is written.holders else []
            )
            places = [place for place in places if place >= 0]
            # Some templates write earlier turns otherwise than the last (reasoning models leave out old reasoning).
            # The answer then begins where the whole text departs from the prompt, or, if even that is not reliable, at
            # the first placeholder.
            first = min(places, default=len(whole))
            start = _shared_start(whole, before)
            if start < len(before) and (not places or start < self._header(whole, written, i) or start > first):
                start = first
            if whole.startswith(until):
                end = len(until)
            elif places and not message.get("tool_calls"):
                end = whole.index(CLOSE, max(places)) + 1
            else:
                end = -1
            if end < start:
                raise DataError(
                    Bilingual(
                        "The tokenizer's chat template does not continue its own prompt, so the answers cannot be "
                        "separated from the rest: use a named template, such as data.template=chatml.",
                        "分词器的对话模板没有接着自己的提示写下去，无法区分答案与其余部分：请用内置模板，"
                        "例如 data.template=chatml。",
                    )
                )
            spans.append((start, end))
        return whole, spans

    def _header(self, whole: str, written: TalkWithPlaces, i: int) -> int:
        """The end of the last placeholder of the messages before the `i`-th."""
        ends = [whole.find(f"{OPEN}{n}{CLOSE}") for numbers in written.numbers[:i] for n in numbers]
        return max((whole.index(CLOSE, at) + 1 for at in ends if at >= 0), default=0)

    def _end(self, whole: str, start: int, end: int) -> tuple[str, str, int]:
        """(an answer's text, its end marker, the position behind both)."""
        answer = whole[start:end]
        inside = self._encoder.markers_in(answer)
        bare = answer.rstrip()
        if inside and bare.endswith(inside[-1]):
            return bare[: -len(inside[-1])], inside[-1], start + len(bare)
        rest = whole[end:]
        behind = self._encoder.markers_in(rest)
        if behind and rest.lstrip().startswith(behind[0]) and behind[0] != self._encoder.tokenizer.bos_token:
            at = rest.index(behind[0])
            return answer + rest[:at], behind[0], end + at + len(behind[0])
        return bare, "", start + len(bare)  # no end marker: use the tokenizer's end of sequence

    # ---- without ----

    def _without_frame(self, written: TalkWithPlaces, tools: Tools, learned: list[bool], prompt: bool) -> list[Piece]:
        """The pieces for a template that changes the data's text.

        The text cannot be kept apart from the template's own then, so it must hold no special tokens.
        """
        for text in written.words:
            if found := self._encoder.reserved_in(text):
                raise DataError(
                    Bilingual(
                        f"holds the special token {found[0]!r} in its text, where this chat template cannot "
                        "keep it from "
                        "acting as one",
                        f"的文本中含有特殊词元 {found[0]!r}，这个对话模板无法避免它起作用",
                    )
                )
        (held,) = self._texts([_Job(written.holders, tools, prompt)])
        for turn, numbers in enumerate(written.numbers, start=1):
            if any(n in written.needed and f"{OPEN}{n}{CLOSE}" not in held for n in numbers):
                raise DataError(
                    Bilingual(
                        f"loses its turn {turn} ({written.messages[turn - 1]['role']}), which the model's "
                        "chat template "
                        "does not write: use a named template, or take the turn out",
                        f"的第 {turn} 轮（{written.messages[turn - 1]['role']}）丢失了，模型的对话模板没有写出它："
                        "请用内置模板，或去掉这一轮",
                    )
                )
        return self._pieces(written.messages, written, tools, learned, prompt)

    # ---- the template itself ----

    def _texts(self, jobs: list[_Job]) -> list[str]:
        """What the template writes."""
        return [text for text, _ in self._rendered(jobs, marked=False)]

    def _rendered(self, jobs: list[_Job], *, marked: bool) -> list[tuple[str, list[tuple[int, int]]]]:
        """The texts, and the positions of the answers in them.

        A template may come from anyone: it runs in Jinja's sandbox, in a process with limits on time and memory.

        Raises:
            DataError: The template refuses one.
            ModelError: The template takes more time or memory than it may, or there is none that fits.
        """
        names = self._encoder.tokenizer.special_tokens_map
        out: list[tuple[str, list[tuple[int, int]]]] = []
        for part in _portions(jobs):
            if any(not job.messages for job in part):
                raise DataError(
                    Bilingual(
                        "is refused by the chat template: it begins with an answer", "被对话模板拒绝：对话以答案开头"
                    )
                )
            template = _template(self._encoder, part[0].tools)
            try:
                found = render(template, names, [(job.messages, job.tools, job.prompt, marked) for job in part])
            except LimitError as error:  # as it would for each of the other rows, one after the other
                raise _unusable(message_of(error)) from None
            except RefusedError as error:
                raise _refusal(message_of(error)) from None
            for one in found:
                if isinstance(one, str):
                    raise _refusal(one)
                text, spans = one
                out.append((text, [(start, end) for start, end in spans]))
        return out


class _Job(NamedTuple):
    """What a template writes at once; `prompt`: an answer follows."""

    messages: list[ChatMessage]
    tools: Tools
    prompt: bool


def _portions(jobs: list[_Job]) -> Iterator[list[_Job]]:
    """The jobs, so many at a time that a request stays small; with and without tools a model may have two templates."""
    part: list[_Job] = []
    length = 0
    for job in jobs:
        size = sum(len(str(value)) for message in job.messages for value in message.values())
        if part and (length + size > AT_ONCE or (job.tools is None) is not (part[0].tools is None)):
            yield part
            part, length = [], 0
        part.append(job)
        length += size
    if part:
        yield part


def _template(encoder: Encoder, tools: Tools = None) -> str:
    try:
        return encoder.tokenizer.get_chat_template(tools=tools)
    except ValueError as error:  # there are several, and none is for this
        raise _unusable(message_of(error)) from None


def _unusable(why: str) -> ModelError:
    return ModelError(
        Bilingual(
            f"the model's chat template cannot be used: {first_line(why).rstrip('.')}. Take a named one with "
            "data.template.",
            f"模型的对话模板无法使用：{local(first_line(why), 'zh').rstrip('.。')}。"
            "请用 data.template 指定一个内置模板。",
        )
    )


def _refusal(why: str) -> DataError:
    return DataError(
        Bilingual(
            f"is refused by the chat template: {first_line(why)}", f"被对话模板拒绝：{local(first_line(why), 'zh')}"
        )
    )


def _learned(talk: Conversation, train_on: str) -> list[bool]:
    """Whether each answer is learned."""
    wanted = [m.trained for m in talk.messages if m.role == "assistant"]
    return wanted if train_on == "all" else [on and i == len(wanted) for i, on in enumerate(wanted, start=1)]


def _shared_start(a: str, b: str) -> int:
    """The length of the longest common prefix of two texts."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _tools(text: str) -> Tools:
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


def _places(piece: Piece) -> list[Piece]:
    """The piece cut at its placeholders."""
    parts = PLACE.split(piece.text)
    out: list[Piece] = []
    for i, part in enumerate(parts):
        if i % 2:
            out.append(Piece(f"{OPEN}{part}{CLOSE}", data=True, trained=piece.trained, answer=piece.answer))
        elif part:
            out.append(Piece(part, trained=piece.trained, answer=piece.answer))
    return out


def _fill(piece: Piece, words: list[str]) -> Piece:
    if not piece.data:
        return piece
    number = PLACE.fullmatch(piece.text)
    assert number is not None
    return Piece(words[int(number[1])], data=True, trained=piece.trained, answer=piece.answer)
