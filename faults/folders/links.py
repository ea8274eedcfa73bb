"""Kind 2: names that lead out, and files that are none."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from faults.folders.making import (
    FURTHER,
    HELLO,
    USES,
    change_json,
    change_settings,
    copy,
    fifo,
    link,
    sparse,
    table,
    victim,
    victims,
    write,
)
from faults.folders.sandbox import Case, Site, Step

KIND = "links"


def _nothing(site: Site) -> None:
    pass


def _open(site: Site) -> None:
    """A comparison that goes on, all runs of which are done: what is left is the table and the page."""
    change_json(site.evil / "comparison.json", {"status": "running"})


def _waiting(site: Site) -> None:
    """A comparison with a run that is to be made again."""
    change_json(site.evil / "comparison.json", {"status": "running", "trials/0/status": "waiting"})


def _to_victim(name: str, *, folder: bool = False) -> Callable[[Site], object]:
    """A link in place of a file or a folder of the stranger's."""

    def change(site: Site) -> None:
        link(site.evil / name, victims(site) if folder else victim(site))

    return change


def _copied_out(name: str) -> Callable[[Site], object]:
    """What is there lies outside, whole, and a link leads to it."""

    def change(site: Site) -> None:
        there = site.outside / Path(name).name
        shutil.move(site.evil / name, there)
        link(site.evil / name, there)

    return change


def _hard(name: str) -> Callable[[Site], object]:
    """A second name of the user's file."""

    def change(site: Site) -> None:
        path = site.evil / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(victim(site))

    return change


def _odd(name: str, make: Callable[[Path], object]) -> Callable[[Site], object]:
    def change(site: Site) -> None:
        path = site.evil / name
        path.unlink(missing_ok=True)
        make(path)

    return change


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's name is at most 108 bytes
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def _zero(path: Path) -> None:
    """/dev/zero under another name, where this user may make it; else a link to it."""
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))
    except OSError:
        path.symlink_to("/dev/zero")


PID = os.getpid  # of the command: it runs in the process that builds the case
# what `report` writes, under names that a folder may hold already
REPORTED = {
    f"{name} before `report`": _to_victim(name)
    for name in (
        "report.html",
        ".report.html.tmp",
        ".comparison.json.tmp",
        ".comparison.json.tmp1",
        ".report.html.tmp1",
    )
} | {
    "report.html is a folder's link": _to_victim("report.html", folder=True),
    "a hard link as report.html": _hard("report.html"),
    "the temporary name by the process's number": lambda site: link(
        site.evil / f".report.html.tmp{PID()}", victim(site)
    ),
}
READ_BY_REPORT = {
    f"{name} leads out before `report`": _copied_out(name)
    for name in (
        "comparison.json",
        "runs",
        "runs/lora",
        "runs/lora/seed-42",
        "runs/lora/seed-42/run.json",
        "runs/lora/seed-42/answers.json",
    )
}
COMPARED = {
    f"{name} before `compare`": _to_victim(name)
    for name in ("compare.yaml.tmp", ".compare.yaml.tmp", ".comparison.json.tmp", ".report.html.tmp", "report.html")
} | {
    "logs lead out, and a run is made": lambda site: (_waiting(site), _to_victim("logs", folder=True)(site)),
    "a log leads out, and a run is made": lambda site: (_waiting(site), _to_victim("logs/worker-1.log")(site)),
    "a run's folder leads out, and is made": lambda site: (
        _waiting(site),
        _to_victim("runs/lora/seed-42", folder=True)(site),
    ),
    "the runs of a method lead out": _to_victim("runs/lora", folder=True),
    "a run's folder leads out": _to_victim("runs/lora/seed-42", folder=True),
    "base leads out": _to_victim("base", folder=True),
    "base/answers.json leads out": _to_victim("base/answers.json"),
    "a temporary name by the process's number leads out": lambda site: link(
        site.evil / f".comparison.json.tmp{PID()}", victim(site)
    ),
    "a trial's folder is outside": lambda site: (
        change_json(site.evil / "comparison.json", {"trials/0/folder": "../../outside/victims"}) or victims(site)
    ),
    "a trial's folder is absolute": lambda site: change_json(
        site.evil / "comparison.json", {"trials/0/folder": str(victims(site))}
    ),
}
RESUMED = {
    "checkpoints lead out": _to_victim("checkpoints", folder=True),
    "checkpoints lead to the good ones outside": _copied_out("checkpoints"),
    "a checkpoint leads out": _copied_out("checkpoints/checkpoint-2"),
    "an older checkpoint leads out": _copied_out("checkpoints/checkpoint-1"),
    "a further checkpoint leads out": _to_victim("checkpoints/checkpoint-3", folder=True),
    "a damaged checkpoint leads out": lambda site: (
        link(site.evil / "checkpoints" / "checkpoint-9", victims(site)),
        link(site.evil / "checkpoints" / "damaged-checkpoint-9", victims(site)),
    ),
    "adapter leads out": _copied_out("adapter"),
    "adapter leads to the user's folder": _to_victim("adapter", folder=True),
    "model leads out": _to_victim("model", folder=True),
    "run.json leads out": _copied_out("run.json"),
    "run.yaml leads out": _copied_out("run.yaml"),
    "a state leads out": _copied_out("checkpoints/checkpoint-2/state.safetensors"),
    "a manifest leads out": _copied_out("checkpoints/checkpoint-2/manifest.json"),
    "a temporary name of the adapter leads out": lambda site: link(site.evil / f".adapter.tmp{PID()}", victims(site)),
    "an old adapter leads out": lambda site: link(site.evil / ".adapter.tmp-old", victims(site)),
    "a temporary name of a checkpoint leads out": lambda site: link(
        site.evil / "checkpoints" / f".checkpoint-3.tmp{PID()}", victims(site)
    ),
    "a temporary name of run.json leads out": lambda site: link(site.evil / f".run.json.tmp{PID()}", victim(site)),
    "names such as temporary ones are links": lambda site: [
        link(site.evil / f".{n}.tmp", victims(site)) for n in ("a", "run.yaml", "x.y")
    ],
    "run.json is a hard link": lambda site: (
        victim(site, content=(site.evil / "run.json").read_bytes()),
        _hard_again(site, "run.json"),
    ),
    "run.yaml names another output": lambda site: change_settings(site, {"output": str(victims(site))}),
    "run.yaml names an output above": lambda site: (
        change_settings(site, {"output": "../outside/victims"}) or victims(site)
    ),
}


