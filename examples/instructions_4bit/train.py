"""Instruction tuning of a chat model in 4 bits (QLoRA), step by step."""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

import siliang.models.chatglm3  # noqa: F401, which needs no remote code
from siliang import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="folder of a causal model, such as chatglm3-6b")
parser.add_argument("--data", required=True, help="jsonl file with input and output, and perhaps instruction")
parser.add_argument("--output", default="./roleplay", help="the adapter and the Trainer's checkpoints")
parser.add_argument("--system", default="现在模仿原神角色评价他人", help="what every conversation begins with")
parser.add_argument("--gradient-checkpointing", action="store_true")
parser.add_argument("--max-length", type=int, default=512)
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--accumulation", type=int, default=8)
parser.add_argument("--learning-rate", type=float, default=5e-5, help="the Trainer's default, as in the tutorial")
parser.add_argument("--max-steps", type=int, default=-1, help="-1: one epoch")
options = parser.parse_args()

# ---- the model with its adapter ----
peft_config = LoraConfig(
    task_type=TaskType.CAUSAL_LM,
    inference_mode=False,
    r=8,
    lora_alpha=32,
    lora_dropout=0.1,
)
model = AutoModelForCausalLM.from_pretrained(
    options.model,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    device_map="auto",
)
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.gradient_checkpointing)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

# ---- the data ----
ds = Dataset.from_pandas(pd.read_json(options.data, lines=True))
tokenizer = AutoTokenizer.from_pretrained(options.model)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
if tokenizer.chat_template is None:  # a base model's tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Human: ' if m.role == 'user' else '' }}{{ m.content }}\n\n{% endfor %}Assistant: "
    )


def process_func(example: dict[str, Any]) -> dict[str, list[int]]:
    """One conversation, filled up to the full length."""
    asked = "\n".join([example["instruction"], example["input"]]) if "instruction" in example else example["input"]
    turns = [{"role": "system", "content": options.system}, {"role": "user", "content": asked.strip()}]
    instruction = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    response = [*tokenizer.encode("\n" + example["output"], add_special_tokens=False), tokenizer.eos_token_id]
    input_ids = (instruction + response)[: options.max_length]
    # -100 by position: the padding's number may be that of the end of the answer, which must be learned
    labels = ([-100] * len(instruction) + response)[: options.max_length]
    pad_len = options.max_length - len(input_ids)
    return {
        "input_ids": input_ids + [tokenizer.pad_token_id] * pad_len,
        "attention_mask": [1] * len(input_ids) + [0] * pad_len,
        "labels": labels + [-100] * pad_len,
    }


tokenized_ds = ds.map(process_func, remove_columns=ds.column_names)

# ---- training ----
training_args = TrainingArguments(
    output_dir=options.output,
    per_device_train_batch_size=options.batch_size,
    gradient_accumulation_steps=options.accumulation,
    logging_steps=20,
    num_train_epochs=1,
    max_steps=options.max_steps,
    learning_rate=options.learning_rate,
)
data_collator = DataCollatorForSeq2Seq(
    tokenizer,
    model=model,
    label_pad_token_id=-100,
    pad_to_multiple_of=None,
    padding=False,
)
trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=tokenized_ds,
    data_collator=data_collator,
)
trainer.train()
model.save_pretrained(training_args.output_dir)
