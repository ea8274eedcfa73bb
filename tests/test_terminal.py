"""Nothing that others wrote steers a terminal or a shell: data, names, labels, settings, what models and errors say."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
from commands import Ended, run
from rich.text import Text
from tiny import WORDS, write_jsonl

from siliang.cli.console import HANDLER
from siliang.cli.shown_console import ShownConsole, shown_text
from siliang.next_steps import next_steps
from siliang.safety.safe_yaml import dump_yaml
from siliang.terminal import CleanStream, StreamedText, clean_output, one_line, shell_command, shown
from siliang.types import TaskType

# What a terminal would obey, or a reader would not see.
HOSTILE = {
    "colour": "\x1b[5;35m",
    "clear": "\x1b[2J",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;https://evil.example\x1b\\",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "device": "\x1bP0;1|evil\x1b\\",
    "one byte": "\x9b31m\x9d0;owned\x9c",
    "over": "\rover",
    "back": "\x08\x08",
    "delete": "\x7f",
    "bell": "\x07\x0b\x0c\x00\x1a",
    "order": "\u202eevil\u202c",
    "isolate": "\u2066evil\u2069\u200e\u200f\u061c",
    "unseen": "\u200b\u2060\ufeff\u00ad\u2063",
    "tags": "\U000e0041\U000e007f",
    "lines": "\u2028\u2029\x85",
}
ALL = "a".join(HOSTILE.values()).replace("\x00", "")
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
UNSEEN = re.compile(r"[\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]")
RICH = re.compile(r"\x1b\[(?:[0-9;]*m|\?25[lh]|[0-9]*[AK])|\r")  # what Rich draws with on a terminal


def check_clean(ended: Ended, *, drawn: bool = False) -> str:
    """The text of a command, without what Rich draws with; nothing hostile is in it."""
    text = ended.out + ended.err
    assert "\x1b[5;35m" not in text and "a bug in siliang" not in text, text
    text = RICH.sub("", text) if drawn else text
    assert not OBEYED.search(text) and not UNSEEN.search(text), ascii(text)
    return text


# ---- one text ----


@pytest.mark.parametrize("kind", HOSTILE)
def test_characters_are_shown_as_escapes(kind: str) -> None:
    for text in (f"x{HOSTILE[kind]}y", HOSTILE[kind]):
        clean = shown(text)
        assert not OBEYED.search(clean) and not UNSEEN.search(clean)
        assert clean.isascii() and clean.encode("gbk", HANDLER) == clean.encode()
        if "\\" not in text:
            assert clean.encode().decode("unicode_escape") == text  # each can be told from every other
    assert not OBEYED.search(clean_output(HOSTILE[kind]))


@pytest.mark.parametrize(
    "text",
    [
        "a\tb\nc",
        "说，好。",
        "é ñ ü",
        "👩\u200d👩\u200d👧 ❤\ufe0f",
        "می\u200cخواهم",
        "क्\u200dष",
        "שלום",
        "\ue000",
        "\u3000",
    ],
)
def test_words_of_every_script_stay(text: str) -> None:
    assert shown(text) == text


def test_lines_ends() -> None:
    assert shown("a\r\nb\r\n") == "a\nb\n" and shown("a\rb\n") == "a\\x0db\n"
    assert one_line("a\r\nb\tc\rd") == "a\\nb\\tc\\x0dd"


def test_an_escape_in_two_pieces() -> None:
    text = f"one {ALL} two 👩\u200d👩\r\nthree\ry 说\u200b说 x\u200bx"
    for size in range(1, 9):
        pieces = StreamedText()
        said = [pieces.add(text[i : i + size]) for i in range(0, len(text), size)]
        assert "".join(said) + pieces.end() == shown(text)


def test_a_screen_lets_a_bar_draw_and_nobody_else() -> None:
    out = io.StringIO()
    screen = CleanStream(out)
    for piece in ("\r 5%|#   |", "\r50%|##  |", "\n", "label:", "\rfake", "\n", "x\ry\n", "\rx\x1b[2J", "\n"):
        assert screen.write(piece) == len(piece)
    assert out.getvalue() == "\r 5%|#   |\r50%|##  |\nlabel:\\x0dfake\nx\\x0dy\n\rx\\x1b[2J\n"


def test_styles_stay_and_secrets_in_several_of_them_go() -> None:
    token = f"hf_{'aB3d' * 8}"
    text = Text("see ").append(token[:5], "green").append(token[5:], "red").append(" \x1b[2J", "bold").append(" end")
    clean = shown_text(text)
    assert clean.plain == "see *** \\x1b[2J end"
    assert clean.get_style_at_offset(ShownConsole(), 9).bold
    out = io.StringIO()
    console = ShownConsole(file=out, width=12, force_terminal=False)
    console.print(f"{token} {token}", markup=False)
    console.print(Text(f"abcdef {token}"))
    assert out.getvalue() == "*** ***\nabcdef ***\n"  # hidden before it is wrapped


# ---- every door ----


def test_warnings_logs_errors_and_tracebacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        print(ALL)
        print(ALL, file=sys.stderr)
        logging.getLogger("some.library").warning("%s", ALL)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(ALL, stacklevel=1)
        try:
            raise OSError(ALL)
        except OSError:
            traceback.print_exc()
        raise KeyError(ALL)

    monkeypatch.setattr("siliang.errors.find_entry", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for words in (("explain", "SLE03"), ("explain", "SLE03", "--debug")):
        ended = run(*words)
        assert ended.code == 1 and ended.err.count("owned") > 3
        text = ended.out + ended.err
        assert not OBEYED.search(text) and not UNSEEN.search(text)
    [kept, *_] = tmp_path.glob("siliang-traceback-*.txt")
    assert not OBEYED.search(kept.read_text())


@pytest.mark.parametrize(
    "command", ["check", "train", "plan", "compare", "report", "eval", "chat", "merge", "explain", "x"]
)
def test_what_is_given_comes_back_clean(command: str, tmp_path: Path) -> None:
    for given in (
        ALL,
        str(tmp_path / ALL),
        f"--{ALL}",
        f"--set=train.{ALL}={ALL}",
        f"--set=data.train={ALL}",
        f"--model={ALL}",
    ):
        ended = run(command, given)
        assert ended.code == 2
        check_clean(ended)


@pytest.fixture(scope="module")
def places(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and models of somebody who means harm."""
    folder = tmp_path_factory.mktemp("places") / f"evil{ALL.replace('/', '')}"
    folder.mkdir()
    words = " ".join(WORDS[:20])
    kinds = [kind.replace("\x00", "") for kind in HOSTILE.values()]
    labels = (f"good{ALL}", "bad")
    rows = [{f"text{ALL}": f"{words} x{kinds[i % len(kinds)]} {words}", "label": labels[i % 2]} for i in range(60)]
    write_jsonl(folder / "rows.jsonl", rows)
    talks = [{"instruction": f"{words} {kinds[i % len(kinds)]}", "output": f"{words} {i}"} for i in range(40)]
    write_jsonl(folder / "talks.jsonl", talks)
    write_jsonl(folder / "bad.jsonl", [*talks, {"instruction": [ALL], ALL: 1}])
    for name in ("bert", "llama"):
        shutil.copytree(model_folders[name], folder / name)
    # the words that the data does not have are what the model may say
    tokenizer = json.loads((folder / "llama" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {w + ALL if w in WORDS[20:] else w: n for w, n in vocabulary.items()}
    (folder / "llama" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def test_a_classifier(places: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / f"run{ALL.replace('/', '')}"
    flags = (
        "--data",
        places / "rows.jsonl",
        "--task",
        "seq_cls",
        "--set",
        "train.max_steps=2",
        "--set",
        "accept=[SL002]",
    )
    settings = tmp_path / "run.yaml"
    settings.write_text(dump_yaml({"data": {"train": "x", "columns": {"text": f"text{ALL}"}, "max_length": 64}}))
    named = tmp_path / "bert"
    named.symlink_to(places / "bert")
    place = tmp_path / "places"  # a name with control characters in it is not a setting
    place.symlink_to(places)
    flags = (settings, "--model", named, "--data", place / "rows.jsonl", "--task", "seq_cls")
    flags += ("--set", "train.max_steps=2", "--set", "accept=[SL002]")
    for terminal in (False, True):
        check_clean(run("check", *flags, terminal=terminal), drawn=terminal)
        check_clean(run("plan", *flags, "--memory", "8GB", "--device", "cpu", terminal=terminal), drawn=terminal)
    found = run("check", *flags, "--json")
    check_clean(found)
    assert f"text{ALL}" in json.loads(found.out)["counts"]["columns"]["text"]
    shutil.copytree(named, tmp_path / "model")
    trained = run("train", *flags, "--output", tmp_path / "run", terminal=True)
    assert trained.code == 0, trained
    check_clean(trained, drawn=True)
    shutil.copytree(tmp_path / "run", run_folder)
    for words in (("eval", run_folder), ("report", run_folder, "--output", tmp_path / "page.html")):
        for terminal in (False, True):
            (tmp_path / "page.html").unlink(missing_ok=True)
            ended = run(*words, terminal=terminal)
            check_clean(ended, drawn=terminal)
            assert ended.code == 0, ended
    for terminal in (False, True):
        said = run("predict", run_folder, f"the film {ALL}", terminal=terminal)
        assert said.out.count("\n") == 1 and "\\x1b" in check_clean(said, drawn=False)
    told = run("predict", run_folder, f"the film {ALL}", "--json")
    check_clean(told)
    assert json.loads(told.out)["text"] == f"the film {ALL}"  # machines get every character
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not OBEYED.search(page) and not UNSEEN.search(page) and "\\x1b" in page


def test_a_writer(places: Path, tmp_path: Path) -> None:
    (tmp_path / "places").symlink_to(places)
    place = tmp_path / "places"
    flags = ("--model", place / "llama", "--data", place / "talks.jsonl", "--task", "causal_lm")
    quick = ("--set", "train.max_steps=2", "--set", "accept=[SL002]")
    assert run("train", *flags, *quick, "--output", tmp_path / "run").code == 0
    ask = (" ".join(WORDS[:3]), "--max-new-tokens", 25, "--temperature", 5)
    for terminal in (False, True):
        said = run("generate", tmp_path / "run", *ask, "--base", terminal=terminal)
        assert said.code == 0 and "\\x1b]52" in said.out and not OBEYED.search(said.out)
        talk = run("chat", tmp_path / "run", *ask[1:], stdin=f"{ask[0]} {ALL}\n".encode(), terminal=terminal)
        assert talk.code == 0 and "x1b]52" in check_clean(talk, drawn=terminal).replace("\n", "").replace(" ", "")
    for terminal in (False, True):
        bad = run("check", *flags[:3], place / "bad.jsonl", *flags[4:], terminal=terminal)
        check_clean(bad, drawn=terminal)
    methods = [{"name": "lora", "label": f"[bold]$(touch X){ALL}"}, {"name": "ia3", "label": "b"}]
    settings = tmp_path / "compare.yaml"
    settings.write_text(dump_yaml({"methods": methods, "seeds": 1, "prompts": [f"x {ALL}"]}), encoding="utf-8")
    for terminal in (False, True):
        compared = run("compare", settings, *flags, *quick, "--output", tmp_path / "compared", terminal=terminal)
        assert compared.code == 0, compared
        assert "[bold]$(touch X)" in check_clean(compared, drawn=terminal)
    for path in (tmp_path / "compared").rglob("*"):
        if path.suffix in (".json", ".html", ".log", ".yaml"):
            assert not OBEYED.search(path.read_text(encoding="utf-8").replace("\r\n", "\n")), path


# ---- shells ----

NAMES = (
    "plain", "a b", "$(touch X)", "`touch X`", "a'b\"c", "-run", "~", "*", "a;touch X", "a&b|c>X", "a\nb", "\x1b[2Jx",
    "\\n", "说🤗", "\u202ex", "#x", "!x", "a\tb", "\x9bx", "{a,b}", "a$IFS", "--output",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_suggested_command_is_one_that_a_shell_takes(name: str, tmp_path: Path) -> None:
    for task, method in ((TaskType.SEQ_CLS, "lora"), (TaskType.CAUSAL_LM, "full")):
        for words in next_steps(Path(name), task, {"name": method}).values():
            line = shell_command("siliang", *words)
            assert shown(line) == line and "\n" not in line
            given = _as_bash_reads(line, tmp_path)
            assert given[0] == "siliang" and len(given) == len(words) + 1
            assert given[2] == (f"./{name}" if name.startswith("-") else name)
    comment = f"true # {shell_command(Path(name))}\nprintf done"
    ended = subprocess.run(["bash", "-c", comment], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    assert ended.stdout == b"done"
    assert not list(tmp_path.iterdir())


def _as_bash_reads(line: str, folder: Path) -> list[str]:
    """The words of a command line."""
    code = f'set -- {line}; printf "%s\\0" "$@"'
    env = {"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin", "HOME": "/nowhere"}
    done = subprocess.run(["bash", "-c", code], cwd=folder, capture_output=True, timeout=60, check=True, env=env)
    return done.stdout.decode().split("\0")[:-1]


def test_suggestions_of_commands_are_quoted(
    model_folders: dict[str, Path], review_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--model", model_folders["bert"], "--data", review_file, "--task", "seq_cls", "--set", "train.max_steps=1")
    for name in ("$(touch X)", "-run"):
        ended = run("train", *flags, f"--output={name}")
        assert ended.code == 0, ended
        lines = [
            line for line in ended.out.splitlines() if " predict " in line or " eval " in line or " merge " in line
        ]
        assert len(lines) == 3
        for line in lines:
            words = _as_bash_reads(line.removeprefix("next").strip(), tmp_path)
            assert (f"./{name}" if name.startswith("-") else name) in words
        assert run("report", f"./{name}", "--output", "page.html").code == 0
        page = (tmp_path / "page.html").read_text()
        assert shell_command(Path(name)).replace("'", "&#39;") in page
        (tmp_path / "page.html").unlink()
    method = json.dumps([{"name": "lora", "label": "$(touch X)"}, {"name": "lora", "r": 4, "label": "b"}])
    flags = ("--model", model_folders["bert"], "--data", review_file, "--task", "seq_cls")
    ended = run("plan", *flags, "--set", f"methods={method}", "--memory", "1MB", "--device", "cpu")
    assert "--method '$(touch'" in ended.out, ended
    ended = run("check", *flags, "--set", "model_name_or_path=$(touch X)")
    assert "`'model=$(touch X)'`" in ended.err, ended
    assert not (tmp_path / "X").exists()
