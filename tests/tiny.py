"""Tiny models and tokenizers, made without a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
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


def qwen2() -> nn.Module:
    """Grouped key/value heads, and biases on query, key and value alone."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
}


def bert() -> nn.Module:
    """A classifier of 3 classes."""
    return BertForSequenceClassification(BertConfig(**ENCODER))


def roberta() -> nn.Module:
    """A classifier that counts its positions from the padding number on."""
    return RobertaForSequenceClassification(RobertaConfig(**ENCODER, pad_token_id=1))


def deberta() -> nn.Module:
    """Disentangled attention with relative positions, query, key and value in one projection."""
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 32}
    return DebertaForSequenceClassification(DebertaConfig(**ENCODER, **relative))


def deberta_v2() -> nn.Module:
    """The same with three projections, which the relative positions share."""
    relative = {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 16,
        "share_att_key": True,
    }
    return DebertaV2ForSequenceClassification(DebertaV2Config(**ENCODER, **relative))


def t5() -> nn.Module:
    """An encoder-decoder with relative positions."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


def bart() -> nn.Module:
    """An encoder-decoder with learned positions."""
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
        )
    )


class Plain(nn.Module):
    """Three linear layers, no transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.second(self.first(x).relu()).relu()))


TINY: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "bloom": bloom,
    "gpt2": gpt2,
    "qwen2": qwen2,
    "bert": bert,
    "roberta": roberta,
    "deberta": deberta,
    "deberta_v2": deberta_v2,
    "t5": t5,
    "bart": bart,
    "plain": Plain,
}
TASK = {
    "llama": "CAUSAL_LM",
    "bloom": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "qwen2": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "roberta": "SEQ_CLS",
    "deberta": "SEQ_CLS",
    "deberta_v2": "SEQ_CLS",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
    "plain": None,
}


def make(name: str, seed: int = 0) -> nn.Module:
    """The tiny model `name`, with the same weights for the same seed, in eval mode."""
    torch.manual_seed(seed)
    return TINY[name]().eval()


def batch(name: str) -> dict[str, torch.Tensor]:
    """Inputs with labels for the tiny model `name`."""
    generator = torch.Generator().manual_seed(1)
    if name == "plain":
        return {"x": torch.randn(5, 8, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if TASK[name] == "SEQ_CLS":
        inputs["labels"] = torch.tensor([0, 2, 1])
    elif TASK[name] == "SEQ_2_SEQ_LM":
        inputs["labels"] = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    return inputs


def without_dropout(model: nn.Module) -> None:
    """Nothing random is left in the model's forward."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


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
