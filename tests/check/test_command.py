"""`siliang check` as a command: what it prints, and its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny import WORDS, write_jsonl

from siliang.check import RULES

ENV = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


KNOWN = ("--set", "accept=[SL002]")


def check(*arguments: object, code: int = 0) -> str:
    command = [sys.executable, "-m", "siliang", "check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code < 2 else done.stderr


def test_examples_counts_findings_and_codes(model_folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"instruction": f"say {a} {b}", "output": f"{b} {a}"} for a in WORDS[:10] for b in WORDS[:10]]
    flags = (
        "--model",
        model_folders["llama"],
        "--task",
        "causal_lm",
        "--set",
        "data.max_length=64",
        "--set",
        "train.log_every=1",
    )
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    shown = check(*flags, "--data", data)
    assert "Human : say" in shown and "</s>]]" in shown and "[[" in shown
    assert "rows              train 90  held out 10  bad 0" in shown
    assert shown.endswith("Nothing found.\n")

    write_jsonl(data, [*rows, rows[0]])
    assert "SL002 warning" in check(*flags, "--data", data, "--set", "data.test_size=0.01", "--examples", 0)
    check(*flags, "--data", data, "--set", "data.test_size=0.01", "--strict", code=1)
    known = json.loads(check(*flags, "--data", data, "--set", "data.test_size=0.01", *KNOWN, "--strict", "--json"))
    assert [(f["code"], f["accepted"]) for f in known["findings"]] == [("SL002", True)]

    write_jsonl(data, [*rows, {"instruction": "a", "output": ""}])
    found = json.loads(check(*flags, "--data", data, "--json", code=1))
    assert [(f["code"], f["severity"], f["count"]) for f in found["findings"]] == [("SL001", "error", 1)]
    assert found["findings"][0]["rows"] == [f"{data}:101 has an empty 'output'"]
    assert found["counts"]["rows"]["bad"] == 1


def test_pages_and_bad_usage(tmp_path: Path) -> None:
    page = check("--explain", "SL007")
    assert page.startswith("SL007 (error): The end of sequence is not learned.") and "Cause:" in page and "Fix:" in page
    for page, (code, rule) in zip(check("--explain", "all").split("\n\nSL"), RULES.items(), strict=True):
        assert f"SL{page.removeprefix('SL')}".strip() == f"{code} ({rule.severity}): {rule.page}"
    assert "rule SL999 does not exist; the rules are SL001 to" in check("--explain", "SL999", code=2)
    assert "give the settings to check" in check(code=2)
    assert "There is no data file" in check(
        "--model", tmp_path, "--data", tmp_path / "no.csv", "--task", "seq_cls", code=2
    )
