"""Renders chat templates in a sandbox like that of transformers."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from siliang.language import Bilingual
from siliang.safety.limited.refused import LimitError, error_line

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from jinja2.parser import Parser

CACHED_TEMPLATES = 16
MOST_CHARACTERS = 2**20  # of output, beyond GROWTH times the characters of the input
GROWTH = 16

Message = dict[str, object]
Spans = list[tuple[int, int]]  # (first character, the one after the last) of each answer


def render(
    key: str,
    template: str | None,
    names: dict[str, object],
    jobs: list[tuple[list[Message], object, bool, bool]],
    *,
    cache: dict[str, tuple[Template, int]],
) -> list[tuple[str, Spans] | str] | None:
    """Texts of a chat template, as `transformers.utils.chat_template_utils.render_jinja_template` writes them.

    Args:
        key: Identifies the template in later requests.
        template: Its text; None for a template of an earlier request.
        names: The template's variables besides the messages: special tokens.
        jobs: (messages, tools, whether to end with a generation prompt, whether to mark answers) of each text.
        cache: Compiled templates and the lengths of their texts.

    Returns:
        For each job (text, spans), or the reason for which the template refuses it. None if the template is neither
        given nor in the cache.
    """
    if template is not None:
        while len(cache) >= CACHED_TEMPLATES:
            cache.pop(next(iter(cache)))
        cache[key] = (compiled_template(template), len(template))
    elif key not in cache:
        return None
    compiled, length = cache[key]
    out: list[tuple[str, Spans] | str] = []
    for messages, tools, prompt, marked in jobs:
        most = MOST_CHARACTERS + GROWTH * (length + len(json.dumps([messages, tools])))
        settings = {"messages": _aliased(messages), "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            out.append(_generated(compiled, {**settings, **names}, marked, most))
        except (LimitError, MemoryError):
            raise
        except Exception as error:  # of Jinja, of Python, or from the template's raise_exception
            out.append(error_line(error))
    return out


def _generated(compiled: Template, values: Mapping[str, object], marked: bool, most: int) -> tuple[str, Spans]:
    blocks: list[str] = []
    spans: Spans = []
    length = 0
    activate = compiled.environment.activate_tracker  # pyright: ignore[reportAttributeAccessIssue] (added by Tracker)
    with activate(blocks, spans) if marked else nullcontext():
        for block in compiled.generate(**values):
            blocks.append(block)
            length += len(block)
            if length > most:
                raise LimitError(Bilingual(f"it writes more than {most:,} characters", f"输出超过 {most:,} 个字符"))
    return "".join(blocks), spans


def _aliased(messages: list[Message]) -> list[Message]:
    """The messages, with an answer's reasoning under each of the names that templates use."""
    out: list[Message] = []
    for message in messages:
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((message[name] for name in names if message.get(name) is not None), None)
        out.append(message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning})
    return out


def compiled_template(text: str) -> Template:
    """The template in a sandbox like that of transformers; a test compares the two."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Tracker(Extension):
        """{% generation %}: records the positions of answers in the text."""

        tags = {"generation"}  # noqa: RUF012

        def __init__(self, environment: Environment) -> None:
            super().__init__(environment)
            environment.extend(activate_tracker=self.activate)
            self._blocks: list[str] | None = None
            self._spans: Spans = []

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_generation_support"), [], [], body).set_lineno(line)

        @jinja2.pass_eval_context
        def _generation_support(self, context: object, caller: Callable[[], str]) -> str:
            text = caller()
            if self._blocks is not None:
                start = len("".join(self._blocks))
                self._spans.append((start, start + len(text)))
            return text

        @contextmanager
        def activate(self, blocks: list[str], spans: Spans) -> Iterator[None]:
            self._blocks, self._spans = blocks, spans
            try:
                yield
            finally:
                self._blocks = None

    class Dict:
        def __call__(self, *args: object, **kwargs: object) -> dict[str, object]:
            return dict(*args, **kwargs)

        def fromkeys(self, keys: Iterable[object], value: object = None, /) -> dict[object, object]:
            return dict.fromkeys(keys, value)

    class Namespace(jinja2.utils.Namespace):
        """A namespace without names that begin with an underscore, which lead to Python's internals."""

        def __init__(*args: object, **kwargs: object) -> None:
            self, args = args[0], args[1:]
            values = dict(*args, **kwargs)
            for name in values:
                check(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: object) -> None:
            check(name)
            super().__setitem__(name, value)

    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")

    def raise_exception(message: str | None) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        x: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Tracker, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment.from_string(text)
