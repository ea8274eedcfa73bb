"""The metadata of a dataset: the header of its README, the lists that Dataset.save_to_disk writes, and file names. The
author may be unknown, so names are checked before use: they must be in the dataset's folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from siliang.data.text_files import FILE_KINDS
from siliang.language import Bilingual, local
from siliang.paths import inside
from siliang.safety.safe_json import read_json
from siliang.safety.safe_yaml import YamlError, check_yaml
from siliang.types import DataError, first_line

if TYPE_CHECKING:  # slow to import
    from datasets import Features

Parts = dict[str, list[Path]]  # the files of each

STANDALONE = ".huggingface.yaml"  # which `datasets` reads in place of a README's header
MOST_README_BYTES = 4 * 2**20  # in which a header ends
MOST_STATE_BYTES = 64 * 2**20  # of the list of a saved data set's files


def described(path: Path) -> tuple[Parts, Features | None]:
    """The parts and the columns' classes, as the README of a data set's repository says them, if it does."""
    from datasets.data_files import get_data_patterns, sanitize_patterns
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData

    if (path / STANDALONE).exists():
        raise DataError(
            Bilingual(
                f"{path / STANDALONE} is not read: write its content into README.md.",
                f"不读取 {path / STANDALONE}：请把其中的内容写进 README.md。",
            )
        )
    readme = path / "README.md"
    header = _header(readme)
    _check_header(path, header, str(readme))
    card = DatasetCardData(**{key: header[key] for key in ("configs", "dataset_info") if key in header})
    if not card.to_dict():
        return {}, None
    infos = DatasetInfosDict.from_dataset_card_data(card)
    configs = MetadataConfigs.from_dataset_card_data(card)
    name = configs.get_default_config_name() or next(iter(configs if configs else infos), "default")
    if len(configs) > 1 and not configs.get_default_config_name():
        raise DataError(
            Bilingual(
                f"{readme} describes several data sets, and says of none that it is the default: {', '.join(configs)}.",
                f"{readme} 描述了几个数据集，却没有说哪个是默认的：{'、'.join(configs)}。",
            )
        )
    features = infos[name].features if name in infos else None
    config = configs.get(name, {})
    features = config.get("features") or features
    if not config:
        return {}, features
    root = path.resolve() / (config.get("data_dir") or "")
    patterns = sanitize_patterns(config["data_files"]) if config.get("data_files") else get_data_patterns(str(root))
    parts = _matching(path, patterns, root, str(readme))
    if config.get("data_files") and not any(parts.values()):
        raise DataError(
            Bilingual(
                f"{readme}: of the files that it names none is there that can be read.",
                f"{readme}：其中写明的文件没有一个存在且可读。",
            )
        )
    return parts, features


def by_name(path: Path) -> Parts:
    """The parts by the names of files and folders, as `datasets` knows them: data/train-00000-of-00002.parquet,
    train.jsonl, test/a.csv; files whose names say no part are for training."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns

    root = path.resolve()
    try:
        return _matching(path, get_data_patterns(str(root)), root, str(path))
    except (EmptyDatasetError, FileNotFoundError):
        return {}


def check_saved(path: Path) -> None:
    """A saved data set's own description must not lead to other files of this machine.

    Raises:
        DataError: It does, or it is damaged.
    """
    for file in path.rglob("dataset_info.json"):
        if (size := file.stat().st_size) > MOST_STATE_BYTES:
            raise DataError(
                Bilingual(
                    f"{file} has {size:,} bytes: at most {MOST_STATE_BYTES:,} are read.",
                    f"{file} 有 {size:,} 字节：最多读取 {MOST_STATE_BYTES:,} 字节。",
                )
            )
    for file in (*path.glob("dataset_dict.json"), *path.rglob("state.json")):
        try:
            values = read_json(file, most_bytes=MOST_STATE_BYTES, foreign=True)
            listed = values.get("splits") or [entry["filename"] for entry in values.get("_data_files") or []]
            names = list(listed)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise DataError(Bilingual(f"{file} is damaged.", f"{file} 已损坏。")) from None
        for name in names:
            _check_file(file.parent, name, str(file))


