"""What is printed in two languages says the same in both: same values, labels of one width, characters of GBK."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from siliang.check import RULES
from siliang.cli.help_page import COMMANDS_ZH
from siliang.cli.main import app
from siliang.config import RunConfig, Setting, describe
from siliang.config.comparison import MethodEntry, describe_settings
from siliang.config.run import MethodConfig, QuantizationConfig
from siliang.config.sources import Source
from siliang.language import Bilingual, both, filled, joined, local, padded, width
from siliang.other_names import TABLE
from siliang.types import ConfigError, DataError, SiliangError, first_line, message_of

SOURCE = Path(__file__).resolve().parents[1] / "src" / "siliang"
CHINESE = re.compile("[一-鿿]")
LABEL = re.compile(r"\S+ {2,}")  # in front of a line of a run: "saved      ..."
TYPEWRITTEN = re.compile("[一-鿿][,;:?!]")  # half-width punctuation behind a Chinese character


def pairs() -> Iterator[tuple[str, ast.expr, ast.expr]]:
    """Every pair of texts in the source, with its place."""
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name == "language.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Bilingual", "both"):
                assert len(node.args) == 2 and not node.keywords, f"{path}:{node.lineno}"
                en, zh = node.args
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", en, zh


def written(node: ast.expr) -> str | None:
    """The literal text of a string, with a mark for each value; None of what is not a literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        texts = written(node.left), written(node.right)
        return None if None in texts else "".join(map(str, texts))
    return None


def called(function: ast.expr) -> str:
    """The name of what is called: `warn` of `warn(...)` and of `warnings.warn(...)`."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def errors(kinds: set[str]) -> Iterator[tuple[str, str]]:
    """Every error or warning that is made with a text in one language, with its place."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or called(node.func) not in kinds or not node.args:
                continue
            if (text := written(node.args[0])) is not None:
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", text


def values(node: ast.expr) -> set[str]:
    """The names of the values that a text shows; `more_zh`, the Chinese of `more`, is the same value."""
    found = [part for part in ast.walk(node) if isinstance(part, ast.FormattedValue)]
    names = {n.id for part in found for n in ast.walk(part.value) if isinstance(n, ast.Name)}
    return {name.removesuffix("_zh") for name in names} - {"local", "len", "str", "message_of"}


def test_pairs_say_the_same() -> None:
    found = list(pairs())
    assert len(found) > 100
    for place, en, zh in found:
        assert values(en) == values(zh), place


def test_pairs_are_english_and_chinese() -> None:
    for place, *both_texts in pairs():
        en, zh = map(written, both_texts)
        if en is not None:
            assert not CHINESE.search(en), place
        if zh is not None:
            zh.encode("gbk")  # a Windows console in China
            assert CHINESE.search(zh) or not re.search("[A-Za-z]{3}", zh.replace("{}", "")), place
            assert not TYPEWRITTEN.search(zh), place
        if en and zh and (label := LABEL.match(en)):
            other = LABEL.match(zh)
            assert other is not None and width(other[0]) == width(label[0]), place


def test_errors_say_it_in_both() -> None:
    kinds = {kind.__name__ for kind in all_kinds(SiliangError)} | {"BadRow", "YamlError", "JsonError", "LimitError"}
    assert len(kinds) > 15
    kinds |= {"kind", "warn"}  # an error of a class that the caller chooses; a warning
    alone = [f"{place}: {text}" for place, text in errors(kinds) if re.search("[A-Za-z]{3}", text.replace("{}", ""))]
    assert not alone, "\n".join(alone)


def all_kinds(kind: type[Exception]) -> list[type[Exception]]:
    return [kind, *(found for sub in kind.__subclasses__() for found in all_kinds(sub))]


def test_names_of_other_tools_say_it_in_both() -> None:
    for row in TABLE:
        for text in (*([row.note] if row.note else []), *row.lacks.values()):
            assert isinstance(text, Bilingual), f"{row.setting}: {text}"


def test_errors_within_errors_keep_their_chinese() -> None:
    inner = DataError(Bilingual("no rows.\nGive some.", "没有样本。\n请给出。"))
    assert local(message_of(inner), "zh") == "没有样本。\n请给出。" and message_of("plain") == "plain"
    assert local(message_of(ValueError(Bilingual("one", "一"))), "zh") == "一" and message_of(ValueError("a")) == "a"
    assert first_line(inner) == "no rows." and local(first_line(inner), "zh") == "没有样本。"
    assert first_line(inner, kind=True) == "DataError: no rows." and type(first_line(ValueError("a"))) is str


