"""A table of tokens from many examples: in several processes where there are very many, and in a file that is kept."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

from siliang.config import DataConfig
from siliang.data.cache import cache_folder, prune, used
from siliang.data.example_set import ExampleSet
from siliang.data.small_table import SmallTable, TokenColumns
from siliang.language import Bilingual
from siliang.types import DataError

if TYPE_CHECKING:  # slow to import
    from datasets import Dataset, Features

PARALLEL_ROWS = 20_000  # from so many on, several processes tokenize
BATCH = 500
BatchFunction = Callable[[dict[str, list[str]], list[int]], TokenColumns]  # examples and their numbers to tokens


def map_examples(
    examples: ExampleSet,
    function: BatchFunction,
    features: Features,
    key: str,
    data: DataConfig,
    *,
    cached: bool,
    one_process: bool,
) -> Dataset:
    """The table that a function makes of the batches of examples.

    Args:
        function: From a batch of examples as JSON, and their numbers.
        key: The name of the table among those that are kept.
        cached: Keep it in a file.
        one_process: The function depends on which examples are in a batch.

    Raises:
        DataError: One of the processes was killed.
    """
    from datasets import disable_progress_bars, enable_progress_bars

    n = len(examples)
    file: str | None = None
    if cached:
        file = str(_kept_file(key, ".arrow"))
    workers = data.workers or (max(1, os.cpu_count() or 1) if n >= PARALLEL_ROWS else 1)
    workers = 1 if one_process else min(workers, max(1, n // BATCH))
    if sys.stderr.isatty() and cached:
        enable_progress_bars()
    else:
        disable_progress_bars()
    try:
        with _terminable() if workers > 1 else nullcontext():
            return _mapped(examples, function, features, key, workers, file)
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise DataError(
            Bilingual(
                f"one of {workers} processes that tokenize was killed, perhaps because memory was full.\n"
                "Set data.workers=1, or a smaller number than that.",
                f"{workers} 个分词进程中有一个被杀死，可能是内存已满。\n请设置 data.workers=1，或更小的数。",
            )
        ) from None


def map_few(
    examples: ExampleSet, function: BatchFunction, kinds: dict[str, str], lists: list[str], key: str, *, cached: bool
) -> SmallTable:
    """The small table that a function makes of the batches of a few examples.

    Args:
        kinds: For each column, what a number is.
        lists: The columns of lists.
        key: The name of the table among those that are kept.
        cached: Keep it in a file.
    """
    file = _kept_file(key, ".npz") if cached else None
    if file is not None and file.is_file():
        with suppress(OSError, ValueError, KeyError, BadZipFile):  # a damaged file is made anew
            return SmallTable.read(file, kinds)
    lines, columns = list(examples.lines()), {name: list[object]() for name in kinds}
    for start in range(0, len(lines), BATCH):
        batch = lines[start : start + BATCH]
        for name, values in function({"example": batch}, list(range(start, start + len(batch)))).items():
            columns[name] += values
    table = SmallTable(columns, kinds).compact(lists)
    if file is not None:
        with suppress(OSError):  # a full or read-only disk
            table.write(file)
    return table


def _kept_file(key: str, suffix: str) -> Path:
    """The file of a table of tokens among those that are kept."""
    folder = cache_folder() / "tokens"
    folder.mkdir(exist_ok=True)
    used(folder, key)
    prune(folder)
    return folder / f"{key}{suffix}"


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the block a process that is forked ends at SIGTERM, by which the pool ends its processes. With this
    process's own handler, which may only take note, one that waits for a lock of a killed one would wait for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is not None:  # None: it was set by other than Python's code
            signal.signal(signal.SIGTERM, before)


def _mapped(
    examples: ExampleSet, function: BatchFunction, features: Features, key: str, workers: int, file: str | None
) -> Dataset:
    table = examples.dataset()
    return table.map(
        function,
        with_indices=True,
        batched=True,
        batch_size=BATCH,
        remove_columns=table.column_names,
        features=features,
        num_proc=workers if workers > 1 else None,
        new_fingerprint=key,
        desc="tokens",
        cache_file_name=file,
        keep_in_memory=file is None,
    )
