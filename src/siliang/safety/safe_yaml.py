"""Reads untrusted yaml: texts, numbers, true, false, null, lists and mappings, with limits on size, depth, expanded
aliases, and the digits of numbers.

Plain values are those of YAML 1.2: 1e-3 is a number; 1:30:00, 2026-01-31 and 007 are texts. In YAML 1.1 the first is a
text, and the others are a number in base 60, a date and an octal number.
"""

from __future__ import annotations

import codecs
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from siliang.language import Bilingual, local, together
from siliang.paths import near_names
from siliang.secrets import redacted, shortened
from siliang.types import ConfigError, TextError, first_line, message_of

MAX_CHARACTERS = 1_000_000
MOST_BYTES = 4 * MAX_CHARACTERS  # of UTF-8
MAX_DEPTH = 20
MAX_VALUES = 10_000  # aliases expanded

MAX_VALUES_OF_OTHERS = 200_000  # for descriptions of data sets, some with hundreds of parts
MAX_NUMBER = 2**64
LONGEST_NUMBER = 100  # characters
SHOWN = 40  # characters of a value in an error

INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)\Z")
DECIMAL = re.compile(
    r"""[-+]?(?:
        (?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
        |[0-9]+[eE][-+]?[0-9]+
        |\.(?:inf|Inf|INF)
    )\Z|\.(?:nan|NaN|NAN)\Z""",
    re.VERBOSE,
)
DIGITS = re.compile(r"[-+0-9a-fA-FxX_.:]+\Z")  # all numbers of YAML 1.1, also those in base 60
# the safe loader's types, without dates, bytes and sets, which no setting has
TYPES = ("null", "bool", "str", "seq", "map")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class YamlError(TextError):
    """The text is not yaml, or exceeds a limit."""


class _Loader(yaml.SafeLoader):
    """The safe loader, with the numbers of YAML 1.2 within limits, and without dates, bytes and sets."""


class _Dumper(yaml.SafeDumper):
    """Writes yaml that `_Loader` and loaders of YAML 1.1 read alike: the texts 12e45 and 1:30 are in quotes."""


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if WHOLE.match(text) is None:
        raise _wrong(node, Bilingual("is not a whole number", "不是整数"))
    number = int(text.replace("_", ""), 0) if len(text) <= LONGEST_NUMBER else MAX_NUMBER
    if abs(number) >= MAX_NUMBER:
        raise _wrong(node, Bilingual("is too large: at most 64 bits", "过大：最多 64 位"))
    return number


def _decimal_number(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node)
    if DECIMAL.match(text) is None and WHOLE.match(text) is None:
        raise _wrong(node, Bilingual("is not a number", "不是数"))
    if len(text) > LONGEST_NUMBER:
        raise _too_long(node.value, node.start_mark.line + 1)
    plain = text.replace("_", "")
    if plain.lstrip("+-")[:1] == "0" and plain.lstrip("+-")[1:2] in ("x", "o", "b"):
        return float(int(plain, 0))
    number = float(plain.lstrip(".") if plain.lower() == ".nan" else plain.replace(".i", "i").replace(".I", "I"))
    if math.isinf(number) and "inf" not in plain.lower():
        raise _wrong(node, Bilingual("is out of range", "超出数的范围"))
    return number


def _wrong(node: yaml.ScalarNode, why: str) -> YamlError:
    return YamlError(together(_shown(node.value), " ", why), node.start_mark.line + 1)


def _too_long(value: str, line: int) -> YamlError:
    return YamlError(
        Bilingual(
            f"{_shown(value)} has more than {LONGEST_NUMBER} characters, too many for a number",
            f"{_shown(value)} 超过 {LONGEST_NUMBER} 个字符，作为数太长",
        ),
        line,
    )


def _shown(value: str) -> str:
    return shortened(value, SHOWN, f"... ({len(value):,} characters)")


