"""Renders chat templates, which may come from anyone: in Jinja's sandbox, in a process with limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from siliang.data.chat_messages import ChatMessage
from siliang.data.encode import Encoder
from siliang.data.jinja import Arguments, as_jinja, defaults
from siliang.data.templates import Template
from siliang.language import Bilingual, local
from siliang.safety.limits import LimitError, RefusedError, render
from siliang.types import DataError, ModelError, first_line, message_of

AT_ONCE = 200_000  # characters of conversations that are written in one request


class Job(NamedTuple):
    """What a template writes at once; `prompt`: an answer follows."""

    messages: list[ChatMessage]
    tools: object
    prompt: bool


class Renderer:
    """A template and a tokenizer's names for it.

    Attributes:
        named: The template's text; None where it is the tokenizer's own, of which there may be one for tools.
    """

    def __init__(self, encoder: Encoder, template: Template | None, arguments: Arguments) -> None:
        self._tokenizer, self._defaults = encoder.tokenizer, defaults(arguments)
        self.named = None if template is None else as_jinja(template, encoder, arguments)

    def text(self, *, tools: bool = False) -> str:
        """The template.

        Raises:
            ModelError: The tokenizer has several, and none is for this.
        """
        if self.named is not None:
            return self.named
        try:
            return self._defaults + self._tokenizer.get_chat_template(tools=[{}] if tools else None)
        except ValueError as error:
            raise _unusable(message_of(error)) from None

    def texts(self, jobs: list[Job]) -> list[str]:
        """What the template writes."""
        return [text for text, _ in self.rendered(jobs, marked=False)]

    def rendered(self, jobs: list[Job], *, marked: bool) -> list[tuple[str, list[tuple[int, int]]]]:
        """The texts, and the positions of the answers in them.

        Raises:
            DataError: The template refuses one.
            ModelError: The template takes more time or memory than it may, or there is none that fits.
        """
        names = self._tokenizer.special_tokens_map
        out: list[tuple[str, list[tuple[int, int]]]] = []
        for part in _portions(jobs):
            if any(not job.messages for job in part):
                raise DataError(
                    Bilingual(
                        "is refused by the chat template: it begins with an answer", "被对话模板拒绝：对话以答案开头"
                    )
                )
            template = self.text(tools=part[0].tools is not None)
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


def _portions(jobs: list[Job]) -> Iterator[list[Job]]:
    """The jobs, so many at a time that a request stays small; with and without tools a model may have two templates."""
    part: list[Job] = []
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
