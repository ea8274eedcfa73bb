"""The harness of strangers' folders: that it hears of each bad deed, and a small share of its cases."""

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

if sys.platform != "linux":
    pytest.skip("the kernel's watch and /proc are Linux's", allow_module_level=True)

from faults.folders.bases import make_bases
from faults.folders.grammar import make_cases
from faults.folders.sandbox import Case, Most, Outcome, Site, controls, try_cases
from faults.folders.trial import BY_HAND, Tried

LITTLE = Most(seconds=1.5, idle_s=1.5, memory_bytes=2 * 10**8)


def run(case: Case, folder: Path, most: Most = LITTLE) -> Outcome:
    found: list[Outcome] = []
    (folder / "cases").mkdir(exist_ok=True)
    try_cases([case], folder / "cases", folder, lambda number, case, outcome: found.append(outcome), most=most)
    return found[0]


def deed(do: Callable[[Site], object]) -> Case:
    """A case that does what no stranger's folder may."""

    def build(site: Site) -> list[Callable[[], object]]:
        (site.outside / "mine").write_text("mine")
        (site.work / "evil.py").write_text("x = 1\n")
        save_file({"x": torch.zeros(1)}, site.outside / "x.safetensors")
        os.mkfifo(site.work / "pipe")
        (site.work / "link").symlink_to(site.outside / "mine")
        (site.work / "folder").symlink_to(site.outside)
        return [lambda: do(site) and None]

    return Case("deeds", "x", build, "works")


def _nested() -> object:
    a, b = [1], [1]
    for _ in range(60):
        a, b = [a, a], [b, b]
    return a == b


DEEDS: dict[str, tuple[str, Callable[[Site], object]]] = {
    "writes outside": ("opens for writing", lambda s: (s.outside / "new").write_text("x")),
    "writes through a link": ("opens for writing", lambda s: Path("link").write_text("x")),
    "writes through a descriptor of a folder": (
        "opens for writing",
        lambda s: os.open("../outside/new", os.O_CREAT | os.O_WRONLY, dir_fd=os.open(s.evil.parent, os.O_RDONLY)),
    ),
    "writes in C": ("made: outside/", lambda s: save_file({"x": torch.zeros(1)}, s.outside / "new")),
    "reads in C": ("opened: outside/x.safetensors", lambda s: load_file(s.outside / "x.safetensors")),
    "reads through a link": ("reads outside/mine", lambda s: Path("link").read_text()),
    "reads another's file": ("reads /etc/passwd", lambda s: Path("/etc/passwd").read_text()),
    "lists": ("lists", lambda s: list(Path("folder").iterdir())),
    "removes": ("os.remove outside/mine", lambda s: Path("folder/mine").unlink()),
    "renames": ("os.rename outside/mine", lambda s: (s.outside / "mine").rename(s.work / "mine")),
    "links": ("os.link outside/mine", lambda s: Path("mine").hardlink_to(s.outside / "mine")),
    "changes rights": ("os.chmod outside/mine", lambda s: Path("link").chmod(0o777)),
    "makes a folder": ("os.mkdir outside/new", lambda s: Path("folder/new").mkdir()),
    "runs a program": ("starts", lambda s: subprocess.run(["true"])),
    "asks a shell": ("os.system", lambda s: os.system("true")),
    "runs code": ("runs code of work/evil.py", lambda s: exec(compile("1", str(Path("evil.py").absolute()), "exec"))),
    "loads a library": ("loads work/evil.so", lambda s: ctypes.CDLL(str(Path("evil.so").absolute()))),
    "calls": ("socket.connect", lambda s: socket.socket().connect(("127.0.0.1", 9))),
    "asks for a name": ("socket.getaddrinfo", lambda s: socket.getaddrinfo("localhost", 9)),
    "takes memory": ("memory: ", lambda s: bytes(b"x" * (4 * 10**8))),
    "takes memory for a while": ("memory: ", lambda s: len(b"x" * (4 * 10**8))),
    "never ends in C": ("time: ended", lambda s: _nested()),
    "waits for ever": ("time: it waits", lambda s: Path("pipe").read_text()),
    "ends its process": ("its process is gone", lambda s: os._exit(0)),
    "raises what is not an error of ours": ("no error of ours: ZeroDivisionError", lambda s: 1 / 0),
}


