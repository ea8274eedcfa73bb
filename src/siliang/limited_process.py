"""The program of the process that runs what strangers have written, under limits of the system. See limits.py.

It stands alone: the standard library and Jinja, and for a tokenizer's file `tokenizers`. So it starts in a tenth of a
second and holds nothing of the process that asks: no model, no data, no tokens in its environment.

It reads requests from its standard input and writes an answer to each: the length in 4 bytes, then JSON. An answer is
["result", value] or ["error" or "limit", kind, message].
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

EXTRA_BYTES = 2 * 2**30  # of address space, beyond what the process has when it begins
KEPT_TEMPLATES = 16
MOST_CHARACTERS = 2**20  # that a template writes beyond GROWTH times what it reads
GROWTH = 16


class _LimitError(Exception):
    pass


# ---- chat templates ----


def render(
    key: str,
    template: str | None,
    names: dict[str, Any],
    jobs: list[tuple[Any, Any, bool, bool]],
    *,
    kept: dict[str, Any],
) -> list[Any]:
    """Texts of a chat template, as `transformers.utils.chat_template_utils.render_jinja_template` writes them.

    Args:
        key: Names the template in later requests.
        template: Its text; None where it was given before.
        names: What it knows beside the messages: special tokens.
        jobs: (messages, tools, whether to end with a generation prompt, whether to mark answers) of each text.
        kept: The compiled templates.

    Returns:
        For each job [text, spans], or a text: why the template refuses it.
    """
    if template is not None:
        while len(kept) >= KEPT_TEMPLATES:
            kept.pop(next(iter(kept)))
        kept[key] = (_compiled(template), len(template))
    compiled, length = kept[key]
    out: list[Any] = []
    for messages, tools, prompt, marked in jobs:
        most = MOST_CHARACTERS + GROWTH * (length + len(json.dumps([messages, tools])))
        settings = {"messages": _aliased(messages), "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            out.append(_written(compiled, {**settings, **names}, marked, most))
        except (_LimitError, MemoryError):
            raise
        except Exception as error:  # Jinja's kinds, Python's, and the template's own raise_exception
            out.append(_in_a_line(error))
    return out


def _written(compiled: Any, values: dict[str, Any], marked: bool, most: int) -> list[Any]:
    blocks: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    tracker = compiled.environment.activate_tracker(blocks, spans) if marked else _nothing()
    with tracker:
        for block in compiled.generate(**values):
            blocks.append(block)
            length += len(block)
            if length > most:
                raise _LimitError(f"it writes more than {most:,} characters")
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


def _compiled(text: str) -> Any:
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
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any, **kwargs: Any) -> Any:
            return dict.fromkeys(*args, **kwargs)

    class Namespace(jinja2.utils.Namespace):
        """Takes no name that leads to Python's insides."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            values = dict(*args, **kwargs)
            for name in values:
                check(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")

    def raise_exception(message: Any) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
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


# ---- regular expressions ----


def match(patterns: list[str], texts: list[str], whole: bool) -> list[Any]:
    """For each pattern a text, why it is none; or a list with, for each text, its groups, None without a match.

    Args:
        whole: It must match the whole text, not its beginning alone.
    """
    return [_match(pattern, texts, whole) for pattern in patterns]


def _match(pattern: str, texts: list[str], whole: bool) -> Any:
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return _in_a_line(error)
    at = compiled.fullmatch if whole else compiled.match
    return [None if (found := at(text)) is None else found.groups() for text in texts]


# ---- the process ----


def _in_a_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:1000]


def _limit_the_process() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    pages = statm.read_text().split() if (statm := Path("/proc/self/statm")).is_file() else []
    if pages:  # Linux
        wanted = int(pages[0]) * os.sysconf("SC_PAGESIZE") + EXTRA_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (wanted, wanted))
    # no file is opened or written, no process started, whatever gets out of Jinja's sandbox
    for name in ("RLIMIT_CORE", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_NPROC"):
        if (number := getattr(resource, name, None)) is not None:
            resource.setrlimit(number, (0, 0))


def _limit_the_time(seconds: float) -> None:
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), hard))


def _preload(kind: str) -> None:
    """What is imported before no file can be opened any more, also what Jinja would import when it is needed."""
    time.localtime()
    if kind == "tokenizer":
        import tokenizers  # noqa: F401

        return
    import pprint  # noqa: F401
    import textwrap  # noqa: F401

    import jinja2.constants
    import jinja2.debug  # noqa: F401

    _compiled("{% generation %}{{ 1 | tojson }}{% endgeneration %}").render()
    _compiled("{{ strftime_now('%Y') }}").render()


def _read(length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = os.read(0, length - len(parts))
        if not part:
            os._exit(0)  # whoever asked is gone
        parts += part
    return bytes(parts)


def _write(answer: Any) -> None:
    data = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
    data = memoryview(len(data).to_bytes(4, "big") + data)
    while data:
        data = data[os.write(1, data) :]


def main() -> None:
    sys.path[:] = [path for path in sys.argv[2:] if Path(path).is_absolute()]
    _preload(sys.argv[1])
    _limit_the_process()
    functions = {"render": partial(render, kept={}), "match": match}
    _write(["result", None])
    while True:
        name, seconds, arguments = json.loads(_read(int.from_bytes(_read(4), "big")).decode("utf-8", "surrogatepass"))
        _limit_the_time(seconds)
        try:
            answer = ["result", functions[name](*arguments)]
        except _LimitError as error:
            answer = ["limit", str(error)]
        except MemoryError:
            answer = ["limit", f"it wants more than {EXTRA_BYTES // 2**30} GiB of memory"]
        except Exception as error:
            answer = ["error", _in_a_line(error)]
        _write(answer)
        if answer[0] == "limit":
            os._exit(0)  # what is left in the memory goes with the process


if __name__ == "__main__":
    main()
