"""A script of a user: the model first, the Trainer later, with PEFT or without it. See test_stock_trainer.py."""

import json
import sys
from pathlib import Path
from typing import Any

if "--without-peft" in sys.argv:
    sys.modules["peft"] = None  # type: ignore[assignment]  # as where it is not installed

import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import make, word_tokenizer

from siliang import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict


def attached() -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(make("llama"), LoraConfig(task_type=TaskType.CAUSAL_LM))


def main(folder: Path) -> None:
    models = [attached(), attached()]
    assert "transformers.trainer" not in sys.modules
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = word_tokenizer()
    ids = [tokenizer(f"say {word} : {word} </s>")["input_ids"] for word in ("one", "two", "three", "four")] * 4
    rows = Dataset.from_list([{"input_ids": i, "attention_mask": [1] * len(i), "labels": i} for i in ids])
    trainers = []
    for name, model in zip(("whole", "again"), models, strict=True):
        settings: dict[str, Any] = (
            {"load_best_model_at_end": True, "greater_is_better": True} if name == "whole" else {}
        )
        args = TrainingArguments(
            output_dir=str(folder / name),
            per_device_train_batch_size=4,
            num_train_epochs=1,
            logging_steps=1,
            save_steps=2,
            eval_steps=2,
            eval_strategy="steps",
            learning_rate=1e-2,
            metric_for_best_model="loss",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **settings,
        )
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collator)
        trainer.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2") if name == "again" else None)
        trainers.append(trainer)
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in trainers]
    first = load_file(folder / "whole" / "checkpoint-2" / "adapter_model.safetensors")
    now = get_peft_model_state_dict(models[0])
    same = losses[0] == losses[1] and len(losses[0]) == 4
    print(json.dumps({"resumed_as_whole": same, "best_is_first": all(torch.equal(now[k], first[k]) for k in first)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
