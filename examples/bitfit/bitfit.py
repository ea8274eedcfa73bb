"""BitFit on a causal model, by hand and by config: only the biases are trained."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from siliang import BitFitConfig, PeftModel, TaskType, get_peft_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="folder of a causal model with biases, such as bloom-1b4-zh")
parser.add_argument("--data", required=True, help="json(l) file or save_to_disk folder: instruction, input, output")
parser.add_argument("--by", choices=("hand", "config"), default="hand", help="freeze by a loop, or by BitFitConfig")
parser.add_argument("--output", default="./bitfit")
parser.add_argument("--rows", type=int, help="use the first rows only")
parser.add_argument("--max-length", type=int, default=256, help="tokens of a row, and of the answer")
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--accumulation", type=int, default=8)
parser.add_argument("--learning-rate", type=float, default=5e-5, help="the Trainer's default, as in the tutorial")
parser.add_argument("--max-steps", type=int, default=-1, help="-1: one epoch")
parser.add_argument("--question", default="如何能吃学习的苦")
options = parser.parse_args()

# ---- data ----
dataset = Dataset.load_from_disk(options.data) if Path(options.data).is_dir() else Dataset.from_json(options.data)
dataset = dataset.select(range(min(options.rows or len(dataset), len(dataset))))
tokenizer = AutoTokenizer.from_pretrained(options.model)


def process_func(example: dict[str, str]) -> dict[str, list[int]]:
    """Question and answer as one row of tokens, of which the answer's alone carry labels."""
    question = "\n".join(["Human: " + example["instruction"], example["input"]]).strip() + "\n\nAssistant: "
    instruction = tokenizer(question)
    response = tokenizer(example["output"] + tokenizer.eos_token)
    row = {
        "input_ids": instruction["input_ids"] + response["input_ids"],
        "attention_mask": instruction["attention_mask"] + response["attention_mask"],
        "labels": [-100] * len(instruction["input_ids"]) + response["input_ids"],
    }
    return {name: values[: options.max_length] for name, values in row.items()}


tokenized_dataset = dataset.map(process_func, remove_columns=dataset.column_names)

# ---- model ----
model = AutoModelForCausalLM.from_pretrained(options.model)
total = sum(param.numel() for param in model.parameters())
if options.by == "hand":
    num_param = 0
    for name, param in model.named_parameters():
        if "bias" not in name:
            param.requires_grad = False
        else:
            num_param += param.numel()
    print(f"trained: {num_param:,} of {total:,} parameters, a share of {num_param / total}")
else:
    model = get_peft_model(model, BitFitConfig(task_type=TaskType.CAUSAL_LM))
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
ipt = tokenizer("Human: {}\n{}".format(options.question, "").strip() + "\n\nAssistant: ", return_tensors="pt")
ipt = ipt.to(model.device)
print(
    tokenizer.decode(model.generate(**ipt, max_length=options.max_length, do_sample=True)[0], skip_special_tokens=True)
)

# ---- saving what was trained, and putting it into the base model again ----
output = Path(options.output)
base = AutoModelForCausalLM.from_pretrained(options.model)
if options.by == "hand":
    torch.save({n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}, output / "trained.pt")
    base.load_state_dict(torch.load(output / "trained.pt", weights_only=True), strict=False)
    again = base.eval()
else:
    model.save_pretrained(output)
    again = PeftModel.from_pretrained(base, output)
with torch.no_grad():
    difference = (again.to(model.device)(**ipt).logits - model(**ipt).logits).abs().max().item()
print(f"reloaded: the logits differ by at most {difference}")
