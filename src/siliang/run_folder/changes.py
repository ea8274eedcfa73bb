"""What of a run's base model and data is not as it was, by the hashes that its record keeps."""

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
    """In what a base model differs from the one whose files' hashes these were; None for nothing, or where there are no
    files to look at."""
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
    """Which of these sources is not what it was; None where all are."""
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
    """Of the base model's files, and of the data's, with a template that is a file."""
    read = [*sources_of(config), *([config.data.template] if has_template_file(config) else [])]
    return base_files(config.model, config.revision), [File(path=absolute(p), sha256=source_sha256(p)) for p in read]


def sources_of(config: RunConfig) -> list[str]:
    """The names of a run's data, those held out behind those trained on."""
    return [s.path for s in (*config.data.train_sources, *config.data.eval_sources)]


def what_changed(
    config: RunConfig, model_files: dict[str, str], data_files: list[File]
) -> list[tuple[type[ModelError | DataError], str, str]]:
    """What of the base model and the data of `config` is not as when these hashes were made, wherever it lies: the kind
    of error, what has changed, and which part of it."""
    found: list[tuple[type[ModelError | DataError], str, str]] = []
    if (changed := changed_base(config.model, config.revision, model_files)) is not None:
        found.append((ModelError, Bilingual(f"the base model {config.model}", f"基座模型 {config.model} "), changed))
    now, data = hashes(config)[1], Bilingual("the data", "数据")
    if len(now) != len(data_files):
        return [*found, (DataError, data, Bilingual("there are other sources", "数据来源不同"))]
    other = next((new.path for new, was in zip(now, data_files, strict=True) if new.sha256 != was.sha256), None)
    if other is None:
        return found
    return [*found, (DataError, data, Bilingual(f"{other} is not what it was", f"{other} 与原来不同"))]


def _exists(path: str) -> bool:
    return Path(path).exists() or is_pattern(path)
