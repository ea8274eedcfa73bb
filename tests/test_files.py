"""The one atomic write: whole or not there, never through a link, with the rights that the user's umask leaves."""

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from siliang import files
from siliang.files import (
    append,
    creating_folder,
    remove,
    remove_stale,
    remove_tree,
    replacing,
    replacing_folder,
    write_text,
)


@pytest.fixture(params=[True, False], ids=["descriptors", "names"])
def there(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder; on systems that open folders, and on others."""
    if not request.param:
        monkeypatch.setattr(os, "supports_dir_fd", set())
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0  # noqa: PTH208
    yield tmp_path
    if before:
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_text(there: Path) -> None:
    write_text(there / "a.json", "一\r\n\n")
    assert (there / "a.json").read_bytes() == "一\r\n\n".encode()
    write_text(there / "a.json", "two")
    assert (there / "a.json").read_text() == "two" and names(there) == ["a.json"]


def test_a_link_is_replaced(there: Path) -> None:
    (there / "key").write_text("secret")
    for target in ("key", "not-there", "a"):
        (there / "a").unlink(missing_ok=True)
        (there / "a").symlink_to(target)
        write_text(there / "a", "new")
        (there / "b").unlink(missing_ok=True)
        (there / "b").symlink_to(target)
        with replacing(there / "b") as temporary:
            temporary.write_text("new")
        assert not (there / "a").is_symlink() and not (there / "b").is_symlink()
    assert (there / "key").read_text() == "secret" and names(there) == ["a", "b", "key"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_rights_that_the_umask_leaves(umask: int, there: Path) -> None:
    before = os.umask(umask)
    try:
        write_text(there / "a", "x")
        with replacing(there / "b") as temporary:
            save_file({"x": torch.ones(2)}, temporary)
        write_text(there / "c", "x", mode=0o600)
        with replacing_folder(there / "d") as folder:
            save_file({"x": torch.ones(2)}, folder / "x")
    finally:
        os.umask(before)
    rights = {p.name: stat.S_IMODE(p.stat().st_mode) for p in there.iterdir()}
    assert stat.S_IMODE((there / "d" / "x").stat().st_mode) == 0o666 & ~umask
    assert rights == {"a": 0o666 & ~umask, "b": 0o666 & ~umask, "c": 0o600, "d": 0o777 & ~umask}


def test_nothing_is_left_of_what_failed(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (there / "a").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(there / "a", "\ud800")
    with pytest.raises(RuntimeError), replacing(there / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), replacing_folder(there / "a") as temporary:
        raise RuntimeError

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(there / "a", "new")
    with pytest.raises(OSError, match="No space"), replacing(there / "a") as temporary:
        temporary.write_text("new")
    assert names(there) == ["a"] and (there / "a").read_text() == "old"


def test_two_write_the_same_file_at_once(there: Path) -> None:
    texts = [str(i) * 200_000 for i in range(8)]
    threads = [threading.Thread(target=lambda t=t: [write_text(there / "a", t) for _ in range(5)]) for t in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (there / "a").read_text() in texts and names(there) == ["a"]


def test_the_name_that_the_user_knows_is_in_the_error(there: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        write_text(there / "none" / "a.json", "x")
    assert ".tmp-" not in str(error.value)
    write_text(there / ("x" * 255), "x")  # the longest name that there is
    assert names(there) == ["x" * 255]


def test_a_folder_that_is_filled(there: Path) -> None:
    with creating_folder(there / "a") as temporary:
        (temporary / "x").write_text("one")
    with pytest.raises(OSError, match="not empty"), creating_folder(there / "a") as temporary:
        (temporary / "x").write_text("two")
    (there / "b").symlink_to("a")
    with creating_folder(there / "b") as temporary:
        (temporary / "x").write_text("three")
    assert (there / "a" / "x").read_text() == "one" and (there / "b" / "x").read_text() == "three"
    assert names(there) == ["a", "b"]


def test_what_is_removed(there: Path) -> None:
    (there / "kept" / "deep").mkdir(parents=True)
    for take in (remove, remove_tree):
        (there / "link").symlink_to("kept")
        take(there / "link")
        (there / "folder" / "x").mkdir(parents=True)
        (there / "folder" / "x" / "out").symlink_to(there / "kept")
        take(there / "folder")
        take(there / "none")
    assert names(there) == ["kept"] and names(there / "kept") == ["deep"]


def test_only_known_names_are_swept(there: Path) -> None:
    (there / "kept").mkdir()
    (there / "kept" / "x").write_text("x")
    left = [f".a.tmp-{'0' * 16}", ".a.tmp", ".a.tmp1", f".b.tmp-{'0' * 16}", f".a.tmp-{'g' * 16}", f"a.tmp-{'0' * 16}"]
    for name in left:
        (there / name).write_text("x")
    (there / f".a.tmp-{'1' * 16}").symlink_to("kept")
    (there / f".a.tmp-{'2' * 16}").mkdir()
    remove_stale(there, "a|c")
    assert names(there) == sorted([*left[1:], "kept"]) and names(there / "kept") == ["x"]


def test_a_file_that_grows(there: Path) -> None:
    for _ in range(2):
        with append(there / "log") as opened:
            opened.write(b"one\n")
    assert (there / "log").read_text() == "one\none\n"
    (there / "key").write_text("secret")
    (there / "soft").symlink_to("key")
    os.link(there / "key", there / "hard")
    os.mkfifo(there / "pipe")
    for name in ("soft", "hard", "pipe"):
        with append(there / name) as opened:
            opened.write(b"one\n")
        assert (there / name).read_text() == "one\n"
    assert (there / "key").read_text() == "secret"


def test_a_temporary_name_is_never_the_same() -> None:
    assert len({files.temporary_name("a") for _ in range(1000)}) == 1000
