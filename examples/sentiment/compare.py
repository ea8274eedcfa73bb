"""Five ways to tune an encoder for sentiment, with a training loop of its own: full, prefix, prompt, P-tuning, LoRA."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from datasets import load_dataset
from torch.optim import AdamW
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

import siliang
from siliang import (
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from siliang.methods import METHODS

P_TYPES = {
    "full": None,
    "prefix-tuning": PeftType.PREFIX_TUNING,
    "prompt-tuning": PeftType.PROMPT_TUNING,
    "p-tuning": PeftType.P_TUNING,
    "lora": PeftType.LORA,
}
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="folder of an encoder, such as chinese-roberta-wwm-ext")
parser.add_argument("--data", required=True, help="csv file: review, label (0 or 1)")
parser.add_argument("--types", nargs="+", choices=P_TYPES, default=list(P_TYPES))
parser.add_argument("--rows", type=int, help="use this many rows, drawn at random")
parser.add_argument("--lr", type=float, default=3e-4)
parser.add_argument("--own-rates", action="store_true", help="each method at its own default rate instead of --lr")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--max-length", type=int, default=86)
parser.add_argument("--seed", type=int, default=42, help="of new weights and the order of the data")
options = parser.parse_args()
print(siliang.__version__)

# ---- data ----
dataset = load_dataset("csv", data_files=options.data)
dataset = dataset.filter(lambda row: row["review"] is not None)["train"]
if options.rows:
    dataset = dataset.shuffle(seed=123).select(range(min(options.rows, len(dataset))))
datasets = dataset.train_test_split(0.2, seed=123)
left = any(kind in options.model for kind in ("gpt", "opt", "bloom"))
tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left" if left else "right")
if tokenizer.pad_token_id is None:
    tokenizer.pad_token_id = tokenizer.eos_token_id


def process_function(examples: dict[str, list[Any]]) -> Any:
    """Tokens of the reviews, with their labels."""
    tokenized_examples = tokenizer(examples["review"], truncation=True, max_length=options.max_length)
    tokenized_examples["labels"] = examples["label"]
    return tokenized_examples


def collate_fn(examples: list[Any]) -> Any:
    """A batch as long as its longest review."""
    return tokenizer.pad(examples, padding="longest", return_tensors="pt")


tokenized_datasets = datasets.map(process_function, batched=True, remove_columns=datasets["train"].column_names)


class Accuracy:
    """The share of right answers over batches, under the names of `evaluate`, which would ask the network for it."""

    def __init__(self) -> None:
        self.right = self.total = 0

    def add_batch(self, predictions: torch.Tensor, references: torch.Tensor) -> None:
        """Counts one batch."""
        self.right += int((predictions == references).sum())
        self.total += len(references)

    def compute(self) -> dict[str, float]:
        """The share so far; counting begins anew."""
        accuracy = self.right / self.total
        self.right = self.total = 0
        return {"accuracy": accuracy}


def config_of(peft_type: PeftType) -> PeftConfig:
    """The config of one of the four methods, at the tutorial's values."""
    if peft_type is PeftType.PREFIX_TUNING:
        return PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20)
    if peft_type is PeftType.PROMPT_TUNING:
        return PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20)
    if peft_type is PeftType.P_TUNING:
        return PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=20, encoder_hidden_size=128)
    return LoraConfig(task_type="SEQ_CLS", inference_mode=False, r=8, lora_alpha=16, lora_dropout=0.1)


def print_trainable_parameters(model: torch.nn.Module) -> None:
    """The same line for a model without adapters."""
    trainable_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    all_param = sum(p.numel() for p in model.parameters())
    share = 100 * trainable_params / all_param
    print(f"trainable params: {trainable_params:,d} || all params: {all_param:,d} || trainable%: {share:.4f}")


def train(p_type: str) -> tuple[float, float, float]:
    """One run: accuracy, summed loss over the test batches, minutes."""
    set_seed(options.seed)
    train_dataloader = DataLoader(
        tokenized_datasets["train"], shuffle=True, collate_fn=collate_fn, batch_size=options.batch_size
    )
    eval_dataloader = DataLoader(
        tokenized_datasets["test"], shuffle=False, collate_fn=collate_fn, batch_size=options.batch_size
    )
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    peft_type = P_TYPES[p_type]
    if peft_type is not None:
        model = get_peft_model(model, config_of(peft_type))
        model.print_trainable_parameters()
    else:
        print_trainable_parameters(model)

    rate = METHODS[str(peft_type or "full").lower()].learning_rate if options.own_rates else options.lr
    optimizer = AdamW(params=model.parameters(), lr=rate)
    steps = len(train_dataloader) * options.epochs
    lr_scheduler = get_linear_schedule_with_warmup(
        optimizer=optimizer, num_warmup_steps=0.06 * steps, num_training_steps=steps
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    metric = Accuracy()
    accuracy, total_loss, start = 0.0, 0.0, time.time()
    for epoch in range(options.epochs):
        model.train()
        for batch in tqdm(train_dataloader, disable=None):
            batch.to(device)
            outputs = model(**batch)
            loss = outputs.loss
            loss.backward()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()

        model.eval()
        total_loss = 0.0
        for batch in tqdm(eval_dataloader, disable=None):
            batch.to(device)
            with torch.no_grad():
                outputs = model(**batch)
                total_loss += outputs.loss.item()
            metric.add_batch(predictions=outputs.logits.argmax(dim=-1), references=batch["labels"])
        eval_metric = metric.compute()
        accuracy = eval_metric["accuracy"]
        print(f"epoch {epoch} loss {total_loss}:", eval_metric)
    return accuracy, total_loss, (time.time() - start) / 60


results = {p_type: train(p_type) for p_type in options.types}
labels = datasets["test"]["label"]
print(f"\nlarger class of the {len(labels)} test reviews: {max(labels.count(0), labels.count(1)) / len(labels):.4f}")
print(f"{'':15}{'accuracy':>10}{'loss':>10}{'minutes':>10}")
for p_type, (accuracy, loss, minutes) in results.items():
    print(f"{p_type:15}{accuracy:10.4f}{loss:10.4f}{minutes:10.2f}")
