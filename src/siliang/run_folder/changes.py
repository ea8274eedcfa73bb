"""Changes of a run's base model and data since its training, by the hashes in its record."""

from __future__ import annotations

from pathlib import Path

from siliang.config import RunConfig
from siliang.data.hashes import base_files, is_loaded_beside, source_sha256
from siliang.files import absolute, is_pattern
from siliang.language import Bilingual
from siliang.records import File
from siliang.run_settings import has_template_file
from siliang.types import DataError, ModelError


def changed_base(model: str, revision: str | None, was: dict[str, str]) -> str | None:
    """A change of a base model since its files had these hashes; None without a change, or without local files."""
    if not was or not (now := base_files(model, revision)):
        return None
    if added := sorted(name for name in now.keys() - was.keys() if is_loaded_beside(name, was.keys())):
        return Bilingual(f"{added[0]} was not there", f"{added[0]} 原来没有")
    if missing := sorted(was.keys() - now.keys()):
        return Bilingual(f"{missing[0]} is missing", f"缺少 {missing[0]}")
    if other := [name for name in sorted(was) if now[name] != was[name]]:
        more, more_zh = (f", and {len(other) - 1} more", f" 等 {len(other)} 个文件") if len(other) > 1 else ("", "")
        return Bilingual(f"{other[0]} is another file{more}", f"{other[0]}{more_zh} 与原来不同")
    return None


def changed_data(paths: list[str], was: list[File]) -> str | None:
    """The first of these sources that has changed; None if none has."""
    known = {f.path: f.sha256 for f in was}
    for path in paths:
        if (now := source_sha256(path)) == known.get(path) or not known:
            continue
        if path in known:
            if _exists(path):
                return Bilingual(f"{path} has changed", f"{path} 变了")
            return Bilingual(f"{path} is gone", f"{path} 已不存在")
        if now not in known.values():
            return Bilingual(f"{path} is other data", f"{path} 是别的数据")
    return None


def hashes(config: RunConfig) -> tuple[dict[str, str], list[File]]:
    """The hashes of the base model's files and of the data's files, including a template file."""
    read = [*sources_of(config), *([config.data.template] if has_template_file(config) else [])]
    return base_files(config.model, config.revision), [File(path=absolute(p), sha256=source_sha256(p)) for p in read]


def sources_of(config: RunConfig) -> list[str]:
    """The names of a run's data: first the training data, then the held-out data."""
    return [s.path for s in (*config.data.train_sources, *config.data.eval_sources)]


def what_changed(
    config: RunConfig, model_files: dict[str, str], data_files: list[File]
) -> list[tuple[type[ModelError | DataError], str, str]]:
    """Changes of the base model and the data of `config` since these hashes: the class of the error, what has changed,
    and which part of it. Where the files are does not matter."""
    changes: list[tuple[type[ModelError | DataError], str, str]] = []
    if (changed := changed_base(config.model, config.revision, model_files)) is not None:
        changes.append((ModelError, Bilingual(f"the base model {config.model}", f"基座模型 {config.model} "), changed))
    now, data = hashes(config)[1], Bilingual("the data", "数据")
    if len(now) != len(data_files):
        return [*changes, (DataError, data, Bilingual("the number of sources differs", "数据来源的数目不同"))]
    other = next((new.path for new, was in zip(now, data_files, strict=True) if new.sha256 != was.sha256), None)
    if other is None:
        return changes
    return [*changes, (DataError, data, Bilingual(f"{other} has changed", f"{other} 已改变"))]


def _exists(path: str) -> bool:
    return Path(path).exists() or is_pattern(path)
