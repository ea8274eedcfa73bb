"""Writes a base model as transformers does, with its custom code, and without the user's secrets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from siliang.files import write_text
from siliang.models.own_code import write_own_code
from siliang.models.tokenizer import Tokenizer
from siliang.safety.safe_json import dump_json
from siliang.secrets import redacted

# The settings files that libraries write into a model's folder.
GENERATION = "generation_config.json"
SETTINGS = ("config.json", GENERATION)
TOKENIZER = "tokenizer_config.json"
NAMES = ("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file", "merges_file")


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    *,
    state_dict: dict[str, Tensor] | None = None,
    ends: Sequence[int] = (),
) -> None:
    """Writes a model and its tokenizer.

    Args:
        state_dict: The weights, if they are not those of the model.
        ends: Tokens that end what it writes, besides those of its generation_config.
    """
    model.save_pretrained(folder, state_dict=state_dict)
    _add_ends(folder / GENERATION, ends)
    write_own_code(model.config, folder)
    tokenizer.save_pretrained(folder)
    _hide_secrets(folder)


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes only a tokenizer."""
    tokenizer.save_pretrained(folder)
    _hide_secrets(folder)


def save_config(folder: Path, config: PreTrainedConfig) -> None:
    """Writes only the config of a model."""
    config.save_pretrained(folder)
    write_own_code(config, folder)
    _hide_secrets(folder)


def _add_ends(path: Path, ends: Sequence[int]) -> None:
    """Adds tokens to those at which a generation_config ends a text."""
    if not ends or not path.is_file():
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    known = values.get("eos_token_id")
    known = [known] if isinstance(known, int) else list(known or [])
    if not set(ends) <= set(known):
        write_text(path, dump_json(values | {"eos_token_id": list(dict.fromkeys([*known, *ends]))}, indent=2) + "\n")


def _hide_secrets(folder: Path) -> None:
    """Removes secrets from the settings files that a library has written into a folder. The vocabulary and the
    templates of a tokenizer are not changed."""
    for path in [folder / name for name in (*SETTINGS, TOKENIZER) if (folder / name).is_file()]:
        values = json.loads(path.read_text(encoding="utf-8"))
        if path.name == TOKENIZER:
            clean = values | {key: redacted(values[key]) for key in NAMES if key in values}
        else:
            clean = redacted(values)
        if clean != values:
            write_text(path, dump_json(clean, indent=2) + "\n")
