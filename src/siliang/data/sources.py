"""Reads rows from files, folders and the hub, one by one, each with the place it came from, so that a bad one can be
named and a file larger than memory can be read. A kind of file has one reader, wherever the file lies.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siliang.data.description import Parts, by_name, check_hub, check_saved, described
from siliang.data.file_rows import rows_of_file
from siliang.data.reading import DataRow, Reading
from siliang.data.text_files import FILE_KINDS, kind_of
from siliang.files import is_pattern
from siliang.hub import unreachable
from siliang.language import Bilingual, local
from siliang.paths import check_links, near_names
from siliang.types import DataError, first_line

if TYPE_CHECKING:  # slow to import
    from datasets import Dataset, DatasetDict

TRAINED = ("train", "training")
HELD_OUT = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")  # in the order of preference


@dataclass
class OpenedSource:
    """A source whose files are known.

    Attributes:
        parts: The files, or the saved table, of each part (train, test ...); a file or a pattern has one, "".
        named: The name that a file of the hub has in places and messages.
        features: What a data set's own description says of its columns.
    """

    source: str
    parts: Mapping[str, list[Path] | Dataset]
    named: dict[Path, str] = field(default_factory=dict)
    features: Mapping[str, object] | None = None

    def part(self, split: str) -> str:
        """The name of a part: `train`, or what is held out, which goes by several names.

        Raises:
            DataError: There is no such part.
        """
        if "" in self.parts or split in self.parts:
            return split if split in self.parts else ""
        names = {"train": TRAINED, "test": HELD_OUT}.get(split, ())
        found = [name for name in names if name in self.parts]
        if not found and not self.parts:
            raise DataError(
                Bilingual(
                    f"{self.source} holds no data: what it saved has no part.",
                    f"{self.source} 没有数据：其中没有任何部分。",
                )
            )
        if not found:
            apart, one = Bilingual("", ""), f"{self.source}/{next(iter(self.parts))}"
            if not any(isinstance(files, list) for files in self.parts.values()):
                apart = Bilingual(
                    f" To read one of them, name its folder, such as {one}.",
                    f"要读取其中一个，请给出它的文件夹，例如 {one}。",
                )
            raise DataError(
                Bilingual(
                    f"{self.source} has no part {split!r}; it has {', '.join(self.parts)}.{apart}",
                    f"{self.source} 没有 {split!r} 部分；它有 {'、'.join(self.parts)}。{apart.zh}",
                )
            )
        return found[0]

    def held_out(self) -> list[str]:
        """The parts that are for evaluation, the most suited first."""
        return [name for name in HELD_OUT if name in self.parts]

    def rows(self, part: str, reading: Reading) -> Iterator[DataRow]:
        """The rows of a part, in order; an unreadable one comes with its problem.

        Raises:
            DataError: It is damaged as a whole.
        """
        held = self.parts[part]
        if not isinstance(held, list):
            yield from _saved(held, self.source)
            return
        from siliang.data.arrow_rows import class_names

        changes = class_names(self.features)
        for file in held:
            for row in rows_of_file(file, self.named.get(file, str(file)), reading):
                for name, change in changes.items():
                    if name in row.values:
                        row.values[name] = change(row.values[name])
                yield row


def open_source(source: str, reading: Reading | None = None) -> OpenedSource:
    """Finds the files of a source.

    Args:
        source: A file, a pattern of files, a folder (from Dataset.save_to_disk, or of files, as a data set's repository
            is), or a name on the hub.
        reading: Collects notes on ignored files.

    Raises:
        DataError: There is no such source.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return OpenedSource(source, {"": [path]})
    if path.is_dir():
        return _folder(path, source, reading or Reading())
    if is_pattern(source) and (found := sorted(glob.glob(str(path), recursive=True))):  # noqa: PTH207 (absolute patterns)
        return OpenedSource(source, {"": [Path(name) for name in found if Path(name).is_file()]})
    if kind_of(path) in FILE_KINDS or source.startswith((".", "/", "~")) or source.strip("/").count("/") != 1:
        near = near_names(path)
        raise DataError(
            Bilingual(f"There is no data file or folder {source}.{near}", f"找不到数据文件或文件夹 {source}。{near.zh}")
        )
    return _hub(source)


# ---- folders and the hub ----


def _folder(path: Path, source: str, reading: Reading) -> OpenedSource:
    """What Dataset.save_to_disk wrote, or files of data whose names, or whose README, say their part."""
    from datasets import DatasetDict, load_from_disk

    check_links(path, DataError)
    saved = ("dataset_info.json", "dataset_dict.json")
    try:
        if any((path / name).is_file() for name in saved):
            check_saved(path)
            loaded = load_from_disk(str(path))
            return OpenedSource(source, _tables(loaded) if isinstance(loaded, DatasetDict) else {"": loaded})
        parts, features = described(path)
        return OpenedSource(source, _only_ours(parts or by_name(path), path, reading), features=features)
    except DataError:
        raise
    except Exception as error:  # `datasets` has many exception classes
        raise DataError(
            Bilingual(
                f"{path} holds no data: {first_line(error)}\n"
                "Name a file in it, a folder from Dataset.save_to_disk, or one of files such as train.jsonl "
                "and test.jsonl.",
                f"{path} 中没有数据：{local(first_line(error), 'zh')}\n"
                "请给出其中的文件、Dataset.save_to_disk 写的文件夹，或含 train.jsonl、test.jsonl 这类文件"
                "的文件夹。",
            )
        ) from None