_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in TYPES
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in (*TYPES, "merge")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _make in ((INT, WHOLE, _whole_number), (FLOAT, DECIMAL, _decimal_number)):
    _Loader.add_constructor(_tag, _make)
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def read_text(path: Path) -> str:
    """The text of a settings file: UTF-8, with or without a byte order mark, or UTF-16 with one, as Windows writes it.

    Raises:
        YamlError: It is in another encoding.
        OSError: It cannot be read.
    """
    with path.open("rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise YamlError(Bilingual(f"it has more than {MAX_CHARACTERS:,} characters", f"超过 {MAX_CHARACTERS:,} 个字符"))
    try:
        text = content.decode("utf-16" if content.startswith(UTF_16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise YamlError(
            Bilingual("it is not UTF-8: save it as UTF-8", "不是 UTF-8 编码：请另存为 UTF-8"), line
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a yaml file.

    Raises:
        ConfigError: The file is missing, is not yaml, exceeds a limit, or is not a mapping.
    """
    try:
        values = parse_yaml(read_text(path))
    except FileNotFoundError:
        near = near_names(path)
        raise ConfigError(
            Bilingual(f"There is no settings file {path}.{near}", f"找不到配置文件 {path}。{near.zh}")
        ) from None
    except IsADirectoryError:
        raise ConfigError(
            Bilingual(f"{path} is a folder: give a settings file.", f"{path} 是文件夹：请给出配置文件。")
        ) from None
    except YamlError as error:
        raise ConfigError(
            Bilingual(
                f"{error.place(path)}: not readable as yaml: {error}.",
                f"{error.place(path)}：不是可读的 yaml：{local(message_of(error), 'zh')}。",
            )
        ) from None
    except OSError as error:
        raise ConfigError(
            Bilingual(
                f"{path} cannot be read: {error.strerror or error}.", f"{path} 无法读取：{error.strerror or error}。"
            )
        ) from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(
            Bilingual(
                f"{path} must hold settings such as `model: ...`, one a line; `siliang config` lists them.",
                f"{path} 应每行写一个设置，例如 `model: ...`；`siliang config` 列出全部设置。",
            )
        )
    return values


def parse_yaml(text: str) -> object:
    """The value of a yaml text.

    Raises:
        YamlError: It is not yaml; it is too long, too deep, or too large when its aliases are expanded; a number has
            too many digits; or a mapping has a name twice.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError(Bilingual(f"it has more than {MAX_CHARACTERS:,} characters", f"超过 {MAX_CHARACTERS:,} 个字符"))
    try:
        _measure(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem: str = getattr(error, "problem", None) or first_line(error)
        if "unknown escape character" in problem:
            problem = together(
                problem,
                Bilingual(
                    " (in double quotes a backslash starts an escape: write a Windows path in single quotes)",
                    "（双引号中反斜杠表示转义：Windows 路径请用单引号）",
                ),
            )
        elif "cannot start any token" in problem and "\t" in problem:
            problem = Bilingual("there is a tab: yaml needs blanks", "有制表符：yaml 须用空格")
        raise YamlError(problem, mark.line + 1 if mark else None) from None
    except YamlError:
        raise
    except Exception as error:  # the loader's conversions raise various errors, such as for `!!int x` or a 13th month
        why = shortened(first_line(error, kind=True), 200)
        raise YamlError(Bilingual(f"a value cannot be read: {why}", f"有一个值无法读取：{why}")) from None


def check_yaml(text: str) -> None:
    """Refuses yaml that would take another program's loader, of YAML 1.1, much time or memory.

    Raises:
        YamlError: It is not yaml; it is too long, too deep, or too large when its aliases are expanded; or a number has
            too many digits.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError(Bilingual(f"it has more than {MAX_CHARACTERS:,} characters", f"超过 {MAX_CHARACTERS:,} 个字符"))
    try:
        _measure(text, most_values=MAX_VALUES_OF_OTHERS)
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.ScalarToken) and len(token.value) > LONGEST_NUMBER and DIGITS.match(token.value):
                raise _too_long(token.value, token.start_mark.line + 1)
    except yaml.YAMLError as error:
        raise YamlError(first_line(error)) from None


def dump_yaml(values: object) -> str:
    """A yaml text of values, in their order. `parse_yaml` reads the same values; secrets are redacted."""
    return yaml.dump(redacted(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@dataclass
class _Open:
    """A collection that has not ended.

    Attributes:
        size: Number of values so far, aliases expanded.
        names: A mapping's names so far; None for a list.
        named: The last value was a name; the next one is its value.
    """

    anchor: str | None
    size: int = 1
    names: set[str] | None = None
    named: bool = field(default=False)


def _measure(text: str, most_values: int = MAX_VALUES) -> None:
    """Refuses yaml that the loader cannot handle or would lose; reads its events, which do not expand aliases."""
    sizes: dict[str, int] = {}  # by anchor: number of values, aliases expanded
    stack: list[_Open] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if stack and isinstance(event, yaml.NodeEvent):
            _check_name(stack[-1], event, line)
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append(_Open(event.anchor, names=set() if isinstance(event, yaml.MappingStartEvent) else None))
            if len(stack) > MAX_DEPTH:
                raise YamlError(Bilingual(f"nested more than {MAX_DEPTH} deep", f"嵌套超过 {MAX_DEPTH} 层"), line)
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            closed = stack.pop()
            anchor, size = closed.anchor, closed.size
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise YamlError(
                    Bilingual(
                        f"*{event.anchor} is used inside its value, or before it",
                        f"*{event.anchor} 位于它所指的内容之中或之前",
                    ),
                    line,
                )
            anchor, size = None, sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if stack:
            stack[-1].size += size
            size = stack[-1].size
        if size > most_values:
            raise YamlError(
                Bilingual(
                    f"more than {most_values:,} values, aliases expanded", f"展开别名后超过 {most_values:,} 个值"
                ),
                line,
            )


def _check_name(inside: _Open, event: yaml.NodeEvent, line: int) -> None:
    """Checks the names of a mapping, which are every second value: a name is a text, and occurs once."""
    if inside.names is None:
        return
    inside.named = not inside.named
    if not inside.named:
        return
    if not isinstance(event, yaml.ScalarEvent):
        raise YamlError(Bilingual("a name before a colon must be a text", "冒号前的名称必须是文本"), line)
    if event.value in inside.names:
        raise YamlError(
            Bilingual(
                f"{shortened(event.value, SHOWN)} appears twice in one mapping",
                f"{shortened(event.value, SHOWN)} 在同一映射中出现了两次",
            ),
            line,
        )
    inside.names.add(event.value)
