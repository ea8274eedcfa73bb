"""TRL's SFTTrainer, with a model of siliang and with a config of siliang."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from scripts import run_script
from tiny import make, word_tokenizer
from transformers import PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer  # pyright: ignore

import siliang
from siliang import (
    BitFitConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)

pytestmark = [pytest.mark.filterwarnings("ignore:.*pin_memory.*"), pytest.mark.filterwarnings("ignore::FutureWarning")]

PORTING = Path(__file__).resolve().parents[1] / "docs" / "porting.md"
IDS = torch.tensor([[5, 6, 7, 8]])
CAUSAL: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}
PROMPT: dict[str, Any] = {"num_virtual_tokens": 3, **CAUSAL}
CONFIGS: dict[str, siliang.PeftConfig] = {
    "lora": LoraConfig(lora_dropout=0.1, **CAUSAL),
    "lora and the head": LoraConfig(modules_to_save=["lm_head"], **CAUSAL),
    "ia3": IA3Config(**CAUSAL),
    "prompt": PromptTuningConfig(**PROMPT),
    "p-tuning": PromptEncoderConfig(encoder_hidden_size=8, **PROMPT),
    "prefix": PrefixTuningConfig(**PROMPT),
}


def base() -> PreTrainedModel:
    set_seed(3)
    return make("llama")  # type: ignore[return-value]


def rows() -> Dataset:
    words = ("one", "two", "three", "four") * 4
    return Dataset.from_list([{"prompt": f"say {word} :", "completion": f" {word} </s>"} for word in words])


def trainer(model: Any, folder: Path, peft_config: Any = None, **settings: Any) -> SFTTrainer:
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "max_length": 32,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(folder), **usual | settings),
        train_dataset=rows(),
        eval_dataset=rows(),
        processing_class=word_tokenizer(),
        peft_config=peft_config,
    )


def losses(trained: SFTTrainer) -> list[float]:
    return [line["loss"] for line in trained.state.log_history if "loss" in line]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_trains_as_a_model_does(name: str, checkpointing: bool, tmp_path: Path) -> None:
    config = CONFIGS[name]
    by_config = trainer(base(), tmp_path / "config", config, gradient_checkpointing=checkpointing, seed=5)
    assert isinstance(by_config.model, siliang.PeftModel)
    by_config.train()
    model = base()
    set_seed(5)  # as SFTTrainer does before it attaches
    by_model = trainer(get_peft_model(model, config), tmp_path / "model", gradient_checkpointing=checkpointing, seed=5)
    by_model.train()
    assert losses(by_config) == losses(by_model)
    by_config.save_model(str(tmp_path / "adapter"))
    live = logits(by_config.model)
    for library in (siliang, peft):
        assert torch.equal(logits(library.PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))), live)
    assert not torch.equal(logits(base()), live)


@pytest.mark.parametrize("name", ["ia3", "prompt", "prefix"])
def test_the_losses_are_those_of_peft(name: str, tmp_path: Path) -> None:
    """For methods whose start is the same numbers; LoRA's layers draw theirs in another order."""
    own = CONFIGS[name].to_dict()
    kept = {key: own[key] for key in ("task_type", "num_virtual_tokens") if key in own}
    theirs = getattr(peft, type(CONFIGS[name]).__name__)(**kept)
    settings = {"gradient_checkpointing": False}  # PEFT's prefixes cannot be trained with it
    found = [trainer(base(), tmp_path / str(i), c, **settings) for i, c in enumerate((CONFIGS[name], theirs))]
    assert isinstance(found[1].model, peft.PeftModel)
    for each in found:
        each.train()
    assert losses(found[0]) == pytest.approx(losses(found[1]), rel=1e-5)


def test_bitfit_which_peft_does_not_have(tmp_path: Path) -> None:
    set_seed(3)
    trained = trainer(make("bloom"), tmp_path, BitFitConfig(**CAUSAL))
    before = logits(trained.model)
    trained.train()
    assert not torch.equal(logits(trained.model), before)


def test_resumed_and_best(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "greater_is_better": True}
    whole = trainer(base(), tmp_path / "whole", CONFIGS["lora"], load_best_model_at_end=True, **settings)
    whole.train()
    again = trainer(base(), tmp_path / "again", CONFIGS["lora"], **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(again) == losses(whole)
    first = load_file(tmp_path / "whole" / "checkpoint-2" / "adapter_model.safetensors")
    now = siliang.get_peft_model_state_dict(whole.model)  # type: ignore[arg-type]
    assert all(torch.equal(now[key], first[key]) for key in first)


@pytest.mark.parametrize("by", ["config", "model"])
def test_an_adapter_on_the_head_would_not_be_trained(by: str, tmp_path: Path) -> None:
    """SFTTrainer multiplies by the head's weight itself; it says so of PEFT's adapters, and of siliang's."""
    config = LoraConfig(target_modules=["q_proj", "lm_head"], **CAUSAL)
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer(base(), tmp_path, config) if by == "config" else trainer(get_peft_model(base(), config), tmp_path)


def test_a_model_and_a_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="together with a `peft_config`"):
        trainer(get_peft_model(base(), CONFIGS["lora"]), tmp_path, CONFIGS["ia3"])


def test_the_script_of_the_docs(tmp_path: Path) -> None:
    script = next(s for s in re.findall(r"```python\n(.*?)```", PORTING.read_text("utf-8"), re.DOTALL) if "SFT" in s)
    base().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows().to_list()))
    (tmp_path / "script.py").write_text(script)
    run_script(tmp_path / "script.py", folder=tmp_path)
    opened = [library.PeftModel.from_pretrained(base(), str(tmp_path / "adapter")) for library in (siliang, peft)]
    assert torch.equal(logits(opened[0]), logits(opened[1]))
