"""Conversations as pieces, written by a chat template: the tokenizer's own, a named one, or the user's.

A chat template is a program that writes one text. It does not say which parts of that text come from the data. So it is
run twice: on placeholders, to find the position of each message's text, and on the messages themselves. If the first
result with the placeholders filled in equals the second, the data's text is kept apart from the template's own. The
model learns the template's {% generation %} spans if it has any; otherwise the text from the end of an answer's prompt
to the end of the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from siliang.data.chat_entries import Frame, Selection, View, Written, fill, places
from siliang.data.chat_messages import CLOSE, OPEN, THOUGHT, ChatMessage, TalkWithPlaces, check_call_ids
from siliang.data.encode import Encoder
from siliang.data.jinja import Arguments
from siliang.data.messages import Conversation
from siliang.data.rendering import Job, Renderer
from siliang.data.templates import CHAT, FieldTemplate, JinjaTemplate, Piece, Template
from siliang.language import Bilingual
from siliang.types import ConfigError, DataError


class ChatTemplate:
    """A chat template: the tokenizer's own, a named one, or the user's.

    Attributes:
        name: "chat" for the tokenizer's own.
        own_spacing: The text is tokenized as a whole, as transformers does it with chat templates; otherwise a new text
            begins after <s>, as in the models' own code.
        apart: Every piece is tokenized by itself.
    """

    def __init__(self, encoder: Encoder, template: Template | None = None, arguments: Arguments | None = None) -> None:
        """
        Args:
            template: None for the tokenizer's own.
            arguments: Values of the template's variables.

        Raises:
            DataError: The tokenizer has no template of its own.
            ConfigError: The template has no such variable.
        """
        if template is None and not encoder.tokenizer.chat_template:
            raise DataError(
                Bilingual(
                    "The tokenizer has no chat template: use a named one, such as data.template=human-assistant.",
                    "分词器没有对话模板：请用一个内置模板，例如 data.template=human-assistant。",
                )
            )
        self.name = CHAT if template is None else template.name
        fields = template if isinstance(template, FieldTemplate) else None
        self.own_spacing, self.apart = fields is None, fields is not None and fields.apart
        self._with_input = fields is not None and bool(fields.user_with_input)
        self._end_marker = template.end if isinstance(template, JinjaTemplate) else ""
        self._encoder = encoder
        self._renderer = Renderer(encoder, template, arguments or {})
        text = self._renderer.text()
        _check_arguments(arguments or {}, text, self.name)
        self._marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", text))
        names = sorted(encoder.reserved(), key=len, reverse=True)
        self._reserved = re.compile("|".join(map(re.escape, names))) if names else None
        self._frames: dict[str, Frame | None] = {}

    def prompt(self, talk: Conversation) -> list[Piece]:
        """The conversation as pieces, up to where the assistant's next answer begins.

        Raises:
            DataError: The template refuses the conversation or leaves out a turn of it.
        """
        return self._all([talk], "all", prompt=True)[0][0].pieces

    def entries(
        self, talks: Sequence[Conversation], *, train_on: Literal["all", "last"] = "all", split: bool = True
    ) -> list[list[Written]]:
        """Of each conversation its entries.

        Most templates give one. Some write an answer otherwise when it is no longer the last one (they leave its
        reasoning out, or move the system message): an answer that is learned is then in an entry of its own that ends
        with it, so that the model learns from what it will see.

        Args:
            split: False: each conversation is one entry in any case.

        Raises:
            DataError: The template refuses a conversation or leaves out a turn of it, or its answers cannot be
                separated from the rest.
        """
        return self._all(talks, train_on, prompt=False, split=split)

    def _all(
        self, talks: Sequence[Conversation], train_on: str, *, prompt: bool, split: bool = True
    ) -> list[list[Written]]:
        written = [
            TalkWithPlaces.of(
                talk, self._reasoning_field(talk), self._reserved, with_input=self._with_input, strips=self.own_spacing
            )
            for talk in talks
        ]
        for talk in talks:
            if not self.own_spacing:
                _check_system(talk, self.name)
            check_call_ids(talk, partial(self._renderer.text, tools=bool(talk.tools)), self._called)
        wholes = self._renderer.texts([Job(w.messages, w.tools, prompt) for w in written])
        out: list[list[Written]] = []
        for talk, w, whole in zip(talks, written, wholes, strict=True):
            wanted = Selection(_learned(talk, train_on), prompt, split)
            frame = self._frame(w, wanted)
            if frame is not None and frame.filled(w.words) == whole:
                entries = frame.entries
            else:
                entries = self._without_frame(w, wanted)
            out.append([e._replace(pieces=[self._finished(fill(p, w.words)) for p in e.pieces]) for e in entries])
        return out

    def _finished(self, piece: Piece) -> Piece:
        end = self._end_marker if piece.end and not piece.text else ""
        return replace(piece, text=piece.text or end, alone=self.apart) if end or self.apart else piece

    def _reasoning_field(self, talk: Conversation) -> str:
        """The name of the template's field for an answer's reasoning."""
        has_field = any(m.reasoning for m in talk.messages)
        has_tags = any(m.role == "assistant" and THOUGHT.match(m.content) for m in talk.messages)
        if not has_field and not has_tags:
            return ""
        text = self._renderer.text()
        if not has_field and "think" in text:
            return ""
        found = next((name for name in ("reasoning_content", "thinking", "reasoning") if name in text), None)
        if found is None or not has_field:
            raise DataError(
                Bilingual(
                    f"has reasoning with an answer, which {self._called} does not support: use the template of a "
                    "reasoning model, such as qwen3, or remove the reasoning",
                    f"的答案带有思考过程，而{self._called.zh}不支持：请用推理模型的模板，例如 qwen3，或去掉思考过程",
                )
            )
        return found

    @property
    def _called(self) -> Bilingual:
        if self.name == CHAT:
            return Bilingual("the model's chat template", "模型的对话模板")
        return Bilingual(f"the template {self.name}", f"模板 {self.name} ")

    # ---- with placeholders ----

    def _frame(self, written: TalkWithPlaces, wanted: Selection) -> Frame | None:
        key = json.dumps([written.holders, written.held_tools, *wanted])
        if key not in self._frames:
            if len(self._frames) > 1000:
                self._frames.clear()
            try:
                view = self._view(written, len(written.messages), wanted.prompt, held=True)
                self._check_written(written, view, wanted)
                self._frames[key] = Frame(view.whole, self._entries(written, view, wanted, held=True))
            except DataError:
                self._frames[key] = None
        return self._frames[key]

    def _entries(self, written: TalkWithPlaces, view: View, wanted: Selection, *, held: bool) -> list[Written]:
        """The template's text, cut at the borders of learned spans and at placeholders.

        Args:
            view: Of the whole conversation.
            held: Of the messages with placeholders.
        """
        learned = wanted.learned
        if wanted.prompt:
            return [Written(self._cut(view, [False] * len(view.spans)))]
        if len(view.spans) != len(learned):
            if len(set(learned)) > 1:
                raise DataError(
                    Bilingual(
                        f"has {len(learned)} answers, of which some are not learned, and the model's chat template "
                        f"marks {len(view.spans)} stretches as answers: use a named template, such as "
                        "data.template=chatml",
                        f"有 {len(learned)} 个答案，其中有的不学习，而模型的对话模板标出了 {len(view.spans)} 段答案："
                        "请用内置模板，例如 data.template=chatml",
                    )
                )
            return [Written(self._cut(view, [any(learned)] * len(view.spans)))]
        if not wanted.split or all(kept or not want for want, kept in zip(learned[:-1], view.kept, strict=False)):
            return [Written(self._cut(view, learned))]
        entries: list[Written] = []
        turns = [i for i, message in enumerate(written.messages) if message["role"] == "assistant"]
        left, last, until = list(learned), len(learned) - 1, len(written.messages)
        while True:
            now = [want and (kept or k == last) for k, (want, kept) in enumerate(zip(left, view.kept, strict=False))]
            if any(now):
                entries.insert(0, Written(self._cut(view, now), until, now))
            left = [want and not (k < len(now) and now[k]) for k, want in enumerate(left)]
            if not any(left):
                return entries
            last = max(k for k, want in enumerate(left) if want)
            until = turns[last] + 1
            view = self._view(written, until, False, held=held)

    def _check_written(self, written: TalkWithPlaces, view: View, wanted: Selection) -> None:
        """Checks that the template leaves out nothing that matters.

        Args:
            view: Of the messages with placeholders.
        """
        for turn, numbers in enumerate(written.numbers, start=1):
            if any(n in written.needed and f"{OPEN}{n}{CLOSE}" not in view.whole for n in numbers):
                role = written.messages[turn - 1]["role"]
                raise self._lost(Bilingual(f"its turn {turn} ({role})", f"第 {turn} 轮（{role}）"))
        turns = [i for i, message in enumerate(written.messages) if message["role"] == "assistant"]
        for i, alone, learned in zip(turns, view.alone, wanted.learned, strict=True):
            if (
                learned
                and not wanted.prompt
                and i in written.thoughts
                and f"{OPEN}{written.thoughts[i]}{CLOSE}" not in alone
            ):
                raise self._lost(Bilingual(f"the reasoning of its turn {i + 1}", f"第 {i + 1} 轮的思考过程"))
        for name in written.named:
            if name not in view.whole:
                raise self._lost(Bilingual(f"its tool {name!r}", f"工具 {name!r}"))

    def _lost(self, what: Bilingual) -> DataError:
        return DataError(
            Bilingual(
                f"loses {what}, which {self._called} does not write: use another template, or take it out",
                f"丢失了{what.zh}，{self._called.zh}没有写出它：请换一个模板，或去掉它",
            )
        )

    def _cut(self, view: View, learned: list[bool]) -> list[Piece]:
        pieces: list[Piece] = []
        at = 0
        for span, trained in zip(view.spans, learned, strict=True):
            if span is None:
                if trained:
                    raise DataError(
                        Bilingual(
                            f"has an answer that cannot be separated from the rest: {self._called} does not continue "
                            "its own prompt. Use a named one, such as data.template=chatml",
                            f"的回答无法与其余部分区分：{self._called.zh}没有接着自己的提示写下去。"
                            "请用内置模板，例如 data.template=chatml",
                        )
                    )
                continue
            pieces += places(Piece(view.whole[at : span[0]]))
            answer, marker, at = self._end(view.whole, *span)
            pieces += places(Piece(answer, trained=trained, answer=True))
            pieces.append(Piece(marker, trained=trained, end=True))
        pieces += places(Piece(view.whole[at:]))
        return [p for p in pieces if p.text or p.end]

    def _view(self, written: TalkWithPlaces, until: int, prompt: bool, *, held: bool) -> View:
        """The text of the first messages, and the answers in it; an end marker is inside a span or directly behind."""
        messages = (written.holders if held else written.messages)[:until]
        tools = written.held_tools if held else written.tools
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        parts = [Job(messages[:end], tools, before) for i in answers for end, before in ((i, True), (i + 1, False))]
        whole, *texts = self._renderer.texts([Job(messages, tools, prompt), *parts])
        spans: list[tuple[int, int] | None] = []
        if self._marked:
            spans += self._marked_spans(Job(messages, tools, prompt))
        if not spans:
            for i, before, alone in zip(answers, texts[::2], texts[1::2], strict=True):
                spans.append(self._span(written, messages, i, whole, before, alone, held=held))
        kept = [
            span is not None and alone.startswith((whole[: span[0]] + self._end(whole, *span)[0]).rstrip())
            for alone, span in zip(texts[1::2], spans, strict=False)
        ]
        return View(whole, spans, texts[1::2], kept)

    def _marked_spans(self, job: Job) -> list[tuple[int, int]]:
        """Those of {% generation %}."""
        ((_, spans),) = self._renderer.rendered([job], marked=True)
        return [(start, end) for start, end in spans if end > start]

    def _span(
        self,
        written: TalkWithPlaces,
        messages: list[ChatMessage],
        i: int,
        whole: str,
        before: str,
        alone: str,
        *,
        held: bool,
    ) -> tuple[int, int] | None:
        """The answer of message `i` in the whole text; None where it cannot be distinguished from the rest.

        Args:
            before: The text of the prompt in front of it.
            alone: The text up to this answer, when it is the last.
        """
        found = [whole.find(f"{OPEN}{n}{CLOSE}") for n in written.numbers[i]] if held else []
        found = [place for place in found if place >= 0]
        # Some templates write earlier turns otherwise than the last (reasoning models leave out old reasoning). The
        # answer then begins where the whole text departs from the prompt, or, if even that is not reliable, at the
        # first placeholder.
        first = min(found, default=len(whole))
        start = _shared_start(whole, before)
        if start < len(before) and (not found or start < self._header(whole, written, i) or start > first):
            start = first
        stop = self._end(alone, min(start, len(alone)), len(alone))[2]
        if whole.startswith(alone[:stop]):
            end = stop
        elif found and not messages[i].get("tool_calls"):
            end = whole.index(CLOSE, max(found)) + 1
        else:
            end = -1
        return None if end < start else (start, end)

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
            text, marker = bare[: -len(inside[-1])], inside[-1]
            # Phi-3 writes <|end|>, a line break, and the end of sequence at the end of the whole text
            shorter = text.rstrip()
            if shorter != text and inside[-1:] != inside[-2:-1] and shorter.endswith(tuple(inside[-2:-1])):
                text, marker = shorter[: -len(inside[-2])], inside[-2]
            return text, marker, start + len(text) + len(marker)
        rest = whole[end:]
        behind = self._encoder.markers_in(rest)
        if behind and rest.lstrip().startswith(behind[0]) and behind[0] != self._encoder.tokenizer.bos_token:
            at = rest.index(behind[0])
            return answer + rest[:at], behind[0], end + at + len(behind[0])
        return bare, "", start + len(bare)  # no end marker: use the tokenizer's end of sequence

    # ---- without ----

    def _without_frame(self, written: TalkWithPlaces, wanted: Selection) -> list[Written]:
        """The entries of a template that changes the data's text.

        The text cannot be kept apart from the template's own then, so it must hold no special tokens.
        """
        for text in written.words:
            if found := self._encoder.reserved_in(text):
                raise DataError(
                    Bilingual(
                        f"holds the special token {found[0]!r} in its text, where this chat template cannot "
                        "keep it from acting as one",
                        f"的文本中含有特殊词元 {found[0]!r}，这个对话模板无法避免它起作用",
                    )
                )
        messages = len(written.messages)
        self._check_written(written, self._view(written, messages, wanted.prompt, held=True), wanted)
        view = self._view(written, messages, wanted.prompt, held=False)
        return self._entries(written, view, wanted, held=False)


def _check_system(talk: Conversation, name: str) -> None:
    spoken = [m.role for m in talk.messages]
    first = next((i for i, role in enumerate(spoken) if role != "system"), len(spoken))
    if "system" in spoken[first:]:
        turn = spoken.index("system", first) + 1
        raise DataError(
            Bilingual(
                f"has a system message in turn {turn}, and the template {name} has a place for it in front of the "
                "conversation only",
                f"的第 {turn} 轮是系统消息，而模板 {name} 只在对话开头有它的位置",
            )
        )


def _check_arguments(arguments: Arguments, text: str, name: str) -> None:
    for argument in arguments:
        # the default that was put in front of the template names it three times
        if len(re.findall(rf"\b{re.escape(argument)}\b", text)) <= 3:
            raise ConfigError(
                Bilingual(
                    f"data.template_arguments: the template {name} has no variable {argument!r}: leave it out.",
                    f"data.template_arguments：模板 {name} 没有变量 {argument!r}：请去掉它。",
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
