"""The stock transformers.Trainer, used as the tutorials use it."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import make, word_tokenizer
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import siliang
from siliang import BitFitConfig, LoraConfig, PeftModel, TaskType, get_peft_model
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
