"""What a terminal's encoding cannot show is replaced; JSON stays JSON; errors of the command line are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import refused, run
from rich.console import Console
from tiny import WORDS, write_jsonl

from siliang.cli.console import HANDLER
from siliang.safety.safe_yaml import dump_yaml, parse_yaml
from siliang.units import show_bytes

ENCODINGS = ["gbk", "ascii", "utf-8"]
TALK = "说🤗 ⁇ é ☃"


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    known = " ".join(WORDS[:20])  # a row of mostly unknown words is refused
    rows = [{"instruction": f"{TALK} {known} {i}", "output": f"{known} {TALK}"} for i in range(12)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "emoji.jsonl", rows)


@pytest.fixture(scope="module")
def trained(model_folders: dict[str, Path], emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "输出🤗"
    flags = ("--model", model_folders["llama"], "--data", emoji, "--task", "causal_lm", "--output", folder)
    ended = run("train", *flags, "--set", "train.max_steps=3", "--set", "train.log_every=1", encoding="gbk")
    assert ended.code == 0, ended
    assert "saved      " in ended.out and "输出?" in ended.out
    return folder


@pytest.mark.parametrize(("encoding", "terminal"), [("gbk", True), ("cp1252", False), ("ascii", True)])
def test_every_command_on_every_terminal(
    trained: Path, model_folders: dict[str, Path], emoji: Path, tmp_path: Path, encoding: str, terminal: bool
) -> None:
    flags = ("--model", model_folders["llama"], "--data", emoji, "--task", "causal_lm")
    quick = ("--set", "train.max_steps=2", "--set", "accept=[SL002]")
    page = tmp_path / "页.html"
    for words, code in [
        (("check", *flags), 0),
        (("train", *flags, "--output", tmp_path / "运行🤗", *quick), 0),
        (("eval", trained), 0),
        (("generate", trained, TALK, "--max-new-tokens", 3), 0),
        (("report", trained, "--output", page), 0),
        (("report", trained, "--output", tmp_path / "页二.html", "--lang", "zh"), 0),
        (("plan", *flags, "--method", "lora", "--device", "cpu", "--memory", "8GB"), 0),
        (("config",), 0),
        (("methods",), 0),
        (("--help",), 0),
        (("train", "--help"), 0),
        (("explain", "SL007"), 0),
        (("check", "--model", "模型🤗", "--data", emoji, "--task", "causal_lm"), 2),
        (("train", "设置🤗.yaml"), 2),
    ]:
        ended = run(*words, encoding=encoding, terminal=terminal)
        assert ended.code == code, (words, ended)
        assert "Traceback" not in ended.err and "a bug in siliang" not in ended.err
        assert ended.out if code == 0 else ended.err


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_stays_json(trained: Path, model_folders: dict[str, Path], emoji: Path, encoding: str) -> None:
    flags = ("--model", model_folders["llama"], "--data", emoji, "--task", "causal_lm")
    for words in (
        ("check", *flags, "--json"),
        ("eval", trained, "--json"),
        ("plan", *flags, "--method", "lora", "--memory", "8GB", "--device", "cpu", "--json"),
    ):
        ended = run(*words, encoding=encoding)
        assert json.loads(ended.out), words


def test_texts_come_in_and_out_whole(model_folders: dict[str, Path], review_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = ("--model", model_folders["bert"], "--data", review_file, "--task", "seq_cls", "--output", folder)
    assert run("train", *flags, "--set", "train.max_steps=1").code == 0
    texts = ["the film", 'é "☃" 说🤗']
    for encoding in ENCODINGS:
        ended = run("predict", folder, "--json", *texts, encoding=encoding)
        assert [json.loads(line)["text"] for line in ended.out.splitlines()] == texts
        shown = run("predict", folder, *texts, encoding=encoding)
        assert shown.code == 0 and len(shown.out.splitlines()) == 2
    # the other way round: what is piped in
    asked = run("predict", folder, "--json", stdin="电影\r\n\r\n好\n".encode("gbk"), encoding="gbk")
    assert [json.loads(line)["text"] for line in asked.out.splitlines()] == ["电影", "", "好"]
    wrong = run("predict", folder, stdin="电影\n".encode("gbk"), encoding="utf-8")
    assert wrong.code == 2 and "SLE01" not in wrong.err and "standard input is not utf-8 after line 0" in wrong.err
    surrogate = run("predict", folder, b"\xb5\xe7".decode("utf-8", "surrogateescape"))
    assert surrogate.code == 2 and "bytes that are not utf-8" in surrogate.err


def test_replacements_are_one_character_each() -> None:
    assert "★ ± — 说".encode("ascii", HANDLER) == b"* ~ - ?"
    assert "█▓▒░·".encode("ascii", HANDLER) == b"#%+:."
    assert "\udcff".encode("utf-8", HANDLER) == b"?"
    console = Console(width=20)
    assert console.measure("±").maximum == 1


def test_a_terminal_in_a_process_of_its_own(emoji: Path, tmp_path: Path) -> None:
    """As a Windows console is: through the interpreter's own streams. And the version, at once."""
    env = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    env |= {"PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1"}
    code = "import sys, siliang.cli.main as m; sys.argv = ['siliang', '--version']\n"
    code += "try: m.main()\nexcept SystemExit as s: assert not s.code\n"
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("siliang 0.") and "torch 2" in lines[0] and "transformers 5" in lines[0]
    assert lines[1].startswith("Python 3.") and lines[2] == "False False", done
    words = [sys.executable, "-m", "siliang", "train", "--model", "模", "--data", str(emoji), "--task", "causal_lm"]
    done = subprocess.run([*words, "--output", tmp_path / "o"], env=env, capture_output=True)
    assert done.returncode == 2 and b"Traceback" not in done.stderr and done.stderr.startswith(b"error[SLE0")


