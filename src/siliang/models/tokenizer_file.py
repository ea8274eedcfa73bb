"""A tokenizer's files, looked at before they are read: rules in them are programs that a stranger wrote."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.hub import cached_file

from siliang.hub import only_cached
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


def find_file(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a model, of the hub's where it is no folder here; None where it has none or it cannot be had."""
    folder = Path(name)
    if folder.is_dir():
        return path if (path := folder / file).is_file() else None
    try:
        found = cached_file(
            name,
            file,
            revision=revision,
            local_files_only=only_cached(name),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # loading says it better
        return None
    return Path(found) if found else None
