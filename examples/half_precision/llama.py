"""LoRA on a model loaded in half precision, with gradient checkpointing."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from siliang import LoraConfig, TaskType, get_peft_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="folder of a causal model, such as Llama-2-7b")
parser.add_argument("--data", required=True, help="json(l) file or save_to_disk folder: instruction, input, output")
parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
parser.add_argument("--all-half", action="store_true", help="the adapter in half precision as well")
parser.add_argument("--no-checkpointing", action="store_true")
parser.add_argument("--output", default="./llama")
parser.add_argument("--rows", type=int, help="use the first rows only")
parser.add_argument("--max-length", type=int, default=384)
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--accumulation", type=int, default=8)
parser.add_argument("--learning-rate", type=float, default=5e-5, help="the Trainer's default, as in the tutorial")
parser.add_argument("--max-steps", type=int, default=-1, help="-1: one epoch")
options = parser.parse_args()
dtype = getattr(torch, options.dtype)

# ---- data ----
dataset = Dataset.load_from_disk(options.data) if Path(options.data).is_dir() else Dataset.from_json(options.data)
dataset = dataset.select(range(min(options.rows or len(dataset), len(dataset))))
tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.padding_side = "right"
tokenizer.pad_token = tokenizer.eos_token


def process_func(example: dict[str, str]) -> dict[str, list[int]]:
    """One row of tokens. The end of the answer is put there by its number: as text it may melt into the last word."""
    question = "\n".join(["Human: " + example["instruction"], example["input"]]).strip() + "\n\nAssistant: "
    instruction = tokenizer(question, add_special_tokens=False)
    response = tokenizer(example["output"], add_special_tokens=False)
    answer_ids = response["input_ids"] + [tokenizer.eos_token_id]
    row = {
        "input_ids": instruction["input_ids"] + answer_ids,
        "attention_mask": instruction["attention_mask"] + response["attention_mask"] + [1],
        "labels": [-100] * len(instruction["input_ids"]) + answer_ids,
    }
    return {name: values[: options.max_length] for name, values in row.items()}


tokenized_dataset = dataset.map(process_func, remove_columns=dataset.column_names)

# ---- model ----
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, device_map="auto")
config = LoraConfig(task_type=TaskType.CAUSAL_LM)
model = get_peft_model(model, config)
if not options.no_checkpointing:
    model.enable_input_require_grads()
model.print_trainable_parameters()
if options.all_half:
    model = model.to(dtype)  # .half() or .bfloat16()

# ---- training ----
args = TrainingArguments(
    output_dir=options.output,
    per_device_train_batch_size=options.batch_size,
    gradient_accumulation_steps=options.accumulation,
    logging_steps=10,
    num_train_epochs=1,
    max_steps=options.max_steps,
    learning_rate=options.learning_rate,
    gradient_checkpointing=not options.no_checkpointing,
    # Adam's usual 1e-8 is 0 in float16
    adam_epsilon=1e-4 if options.all_half and dtype is torch.float16 else 1e-8,
)
trainer = Trainer(
    args=args,
    train_dataset=tokenized_dataset,
    model=model,
    data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
)
trainer.train()
print("dtypes of what was trained:", *{str(p.dtype) for p in model.parameters() if p.requires_grad})
