"""The stock transformers.Trainer, used as the tutorials use it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import make, word_tokenizer
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

import siliang
from siliang import (
    BitFitConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from siliang.models.checkpointing import enable_checkpointing

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


def rows() -> Dataset:
    tokenizer = word_tokenizer()
    ids = [tokenizer(f"say {word} : {word} </s>")["input_ids"] for word in ("one", "two", "three", "four")] * 4
    # `extra` must be dropped by the Trainer, which reads the names off the model's forward
    return Dataset.from_list([{"input_ids": i, "attention_mask": [1] * len(i), "labels": i, "extra": 1} for i in ids])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "config", [LoraConfig(task_type=TaskType.CAUSAL_LM), BitFitConfig(task_type=TaskType.CAUSAL_LM)]
)
def test_checkpoints_are_adapter_folders(config: siliang.PeftConfig, checkpointing: bool, tmp_path: Path) -> None:
    base = make("bloom")
    model = get_peft_model(base, config)
    if checkpointing:
        model.enable_input_require_grads()
        enable_checkpointing(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            logging_steps=1,
            save_steps=4,
            eval_strategy="epoch",
            learning_rate=3e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows(),
        eval_dataset=rows(),
        data_collator=DataCollatorForSeq2Seq(tokenizer=word_tokenizer(), padding=True),
    )
    trainer.train()
    first, last = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert last < first
    names = {p.name for p in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names and "pytorch_model.bin" not in names
    again = PeftModel.from_pretrained(make("bloom"), tmp_path / "checkpoint-8")
    ids = torch.tensor([[5, 6, 7]])
    model.eval()
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)


def test_a_base_in_4_bits_trains(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make("llama").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    model = get_peft_model(siliang.prepare_model_for_kbit_training(base), LoraConfig(task_type=TaskType.CAUSAL_LM))
    in_32_bits = get_peft_model(make("llama"), LoraConfig(task_type=TaskType.CAUSAL_LM))
    assert model.get_nb_trainable_parameters() == in_32_bits.get_nb_trainable_parameters()  # as PEFT counts
    args = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=4,
        logging_steps=4,
        learning_rate=3e-2,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=rows(), data_collator=DataCollatorForSeq2Seq(word_tokenizer())
    )
    trainer.train()
    first, *_, last = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert last < first


CAUSAL: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}
CONFIGS: dict[str, siliang.PeftConfig] = {
    "lora": LoraConfig(lora_dropout=0.1, modules_to_save=["lm_head"], **CAUSAL),
    "dora": LoraConfig(use_dora=True, **CAUSAL),
    "bitfit": BitFitConfig(**CAUSAL),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, **CAUSAL),
}


def trainer(model: PeftModel, folder: Path, **settings: Any) -> Trainer:
    """8 steps of 2 rows, a checkpoint and an evaluation every 2 steps."""
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_steps": 2,
        "eval_strategy": "steps",
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **usual | settings),
        train_dataset=rows(),
        eval_dataset=rows(),
        data_collator=DataCollatorForSeq2Seq(tokenizer=word_tokenizer(), padding=True),
    )


def attached(name: str, base: str = "llama") -> PeftModel:
    """Of the same start each time; BLOOM has the biases that BitFit tunes."""
    set_seed(3)
    return get_peft_model(make("bloom" if name == "bitfit" else base), CONFIGS[name])


def logged(trained: Trainer) -> list[tuple[int, float]]:
    return [
        (line["step"], line[key]) for line in trained.state.log_history for key in ("loss", "eval_loss") if key in line
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_resumed_run_ends_as_one_that_was_never_stopped(name: str, tmp_path: Path) -> None:
    whole = trainer(attached(name), tmp_path / "whole")
    whole.train()
    again = trainer(attached(name), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert logged(again) == logged(whole)
    files = sorted(p.name for p in (tmp_path / "whole" / "checkpoint-8").glob("*.safetensors"))
    assert files == sorted(p.name for p in (tmp_path / "again" / "checkpoint-8").glob("*.safetensors"))
    for file in files:
        one, other = (load_file(tmp_path / run / "checkpoint-8" / file) for run in ("whole", "again"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_best_checkpoint_is_loaded_at_the_end(name: str, tmp_path: Path) -> None:
    model = attached(name)
    # as if more were better: the first checkpoint is the best one, and the last one is in the model when training ends
    best = trainer(model, tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    best.train()
    assert best.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    now = siliang.get_peft_model_state_dict(model)
    first, last = (load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 8))
    assert now.keys() == first.keys()
    assert all(torch.equal(now[key], first[key]) for key in first)
    assert not all(torch.equal(last[key], first[key]) for key in first)
    assert any(p.requires_grad for p in model.parameters())  # it can be trained on


def test_several_adapters_are_resumed(tmp_path: Path) -> None:
    def two() -> PeftModel:
        model = attached("dora")
        model.add_adapter("second", LoraConfig(r=2, **CAUSAL))
        model.set_adapter("second")
        return model

    whole, again = trainer(two(), tmp_path / "whole"), trainer(two(), tmp_path / "again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert logged(again) == logged(whole)
    assert again.model.active_adapters == ["second"]  # type: ignore[union-attr]


def test_another_adapter_is_not_loaded_over_one(tmp_path: Path) -> None:
    attached("lora").save_pretrained(tmp_path)
    set_seed(3)
    model = get_peft_model(make("llama"), LoraConfig(lora_alpha=16, modules_to_save=["lm_head"], **CAUSAL))
    before = siliang.get_peft_model_state_dict(model)
    with pytest.raises(siliang.SiliangError, match=r"lora_alpha = 8, and adapter 'default' of the model has 16"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(t, before[key]) for key, t in siliang.get_peft_model_state_dict(model).items())


def test_weights_loaded_over_a_merged_adapter(tmp_path: Path) -> None:
    model = attached("dora")
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    expected = model.eval()(input_ids=ids).logits
    for p in model.parameters():
        p.data += p.requires_grad * 0.1
    model.merge_adapter()
    with pytest.warns(UserWarning, match="these are unmerged first"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("peft", [True, False])
def test_a_trainer_that_is_imported_after_the_model_is_made(peft: bool, tmp_path: Path) -> None:
    """And PEFT need not be installed."""
    script = Path(__file__).with_name("late_trainer.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", script, str(tmp_path), *([] if peft else ["--without-peft"])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"resumed_as_whole": True, "best_is_first": True}
