"""Limits for the sizes in a config.json, checked before the model is created: a small file can declare any size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedConfig

from siliang.language import Bilingual, local
from siliang.models.folder import INDEX, weight_files
from siliang.types import ModelError, message_of
from siliang.weight_files import check_weights

# the maximum of each size; the largest known models have 126 layers, 2,048 experts per layer, 65,536 columns and a
# vocabulary of a million tokens
LIMITS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"(^|_)num_labels$"), 50_000),
    (re.compile(r"(^|_)(num|n)_\w*heads?$"), 2**16),
    (re.compile(r"(^|_)(num|n)_\w*experts?$"), 4096),
    (re.compile(r"(^|_)n(um)?_\w*(layers?|blocks?|stages?)$|_layers$|^depths?$"), 1000),
    (re.compile(r"(head_dim|head_size|d_kv)$"), 2**14),
    (re.compile(r"(size|dim|embd|inner|d_model|d_ff|rank|width|channels)s?$"), 2**24),
    (re.compile(r"(positions?|position_embeddings|n_ctx|seq_length)$"), 2**28),
)
MOST_ENTRIES = 50_000  # entries of a list or a mapping, such as labels
MOST_BLOCKS = 200_000  # layers times experts
DEPTH = "layers?$"
WIDE = "(hidden_size|n_embd|d_model)$"
TALL = "(vocab_size|intermediate_size|ffn_dim|d_ff|n_inner)$"


def check_counts(values: Mapping[str, object], path: Path) -> None:
    """Checks the numbers of layers, columns and labels in a config.json.

    Raises:
        ModelError: A number is above its limit.
    """
    for part in _parts(values):
        for name, value in part.items():
            if isinstance(value, list | dict) and len(value) > MOST_ENTRIES:
                raise ModelError(
                    Bilingual(
                        f"{path}: {name} has {len(value):,} entries: at most {MOST_ENTRIES:,} are allowed.",
                        f"{path}：{name} 有 {len(value):,} 项：最多允许 {MOST_ENTRIES:,} 项。",
                    )
                )
            most = next((most for pattern, most in LIMITS if pattern.search(name)), None)
            for number in value if isinstance(value, list) else [value]:
                if most is not None and isinstance(number, int | float) and number > most:
                    raise ModelError(
                        Bilingual(
                            f"{path}: {name} = {number:,}: at most {most:,} are allowed.",
                            f"{path}：{name} = {number:,}：最大允许 {most:,}。",
                        )
                    )
        layers, experts = (_largest(part, end) for end in (DEPTH, "experts$"))
        if layers * experts > MOST_BLOCKS:
            raise ModelError(
                Bilingual(
                    f"{path}: {layers:,} layers of {experts:,} experts: at most {MOST_BLOCKS:,} are allowed.",
                    f"{path}：{layers:,} 层，每层 {experts:,} 个专家：总共最多允许 {MOST_BLOCKS:,} 个。",
                )
            )


def check_files(folder: Path) -> None:
    """Checks that the weight files in a model's folder have plain tensors within the file.

    Raises:
        ModelError: A file has not.
    """
    for path in _files(folder):
        try:
            check_weights(path, older=True)
        except (OSError, ValueError) as error:
            raise ModelError(
                Bilingual(f"{path} is damaged: {error}.", f"{path} 已损坏：{local(message_of(error), 'zh')}。")
            ) from None


def may_be_too_large(config: PreTrainedConfig, folder: Path) -> bool:
    """Whether the matrices of a config could be larger than the weight files of the folder.

    This is a rough estimate: if it is true, the shapes are compared one by one.
    """
    most = sum(path.stat().st_size for path in _files(folder)) // 2
    for part in _parts(config.to_dict()):
        wide = _largest(part, WIDE)
        tall = max(wide, _largest(part, TALL))
        if wide * tall * max(1, _largest(part, DEPTH)) > most or wide * _largest(part, "positions?|embeddings$") > most:
            return True
    return False


def _files(folder: Path) -> list[Path]:
    """The weight files to load."""
    return [path for name in weight_files(folder) if not name.endswith(INDEX) and (path := folder / name).is_file()]


def _parts(values: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """A config and its sub-configs."""
    yield values
    for value in values.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _largest(values: Mapping[str, object], end: str) -> int:
    found = (v for name, v in values.items() if type(v) is int and re.search(end, name))
    return max(found, default=0)