@pytest.mark.parametrize("code", RULES)
def test_pages_of_rules(code: str) -> None:
    rule = RULES[code]
    assert len(rule.paragraphs) == 6, f"{code}: title, Cause and Fix, and 标题, 原因 and 办法"
    for text in (rule.title, rule.cause, rule.fix, rule.page):
        assert text and not CHINESE.search(text.replace("锟斤拷", ""))
        assert CHINESE.search(text.zh) and not TYPEWRITTEN.search(text.zh) and "\n" not in rule.cause.zh
        text.zh.replace("Ã©、â€", "").encode("gbk")
    assert not rule.title.zh.endswith("。") and rule.fix.zh.endswith("。") and rule.cause.zh.endswith("。")


def test_every_command_is_in_chinese() -> None:
    assert set(COMMANDS_ZH) == {"siliang", *(command.name for command in app.registered_commands)}


SECTIONS = (MethodEntry, MethodConfig, QuantizationConfig, Source)  # not listed, or listed as one value


@pytest.mark.parametrize(
    "setting",
    [*describe(RunConfig), *describe_settings(), *chain.from_iterable(map(describe, SECTIONS))],
    ids=lambda s: s.name,
)
def test_meanings_of_settings(setting: Setting) -> None:
    en, zh = str(setting.meaning), setting.meaning.zh
    assert en and not CHINESE.search(en) and en.endswith(".")
    assert CHINESE.search(zh) and not TYPEWRITTEN.search(zh) and zh.endswith("。") and "  " not in zh
    zh.encode("gbk")
    # settings, values and numbers are the same
    words = re.compile(r"`[^`]+`|\w+_\w+|\d[\d,.:]*\d|\d|SL\d+|--\w+|\{.*?\}", re.ASCII)
    assert set(words.findall(en)) == set(words.findall(zh))


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS_ZH if name != "siliang")], ids=" ".join)
def test_help(words: list[str]) -> None:
    """In Chinese: only names, and no line that is too wide."""
    code = f"import sys; sys.argv[1:] = {[*words, '--help']}; from siliang.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"SILIANG_LANG": "zh", "PYTHONUTF8": "1", "COLUMNS": "80"},
        check=True,
    )
    page = done.stdout
    assert page.startswith("用法：siliang") and "选项：" in page and "显示本说明并退出。" in page
    page.encode("gbk")
    assert not TYPEWRITTEN.search(page) and all(width(line) <= 80 for line in page.splitlines())
    assert not re.search("[a-z]+ (a|the|of|is) [a-z]+|Usage|default:|required", page)
    assert not re.search("<(str|path|int|float|list)[> [\\]]|OPTIONS|COMMAND|ARGS|ADDRESS|_NAME", page)


def test_lines_of_two_languages() -> None:
    assert joined("一行，\n  另一行 a\n  b\n另一行") == "一行，另一行 a b 另一行"
    assert (
        filled("aaa bbb ccc", 8) == "aaa bbb\nccc"
        and filled("aaa bbbbbbbbbbbb c", 8, "  ") == "  aaa\n  bbbbbbbbbbbb\n  c"
    )
    assert filled("一二“三”。四", 7) == "一二\n“三”。\n四"
    assert filled("一二三四五。", 10) == "一二三四\n五。" and filled("一二（三）四", 7) == "一二\n（三）\n四"
    text = " ".join(setting.meaning.zh for setting in describe(RunConfig))
    lines = filled(text, 60, "  ").splitlines()
    assert all(width(line) <= 60 or " " not in line.strip() for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert not any(line.lstrip()[0] in "，。；：、）" for line in lines)


def test_bilingual(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Bilingual("one row", "一条样本")
    assert json.dumps([text]) == '["one row"]' and f"{text}" == "one row"
    assert pickle.loads(pickle.dumps(text)).zh == "一条样本"
    for wanted, shown in (("en", "one row"), ("zh", "一条样本")):
        monkeypatch.setenv("SILIANG_LANG", wanted)
        assert local(text) == both("one row", "一条样本") == shown and local("plain") == "plain"
        assert type(local(text)) is str
    assert local(text, "zh") == "一条样本"
    error = ConfigError(text)
    assert str(error) == "one row" and error.zh == "一条样本" and ConfigError("x").zh is None


def test_widths() -> None:
    assert width("数据 a") == 6 and padded("数据", 6) == "数据  " and padded("abc", 2) == "abc"
