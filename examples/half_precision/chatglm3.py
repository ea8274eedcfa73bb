"""Half-precision LoRA on a chat model whose prompt is its own: ChatGLM3, or any causal model with a chat template."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import siliang.models.chatglm3  # noqa: F401, which needs no remote code
from siliang import LoraConfig, TaskType, get_peft_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="folder of a causal model, such as chatglm3-6b-base")
parser.add_argument("--data", required=True, help="json(l) file or save_to_disk folder: instruction, input, output")
parser.add_argument("--targets", nargs="+", default=["query_key_value"], help="target_modules")
parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
parser.add_argument("--no-task-type", action="store_true", help="for a model of which one does not know the task")
parser.add_argument("--output", default="./chatglm3")
parser.add_argument("--rows", type=int, help="use the first rows only")
parser.add_argument("--max-length", type=int, default=384)
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--accumulation", type=int, default=16)
parser.add_argument("--learning-rate", type=float, default=5e-5, help="the Trainer's default, as in the tutorial")
parser.add_argument("--max-steps", type=int, default=-1, help="-1: one epoch")
parser.add_argument("--question", default="如何准备数据分析师面试？")
parser.add_argument("--new-tokens", type=int, default=128)
options = parser.parse_args()

# ---- data ----
dataset = Dataset.load_from_disk(options.data) if Path(options.data).is_dir() else Dataset.from_json(options.data)
dataset = dataset.select(range(min(options.rows or len(dataset), len(dataset))))
tokenizer = AutoTokenizer.from_pretrained(options.model)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
if tokenizer.chat_template is None:  # a base model's tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Human: ' if m.role == 'user' else '' }}{{ m.content }}\n\n{% endfor %}Assistant: "
    )


def chat_input(text: str) -> list[int]:
    """The tokens of a user's turn, up to where the assistant's answer begins."""
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]


def process_func(example: dict[str, str]) -> dict[str, list[int]]:
    """Turn and answer as one row of tokens, of which the answer's alone carry labels."""
    instruction = chat_input("\n".join([example["instruction"], example["input"]]).strip())
    response = tokenizer("\n" + example["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    row = {
        "input_ids": instruction + response,
        "attention_mask": [1] * (len(instruction) + len(response)),
        "labels": [-100] * len(instruction) + response,
    }
    return {name: values[: options.max_length] for name, values in row.items()}


tokenized_dataset = dataset.map(process_func, remove_columns=dataset.column_names)
first = tokenized_dataset[0]
print("a row:     ", repr(tokenizer.decode(first["input_ids"])))
print("its labels:", repr(tokenizer.decode([label for label in first["labels"] if label != -100])))

# ---- model ----
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype), device_map="auto")
task_type = None if options.no_task_type else TaskType.CAUSAL_LM
config = LoraConfig(task_type=task_type, target_modules=options.targets)
model = get_peft_model(model, config)
model.print_trainable_parameters()

# ---- training ----
args = TrainingArguments(
    output_dir=options.output,
    per_device_train_batch_size=options.batch_size,
    gradient_accumulation_steps=options.accumulation,
    logging_steps=10,
    num_train_epochs=1,
    max_steps=options.max_steps,
    learning_rate=options.learning_rate,
    remove_unused_columns=not options.no_task_type,
)
trainer = Trainer(
    args=args,
    train_dataset=tokenized_dataset,
    model=model,
    data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
)
trainer.train()

# ---- an answer ----
model.eval()
ids = torch.tensor([chat_input(options.question)], device=model.device)
written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new_tokens)
print(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