def check_hub(name: str) -> None:
    """The description of a data set of the hub, before `datasets` looks for the files that it names."""
    from huggingface_hub import hf_hub_download

    own = f"hf://datasets/{name}/"
    for file in ("README.md", STANDALONE):
        try:
            path = Path(hf_hub_download(name, file, repo_type="dataset"))
        except Exception:  # there is none, or the hub does not give it
            continue
        if file == STANDALONE:
            raise DataError(
                Bilingual(f"{name} has a {STANDALONE}, which is not read.", f"{name} 有 {STANDALONE}，不会读取它。")
            )
        _check_header(path.parent, _header(path), f"{name}/{file}", own=own)


def _header(readme: Path) -> dict[str, Any]:
    """The YAML block between the two lines `---` at the beginning of a README."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    text = ""
    if readme.is_file():
        with readme.open("rb") as opened:
            text = opened.read(MOST_README_BYTES).decode("utf-8", errors="replace")
    found = REGEX_YAML_BLOCK.search(text.removeprefix("\ufeff"))
    if found is None or not re.search(r"^(configs|dataset_info):", found[2], re.MULTILINE):
        return {}
    try:
        check_yaml(found[2])
        values = yaml.safe_load(found[2])
    except (YamlError, yaml.YAMLError, ValueError) as error:
        line = error.line if isinstance(error, YamlError) else None
        where = f"{readme}:{line + 1}" if line else str(readme)
        raise DataError(
            Bilingual(
                f"{where}: its description cannot be read: {first_line(error)}.",
                f"{where}：无法读取数据集的描述：{local(first_line(error), 'zh')}。",
            )
        ) from None
    return values if isinstance(values, dict) else {}


def _check_header(folder: Path, header: Mapping[str, object], source: str, *, own: str = "") -> None:
    """What a data set's description names as its files are plain names of files in its folder, before anybody looks
    for them.

    Args:
        own: How names in the same repository of the hub begin, where they are written out.

    Raises:
        DataError: A name leads out, or names another way of reading.
    """
    configs = header.get("configs") or []
    for config in configs if isinstance(configs, list) else [configs]:
        if not isinstance(config, dict):
            raise DataError(
                Bilingual(f"{source}: `configs` is not a list of mappings.", f"{source}：`configs` 不是映射的列表。")
            )
        for name in (*_named_files(config.get("data_files")), *_named_files(config.get("data_dir"))):
            _check_file(folder, name.removeprefix(own) if own and isinstance(name, str) else name, source)


def _named_files(names: object) -> Iterator[object]:
    """The names in `data_files`: one, several, or those of each split."""
    if isinstance(names, list):
        for entry in names:
            yield from _named_files(entry)
    elif isinstance(names, dict):
        for value in [names["path"]] if "split" in names and "path" in names else names.values():
            yield from _named_files(value)
    elif names is not None:
        yield names


def _check_file(folder: Path, name: object, source: str) -> None:
    """A file that a data set's description names lies in its folder, and is not hidden: hidden files are of other
    programs, and the hash of a folder of data leaves them out.

    Raises:
        DataError: It does not, or it is.
    """
    inside(folder, name, kind=DataError, source=source)
    if any(part.startswith((".", "cache-")) and part != "." for part in str(name).split("/")):
        raise DataError(
            Bilingual(
                f"{source} names {name}, which is hidden: such files are not read. Rename it.",
                f"{source} 写有隐藏文件 {name}：不读取隐藏文件。请改名。",
            )
        )


def _matching(folder: Path, patterns: dict[str, list[str]], root: Path, source: str) -> Parts:
    """The files of each part that patterns of `datasets` find from `root`; all of them lie in the folder."""
    from datasets.data_files import DataFilesDict

    found = DataFilesDict.from_patterns(patterns, base_path=str(root), allowed_extensions=[*FILE_KINDS])
    parts = {str(part): [Path(str(file)) for file in files] for part, files in found.items()}
    _stay_inside(folder, [file for files in parts.values() for file in files], source)
    return parts


def _stay_inside(folder: Path, files: list[Path], source: str) -> None:
    """Files that were found by a description's patterns lie in the folder, wherever links lead."""
    root = folder.resolve()
    for file in files:
        if not file.is_relative_to(root):
            raise DataError(
                Bilingual(
                    f"{source} names {file}, which is not inside it: only files in {folder} are read.",
                    f"{source} 写有 {file}，它不在文件夹之内：只读取 {folder} 中的文件。",
                )
            )
        _check_file(folder, file.relative_to(root).as_posix(), source)
