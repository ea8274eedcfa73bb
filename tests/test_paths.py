"""Where a name may lead that stands in a stranger's file, and what a folder may hold."""

import os
import socket
from pathlib import Path

import pytest

from siliang.paths import check_links, inside
from siliang.types import ConfigError, DataError, ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file in it, beside a secret."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (tmp_path / "it" / "part").mkdir(parents=True)
    (tmp_path / "it" / "part" / "rows.jsonl").write_text("{}")
    return tmp_path / "it"


@pytest.mark.parametrize(
    "name", ["part/rows.jsonl", "./part/rows.jsonl", "part//rows.jsonl", "new/one", "a..b", "*.csv"]
)
def test_a_name_inside(name: str, folder: Path) -> None:
    assert inside(folder, name) == folder / name


NAMES = [
    *("/etc/passwd", "//host/share", "../secret/key", "part/../../secret/key", "part/..", "..", ".", "./", "~/x"),
    *("~root/x", "C:x", "c:\\x", "..\\secret\\key", "part\\rows.jsonl", "\\\\host\\share", "file:///etc/passwd"),
    *("local://x", "zip://x::/etc/passwd", "gzip::x"),
]


@pytest.mark.parametrize("name", [*NAMES, "", "a\0b", "a\nb", "\x1b[2J", 5, None, ["a"]])
def test_a_name_that_leads_out(name: str, folder: Path) -> None:
    with pytest.raises(DataError, match="not inside it"):
        inside(folder, name, kind=DataError)


def test_a_name_that_no_file_can_have(folder: Path) -> None:
    with pytest.raises(ConfigError, match="names"):
        inside(folder, "\ud800")
    with pytest.raises(ConfigError) as error:
        inside(folder, "../" + "x" * 10_000, source="comparison.json")
    assert str(error.value).startswith("comparison.json names") and len(str(error.value)) < 500


def test_a_home_is_none_in_the_folder_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError):
        inside(Path(), "~/x")
    assert inside(Path(), "part/rows.jsonl").is_file()


def test_links(folder: Path) -> None:
    (folder / "within").symlink_to("part")
    (folder / "later").symlink_to("not-there-yet")
    check_links(folder)
    assert inside(folder, "within/rows.jsonl").is_file()
    (folder / "out").symlink_to("../secret")
    (folder / "ring").symlink_to("ring")
    for name in ("out", "out/key", "out/new", "ring", "ring/x"):
        with pytest.raises(ConfigError, match="a link leads out"):
            inside(folder, name)


@pytest.mark.parametrize("place", ["x", "part/x", ".x"])
@pytest.mark.parametrize("target", ["secret", "secret/key", "not-there", "it/../secret"])
def test_a_folder_with_a_link_that_leads_out(target: str, place: str, folder: Path) -> None:
    for written in (folder.parent / target, os.path.relpath(folder.parent / target, (folder / place).parent)):
        (folder / place).symlink_to(written)
        with pytest.raises(ModelError, match="is a link that leads out") as error:
            check_links(folder, ModelError)
        assert str(folder / place) in str(error.value) and "\n" not in str(error.value)
        (folder / place).unlink()


@pytest.mark.parametrize("target", ["/dev/null", "/dev/stdin", "/", "x"])
def test_a_link_to_a_device_or_itself(target: str, folder: Path) -> None:
    (folder / "x").symlink_to(target)
    with pytest.raises(ConfigError, match="is a link that leads"):
        check_links(folder)


def test_a_folder_that_is_a_link_itself(folder: Path) -> None:
    """The user named it."""
    (folder.parent / "name").symlink_to(folder)
    check_links(folder.parent / "name")
    assert inside(folder.parent / "name", "part/rows.jsonl").is_file()


def test_what_is_neither_file_nor_folder(folder: Path) -> None:
    os.mkfifo(folder / "part" / "pipe")
    with pytest.raises(ConfigError, match="part/pipe is neither a file nor a folder"):
        check_links(folder)
    (folder / "part" / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(folder / "s"))
        with pytest.raises(ConfigError, match="neither a file nor a folder"):
            check_links(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into any folder")
def test_a_folder_that_hides_what_it_holds(folder: Path) -> None:
    (folder / "part").chmod(0o300)
    try:
        with pytest.raises(ConfigError, match="part cannot be listed"):
            check_links(folder)
    finally:
        (folder / "part").chmod(0o700)


def test_no_folder(tmp_path: Path) -> None:
    check_links(tmp_path / "none")
    (tmp_path / "file").touch()
    check_links(tmp_path / "file")
