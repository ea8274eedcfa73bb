"""A folder from a stranger with links in it, opened by each command: nothing outside is read, written or removed."""

import json
import os
import shutil
from pathlib import Path

import pytest
from commands import refused, run
from records import SCORES, comparison
from tiny import WORDS, write_jsonl

ROWS = [{"instruction": f"say {w}", "input": "", "output": f"{w} {w}"} for w in WORDS[-24:]]


class Outside:
    """What is the user's own, and must stay as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "deep").mkdir(parents=True)
        (folder / "key").write_text("secret")
        (folder / "deep" / "note").write_text("mine")
        for name in (
            "checkpoint-1",
            "checkpoint-2",
            "damaged-checkpoint-1",
            ".adapter.tmp-0123456789abcdef",
            ".x.tmp1",
        ):
            (folder / name).mkdir()
            (folder / name / "kept").write_text("kept")
        self.was = self.now()

    def now(self) -> dict[str, tuple[int, int, bytes | None]]:
        return {
            str(p.relative_to(self.folder)): (
                p.lstat().st_mode,
                p.lstat().st_ino,
                p.read_bytes() if p.is_file() else None,
            )
            for p in sorted(self.folder.rglob("*"))
        }


@pytest.fixture
def outside(tmp_path: Path) -> Outside:
    return Outside(tmp_path / "outside")


@pytest.fixture(scope="module")
def begun(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with two checkpoints, which was finished; beside it its data."""
    folder = tmp_path_factory.mktemp("handed")
    write_jsonl(folder / "data.jsonl", ROWS)
    flags = [
        "--model",
        model_folders["llama"],
        "--data",
        folder / "data.jsonl",
        "--task",
        "causal_lm",
        "--method",
        "lora",
    ]
    sets = [
        "train.max_steps=4",
        "train.save_every=2",
        "train.batch_size=4",
        "data.max_length=32",
        "train.precision=fp32",
    ]
    words = [word for s in sets for word in ("--set", s)]
    ended = run("train", *flags, *words, "--output", folder / "run")
    assert ended.code == 0, ended
    return folder


@pytest.fixture
def handed(begun: Path, tmp_path: Path) -> Path:
    """A copy of the run, as a stranger hands it over."""
    return shutil.copytree(begun / "run", tmp_path / "run")


@pytest.fixture
def stopped(handed: Path) -> Path:
    """The same, stopped behind its first checkpoint."""
    values = json.loads((handed / "run.json").read_text()) | {"status": "interrupted"}
    (handed / "run.json").write_text(json.dumps(values))
    shutil.rmtree(handed / "adapter")
    shutil.rmtree(handed / "checkpoints" / "checkpoint-4")
    return handed


