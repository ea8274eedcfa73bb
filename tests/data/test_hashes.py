"""Hashes of the files that a run reads."""

import os
import time
from pathlib import Path

import pytest

from siliang.data import hashes
from siliang.data.cache import cache_folder
from siliang.data.hashes import file_sha256, source_sha256
from siliang.types import ConfigError


def test_hash_follows_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("a")
    first = source_sha256(str(path))
    path.write_text("b")
    assert source_sha256(str(path)) != first


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison of 21 runs would read the base model's weights 21 times."""
    monkeypatch.setenv("SILIANG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED_S", -1.0)  # the file is a second old at most
    read: list[Path] = []
    sha256 = hashes.sha256
    monkeypatch.setattr(hashes, "sha256", lambda path: read.append(path) or sha256(path))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(hashes.KEPT_FROM_BYTES))
    first = file_sha256(weights)
    (entry,) = (tmp_path / "cache" / "hashes").iterdir()
    long_ago = time.time() - 29 * 86400
    os.utime(entry, (long_ago, long_ago))
    assert file_sha256(weights) == first and len(read) == 1
    assert entry.stat().st_mtime > long_ago  # what is used is kept

    entry.write_text('{"state": [], "sha256": "0"}')  # damaged
    assert file_sha256(weights) == first and len(read) == 2
    weights.write_bytes(b"a" + bytes(hashes.KEPT_FROM_BYTES - 1))  # the same size
    assert file_sha256(weights) != first and len(read) == 3

    monkeypatch.setattr(hashes, "SETTLED_S", 3600.0)  # it may have changed within the grain of its clock
    os.utime(weights)
    file_sha256(weights), file_sha256(weights)
    assert len(read) == 5


def test_a_file_where_the_cache_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SILIANG_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="is a file, and siliang needs a folder there: set SILIANG_CACHE"):
        cache_folder()
