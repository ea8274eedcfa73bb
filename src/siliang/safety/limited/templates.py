"""Chat templates, rendered in the sandbox that transformers makes for them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

from siliang.safety.limited.refused import LimitError, error_line

KEPT_TEMPLATES = 16
MOST_CHARACTERS = 2**20  # that a template writes beyond GROWTH times what it reads
GROWTH = 16


def render(
    key: str,
    template: str | None,
    names: dict[str, Any],
    jobs: list[tuple[list[Any], object, bool, bool]],
    *,
    kept: dict[str, Any],
) -> list[Any] | None:
    """Texts of a chat template, as `transformers.utils.chat_template_utils.render_jinja_template` writes them.

    Args:
        key: Names the template in later requests.
        template: Its text; None where it may be kept from a request before.
        names: What it knows beside the messages: special tokens.
        jobs: (messages, tools, whether to end with a generation prompt, whether to mark answers) of each text.
        kept: The compiled templates.

    Returns:
        For each job [text, spans], or a text: why the template refuses it. None where the template is not given, and
        is none of those that are kept.
    """
    if template is not None:
        while len(kept) >= KEPT_TEMPLATES:
            kept.pop(next(iter(kept)))
        kept[key] = (compiled_template(template), len(template))
    elif key not in kept:
        return None
    compiled, length = kept[key]
    out: list[Any] = []
    for messages, tools, prompt, marked in jobs:
        most = MOST_CHARACTERS + GROWTH * (length + len(json.dumps([messages, tools])))
        settings = {"messages": _aliased(messages), "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            out.append(_written(compiled, {**settings, **names}, marked, most))
        except (LimitError, MemoryError):
            raise
        except Exception as error:  # Jinja's kinds, Python's, and the template's own raise_exception
            out.append(error_line(error))
    return out


def _written(compiled: Any, values: Mapping[str, object], marked: bool, most: int) -> list[Any]:
    blocks: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    tracker = compiled.environment.activate_tracker(blocks, spans) if marked else _nothing()
    with tracker:
        for block in compiled.generate(**values):
            blocks.append(block)
            length += len(block)
            if length > most:
                raise LimitError(f"it writes more than {most:,} characters")
    return ["".join(blocks), spans]


@contextmanager
def _nothing() -> Any:
    yield


def _aliased(messages: list[Any]) -> list[Any]:
    """An answer's reasoning stands under each of the names that templates know."""
    out = []
    for message in messages:
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((message[name] for name in names if message.get(name) is not None), None)
        out.append(message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning})
    return out


def compiled_template(text: str) -> Any:
    """The template in the sandbox that transformers makes for it; a test compares the two."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Tracker(Extension):
        """{% generation %}: remembers where answers stand in the text."""

        tags = {"generation"}  # noqa: RUF012

        def __init__(self, environment: Any) -> None:
            super().__init__(environment)
            environment.extend(activate_tracker=self.activate)
            self._blocks: list[str] | None = None
            self._spans: list[tuple[int, int]] = []

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_generation_support"), [], [], body).set_lineno(line)

        @jinja2.pass_eval_context
        def _generation_support(self, context: Any, caller: Any) -> str:
            text = caller()
            if self._blocks is not None:
                start = len("".join(self._blocks))
                self._spans.append((start, start + len(text)))
            return text

        @contextmanager
        def activate(self, blocks: list[str], spans: list[tuple[int, int]]) -> Any:
            self._blocks, self._spans = blocks, spans
            try:
                yield
            finally:
                self._blocks = None

    class Dict:
        def __call__(self, *args: object, **kwargs: object) -> Any:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any, **kwargs: Any) -> Any:
            return dict.fromkeys(*args, **kwargs)

    class Namespace(jinja2.utils.Namespace):
        """Takes no name that leads to Python's insides."""

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

    def raise_exception(message: Any) -> None:
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
