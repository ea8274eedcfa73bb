"""A tiny model and rows of different lengths for every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import ENCODER, WORDS, llama, t5, without_dropout, word_tokenizer, write_jsonl
from tokenizers import processors
from transformers import BertConfig, BertForSequenceClassification

from siliang.config import RunConfig

TASKS = (
    *("seq_cls", "several_labels", "number", "ordered"),
    *("token_cls", "question_ans", "causal_lm", "preference", "reward", "seq_2_seq_lm", "embedding", "reranker"),
)
# of seq_cls, whose labels say what it learns
PROBLEMS = ("several_labels", "number", "ordered")
PROMPTS = {"name": "prompt_tuning", "num_virtual_tokens": 3}
LOSSES = {"kto": "kto"}  # of preferences, beside DPO's
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 4},
    "full": {"name": "full"},
    "prompt_tuning": PROMPTS,
    "p_tuning": PROMPTS | {"name": "p_tuning"},
    "prefix_tuning": PROMPTS | {"name": "prefix_tuning"},
}


def make_models(folder: Path, spread: float = 0.3) -> dict[str, Path]:
    """A base model's folder for each task, without dropout; `spread` is of the encoder's new weights."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    torch.manual_seed(0)
    sizes: dict[str, Any] = ENCODER
    encoder = BertForSequenceClassification(BertConfig(**sizes, initializer_range=spread))
    models: dict[str, Any] = {"encoder": encoder, "causal_lm": llama(), "seq_2_seq_lm": t5()}
    for name, model in models.items():
        without_dropout(model)
        config: Any = model.config
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate"):
            if hasattr(config, key):
                setattr(config, key, 0.0)
        config.eos_token_id = 2
        model.save_pretrained(folder / name)
        (tokenizer if name == "encoder" else word_tokenizer()).save_pretrained(folder / name)
    names = {"causal_lm": "causal_lm", "preference": "causal_lm", "reward": "causal_lm", "seq_2_seq_lm": "seq_2_seq_lm"}
    return {task: folder / names.get(task, "encoder") for task in TASKS}


def rows_of(task: str, n: int = 23) -> list[dict[str, Any]]:
    """Rows of 3 to 14 words; of questions, some have no answer and some a context of several windows."""
    rows: list[dict[str, Any]] = []
    for i in range(n):
        words = [WORDS[(7 * i + 3 * j) % 23] for j in range(3 + (5 * i) % 12)]
        text = " ".join(words)
        match task:
            case "seq_cls":
                rows.append({"text": text, "label": ("pos", "neg")[i % 3 == 0]})
            case "several_labels":
                rows.append({"text": text, "label": [w for w in ("good", "film", "story") if w in words]})
            case "number":
                rows.append({"text": text, "label": len(words) / 4 - 1.5})
            case "ordered":
                rows.append({"text": text, "label": len(words) // 3})
            case "token_cls":
                tags = [("O", "B-X", "I-X", "O", "B-Y")[(i + j) % 5] for j in range(len(words))]
                rows.append({"tokens": words, "tags": tags})
            case "question_ans":
                context = " ".join(words * (1 + i % 3))
                word = words[i % len(words)]
                found = {"text": [word], "answer_start": [context.index(word)]}
                answers = {"text": [], "answer_start": []} if i % 4 == 0 else found
                rows.append({"question": "say one", "context": context, "answers": answers})
            case "causal_lm":
                rows.append({"instruction": text, "output": " ".join(words[: 1 + i % 5])})
            case "preference" | "reward":
                chosen, rejected = (" ".join(part[: 1 + i % 5]) for part in (words, words[::-1]))
                rows.append({"prompt": text, "chosen": chosen, "rejected": f"{rejected} {words[0]}"})
            case "embedding" | "reranker":
                negatives = [" ".join(words[j:][: 2 + j]) for j in range(1, 1 + i % 3)]
                rows.append({"anchor": text, "positive": " ".join(words[1 + i % 5 :: -1]), "negative": negatives})
            case _:
                rows.append({"source": text, "target": " ".join(words[: 1 + i % 5])})
    return rows


def rated_rows(n: int = 23) -> list[dict[str, Any]]:
    """The answers of the pairs, each alone and marked as good or bad."""
    pairs = rows_of("preference", n)
    names = [("chosen", "rejected")[i % 3 == 1] for i in range(n)]
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row, name in zip(pairs, names, strict=True)
    ]


def configured(task: str, models: dict[str, Path], folder: Path, method: str = "lora", **train: Any) -> RunConfig:
    """A run of two steps on all of the task's rows, of which it measures a part; "kto" is preference with that loss."""
    data = write_jsonl(folder / f"{task}.jsonl", rated_rows() if task == "kto" else rows_of(task))
    settings = {"max_steps": 2, "batch_size": 4, "precision": "fp32", "learning_rate": 1e-3}
    values = {
        "model": str(models["preference" if task == "kto" else task]),
        "task": {"kto": "preference"}.get(task, "seq_cls" if task in PROBLEMS else task),
        "method": METHODS[method],
        "data": {"train": str(data), "test_size": 0.5, "max_length": 24, "stride": 4, "max_target_length": 8},
        "train": settings | train,
        "classification": {"problem": "ordered"} if task == "ordered" else None,  # the others are seen in the labels
        "preference": {"loss": loss} if (loss := LOSSES.get(task)) else None,
        "accept": ["SL042", "SL045"],
        "output": str(folder / "run"),
    }
    return RunConfig.build(values)
