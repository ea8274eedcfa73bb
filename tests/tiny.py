"""Tiny models and tokenizers, made here: no test needs a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 120
SHARED = Path(__file__).resolve().parents[2] / "shared"


def llama() -> nn.Module:
    """2 blocks, grouped key/value heads, no biases."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def bloom() -> nn.Module:
    """Biases everywhere; the output head is tied to the embedding."""
    return BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    )


def gpt2() -> nn.Module:
    """Its linear layers are Conv1D, stored the other way round."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config)


def bert() -> nn.Module:
    """A classifier of 3 classes."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            num_labels=3,
        )
    )


TINY: dict[str, Callable[[], nn.Module]] = {"llama": llama, "bloom": bloom, "gpt2": gpt2, "bert": bert}


def make(name: str, seed: int = 0) -> nn.Module:
    """The tiny model `name`, with the same weights for the same seed, in eval mode."""
    torch.manual_seed(seed)
    return TINY[name]().eval()


def batch(name: str) -> dict[str, torch.Tensor]:
    """Inputs with labels for the tiny model `name`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=generator)
    labels = torch.tensor([0, 2, 1]) if name == "bert" else ids.clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


WORDS = [
    "the",
    "a",
    "film",
    "was",
    "is",
    "and",
    "not",
    "very",
    "good",
    "bad",
    "dull",
    "bright",
    "funny",
    "slow",
    "fast",
    "story",
    "actor",
    "I",
    "we",
    "liked",
    "hated",
    "it",
    "of",
    "to",
    "Human",
    ":",
    "Assistant",
    "say",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "yes",
    "no",
    "hello",
    "world",
    ".",
    ",",
    "!",
    "?",
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words to numbers, with the special tokens of BERT and of Llama at once."""
    special = ["[PAD]", "<s>", "</s>", "[UNK]"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="[UNK]",
        model_max_length=64,
    )


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def enable_checkpointing(model: Any, **how: Any) -> None:
    """Gradient checkpointing under the name that this transformers has for it (5.23 renamed it)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(how or None)