def _hard_again(site: Site, name: str) -> None:
    (site.evil / name).unlink()
    (site.evil / name).hardlink_to(site.outside / "victim.txt")


MERGED = {
    "the temporary name of the merged folder leads out": lambda site: link(
        site.work / f".merged.tmp{PID()}", victims(site)
    ),
    "the old merged folder leads out": lambda site: link(site.work / ".merged.tmp-old", victims(site)),
    "a temporary name in the current folder": lambda site: [
        link(site.work / f".merged{n}", victims(site)) for n in (".tmp", "-tmp", ".partial")
    ],
}

SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": fifo,
    "a socket": _socket,
    "a device": _zero,
    "a loop": lambda p: p.symlink_to(p.name),
}
FILES = (
    "run.yaml",
    "run.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/manifest.json",
)
SPECIALS = (
    {f"{name} is {what}": _odd(name, make) for name in FILES for what, make in SPECIAL.items()}
    | {f"{name} is a terabyte": _odd(name, sparse) for name in FILES}
    | {
        "run.yaml is a folder": _odd("run.yaml", lambda p: p.mkdir()),
        "run.json is a folder": _odd("run.json", lambda p: p.mkdir()),
        "adapter_config.json is a folder": _odd("adapter/adapter_config.json", lambda p: p.mkdir()),
    }
)


def _huge(site: Site) -> None:
    for i in range(20_000):
        (site.evil / f"f{i}").touch()


def _deep(site: Site) -> None:
    here = Path.cwd()
    os.chdir(site.evil)
    for _ in range(400):
        Path("d" * 100).mkdir()
        os.chdir("d" * 100)
    os.chdir(here)


def _pipes(site: Site) -> None:
    for name in ("x.json", "adapter/x.safetensors", "adapter/README.md", "checkpoints/x"):
        fifo(site.evil / name)


HARMLESS = {
    "20,000 other files": _huge,
    "40,000 characters deep": _deep,
    "names of other scripts": lambda site: [
        write(site.evil / n, "x") for n in ("名字.txt", "a\u202eb", "CON", "é", "e\u0301")
    ],
    "a name that is not text": lambda site: write(Path(os.fsdecode(os.fsencode(site.evil) + b"/\xff\xfe")), "x"),
    "pipes that nobody needs": _pipes,
    "names in the other case": lambda site: [
        write(site.evil / n, "x: 1") for n in ("RUN.YAML", "Run.json", "Adapter/x")
    ],
    "a name with a line's end": lambda site: write(site.evil / "a\nrun.yaml", "x"),
}


def _hub(site: Site, blob: Callable[[Path], object]) -> Path:
    """A base model laid out as in the hub's cache, in the stranger's own folder."""
    repository = site.evil / "models--a--b"
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(site.shared / "llama", snapshot)
    (repository / "blobs").mkdir()
    blob(repository)
    copied = "evil/models--a--b/snapshots/abc"
    change_settings(site, {"model": copied})
    change_json(site.evil / "run.json", {"model_files": {}})
    return snapshot