def link_to(path: Path, target: Path) -> None:
    """What was at `path` is `target` now."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


PLACES = {
    "run.json": "key",
    "run.yaml": "key",
    "answers.json": "key",
    "adapter": "deep",
    "model": "deep",
    "checkpoints": "",
    "checkpoints/checkpoint-2": "deep",
    "checkpoints/checkpoint-4": "deep",
    "checkpoints/checkpoint-2/manifest.json": "key",
    "checkpoints/damaged-checkpoint-2": "deep",
    "checkpoints/.checkpoint-4.tmp-0123456789abcdef": "deep",
    "adapter/adapter_config.json": "key",
    "adapter/adapter_model.safetensors": "key",
    "adapter/manifest.json": "key",
    ".run.json.tmp": "key",
    ".run.json.tmp-0123456789abcdef": "key",
    ".adapter.tmp-0123456789abcdef": "deep",
    "notes.txt": "key",
    "loop": "../..",
}


@pytest.mark.parametrize("place", PLACES)
def test_no_run_with_a_link_that_leads_out_is_opened(
    place: str, stopped: Path, begun: Path, outside: Outside, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    link_to(stopped / place, outside.folder / PLACES[place])
    for words in (
        ("train", stopped, "--resume"),
        ("train", stopped / "run.yaml", "--resume"),
        ("report", stopped),
        ("eval", stopped),
        ("predict", stopped, begun / "data.jsonl"),
        ("generate", stopped, "say"),
        ("chat", stopped),
        ("merge", stopped, "--output", tmp_path / "merged"),
        ("train", "--adapter", stopped, "--data", begun / "data.jsonl", "--output", tmp_path / "further"),
        ("eval", stopped / "checkpoints" / "checkpoint-2"),
    ):
        said = refused(*words)
        assert "is a link that leads out of" in said, words
        assert outside.now() == outside.was, words
    assert not (tmp_path / "merged").exists() and not (tmp_path / "further").exists()


@pytest.mark.parametrize("place", ["adapter", "checkpoints/checkpoint-2", "adapter/adapter_config.json", "adapter/x"])
def test_no_adapter_with_a_link_that_leads_out_is_opened(
    place: str, handed: Path, begun: Path, outside: Outside, tmp_path: Path
) -> None:
    link_to(handed / place, outside.folder / PLACES.get(place, ""))
    for words in (
        ("eval", handed / "adapter"),
        ("train", "--adapter", handed / "adapter", "--data", begun / "data.jsonl", "--output", tmp_path / "further"),
        ("train", "--adapter", handed / "adapter", "--data", begun / "data.jsonl", "--output", tmp_path / "f"),
    ):
        assert "is a link that leads out of" in refused(*words)
    assert outside.now() == outside.was


@pytest.mark.parametrize(
    "place",
    [
        *(".report.html.tmp", "report.html", ".report.html.tmp-0123456789abcdef", "comparison.json", "compare.yaml"),
        *("base", "base/answers.json", "runs", "runs/lora", "runs/lora/seed-0", "runs/lora/seed-0/run.json"),
        *("logs", "logs/worker-1.log", ".comparison.json.tmp", "timing", "x"),
    ],
)
def test_no_comparison_with_a_link_that_leads_out_is_opened(place: str, tmp_path: Path, outside: Outside) -> None:
    folder = comparison(tmp_path / "handed", SCORES)
    (folder / "compare.yaml").write_text("model: x\ntask: seq_cls\nmethods: [lora]\ndata: {train: x.jsonl}\n")
    link_to(folder / place, outside.folder / ("key" if "." in place else ""))
    (folder / "compare.yaml").touch()
    for words in (("report", folder), ("compare", folder / "compare.yaml")):
        said = refused(*words)
        assert "is a link that leads out of" in said or place == "compare.yaml", said
        assert outside.now() == outside.was


def test_what_is_written_replaces_a_link_and_is_never_written_through_it(tmp_path: Path, outside: Outside) -> None:
    """Links within the folder are let in."""
    folder = comparison(tmp_path / "handed", SCORES)
    kept = folder / "runs" / "lora" / "seed-0" / "run.json"
    was = kept.read_bytes()
    for name in ("report.html", ".report.html.tmp", f".report.html.tmp{os.getpid()}"):
        (folder / name).symlink_to(kept)
    assert run("report", folder).code == 0
    assert kept.read_bytes() == was
    assert not (folder / "report.html").is_symlink() and "<html" in (folder / "report.html").read_text()
    # the user's own choice of a name is a name too
    (tmp_path / "page.html").symlink_to(outside.folder / "key")
    assert "exists already" in refused("report", folder, "--output", tmp_path / "page.html")
    (tmp_path / "page.html").unlink()
    assert run("report", folder, "--output", tmp_path / "page.html").code == 0
    assert outside.now() == outside.was and "<html" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("name", [".merged.tmp{pid}", ".merged.tmp", "merged"])
@pytest.mark.parametrize("target", ["deep", "key", "not-there"])
def test_no_temporary_name_of_a_merge_can_be_foreseen(
    name: str, target: str, handed: Path, outside: Outside, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name.format(pid=os.getpid())).symlink_to(outside.folder / target)
    ended = run("merge", handed, "--output", tmp_path / "out" / "merged")
    assert outside.now() == outside.was
    assert ended.code == (2 if name == "merged" else 0), ended
    if ended.code == 0:
        assert (tmp_path / "out" / "merged" / "config.json").is_file()
        assert (tmp_path / "out" / name.format(pid=os.getpid())).is_symlink()


def test_a_resume_removes_only_what_it_knows(
    stopped: Path, begun: Path, monkeypatch: pytest.MonkeyPatch, outside: Outside
) -> None:
    """Links within the folder, and names that are like ours."""
    kept = ["mine.tmp", ".mine.tmp1", ".mine.tmp-0123456789abcdef", "checkpoints/.x.tmp", "checkpoints/checkpoint-x"]
    for name in kept:
        (stopped / name).mkdir(parents=True)
        (stopped / name / "kept").write_text("kept")
    ours = [".adapter.tmp-0123456789abcdef", "checkpoints/.checkpoint-4.tmp-0123456789abcdef"]
    for name in ours:
        (stopped / name).mkdir()
        (stopped / name / "half").write_text("half")
    (stopped / ".run.json.tmp-0123456789abcdef").write_text("half")
    (stopped / "checkpoints" / "checkpoint-1").symlink_to("checkpoint-x")
    ended = run("train", stopped, "--resume")
    assert ended.code == 0, ended
    for name in kept:
        assert (stopped / name / "kept").read_text() == "kept", name
    for name in [*ours, ".run.json.tmp-0123456789abcdef"]:
        assert not (stopped / name).exists(), name


def test_settings_are_not_written_through_a_link(
    model_folders: dict[str, Path], review_file: Path, outside: Outside, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").symlink_to(outside.folder / "not-there")
    flags = ("--model", model_folders["bert"], "--data", review_file, "--task", "seq_cls")
    assert "exists: choose another name" in refused("plan", *flags, "--write", tmp_path / "run.yaml")
    assert outside.now() == outside.was


@pytest.mark.parametrize("name", ["memory.jsonl", "hashes", "tokens"])
def test_the_cache(name: str, outside: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from siliang.plan.history import record_work

    monkeypatch.setenv("SILIANG_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / name).symlink_to(outside.folder / ("key" if "." in name else "deep"))
    record_work("a card", 5)
    record_work("a card", 7)
    assert outside.now() == outside.was
