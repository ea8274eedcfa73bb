"""Weights that the base model's files do not hold: loading makes them up, so they are trained and saved."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import VOCABULARY, make, word_tokenizer, write_jsonl
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
)

import siliang
from siliang.check import find, gather_input
from siliang.config import RunConfig
from siliang.models.base_config import load_config
from siliang.models.invented import invented_modules
from siliang.models.load import invented_weights, load_model
from siliang.plan import plan
from siliang.plan.device import target_device
from siliang.run_folder import open_run
from siliang.tasks import CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, Task
from siliang.train.run import train
from siliang.train.types import Listener
from siliang.types import ModelError, TaskType
from siliang.use.evaluate import evaluate

LABELS = ["a", "b", "c"]
IDS = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A BERT without pooler, and a DistilBERT, as masked language models are saved."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    bert: Any = make("bert")
    BertForMaskedLM(bert.config).save_pretrained(root / "bert")
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64
    )
    DistilBertForMaskedLM(config).save_pretrained(root / "distilbert")
    return {name: root / name for name in ("bert", "distilbert")}


def load(folder: Path, seed: int, task: Task = SEQ_CLS) -> Any:
    return load_model(str(folder), task.model, dtype=torch.float32, labels=LABELS, seed=seed)


CONFIGS = {
    "lora": siliang.LoraConfig(task_type=TaskType.SEQ_CLS, target_modules="all-linear", init_lora_weights=False),
    "bitfit": siliang.BitFitConfig(task_type=TaskType.SEQ_CLS),
    "head": siliang.HeadConfig(task_type=TaskType.SEQ_CLS),
    "prompt": siliang.PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3),
    "no task": siliang.LoraConfig(target_modules="all-linear", init_lora_weights=False),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(("name", "new"), [("bert", "pooler"), ("distilbert", "pre_classifier")])
def test_an_adapter_answers_alike_wherever_it_is_opened(
    name: str, new: str, method: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = siliang.get_peft_model(load(folders[name], seed=1), CONFIGS[method])
    assert {new, "classifier"} <= {m.rpartition(".")[2] for m in model.peft_config["default"].modules_to_save or ()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(f".{new}.modules_to_save.default." in n for n in trained)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    model.eval().save_pretrained(tmp_path)
    wanted = model(**IDS).logits
    elsewhere = siliang.PeftModel.from_pretrained(load(folders[name], seed=2), tmp_path)
    torch.testing.assert_close(elsewhere(**IDS).logits, wanted, rtol=1e-5, atol=1e-6)
    if method in ("lora", "no task"):
        there = peft.PeftModel.from_pretrained(load(folders[name], seed=3), str(tmp_path)).eval()
        torch.testing.assert_close(there(**IDS).logits, wanted, rtol=1e-5, atol=1e-6)


def test_the_users_own_from_pretrained_is_known_too(folders: dict[str, Path]) -> None:
    base: Any = BertForSequenceClassification.from_pretrained(folders["bert"], num_labels=3)
    assert invented_modules(base) == ["bert.pooler", "classifier"]
    base.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)  # not made up: they are the user's
    assert invented_modules(base.to(torch.bfloat16)) == ["bert.pooler", "classifier"]
    model = siliang.get_peft_model(base, siliang.LoraConfig(task_type=TaskType.SEQ_CLS))
    assert model.peft_config["default"].modules_to_save == ["bert.pooler", "classifier", "score"]
    assert model.unload() is base and invented_modules(base) == ["bert.pooler", "classifier"]
    tags = BertForTokenClassification.from_pretrained(folders["bert"], num_labels=3)
    assert invented_modules(tags) == ["classifier"]
    assert invented_modules(make("bert")) == []  # made from a config: nothing is known, and all is as in PEFT


def test_a_head_of_another_size_is_new_and_tied_weights_are_not(folders: dict[str, Path], tmp_path: Path) -> None:
    make("bert").save_pretrained(tmp_path / "three")  # type: ignore[operator]
    two = load_model(str(tmp_path / "three"), SEQ_CLS.model, dtype=torch.float32, labels=["a", "b"])
    assert invented_modules(two) == ["classifier"]
    for name in ("bloom", "t5"):
        make(name).save_pretrained(tmp_path / name)  # type: ignore[operator]
        task = CAUSAL_LM if name == "bloom" else SEQ_2_SEQ_LM
        assert invented_modules(load_model(str(tmp_path / name), task.model, dtype=torch.float32)) == []


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_model_that_is_damaged_is_not_mended(lost: str, tmp_path: Path) -> None:
    model: Any = make("llama")
    state = {k: v for k, v in model.state_dict().items() if k != lost}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match="1 weights are missing or of another shape, the first is " + lost):
        load_model(str(tmp_path), CAUSAL_LM.model, dtype=torch.float32)


def test_what_is_new_is_found_without_reading_weights(folders: dict[str, Path]) -> None:
    for name, new in (("bert", "bert.pooler"), ("distilbert", "pre_classifier")):
        config = load_config(str(folders[name]))
        assert sorted(invented_weights(str(folders[name]), SEQ_CLS.model, config)) == sorted([new, "classifier"])


def test_a_file_without_what_the_base_lacks_is_told_of(folders: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    peft.get_peft_model(load(folders["bert"], seed=1), config).save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="files lack bert.pooler, and the adapter's do not hold it either"):
        siliang.PeftModel.from_pretrained(load(folders["bert"], seed=1), tmp_path)


def test_check_says_what_is_new(folders: dict[str, Path], tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(folders["bert"])
    rows = [{"text": f"the film was {w}", "label": x} for w, x in (("good", "1"), ("bad", "0")) for _ in range(20)]
    values = {
        "model": str(folders["bert"]),
        "task": "seq_cls",
        "method": "lora",
        "data": {"train": str(write_jsonl(tmp_path / "d.jsonl", rows))},
        "output": str(tmp_path / "run"),
    }
    found = {f.code: f for f in find(gather_input(RunConfig.build(values)))}
    assert "has no weights for bert.pooler: they are new, trained, and saved" in found["SL035"].message
    assert found["SL035"].severity == "warning"
    whole = tmp_path / "whole"
    make("bert").save_pretrained(whole)  # type: ignore[operator]
    word_tokenizer().save_pretrained(whole)
    assert "SL035" not in {f.code for f in find(gather_input(RunConfig.build(values | {"model": str(whole)})))}


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "full"])
def test_a_run_trains_saves_and_plans_what_is_new(method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(folders["bert"])
    rows = [{"text": f"the film was {w}", "label": x} for w, x in (("good", "1"), ("bad", "0")) for _ in range(20)]
    values = {
        "model": str(folders["bert"]),
        "task": "seq_cls",
        "method": method,
        "data": {"train": str(write_jsonl(tmp_path / "d.jsonl", rows)), "test_size": 0.2},
        "train": {"max_steps": 2, "precision": "fp32"},
        "accept": ["SL002"],
        "output": str(tmp_path / "run"),
    }
    config = RunConfig.build(values)
    record = train(config, Listener())
    planned = plan(config, target_device(config)).methods[0]
    assert (planned.trained, planned.total) == (record.parameters.trained, record.parameters.total)
    opened = open_run(tmp_path / "run")
    # what was trained is what answers, though the pooler is drawn anew at each loading
    figures = evaluate(opened)
    assert figures["loss"] == pytest.approx(record.final["eval_loss"], rel=1e-5)
