"""What yaml and JSON of strangers may hold: bounded values, and an error of one line beyond them."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from reading import iter_rows, read_rows
from tiny import write_jsonl

from siliang import LoraConfig
from siliang.compare.pool import read_message
from siliang.config import DataConfig
from siliang.config.distributed import deepspeed_settings
from siliang.data.load import load_examples
from siliang.distributed.launched import accelerate_strategy
from siliang.files import find_damage
from siliang.models.base_config import load_config
from siliang.plan.history import known_work, record_work
from siliang.report.gather import gather
from siliang.safety.safe_json import JsonError, parse_json, read_json
from siliang.safety.safe_yaml import dump_yaml, parse_yaml, read_yaml
from siliang.tasks import CAUSAL_LM
from siliang.types import AdapterError, ConfigError, DataError, ModelError


def test_yaml_in_base_60_is_text(tmp_path: Path) -> None:
    """YAML 1.1 multiplies by 60 at every colon: 490,000 of them took it minutes, and then Python could not print it."""
    (tmp_path / "run.yaml").write_text("a: 1" + ":1" * 490_000)
    assert read_yaml(tmp_path / "run.yaml")["a"] == "1" + ":1" * 490_000


def test_plain_values_of_yaml_are_read_as_yaml_1_2_reads_them(tmp_path: Path) -> None:
    """And what is written is read back, also by a reader of YAML 1.1."""
    text = "[1:30:00, 2026-01-31, 007, 0o17, 0x1f, -12, 1_000, 1e-3, 1.5, -.5, 1., .inf, 0b11, +3, '12', '=', 1.2.3]"
    values = ["1:30:00", "2026-01-31", "007", 15, 31, -12, 1000, 1e-3, 1.5, -0.5, 1.0]
    values += [float("inf"), 3, 3, "12", "=", "1.2.3"]
    assert parse_yaml(text) == values
    assert [type(v) for v in parse_yaml(text)] == [type(v) for v in values]
    assert parse_yaml(dump_yaml(values)) == values
    assert yaml.safe_load(dump_yaml(values)) == values


def test_settings_of_any_size_are_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with path.open("wb") as opened:
        opened.truncate(2**40)  # of zeros, which take no room
    with pytest.raises(ConfigError, match="more than 1,000,000 characters"):
        read_yaml(path)


def test_what_a_worker_says_is_a_message_or_nothing() -> None:
    strange = ['{"kind": "done"}', '{"kind": "say", "line": 3}', '{"kind": "rm", "found": {}}', "[" * 10**5]
    for line in ("", "x", "[]", *strange):
        assert read_message(line) is None
    assert read_message('{"kind": "progress", "progress": {"loss": NaN}}') is not None
    assert read_message('{"kind": "failed", "error": "full"}') == {"kind": "failed", "error": "full"}


def test_a_stage_of_accelerate_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "9" * 5000)
    with pytest.raises(ConfigError, match="must be 1, 2 or 3") as refused:
        accelerate_strategy()
    assert len(str(refused.value)) < 200


def test_what_this_machine_remembers_may_be_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The history of the plan: a line that is not its own is passed over."""
    monkeypatch.setenv("SILIANG_CACHE", str(tmp_path))
    record_work("a card", 1000)
    (file,) = tmp_path.rglob("memory.jsonl")
    own = file.read_text()
    for value in ("1e999", "NaN", "9" * 5000, '"1000"', "-1", "null", "true", "[1]"):
        file.write_text(own + own.replace("1000", value) + "[" * 10**5 + "\n3\n")
        assert known_work("a card") in (1000, 500)  # the second, where -1 counts as 0


