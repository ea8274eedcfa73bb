"""How a good folder becomes a stranger's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from faults.folders.sandbox import Case, Expected, Site, Step
from siliang.files import write_manifest

HELLO = ("generate", "evil", "w1", "--max-new-tokens", "2")
USES: dict[str, Step] = {
    "generate": HELLO,
    "chat": ("chat", "evil", "--max-new-tokens", "2"),
    "eval": ("eval", "evil"),
    "merge": ("merge", "evil", "--output", "merged"),
    "resume": ("train", "--resume", "evil", "--set", "train.max_steps=3"),
    "train": ("train", "evil/run.yaml", "--output", "new"),
    "check": ("check", "evil/run.yaml"),
    "plan": ("plan", "evil/run.yaml"),
    "report": ("report", "evil"),
}
FURTHER = ("generate", "chat", "eval", "merge", "resume")  # what takes the folder of a run
SETTINGS = ("train", "check", "plan")  # what takes its settings

Change = Callable[[Site], object]


def copy(site: Site, name: str, to: Path | None = None) -> Path:
    """A good folder as the stranger's, or under another name."""
    to = to or site.evil
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(site.shared / name, to, symlinks=True)
    return to


def write(path: Path, content: str | bytes) -> Path:
    """A file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


def change_json(path: Path, change: dict[str, Any] | Callable[[Any], Any]) -> None:
    """A JSON file with other values; by dotted names, or by a function."""
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(_changed(values, change)), encoding="utf-8")


def change_yaml(path: Path, change: dict[str, Any] | Callable[[Any], Any]) -> None:
    """A yaml file with other values."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(_changed(values, change), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _changed(values: Any, change: dict[str, Any] | Callable[[Any], Any]) -> Any:
    if callable(change):
        return change(values) or values
    for name, value in change.items():
        *parents, last = name.split("/")
        inner = values
        for parent in parents:
            inner = inner[int(parent)] if isinstance(inner, list) else inner.setdefault(parent, {})
        if isinstance(inner, list) and value is REMOVED:
            del inner[int(last)]
        elif isinstance(inner, list):
            inner[int(last)] = value
        elif value is REMOVED:
            inner.pop(last, None)
        else:
            inner[last] = value
    return values


REMOVED = object()


def change_settings(site: Site, change: dict[str, Any]) -> None:
    """Settings of the run, in run.yaml and run.json, as one who made the folder would."""
    change_yaml(site.evil / "run.yaml", change)
    change_json(site.evil / "run.json", {f"config/{name}": value for name, value in change.items()})


def with_base(site: Site, run: str = "lora", base: str = "llama", *, work: str = "evil/base") -> Path:
    """The stranger's run, with a base model of its own in its folder; where that is."""
    copy(site, run)
    folder = copy(site, base, site.work / work)
    change_settings(site, {"model": work})
    change_json(site.evil / "run.json", {"model_files": {}})
    return folder


def sealed(folder: Path) -> None:
    """With a manifest that fits what is there now: it is not signed."""
    if (folder / "manifest.json").exists() or (folder / "manifest.json").is_symlink():
        (folder / "manifest.json").unlink()
        write_manifest(folder)


def link(path: Path, to: Path | str) -> None:
    """A link in place of whatever is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


def victim(site: Site, name: str = "victim.txt", content: str | bytes = "mine\n") -> Path:
    """A file of the user's that nobody may touch."""
    return write(site.outside / name, content)


def victims(site: Site, name: str = "victims") -> Path:
    """A folder of the user's with names such as siliang's own."""
    folder = site.outside / name
    for file in ("keep.txt", "checkpoint-1/state.json", ".x.tmp1/keep.txt", ".run.json.tmp7", "checkpoint-9/a.txt"):
        write(folder / file, "mine\n")
    return folder


def fifo(path: Path) -> None:
    """A pipe in place of a file: whoever opens it waits."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def sparse(path: Path, nbytes: int = 10**12) -> None:
    """A file of a terabyte that takes no room."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(nbytes)


def table(
    kind: str,
    rows: dict[str, Change],
    *,
    base: str | Callable[[Site], object] = "lora",
    steps: Sequence[Step] | Callable[[Site], Sequence[Step]] = (HELLO,),
    expected: Expected = "refused",
    **rest: Any,
) -> list[Case]:
    """A case for each row: what is changed in a copy of the same good folder."""

    def build(change: Change) -> Callable[[Site], Sequence[Step]]:
        def made(site: Site) -> Sequence[Step]:
            copy(site, base) if isinstance(base, str) else base(site)
            change(site)
            return steps(site) if callable(steps) else steps

        return made

    return [Case(kind, name, build(change), expected, **rest) for name, change in rows.items()]
