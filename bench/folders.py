"""The model folders and data files of the workloads, made once for each bench."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.rows import SHARED, made_up_rows, shared_rows
from bench.workloads import SEED, Workload
from siliang.demo import encoder_folder

LAYERS, WIDTH = 2, 64  # of every model in --smoke

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
    "bloom": {"hidden_size": 768, "n_layer": 8, "n_head": 12},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32_000,
    },
}
VOCABULARY = 46_145


def make_ready(workload: Workload, scratch: Path, *, smoke: bool) -> None:
    """Writes the workload's model folder and data file into `scratch`, if they are not there yet.

    Raises:
        FileNotFoundError: The project's test data is not there; --smoke needs none.
    """
    data = scratch / workload.data_file
    if not data.exists():
        make = made_up_rows if smoke else shared_rows
        rows = list(islice(make(workload.data), 64 if smoke else workload.rows))
        data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if not (scratch / workload.model).exists():
        if workload.model == "encoder":
            _make_encoder(scratch / workload.model, smoke=smoke)
        else:
            _make_decoder(workload.model, scratch / workload.model, smoke=smoke)


def _make_decoder(name: str, folder: Path, *, smoke: bool) -> None:
    """A causal model with random weights, the same ones each time, and a tokenizer."""
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

    if smoke:
        tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
        tokenizer.eos_token = "[SEP]"
    else:
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/minimind")
    values: dict[str, Any] = {"vocab_size": VOCABULARY} | SHAPES[name]
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    kind: Any = BloomConfig if name == "bloom" else LlamaConfig
    build: Any = BloomForCausalLM if name == "bloom" else LlamaForCausalLM
    if smoke:
        layers, heads = ("n_layer", "n_head") if name == "bloom" else ("num_hidden_layers", "num_attention_heads")
        values |= {"vocab_size": len(tokenizer), "hidden_size": WIDTH, layers: LAYERS, heads: 4}
        values |= {k: v for k, v in (("intermediate_size", 2 * WIDTH), ("num_key_value_heads", 2)) if k in values}
    torch.manual_seed(SEED)
    model = build(kind(**values, **ends))
    if name in ("1b", "3b", "7b"):
        model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_encoder(folder: Path, *, smoke: bool) -> None:
    """MiniLM-L6 without dropout, or a tiny model of its kind."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    source = encoder_folder()
    config = BertConfig.from_pretrained(source)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    if not smoke:
        folder.mkdir()
        for file in source.iterdir():
            if file.is_file() and file.name != "config.json":
                shutil.copyfile(file, folder / file.name)  # links out of a model's folder are refused
        config.save_pretrained(folder)
        return
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = WIDTH, LAYERS, 4
    config.intermediate_size = 2 * WIDTH
    torch.manual_seed(SEED)
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
