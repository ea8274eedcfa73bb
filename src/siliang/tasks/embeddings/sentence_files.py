"""The files with which sentence-transformers opens a saved adapter or model, under the names of its versions 2 to 6."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from siliang.config import EmbeddingConfig
from siliang.files import write_text
from siliang.models.positions import table_of_positions
from siliang.models.save import save_tokenizer
from siliang.models.tokenizer import Tokenizer
from siliang.safety.safe_json import dump_json
from siliang.tasks.embeddings.tokens import prompts_of
from siliang.types import ADAPTER_CONFIG

CLASSES = "sentence_transformers.models"
FLAGS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}


def longest_text(max_length: int, model: nn.Module) -> int:
    """The tokens of the longest text: `data.max_length`, or fewer if the model has no more positions."""
    table = table_of_positions(model)
    return max_length if table is None else min(max_length, table)


def write_embedding(settings: EmbeddingConfig, max_length: int, folder: Path, width: int, tokenizer: Tokenizer) -> None:
    """A transformer, its pooling, and the division by the length.

    Args:
        settings: Without anything that is left open.
        max_length: Tokens of a text.
        width: Dimensions of a vector.
    """
    save_tokenizer(folder, tokenizer)
    modules = ["Transformer", "Pooling", *(["Normalize"] if settings.normalize else [])]
    prompts = {name: text for name, text in prompts_of(settings).items() if name in ("query", "document")}
    of_single_texts = settings.prompt_name if prompts.get(settings.prompt_name) else None
    pooling = {"word_embedding_dimension": width} | {flag: mode == settings.pooling for mode, flag in FLAGS.items()}
    _write(folder / "1_Pooling" / "config.json", pooling | {"include_prompt": True})
    own = {
        "__version__": {},
        "model_type": "SentenceTransformer",
        "prompts": prompts,
        "default_prompt_name": of_single_texts,  # as for `siliang predict`
        "similarity_fn_name": "cosine",
    }
    _write(folder / "config_sentence_transformers.json", own)
    _write_modules(folder, modules, {"max_seq_length": max_length, "do_lower_case": False})


def write_reranker(max_length: int, folder: Path, tokenizer: Tokenizer, activation: str) -> None:
    """A transformer with a head of one output.

    Args:
        activation: The class of torch by whose function a score is shown.
    """
    save_tokenizer(folder, tokenizer)
    own = {"__version__": {}, "model_type": "CrossEncoder", "prompts": {}, "activation_fn": activation}
    _write(folder / "config_sentence_transformers.json", own)
    head = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    settings: dict[str, Any] = {"transformer_task": "sequence-classification", "config_kwargs": head}
    if (folder / ADAPTER_CONFIG).is_file():  # whose base model may have a head of several classes
        settings["model_kwargs"] = {"ignore_mismatched_sizes": True}
    _write_modules(folder, ["Transformer"], {"max_seq_length": max_length, "do_lower_case": False} | settings)


def _write_modules(folder: Path, names: Sequence[str], settings: dict[str, Any]) -> None:
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"{CLASSES}.{name}"}
        for i, name in enumerate(names)
    ]
    _write(folder / "sentence_bert_config.json", settings)
    _write(folder / "modules.json", modules)


def _write(path: Path, values: object) -> None:
    path.parent.mkdir(exist_ok=True)
    write_text(path, dump_json(values, indent=2) + "\n")
