"""The real data sets through `siliang check`: its findings are those of counts made here without it."""

import collections
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from siliang.check import Finding, find, gather_input
from siliang.check.counts import count
from siliang.config import RunConfig

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def minimind(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama under a real Chinese tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("minimind")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6400,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in (shared / "tokenizers" / "minimind").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def look(model: Path, task: str, train: Path, **data: Any) -> tuple[dict[str, Finding], dict[str, Any]]:
    values = {
        "model": str(model),
        "task": task,
        "data": {"train": str(train), "test_size": 0.0, **data},
        "output": "never-made",
        "accept": ["SL019"],
    }
    subject = gather_input(RunConfig.build(values))
    return {f.code: f for f in find(subject) if f.code != "SL019"}, count(subject)


def copies(rows: list[Any]) -> int:
    return len(rows) - len({json.dumps(row, sort_keys=True) for row in rows})


def test_alpaca_zh(shared: Path, minimind: Path, tmp_path: Path) -> None:
    """Every eighth row, and all that the findings are about."""
    every = json.loads((shared / "data" / "alpaca_zh_52k.json").read_text())
    times = collections.Counter(json.dumps(row, sort_keys=True) for row in every)
    raw = [
        row
        for i, row in enumerate(every)
        if i % 8 == 0
        or not row["output"].strip()
        or "<image>" in row["input"]
        or "\ufffd" in json.dumps(row, ensure_ascii=False)
        or times[json.dumps(row, sort_keys=True)] > 1
    ]
    path = tmp_path / "some.json"
    path.write_text(json.dumps(raw, ensure_ascii=False, indent=2))
    lines = path.read_text().split("\n")
    found, counts = look(minimind, "causal_lm", path, template="chatml")
    empty = [row for row in raw if not row["output"].strip()]
    pictured = [row for row in raw if "<image>" in row["input"]]  # the answers describe what is not there
    bad = [row for row in raw if row in empty or row in pictured]
    good = [row for row in raw if row["output"].strip() and "<image>" not in row["input"]]
    assert found["SL001"].count == len(bad) and f"{len(bad)} rows are bad" in found["SL001"].message
    assert (len(empty), len(pictured)) == (50, 5)
    first = found["SL001"].rows[0]
    number = int(first.split(":")[1].split()[0])  # the line on which the object begins
    assert lines[number - 1].strip() == "{" and raw.index(empty[0]) == sum(
        x.strip() == "{" for x in lines[: number - 1]
    )
    assert counts["rows"] == {"train": len(good), "held_out": 0, "bad": 55}
    assert found["SL002"].count == copies(good) == 1
    assert found["SL004"].count == sum("\ufffd" in json.dumps(row, ensure_ascii=False) for row in good) == 15
    assert set(found) <= {"SL001", "SL002", "SL004", "SL009"}


def test_instructions(shared: Path, minimind: Path) -> None:
    folder = shared / "data" / "instruct"
    for name, repeated in (("alpaca_en_demo", 14), ("alpaca_zh_demo", 8)):
        raw = json.loads((folder / f"{name}.json").read_text())
        found, counts = look(minimind, "causal_lm", folder / f"{name}.json", template="chat")
        assert set(found) == {"SL002", "SL009"}
        assert found["SL002"].count == copies(raw) == repeated
        assert counts["rows"]["train"] == len(raw)
    raw = json.loads((folder / "identity.json").read_text())
    found, _ = look(minimind, "causal_lm", folder / "identity.json", template="chat")
    assert set(found) == {"SL016"}
    assert found["SL016"].count == sum("{{" in json.dumps(row) for row in raw) == 85


def test_tool_calls(shared: Path, minimind: Path) -> None:
    path = shared / "data" / "instruct" / "glaive_toolcall_zh_demo.json"
    raw = json.loads(path.read_text())
    found, counts = look(minimind, "causal_lm", path, template="chat", max_length=4096)
    assert set(found) == {"SL002", "SL028", "SL055"}  # the tiny Llama's rotary positions end at 2,048
    assert found["SL055"].count == 2  # whose calls are in the text of an answer: "AI 计算折扣: {...}"
    assert found["SL028"].severity == "warning"
    assert found["SL002"].count == copies(raw) == 43
    assert counts["rows"] == {"train": 300, "held_out": 0, "bad": 0}
    assert counts["layout"] == "sharegpt"


def test_gsm8k(shared: Path, minimind: Path) -> None:
    folder = shared / "data" / "gsm8k"
    found, counts = look(minimind, "causal_lm", folder / "test.jsonl", template="chatml", max_length=1024)
    assert found == {}
    assert counts["rows"]["train"] == 1319


def test_chnsenticorp(shared: Path) -> None:
    path = shared / "data" / "ChnSentiCorp_htl_all.csv"
    with path.open(encoding="utf-8-sig", newline="") as opened:
        raw = list(csv.DictReader(opened))
    model = shared / "weights" / "zh-mini-bert"
    found, counts = look(model, "seq_cls", path, test_size=0.2, seed=123, max_length=510)
    assert set(found) == {"SL001", "SL009", "SL013", "SL035"}  # the last: its files have no pooler
    empty = [i for i, row in enumerate(raw) if not row["review"].strip()]
    assert len(empty) == 1 and found["SL001"].count == 1
    assert found["SL001"].rows[0].endswith(f"{path}:{empty[0] + 2} has an empty 'review'")  # line 1 is the header
    # the seed's split, of whose test part 0.6941 is the larger class
    assert counts["rows"] == {"train": 6212, "held_out": 1553, "bad": 1}
    larger = sum(row["label"] == "1" for row in raw) - counts["classes"]["1"]
    assert round(larger / 1553, 4) == 0.6941


def test_ner_resume(shared: Path) -> None:
    folder = shared / "data" / "ner_resume"
    blocks = (folder / "train.char.bmes").read_text(encoding="utf-8").split("\n\n")
    sentences = [[line.split(" ") for line in b.strip("\n").split("\n")] for b in blocks if b.strip()]
    model = shared / "weights" / "zh-mini-bert"
    found, counts = look(model, "token_cls", folder / "train.char.bmes", eval=str(folder / "test.char.bmes"))
    assert set(found) == {"SL002", "SL003", "SL017"}
    assert found["SL002"].count == copies(sentences) == 18
    broken = 0
    for sentence in sentences:
        tags = [tag for _, tag in sentence]
        pairs = zip(["O", *tags], [*tags, "O"], strict=True)
        open_ = ("B-", "M-")
        broken += any(
            (b.startswith(("M-", "E-")) != a.startswith(open_)) or (a.startswith(open_) and a[2:] != b[2:])
            for a, b in pairs
        )
    assert found["SL017"].count == broken == 4
    assert counts["rows"]["train"] == len(sentences) == 3821
    assert counts["tags"] == len({tag for s in sentences for _, tag in s}) == 28


def test_csl_titles(shared: Path, tmp_path: Path) -> None:
    bert = shared / "weights" / "zh-mini-bert"
    config = T5Config(vocab_size=21128, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copyfile(bert / name, tmp_path / name)
    folder = shared / "data" / "csl_title"
    header = ["task", "source", "target"]
    found, counts = look(tmp_path, "seq_2_seq_lm", folder / "dev.tsv", eval=str(folder / "test.tsv"), header=header)
    assert set(found) == {"SL009", "SL013"}
    assert counts["rows"] == {"train": 1000, "held_out": 1000, "bad": 0}
    lengths = collections.Counter(line.count("\t") for line in (folder / "dev.tsv").read_text().splitlines())
    assert lengths == {2: 1000}
