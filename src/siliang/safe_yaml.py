"""Yaml that others may have written: plain values only, and limits on size, depth and what aliases unfold to."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import yaml

from siliang.types import first_line

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 20
MAX_VALUES = 10_000  # with every alias written out

# yaml 1.1 takes 1e-3 for text; people, and yaml 1.2, for a number
EXPONENT = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+\Z")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class YamlError(ValueError):
    """Not yaml, or more of it than settings need.

    Attributes:
        line: Where, from 1; None where that means nothing.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class _Loader(yaml.SafeLoader):
    """The safe loader, with 1e-3 for a number as in YAML 1.2: YAML 1.1 takes it for text."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: the text 12e45 in quotes."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def read_text(path: Path) -> str:
    """The text of a settings file: UTF-8, with a byte order mark or without, or UTF-16 with one, as Windows writes it.

    Raises:
        YamlError: It is in another encoding.
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content.startswith(UTF_16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise YamlError("it is not UTF-8, in which settings are written: save it as UTF-8", line) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_yaml(text: str) -> Any:
    """The value of a yaml text, by yaml's safe loader.

    Raises:
        YamlError: It is no yaml, too long, too deep, or unfolds to too much.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError(f"more than {MAX_CHARACTERS:,} characters are no settings")
    try:
        _measure(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = getattr(error, "problem", None) or first_line(error)
        if "unknown escape character" in said:
            said += " (in double quotes a backslash begins an escape: write a Windows path in single quotes)"
        elif "cannot start any token" in said and "\t" in said:
            said = "a tab, where yaml wants blanks"
        raise YamlError(said, mark.line + 1 if mark else None) from None
    except YamlError:
        raise
    except Exception as error:  # the loader raises whatever its conversions do: of `!!int x`, or of a 13th month
        raise YamlError(f"a value cannot be read: {first_line(error, kind=True)}") from None


def dump_yaml(values: Any) -> str:
    """A yaml text, in the values' own order, that `parse_yaml` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _measure(text: str) -> None:
    """Refuses what the loader would choke on; looks at events, which are small whatever they unfold to."""
    whole: dict[str, int] = {}  # values under an anchor, aliases unfolded
    stack: list[tuple[str | None, int]] = []  # collections that are open: anchor, values so far
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append((event.anchor, 1))
            if len(stack) > MAX_DEPTH:
                raise YamlError(f"nested more than {MAX_DEPTH} deep", line)
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = stack.pop()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in whole:
                raise YamlError(f"*{event.anchor} stands inside of what it names, or before it", line)
            anchor, size = None, whole[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        else:
            continue
        if anchor is not None:
            whole[anchor] = size
        if stack:
            stack[-1] = (stack[-1][0], stack[-1][1] + size)
            size = stack[-1][1]
        if size > MAX_VALUES:
            raise YamlError(f"more than {MAX_VALUES:,} values, aliases written out", line)
