"""Every error class has a code, a cause and a remedy, in English and in Chinese, and the command shows them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import siliang.engine.padding
import siliang.train.run  # noqa: F401 - whatever defines errors
from siliang.check import RULES
from siliang.errors import CATALOGUE, _classes, as_markdown, as_shown, explain
from siliang.language import language
from siliang.types import ConfigError, InterruptedRunError, OutputError, SiliangError, TrainingError

ROOT = Path(__file__).resolve().parents[1]


def test_an_error_is_no_book(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's value may be a million characters; secrets are hidden before anything is cut."""
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    text = f"it is {'x' * 3590}correct-horse-battery{'y' * 5000}correct-horse-battery{'z' * 290}: say less."
    for kind in (ConfigError, OutputError, TrainingError):
        said = str(kind(text))
        assert said.startswith("it is x") and said.endswith("z: say less.") and f"({len(text):,} characters)" in said
        assert len(said) < 4100 and "corr" not in said and "battery" not in said
    assert str(ConfigError("short")) == "short"


def test_every_class_is_in_the_catalogue() -> None:
    classes = [kind for kind in _classes(SiliangError) if "code" in vars(kind)]  # KindError has ConfigError's
    assert sorted(kind.code for kind in classes) == sorted(CATALOGUE), "one code for each class"
    for kind in classes:
        entry = CATALOGUE[kind.code]
        for page in (entry.en, entry.zh):
            assert page.title and page.cause and page.remedy
        assert not re.search("[一-鿿]", entry.en.title + entry.en.cause + entry.en.remedy)
        for text in (entry.zh.title, entry.zh.cause, entry.zh.remedy):
            assert re.search("[一-鿿]", text), text
        message = kind("what happened")
        assert as_shown(message, "en") == f"error[{kind.code}]: what happened"
        assert as_shown(message, "zh").startswith(f"错误[{kind.code}] {entry.zh.title}：what happened\n办法：")
        assert entry.en.remedy in explain(kind.code.lower(), "en")
    assert InterruptedRunError.exit_code == 130 and ConfigError.exit_code == 2


def test_docs_are_made_from_it() -> None:
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == as_markdown(), "run `make docs`"


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "de_DE"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "SILIANG_LANG": "en"}, "en"),
        ({"SILIANG_LANG": "zh"}, "zh"),
    ],
)
def test_language(variables: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SILIANG_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language() == wanted


def test_the_command_in_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILIANG_LANG", "zh")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")

    def siliang(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "siliang", *arguments], capture_output=True, encoding="utf-8")

    done = siliang("train", "--model", "./m", "--data", "x", "--task", "seq_cls", "--output", "y")
    assert done.returncode == 2
    assert done.stderr.startswith("错误[SLE03] 数据无法使用：找不到数据文件或文件夹 x。\n")
    assert siliang("explain", "SLE04").stdout.startswith("SLE04: 基座模型无法加载\n\n原因：")
    assert siliang("explain", "SL007").stdout.startswith("SL007（错误）：没有学习结束符\n\n原因：")
    assert "代码从 SLE01 到 SLE15" in siliang("explain", "SLE99").stderr
    assert siliang("methods").stdout.startswith("lora           训练所选线性层的低秩更新\n")
    monkeypatch.setenv("PYTHONIOENCODING", "gbk")  # a Windows console in China
    page = subprocess.run([sys.executable, "-m", "siliang", "check", "--explain", "all"], capture_output=True)
    assert page.stdout.decode("gbk").count("办法：") == len(RULES)


def test_a_line_of_any_length_is_cut() -> None:
    assert len(as_shown(ConfigError("x" * 10_000), "en")) < 1100
