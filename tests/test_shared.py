"""On real models and real data: the project's test data in ../shared."""

import copy
import csv
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from commands import run
from tiny import SHARED
from torch import nn

from siliang import PeftConfig, PeftModel
from siliang.config import RunConfig
from siliang.data.conversations import prompt_tokens
from siliang.models.load import load_model
from siliang.models.tokenizers import load_tokenizer
from siliang.records import Record
from siliang.run_folder import open_run
from siliang.tasks import CAUSAL_LM
from siliang.train.run import train
from siliang.use.evaluate import evaluate
from siliang.use.generate import generate
from siliang.use.merge import merge

pytestmark = [pytest.mark.shared, pytest.mark.filterwarnings("ignore:.*pin_memory.*")]


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on a trained Llama, on English instructions."""
    config = {
        "model": str(shared / "weights" / "stories260K"),
        "task": "causal_lm",
        "method": {"name": "lora", "r": 8, "target_modules": "all-linear"},
        "data": {"train": str(shared / "data" / "instruct" / "alpaca_en_demo.json"), "max_length": 192},
        "train": {"max_steps": 150, "batch_size": 8, "learning_rate": 1e-2},
        "output": str(tmp_path_factory.mktemp("runs") / "stories"),
    }
    train(RunConfig.build(config))
    return Path(config["output"])  # type: ignore[arg-type]


def test_the_base_model_tells_its_story(shared: Path) -> None:
    folder = shared / "weights" / "stories260K"
    tokenizer = load_tokenizer(str(folder))
    model: Any = load_model(str(folder), CAUSAL_LM.model, dtype=torch.float32)
    start = torch.tensor([[tokenizer.bos_token_id]])
    ids = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=200, do_sample=False)[0]
    told = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
    assert len(told) > 400
    assert told in " ".join((folder / "stories260K.md").read_text().split())


def test_lora_lowers_the_held_out_loss(stories: Path) -> None:
    run = open_run(stories)
    tuned = evaluate(run)
    with run.model.disable_adapter():
        base = evaluate(run)
    assert tuned["rows"] == 100
    assert tuned["loss"] < base["loss"] - 0.5
    assert tuned["loss"] == pytest.approx(Record.read(stories).final["eval_loss"], rel=2e-2)


def test_reloaded_merged_and_peft_answer_alike(stories: Path, tmp_path: Path) -> None:
    run = open_run(stories)
    ids = torch.tensor([prompt_tokens("Name a colour.", run.tokenizer, template="human-assistant")])
    with torch.no_grad():
        logits = run.model(input_ids=ids).logits
        base: nn.Module = load_model(run.config.model, CAUSAL_LM.model, dtype=torch.float32)
        there = peft.PeftModel.from_pretrained(base, stories / "adapter").eval()  # type: ignore[arg-type]
        assert_close(there(input_ids=ids).logits, logits)
        answer = generate(run, "Name a colour.", max_new_tokens=20)
        proof = merge(run, tmp_path / "merged")
        merged: Any = load_model(str(tmp_path / "merged"), CAUSAL_LM.model, dtype=torch.float32)
        assert_close(merged(input_ids=ids).logits, logits)
    assert proof.holds and proof.positions >= 300
    written = merged.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=2
    )
    assert run.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True) == answer


def sst2_accuracy(method: str, rate: float, steps: int, held_out: Path, encoder: Path, folder: Path) -> float:
    """On held-out reviews, after training on the first 16 * `steps` of the 6,920."""
    config = {
        "model": str(encoder),
        "task": "seq_cls",
        "method": method,
        "data": {"train": str(SHARED / "data" / "sst2" / "train.tsv"), "eval": str(held_out)}
        | {"header": ["text", "label"]},
        "train": {"max_steps": steps, "batch_size": 16, "learning_rate": rate},
        "output": str(folder / method),
    }
    record = train(RunConfig.build(config))
    assert record.rows.train == 6920 and record.rows.eval == len(held_out.read_text().splitlines())
    print(f"SST-2, {method}: {record.final['accuracy']}")
    return record.final["accuracy"]


@pytest.mark.slow
def test_sst2_lora_reaches_80_percent(shared: Path, encoder: Path, tmp_path: Path) -> None:
    """LoRA r=8, on 400 of the test reviews; on all of them below."""
    some = (shared / "data" / "sst2" / "test.tsv").read_text().splitlines(keepends=True)[:400]
    (tmp_path / "some.tsv").write_text("".join(some))
    assert sst2_accuracy("lora", 2e-3, 130, tmp_path / "some.tsv", encoder, tmp_path) >= 0.80


@pytest.mark.long
def test_sst2_lora_is_ahead_of_the_frozen_encoder(shared: Path, encoder: Path, tmp_path: Path) -> None:
    """A head on the frozen encoder, after about as many steps."""
    held_out = shared / "data" / "sst2" / "test.tsv"
    lora = sst2_accuracy("lora", 2e-3, 130, held_out, encoder, tmp_path)
    assert lora >= 0.80
    assert lora > sst2_accuracy("head", 1e-2, 100, held_out, encoder, tmp_path) + 0.05


def test_tutorial_adapter_opens(shared: Path) -> None:
    folder = shared / "adapters" / "tutorial" / "loraA"
    net = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2))
    x = torch.randn(4, 10)
    there = peft.PeftModel.from_pretrained(copy.deepcopy(net), folder)  # type: ignore[arg-type]
    before = net(x)
    model = PeftModel.from_pretrained(net, folder)
    assert PeftConfig.from_pretrained(folder).peft_type == "LORA"
    assert_close(model(x), there(x))
    with model.disable_adapter():
        assert torch.equal(model(x), before)


def test_seeds_data_reads(shared: Path) -> None:
    from reading import read_rows

    assert len(read_rows(str(shared / "data" / "alpaca_zh_52k.json"))) == 52_002
    rows = read_rows(str(shared / "data" / "ChnSentiCorp_htl_all.csv"))
    with (shared / "data" / "ChnSentiCorp_htl_all.csv").open(encoding="utf-8-sig", newline="") as opened:
        assert [r.values for r in rows] == list(csv.DictReader(opened))


def test_empty_outputs_are_found(shared: Path, tmp_path: Path) -> None:
    """All that are bad in the file, and its first rows."""
    rows = json.loads((shared / "data" / "alpaca_zh_52k.json").read_text())
    empty = [row for row in rows if not row["output"].strip()]
    images = [row for row in rows if "<image>" in row["instruction"] + row["input"]]  # the text of what is not there
    assert (len(empty), len(images)) == (50, 5)
    (tmp_path / "some.json").write_text(json.dumps([*rows[:500], *empty, *images]))
    bad = 55 + sum(row in empty or row in images for row in rows[:500])
    model = shared / "weights" / "stories260K"
    flags = ("--model", model, "--task", "causal_lm", "--data", tmp_path / "some.json", "--output", tmp_path / "r")
    ended = run("train", *flags)
    assert ended.code == 2 and f"{bad} rows are bad" in ended.err, ended
    assert not (tmp_path / "r").exists()
