"""What a machine of a cluster that others have taken over may send: nothing but a run's files reaches the disk."""

import os
from pathlib import Path
from typing import Any

import pytest

from siliang.compare.packed import Packed, files_of, unpack, unpack_once
from siliang.compare.received import IncomingFolder, checked
from siliang.types import ClusterError, ConfigError


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "../run.json", "adapter/../../x.json", "adapter/..", "..", ".", "", "a", "run.json/x.json"),
        *(
            "adapter",
            "adapter/",
            "adapter//adapter_config.json",
            "./run.json",
            "adapter\\x.json",
            "C:run.json",
            "~/x.json",
        ),
        *(
            "run.json\n",
            "run.json\0",
            "adapter/x.json\n",
            ".bashrc",
            "adapter/.x.json",
            "adapter/x.so",
            "adapter/x.pkl",
        ),
        *("checkpoints/x.json", "checkpoints/checkpoint-1/../../../x.json", "checkpoints/checkpoint-x/state.json"),
        *("adapter/a/b.json", "report.html", "compare.yaml", "adapter/x.pth", "run.json.sh", "model/../x.py", "x.py"),
        *("adapter/..json", "checkpoints/checkpoint-" + "1" * 99 + "/state.json", "adapter/" + "x" * 999 + ".json"),
    ],
)
def test_no_run_has_a_file_of_that_name(name: str, tmp_path: Path) -> None:
    incoming = IncomingFolder(tmp_path / "run", 2**30, "far")
    incoming.write("run.json", b"{}")
    with pytest.raises(ClusterError, match="far sent a file"):
        incoming.write(name, b"x")
    assert [*tmp_path.iterdir()] == []


def test_a_run_comes_in_pieces(tmp_path: Path) -> None:
    """In place of what was there."""
    (tmp_path / "other").mkdir()
    (tmp_path / "run").symlink_to("other")
    incoming = IncomingFolder(tmp_path / "run", 2**30)
    names = ["run.yaml", "run.json", "answers.json", "adapter/adapter_model.safetensors", "adapter/manifest.json"]
    names += ["model/vocab.txt", "model/chat_template.jinja", "model/deep/own_code.py", "model/spiece.model"]
    names += ["checkpoints/checkpoint-12/state.safetensors", "checkpoints/damaged-checkpoint-12/state.json"]
    for name in names:
        incoming.write(name, b"one ")
        incoming.write(name, b"two")
    assert incoming.finish(7 * len(names))
    assert not (tmp_path / "run").is_symlink() and [*(tmp_path / "other").iterdir()] == []
    found = {p.relative_to(tmp_path / "run").as_posix(): p.read_bytes() for p in (tmp_path / "run").rglob("*.*")}
    found = {name: content for name, content in found.items() if not name.endswith(("-12",))}
    assert found == dict.fromkeys(names, b"one two")
    incoming.write("run.json", b"more")
    assert not incoming.finish(5) and (tmp_path / "run" / "run.json").read_bytes() == b"one two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "run"]


def test_no_more_than_a_run_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    incoming = IncomingFolder(tmp_path / "run", 10)
    incoming.write("adapter/adapter_model.safetensors", b"x" * 6)
    with pytest.raises(ClusterError, match="more than 10 bytes"):
        incoming.write("adapter/adapter_config.json", b"x" * 6)
    monkeypatch.setattr("siliang.compare.received.MAX_TEXT_BYTES", 5)
    with pytest.raises(ClusterError, match=r"run.json with more than 5 bytes"):
        incoming.write("run.json", b"x" * 6)
    monkeypatch.setattr("siliang.compare.received.MAX_FILES", 3)
    with pytest.raises(ClusterError, match="more than 3 files"):
        for i in range(4):
            incoming.write(f"model/{i}.json", b"")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "message",
    [
        *(None, 5, [], {}, {"kind": 5}, {"kind": ["done"]}, {"kind": "else"}, {"kind": "file", "name": "run.json"}),
        *({"kind": "file", "name": 5, "bytes": b""}, {"kind": "file", "name": "x", "bytes": "text"}, {"kind": "ready"}),
        *(
            {"kind": "done", "found": {"loss": "<script>"}},
            {"kind": "done", "found": {5: 5}},
            {"kind": "say", "line": 5},
        ),
    ],
)
def test_what_no_run_says(message: Any) -> None:
    found = checked(message)
    assert found["kind"] == "failed" and "sent an unknown message" in found["error"]


def test_what_a_run_says() -> None:
    said = {"kind": "done", "found": {"loss": 0.5, "loads": 1}}
    assert checked(said) == said == checked(said | {"more": "x"})


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "..", "a\\b"])
def test_files_for_a_run_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    packed = Packed("files-" + "0" * 32, ((name, (0,)),))
    for folder in ("in", "cache"):
        (tmp_path / folder).mkdir()
    with pytest.raises(ClusterError, match="not inside it"):
        unpack(packed, tmp_path / "in", lambda piece: b"x")
    with pytest.raises(ClusterError, match="not inside it"):
        unpack_once(packed, tmp_path / "cache", lambda piece: b"x")
    with pytest.raises(ClusterError, match="not inside it"):
        unpack_once(Packed(name, ()), tmp_path / "cache", lambda piece: b"x")
    assert {p.name for p in tmp_path.rglob("*")} == {"in", "cache", packed.folder + ".lock"}


def test_names_of_temporaries_differ(tmp_path: Path) -> None:
    """Two that receive the same run do not meet."""
    one, other = IncomingFolder(tmp_path / "run", 99), IncomingFolder(tmp_path / "run", 99)
    one.write("run.json", b"one")
    other.write("run.json", b"other")
    assert len(os.listdir(tmp_path)) == 2  # noqa: PTH208
    assert one.finish(3) and (tmp_path / "run" / "run.json").read_bytes() == b"one"
    assert other.finish(5) and (tmp_path / "run" / "run.json").read_bytes() == b"other"


def test_what_is_sent_lies_in_the_folder_that_was_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("{}\n")
    (tmp_path / "secret.jsonl").write_text("{}\n")
    assert files_of(str(tmp_path / "set")) == [tmp_path / "set" / "train.jsonl"]
    (tmp_path / "set" / "more.jsonl").symlink_to("../secret.jsonl")
    with pytest.raises(ConfigError, match=r"more.jsonl is a link that leads out"):
        files_of(str(tmp_path / "set"))