def test_the_description_of_a_data_set_is_bounded(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    said = f"---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n  number: 1{':1' * 200_000}\n---\n"
    (tmp_path / "README.md").write_text(said)
    with pytest.raises(DataError, match=r"README\.md:5: .*too many for a number"):
        read_rows(str(tmp_path))


# ---- JSON ----

STRANGE_JSON = [
    ('{"a": ' + "9" * 5000 + "}", "a number has more than 40 digits"),
    ('{"a":\n 1e999}', "a number is out of range: 1e999"),
    ('{"a": -1e999}', "a number is out of range: -1e999"),
    ("[" * 100_000 + "]" * 100_000, "nested more than 50 deep"),
    ("[" * 60 + "]" * 60, "nested more than 50 deep"),
    ('{"a": "\\ud800"}', "half of a character"),
    ('{"a": 1', "delimiter"),
    ("", "Expecting value"),
]
STRANGE_AND_OURS = [
    ('{"a": NaN}', "not a number of JSON: NaN"),
    ('{"a": -Infinity}', "not a number of JSON: -Infinity"),
    ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' appears twice in one object"),
]


@pytest.mark.parametrize(("text", "message"), [*STRANGE_JSON, *STRANGE_AND_OURS])
def test_json_beyond_what_files_need(text: str, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        parse_json(text)


def test_json_of_other_programs_may_say_more() -> None:
    """transformers writes Infinity, and takes the last of two values of one name; tokenizers write 1e30."""
    for text, _ in STRANGE_AND_OURS:
        assert isinstance(parse_json(text, foreign=True), dict)
    assert parse_json('{"a": 1, "a": 1000000000000000019884624838656}', foreign=True) == {"a": int(1e30)}
    for text, message in STRANGE_JSON:
        with pytest.raises(JsonError, match=message):
            parse_json(text, foreign=True)


def test_json_is_read_from_plain_files_of_bounded_size(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a":\n"\xff"}')
    with pytest.raises(JsonError, match="not UTF-8") as caught:
        read_json(tmp_path / "a.json")
    assert caught.value.line == 2
    (tmp_path / "a.json").write_text('"' + "a" * 100 + '"')
    with pytest.raises(JsonError, match="more than 100 bytes"):
        read_json(tmp_path / "a.json", most_bytes=100)
    with pytest.raises(JsonError, match="not a plain file"):
        read_json(Path("/dev/zero"))


@pytest.mark.parametrize(("text", "message"), STRANGE_JSON)
def test_configs_of_strangers_end_in_one_line(
    text: str, message: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folders["bert"], folder)
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"config\.json(:\d+)? cannot be read: .*{message}") as refused:
        load_config(str(folder))
    assert len(str(refused.value).splitlines()) == 1
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=rf"adapter_config\.json(:\d+)? cannot be read: .*{message}"):
        LoraConfig.from_pretrained(folder)
    (folder / "zero.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"zero\.json(:\d+)?: not valid JSON: .*{message}"):
        deepspeed_settings(str(folder / "zero.json"))
    (folder / "manifest.json").write_text(text)
    assert find_damage(folder) == "manifest.json is damaged"


def test_numbers_of_rows_that_nothing_can_be_computed_with(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "a", "label": 1}\n{"text": "a", "label": 1e999}\n{"text": "b", "label": %s}\n' % ("9" * 301)
    )
    problems = [row.problem for row in iter_rows(str(path))]
    assert problems == [
        None,
        "not valid JSON: 1e999 is beyond the range of numbers",
        "not valid JSON: a number has more than 300 digits",
    ]


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "[1e999]"])
def test_json_within_a_row_is_bounded(text: str, tmp_path: Path) -> None:
    """A column of a row may hold JSON as text: tools, turns, calls, arguments, earlier rounds."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}
    rows = [
        {"messages": turns, "tools": text},
        {"messages": text},
        {"messages": [turns[0], {"role": "assistant", "content": "", "tool_calls": text}]},
        {"messages": [turns[0], call, {"role": "tool", "content": "1"}, turns[1]]},
        {"instruction": "a", "output": "b", "history": text},
    ]
    for row in rows:
        path = write_jsonl(tmp_path / "a.jsonl", [row])
        with suppress(DataError):
            load_examples(DataConfig(train=str(path), test_size=0.0), CAUSAL_LM.data, seed=0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(JsonError, match="not a plain file"):
        read_json(tmp_path / "run.json")
    with pytest.raises(ConfigError, match=r"run.json is neither a file nor a folder"):
        gather([tmp_path])