def test_settings_from_windows(tmp_path: Path) -> None:
    text = (
        "model: C:\\models\\qwen\ntask: causal_lm\ndata: {train: emoji.json}\noutput: o\nmethod: {lora_dropout: 5e-2}\n"
    )
    contents = {
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "crlf": text.replace("\n", "\r\n").encode(),
        "utf-16": text.encode("utf-16"),
        "plain": text.encode(),
    }
    said = set()
    for name, content in contents.items():
        (tmp_path / f"{name}.yaml").write_bytes(content)
        said.add(refused("check", tmp_path / f"{name}.yaml").replace(name, ""))
    assert len(said) == 1 and "emoji.json" in said.pop()
    (tmp_path / "gbk.yaml").write_bytes("a: 1\n# 中文\nmodel: x\n".encode("gbk"))
    assert "gbk.yaml:2: not readable as yaml: it is not UTF-8" in refused("check", tmp_path / "gbk.yaml")
    (tmp_path / "quoted.yaml").write_text('model: x\ndata: {train: "D:\\data\\new.json"}\n')
    assert "write a Windows path in single quotes" in refused("check", tmp_path / "quoted.yaml")
    (tmp_path / "newline.yaml").write_text('model: "D:\\new"\ntask: causal_lm\ndata: {train: d}\noutput: o\n')
    error = refused("check", tmp_path / "newline.yaml")
    assert "a control character" in error and "single quotes" in error


def test_numbers_in_yaml() -> None:
    assert parse_yaml("5e-2") == 0.05 and parse_yaml("1E5") == 1e5 and parse_yaml("-.5e+3") == -500.0
    assert parse_yaml('"12e45"') == "12e45" and parse_yaml("12e4f") == "12e4f" and parse_yaml("e5") == "e5"
    values = {"a": "12e45", "b": 2e-5, "c": "1e3", "d": "nan", "e": "中文", "f": [1, "1"]}
    assert parse_yaml(dump_yaml(values)) == values


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("predict",), "Missing argument 'run'"),
        (("train", "a.yaml", "b.yaml"), "unexpected extra argument"),
        (("check", "--examples", "many"), "'many' is not a value for '--examples'"),
        (("check", "--examples", "-1"), "'-1' is not a value"),
        (("merge", "x", "--output", "y", "--dtype", "int3"), "int3"),
        (("train", "--model"), "requires an argument"),
        (("report", "--lang", "de", "x"), "x"),
    ],
)
def test_errors_of_usage_are_one_line(words: tuple[str, ...], message: str) -> None:
    error = refused(*words)
    assert message in error and error.startswith("error[SLE0") and error.count("\n") == 1


def test_debug_may_stand_anywhere(tmp_path: Path) -> None:
    ended = run("eval", tmp_path, "--debug")
    assert ended.code == 2 and "Traceback" in ended.err and "is not a run's folder" in ended.err


def test_a_fault_of_our_own_is_two_lines_and_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise KeyError("what nobody expects")

    monkeypatch.setattr("siliang.errors.find_entry", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = run("explain", "SLE03")
    assert ended.code == 1 and "KeyError: 'what nobody expects'" in ended.err and ended.err.count("\n") == 2
    [kept] = tmp_path.glob("siliang-traceback-*.txt")
    assert str(kept) in ended.err and "Traceback" in kept.read_text()


def test_sizes_for_people() -> None:
    shown = {999.4: "999 B", 999_600: "1 MB", 999_999: "1 MB", 1e9: "1 GB", 1.3e12: "1,300 GB", 82.9e6: "82.9 MB"}
    assert {n: show_bytes(n) for n in shown} == shown
    assert not any("e+" in show_bytes(10.0**n * 0.9999) for n in range(18))
