"""The settings that libraries write beside weights, without the user's secrets."""

from __future__ import annotations

import json
from pathlib import Path

from siliang.files import write_text
from siliang.safe_json import dump_json
from siliang.secrets import redacted

# What libraries write of settings into the folder of a model or a checkpoint.
SETTINGS = ("config.json", "generation_config.json", "trainer_state.json")
TOKENIZER = "tokenizer_config.json"
NAMES = ("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file", "merges_file")


def hide_secrets(folder: Path) -> None:
    """Takes the secrets out of the settings that a library has written into a folder. A tokenizer's words and templates
    stay, which are what it was trained with."""
    for path in [folder / name for name in (*SETTINGS, TOKENIZER) if (folder / name).is_file()]:
        values = json.loads(path.read_text(encoding="utf-8"))
        if path.name == TOKENIZER:
            clean = values | {key: redacted(values[key]) for key in NAMES if key in values}
        else:
            clean = redacted(values)
        if clean != values:
            write_text(path, dump_json(clean, indent=2) + "\n")