def _only_ours(parts: Parts, path: Path, reading: Reading) -> Parts:
    """The files of data of each part. Notes those that no part holds.

    Raises:
        DataError: There is no file of data.
    """
    root = path.resolve()
    kept = {part: [f for f in files if kind_of(f) in FILE_KINDS] for part, files in parts.items()}
    parts = {part: [path / f.relative_to(root) for f in files] for part, files in kept.items() if files}
    there = [f for f in sorted(path.rglob("*")) if f.is_file() and not f.name.startswith((".", "README"))]
    ours = [f for f in there if kind_of(f) in FILE_KINDS]
    if not parts and ours:
        parts = {"train": ours}
    if not parts:
        raise DataError(
            Bilingual(
                f"{path} holds no data: no file of a kind that can be read ({', '.join(FILE_KINDS)}).\n"
                "Name a file in it, a folder from Dataset.save_to_disk, or one of files such as train.jsonl "
                "and test.jsonl.",
                f"{path} 中没有数据：没有可读取的文件（{'、'.join(FILE_KINDS)}）。\n"
                "请给出其中的文件、Dataset.save_to_disk 写的文件夹，或含 train.jsonl、test.jsonl 这类文件"
                "的文件夹。",
            )
        )
    taken = {file for files in parts.values() for file in files}
    left = [f.relative_to(path).as_posix() for f in ours if f not in taken]
    if left:
        more, more_zh = (f" and {len(left) - 5} more", " 等") if len(left) > 5 else ("", "")
        reading.note(
            Bilingual(
                f"{path}: not read, as their names say no part: {', '.join(left[:5])}{more}",
                f"{path}：文件名看不出属于哪一部分，未读取：{'、'.join(left[:5])}{more_zh}",
            )
        )
    return parts


def _hub(source: str) -> OpenedSource:
    from datasets import DatasetDict, load_dataset_builder
    from datasets.config import HF_HUB_OFFLINE
    from datasets.packaged_modules.cache.cache import Cache

    name, _, config = source.partition(":")
    off = None if HF_HUB_OFFLINE else unreachable()  # offline, `datasets` itself makes no request
    try:
        _quieten()
        check_hub(name)
        if off is not None:
            last = name.rpartition("/")[2]
            builder = Cache(None, last, config or None, repo_id=name, version="auto", hash="auto")
        else:
            builder = load_dataset_builder(name, config or None)
        if not builder.config.data_files:  # without a network, from what `datasets` made of it before
            builder.download_and_prepare()
            made = builder.as_dataset()
            assert isinstance(made, DatasetDict)  # because no split is given
            return OpenedSource(source, _tables(made))
        parts: Parts = {}
        named: dict[Path, str] = {}
        for part, files in builder.config.data_files.items():
            parts[str(part)] = [_fetch(str(file), name) for file in files]
            named |= {
                path: f"{name}/{str(file).rpartition('@')[2].partition('/')[2] if '@' in str(file) else path.name}"
                for path, file in zip(parts[str(part)], files, strict=True)
            }
        return OpenedSource(source, parts, named, builder.info.features)
    except DataError:
        raise
    except Exception as error:  # the hub's client raises many kinds, all of which mean that the data is not to be had
        if off is not None:
            raise DataError(
                Bilingual(
                    f"{source} is not a file or folder here, and not in the cache of `datasets`; {off}.\n"
                    "Save the data to a file (.jsonl, .parquet) and name that.",
                    f"{source} 不是本机的文件或文件夹，也不在 `datasets` 的缓存中；{local(off, 'zh')}。\n"
                    "请把数据存成文件（.jsonl、.parquet）并给出文件名。",
                )
            ) from None
        raise DataError(
            Bilingual(
                f"{source} is not a file or folder here, and the hub did not give it: {first_line(error)}\n"
                "Look at its name and at the network, or save the data to a file (.jsonl, .parquet) and name that.",
                f"{source} 不是本机的文件或文件夹，也无法从 Hub 取得：{local(first_line(error), 'zh')}\n"
                "请检查名称和网络，或把数据存成文件（.jsonl、.parquet）并给出文件名。",
            )
        ) from None


def _tables(found: DatasetDict) -> dict[str, Dataset]:
    """The table of each part."""
    return {str(part): table for part, table in found.items()}


def _fetch(file: str, name: str) -> Path:
    """A file of a data set of the hub, in the hub's cache."""
    from huggingface_hub import HfFileSystem, hf_hub_download

    if not file.startswith("hf://datasets/") or "::" in file:
        raise DataError(
            Bilingual(
                f"{name} names {file}, which is not in its repository.", f"{name} 写有 {file}，它不在自己的仓库中。"
            )
        )
    found: Any = HfFileSystem().resolve_path(file)
    if (found.repo_type, found.repo_id) != ("dataset", name):
        raise DataError(
            Bilingual(
                f"{name} names {file}, which is not in its repository.", f"{name} 写有 {file}，它不在自己的仓库中。"
            )
        )
    return Path(hf_hub_download(found.repo_id, found.path_in_repo, repo_type=found.repo_type, revision=found.revision))


def _quieten() -> None:
    """Bars are for people, and each of the client's attempts for nobody: the error says it once."""
    import logging

    from datasets import disable_progress_bars, enable_progress_bars

    (enable_progress_bars if sys.stderr.isatty() else disable_progress_bars)()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _saved(table: Dataset, source: str) -> Iterator[DataRow]:
    """The rows of a table from Dataset.save_to_disk."""
    from siliang.data.arrow_rows import changes, rows_of

    change, batches = changes(table.features.arrow_schema, source), table.with_format("arrow").iter(batch_size=1000)
    nbytes = sum(Path(file["filename"]).stat().st_size for file in table.cache_files)
    for number, values in enumerate(rows_of(batches, change, source, nbytes), start=1):
        yield DataRow(values, f"{source}, row {number}")