@pytest.mark.parametrize("name", DEEDS)
def test_each_bad_deed_is_heard_of(name: str, tmp_path: Path) -> None:
    word, do = DEEDS[name]
    outcome = run(deed(do), tmp_path)
    assert any(word in fault for fault in outcome.faults), outcome


def test_what_is_allowed_is_no_fault(tmp_path: Path) -> None:
    def do(site: Site) -> None:
        Path("new").mkdir()
        Path("new/a").write_text("x")
        Path("new/a").rename("b")
        Path("b").unlink()
        assert not Path("link").is_dir() and Path("folder").resolve() == site.outside.resolve()

    assert run(deed(do), tmp_path).faults == []


def test_words_that_are_printed(tmp_path: Path) -> None:
    def case(text: str, **more: object) -> Case:
        return Case("words", "x", lambda site: [lambda: text], "works", **more)  # type: ignore[arg-type]

    assert controls("all well\n\tÜ 四两 👩‍👩") == []
    assert controls("\x1b[31ma\u202eb\x1b\x9b\r") == ["U+001B", "U+202E", "U+009B", "U+000D"]
    assert "printed" in run(case("a word", hides=("word",)), tmp_path).faults[0]
    assert "not in the output" in run(case("a word", shows=("another",)), tmp_path).faults[0]
    refused = Case("words", "x", lambda site: [("generate", "nothing", "w1")], "works")
    assert "refused, and not works" in run(refused, tmp_path).faults[0]


def test_what_is_ended_takes_no_other_case_with_it(tmp_path: Path) -> None:
    names: list[tuple[int, str]] = []
    cases = [deed(DEEDS["waits for ever"][1] if i == 1 else lambda site: None) for i in range(4)]
    (tmp_path / "cases").mkdir()

    def found(number: int, case: Case, outcome: Outcome) -> None:
        names.append((number, outcome.ending))

    try_cases(cases, tmp_path / "cases", tmp_path, found, batch=4, most=LITTLE)
    assert sorted(names) == [(0, "works"), (1, "ended"), (2, "works"), (3, "works")]
    assert not list((tmp_path / "cases").iterdir())


HAND = {
    "code": ("allowed by its record: generate", "an adapter's pickle", "template: globals"),
    "links": ("run.yaml is a pipe", "run.json is a socket", "the base model is //server/share"),
    "sizes": ("a tensor of no rows and 10^9 columns", "a header of 2^62 numbers"),
    "paths": ("weights: an index that leads up", "weights: transformers_weights that lead up"),
    "limits": (
        "generation: a static cache of a billion",
        "generation: a million beams",
        "generation: text for numbers",
        "tokenizer: a word's number beyond the table",
        "tokenizer: post-processors in a chain",
    ),
    "numbers": ("run.yaml: a bomb", "run.json: a config that is a list"),
}


def test_some_of_its_cases(tmp_path: Path) -> None:
    """With one run; `make faults` has the others."""
    make_bases(tmp_path / "bases", ["lora"], sets=False)
    cases = [case for kind, names in HAND.items() for case in BY_HAND[kind] if case.name in names]
    assert len(cases) == sum(map(len, HAND.values()))
    cases += [case for case in make_cases(200, seed=1) if case.kind in ("base models", "templates")][:20]
    tried = Tried()
    (tmp_path / "cases").mkdir()
    try_cases(
        cases, tmp_path / "cases", tmp_path / "bases", lambda _, case, outcome: tried.take(case, outcome), batch=8
    )
    assert tried.passed, tried.failures
    assert tried.refused.total() >= len(HAND)


def test_the_same_seed_makes_the_same_cases() -> None:
    assert [(c.kind, c.name) for c in make_cases(50, 3)] == [(c.kind, c.name) for c in make_cases(50, 3)]
    names = [(case.kind, case.name) for part in BY_HAND.values() for case in part]
    assert len(names) == len(set(names)) and all(len(part) >= 30 for part in BY_HAND.values())
