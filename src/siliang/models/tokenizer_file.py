"""A tokenizer's files, looked at before they are read: rules in them are programs that a stranger wrote."""

from __future__ import annotations

from pathlib import Path

from siliang.hub import find_file
from siliang.limits import RefusedError, look_at_tokenizer
from siliang.types import ModelError, first_line

NAMES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
MOST_BYTES = {"tokenizer.json": 200 * 2**20}
OTHERS = 20 * 2**20


def check_tokenizer(name: str, revision: str | None = None) -> None:
    """Whether a model's tokenizer may be read here: it is tried in a process with limits first.

    Args:
        name: The model's folder, or its name on the hub.

    Raises:
        ModelError: It asks for too much.
    """
    for file in NAMES:
        path = find_file(name, file, revision)
        if path is None:
            continue
        most = MOST_BYTES.get(file, OTHERS)
        if (size := path.stat().st_size) > most:
            raise ModelError(f"{path} has {size:,} bytes: at most {most:,} are read.")
        if file == "tokenizer.json":
            _try(path)


def _try(path: Path) -> None:
    try:
        look_at_tokenizer(path.read_text(encoding="utf-8"))
    except RefusedError as error:
        raise ModelError(f"{path} cannot be used: {first_line(str(error))}.") from None
    except UnicodeDecodeError:
        raise ModelError(f"{path} cannot be used: it is not UTF-8.") from None