def _blobs_out(site: Site) -> None:
    def make(repository: Path) -> None:
        out = site.outside / "blobs"
        out.mkdir()
        shutil.move(repository / "snapshots" / "abc" / "model.safetensors", out / "x")
        shutil.rmtree(repository / "blobs")
        link(repository / "blobs", out)
        link(repository / "snapshots" / "abc" / "model.safetensors", "../../blobs/x")

    _hub(site, make)


def _blob_out(site: Site) -> None:
    def make(repository: Path) -> None:
        shutil.move(repository / "snapshots" / "abc" / "tokenizer.json", site.outside / "tokenizer.json")
        link(repository / "blobs" / "x", site.outside / "tokenizer.json")
        link(repository / "snapshots" / "abc" / "tokenizer.json", "../../blobs/x")

    _hub(site, make)


def _base_links(name: str, to: Callable[[Site, Path], Path | str]) -> Callable[[Site], object]:
    def change(site: Site) -> None:
        base = site.work / "evil" / "base"
        shutil.copytree(site.shared / "llama", base)
        change_settings(site, {"model": "evil/base"})
        change_json(site.evil / "run.json", {"model_files": {}})
        target = to(site, base / name)
        link(base / name, target)

    return change


def _moved(site: Site, path: Path) -> Path:
    out = site.outside / path.name
    shutil.move(path, out)
    return out


BASES = (
    {
        "the blobs of a made-up cache lead out": _blobs_out,
        "a blob of a made-up cache leads out": _blob_out,
    }
    | {
        f"the base model's {name} leads out": _base_links(name, _moved)
        for name in (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        )
    }
    | {
        "the base model's folder leads out": lambda site: (
            with_base_of(site),
            shutil.move(site.evil / "base", site.outside / "base"),
            link(site.evil / "base", site.outside / "base"),
        ),
        "templates of the base model lead out": lambda site: (
            with_base_of(site),
            link(site.evil / "base" / "additional_chat_templates", victims(site)),
        ),
        "a link of a link": lambda site: (
            with_base_of(site),
            shutil.move(site.evil / "base" / "config.json", site.outside / "config.json"),
            link(site.evil / "x", site.outside / "config.json"),
            link(site.evil / "base" / "config.json", "../x"),
        ),
    }
)


def with_base_of(site: Site) -> None:
    base = site.work / "evil" / "base"
    shutil.copytree(site.shared / "llama", base)
    change_settings(site, {"model": "evil/base"})
    change_json(site.evil / "run.json", {"model_files": {}})


def _special_base(name: str, make: Callable[[Path], object]) -> Callable[[Site], object]:
    def change(site: Site) -> None:
        with_base_of(site)
        path = site.evil / "base" / name
        path.unlink(missing_ok=True)
        make(path)

    return change


SPECIAL_BASES = {
    f"the base model's {name} is {what}": _special_base(name, make)
    for name in (
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer_config.json",
    )
    for what, make in (("a pipe", fifo), ("a terabyte", sparse))
}


def _started(name: str) -> Case:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        change_settings(site, {"model": name})
        change_json(site.evil / "run.json", {"model_files": {}})
        return [HELLO]

    return Case(KIND, f"the base model is {name}", build)


ELSEWHERE = [
    _started(name)
    for name in (
        "//server/share",
        "http://localhost:9/model",
        "https://example.com/model",
        "file:///etc",
        "/dev/zero",
        "/proc/self",
        "nobody/nothing",
        "hf://nobody/nothing",
        "s3://bucket/model",
        "~/.ssh",
        "../outside",
        "\\\\server\\share",
    )
]

CASES = [
    *table(KIND, REPORTED, base="comparison", steps=[("report", "evil")], expected="either"),
    *table(KIND, READ_BY_REPORT, base="comparison", steps=[("report", "evil")]),
    *table(
        KIND,
        COMPARED,
        base=lambda site: (copy(site, "comparison"), _open(site)),
        steps=[("compare", "evil/compare.yaml")],
        expected="either",
    ),
    *table(KIND, RESUMED, steps=[USES["resume"]], expected="either"),
    *table(KIND, MERGED, steps=[USES["merge"]], expected="either"),
    *table(KIND, SPECIALS),
    *table(KIND, HARMLESS, steps=[HELLO, USES["resume"]], expected="either"),
    *table(KIND, BASES),
    *table(KIND, SPECIAL_BASES),
    *ELSEWHERE,
    *(
        case
        for use in FURTHER
        for case in table(KIND, {f"adapter leads out before `{use}`": _copied_out("adapter")}, steps=[USES[use]])
    ),
    *table(KIND, {"a pipe among a run's files": _pipes}, steps=[USES["report"]], expected="either"),
]
