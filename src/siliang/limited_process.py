"""The program of the process that runs what strangers have written, under limits of the system. See limits.py.

It stands alone: the standard library and Jinja, and for a tokenizer's file `tokenizers`. So it starts in a tenth of a
second and holds nothing of the process that asks: no model, no data, no tokens in its environment.

It reads requests from its standard input and writes an answer to each: the length in 4 bytes, then JSON. An answer is
["result", value], ["error", message] or ["limit", message].
"""

from __future__ import annotations

import base64
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

EXTRA_BYTES = 900 * 2**20  # of address space, beyond what the process has when it begins
KEPT_TEMPLATES = 16
MOST_CHARACTERS = 2**20  # that a template writes beyond GROWTH times what it reads
GROWTH = 16
# of a tokenizer
MOST_GROWTH = 32  # characters that are made of one: Unicode's own forms make 18
MOST_PADDING = 2**20
MOST_ADDED = 100_000
MOST_NUMBER = 2**24  # of a token: the library makes a list of all numbers up to the largest
MOST_RULES = 100  # known tokenizers have a dozen
MOST_PATTERN = 20_000  # characters
PROBES = tuple(
    [
        unit * (2000 // len(unit))
        for unit in ("a", "A", " ", "\n", "1", ".", "中", "é", "ab ", "a1", "'s", "\r\n", "\u200d😀")
    ]
    + ["The film, which isn't 2 hours long, was GOOD!\n\n  她说：“很好看。” don't_stop <|x|> e=mc²\t" * 20]
)


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
        kept[key] = (_compiled(template), len(template))
    elif key not in kept:
        return None
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
    match_text = compiled.fullmatch if whole else compiled.match
    return [None if (found := match_text(text)) is None else found.groups() for text in texts]


# ---- tokenizers ----


def look_at_tokenizer(text: str) -> str | None:
    """Why a tokenizer.json cannot be used; None where nothing is wrong with it.

    Its rules for text are counted, and tried on some text with a vocabulary of one word: what they do to a text, and
    their regular expressions, is all that a small file can do harm with.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        return "it is no tokenizer"
    rules = [values.get(name) for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor")]
    growth = 1.0
    for rule in _rules(rules):
        growth *= _growth(rule)
        if why := _too_much(rule):
            return why
    if growth > MOST_GROWTH:
        return f"its rules make {growth:,.0f} characters of one"
    padding = values.get("padding")
    if isinstance(padding, dict) and any(n > MOST_PADDING for n in _numbers([padding])):
        return f"it fills up texts to more than {MOST_PADDING:,} tokens"
    if len(values.get("added_tokens") or ()) > MOST_ADDED:
        return f"it adds more than {MOST_ADDED:,} tokens"
    if (largest := _largest_number(values)) > MOST_NUMBER:
        return f"it gives a token the number {largest:,}: at most {MOST_NUMBER:,} are allowed"
    return _tried(values)


def _tried(values: dict[str, Any]) -> str | None:
    from tokenizers import Tokenizer

    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    kept = {name: values.get(name) for name in ("version", "normalizer", "pre_tokenizer", "decoder")}
    bare = Tokenizer.from_str(json.dumps(kept | {"model": model, "added_tokens": [], "post_processor": None}))
    every = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x10000)]))
    for probe in (*PROBES, every):
        if bare.normalizer is not None and len(bare.normalizer.normalize_str(probe)) > MOST_GROWTH * len(probe) + 100:
            return f"its normalizer makes more than {MOST_GROWTH} characters of one"
        found = bare.encode(probe)
        if len(found.ids) > MOST_GROWTH * len(probe) + 100:
            return f"it makes more than {MOST_GROWTH} pieces of a character"
        bare.decode(found.ids)
    return None


def _rules(value: Any) -> Any:
    """Every rule in a tokenizer's parts, one in a sequence of others too."""
    stack, seen = [value], 0
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            seen += 1
            if seen > MOST_RULES:
                raise _LimitError(f"it has more than {MOST_RULES:,} rules")
            yield value
            stack += [v for v in value.values() if isinstance(v, dict | list)]
        elif isinstance(value, list):
            stack += [v for v in value if isinstance(v, dict | list)]


def _growth(rule: dict[str, Any]) -> float:
    """How many characters, or tokens, a rule can make of one."""
    if rule.get("type") == "TemplateProcessing":  # it may write a text more than once
        parts = [part for name in ("single", "pair") if isinstance(part := rule.get(name), list)]
        texts = [[json.dumps(piece.get("Sequence")) for piece in part if isinstance(piece, dict)] for part in parts]
        return float(max((part.count(text) for part in texts for text in part if text != "null"), default=1))
    if rule.get("type") != "Replace":
        return 1.0
    content, pattern = str(rule.get("content")), rule.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return max(1.0, len(content) / len(literal))
    return 1.0 + len(content)  # an expression may match between any two characters


def _too_much(rule: dict[str, Any]) -> str | None:
    if any(isinstance(v, str) and len(v) > MOST_PATTERN for k, v in rule.items() if k != "precompiled_charsmap"):
        return f"a rule has more than {MOST_PATTERN:,} characters"
    if isinstance(rule.get("ids"), list) and len(rule["ids"]) > 100:
        return "it puts more than 100 tokens at a place"
    if isinstance(rule.get("single"), list) and max(len(rule["single"]), len(rule.get("pair") or ())) > 100:
        return "it puts more than 100 tokens around a text"
    charsmap = rule.get("precompiled_charsmap")
    if isinstance(charsmap, str):
        data = base64.b64decode(charsmap)
        forms = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
        if max(map(len, forms), default=0) > 100:
            return "its table of characters holds more than 100 bytes for one"
    return None


def _largest_number(values: dict[str, Any]) -> int:
    """The largest number that a tokenizer gives to a token."""
    model, added = values.get("model"), values.get("added_tokens")
    words = model.get("vocab") if isinstance(model, dict) else None
    numbers = [*words.values()] if isinstance(words, dict) else []  # of a list the places are the numbers
    numbers += [token.get("id") for token in added or () if isinstance(token, dict)]
    return max((n for n in numbers if type(n) is int), default=0)


def _numbers(values: list[Any]) -> Any:
    for value in values:
        if isinstance(value, dict):
            yield from _numbers(list(value.values()))
        elif type(value) in (int, float):
            yield value


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


def _preload() -> None:
    """What is imported before no file can be opened any more, also what Jinja would import when it is needed."""
    time.localtime()
    import pprint  # noqa: F401
    import textwrap  # noqa: F401

    import jinja2.constants
    import jinja2.debug  # noqa: F401
    import tokenizers  # noqa: F401

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
    sys.path[:] = [path for path in sys.argv[1:] if Path(path).is_absolute()]
    _preload()
    _limit_the_process()
    functions = {"render": partial(render, kept={}), "match": match, "look_at_tokenizer": look_at_tokenizer}
    _write(["result", None])
    while True:
        name, seconds, arguments = json.loads(_read(int.from_bytes(_read(4), "big")).decode("utf-8", "surrogatepass"))
        _limit_the_time(seconds)
        try:
            answer = ["result", functions[name](*arguments)]
        except _LimitError as error:
            answer = ["limit", str(error)]
        except MemoryError:
            answer = ["limit", f"it wants more than {EXTRA_BYTES // 2**20} MiB of memory"]
        except BaseException as error:  # tokenizers has one that is no Exception
            answer = ["error", _in_a_line(error)]
        _write(answer)
        if answer[0] == "limit":
            os._exit(0)  # what is left in the memory goes with the process


if __name__ == "__main__":
    main()
