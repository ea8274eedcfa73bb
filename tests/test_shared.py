"""On real models and real data: the project's test data in ../shared."""

import copy
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
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


@pytest.mark.slow
def test_sst2_lora_reaches_80_percent(shared: Path, encoder: Path, tmp_path: Path) -> None:
    """LoRA r=8 on 6,920 reviews' first 2,080; the frozen encoder with a head, same steps, is reported beside it."""
    sst2 = shared / "data" / "sst2"
    accuracy = {}
    for method, rate, steps in (("lora", 2e-3, 130), ("head", 1e-2, 100)):
        config = {
            "model": str(encoder),
            "task": "seq_cls",
            "method": method,
            "data": {"train": str(sst2 / "train.tsv"), "eval": str(sst2 / "test.tsv"), "header": ["text", "label"]},
            "train": {"max_steps": steps, "batch_size": 16, "learning_rate": rate},
            "output": str(tmp_path / method),
        }
        record = train(RunConfig.build(config))
        assert record.rows.train == 6920 and record.rows.eval == 1821
        accuracy[method] = record.final["accuracy"]
    print(f"SST-2 test accuracy: {accuracy}")
    assert accuracy["lora"] >= 0.80
    assert accuracy["lora"] > accuracy["head"] + 0.05


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
    command = [
        "train",
        "--model",
        shared / "weights" / "stories260K",
        "--task",
        "causal_lm",
        "--output",
        tmp_path / "r",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "siliang", *map(str, command), "--data", str(shared / "data" / "alpaca_zh_52k.json")],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    rows = json.loads((shared / "data" / "alpaca_zh_52k.json").read_text())
    empty = sum(not row["output"].strip() for row in rows)
    images = sum("<image>" in row["instruction"] + row["input"] for row in rows)  # the text of what is not there
    assert (empty, images) == (50, 5) and "55 rows are bad" in done.stderr
    assert not (tmp_path / "r").exists()
