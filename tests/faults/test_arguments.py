"""Arguments that are wrong, one by one; `make faults` tries thousands of command lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import refused, run

from faults.arguments import make_names, try_arguments

WHOLE = ("--model", "MODEL", "--data", "DATA", "--task", "seq_cls")
TRAIN = ("train", *WHOLE, "--output", "o", "--set")
PLAN = ("plan", "--model", "MODEL", "--task", "seq_cls", "--method", "lora")


@pytest.fixture(scope="module")
def place(model_folders: dict[str, Path], review_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in it, and everything that is not a run."""
    folder = tmp_path_factory.mktemp("arguments")
    flags = ("--model", model_folders["bert"], "--data", review_file, "--task", "seq_cls", "--output", folder / "run")
    assert run("train", *flags, "--set", "train.max_steps=1", "--set", "data.max_length=16").code == 0
    return folder


def test_command_lines_of_every_kind(place: Path, model_folders: dict[str, Path], review_file: Path) -> None:
    """The same few each time."""
    names = make_names(place / "names", place / "run", model_folders["bert"], review_file)
    tried = try_arguments(names, place / "work", cases=15)
    assert not tried.failures, "\n".join(f"{what}\n   {words}" for what, words in tried.failures.items())
    assert tried.cases == 15


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "RUN", "a", "--temperature", "nan"),
        ("generate", "RUN", "a", "--temperature", "inf"),
        ("generate", "RUN", "a", "--max-new-tokens", "9" * 400),
        ("check", *WHOLE, "--examples", "-1"),
        (*PLAN, "--flops", "nan"),
        (*PLAN, "--flops", "-1"),
        (*PLAN, "--flops", "0"),
        (*PLAN, "--memory", "nan"),
        (*PLAN, "--memory", "0GB"),
        (*PLAN, "--memory", "9" * 500),
        (*PLAN, "--device", "tpu"),
        (*PLAN, "--strategy", "x"),
        (*PLAN, "--method", ""),
        ("merge", "RUN", "--output", ""),
        ("merge", "RUN", "--output", "DATA"),
        ("merge", "RUN", "--output", "DATA/x"),
        ("merge", "RUN", "--output", "x" * 300),
        ("merge", "RUN", "--output", "a\0b"),
        ("report", "RUN", "--output", "x" * 300),
        ("report", "RUN", "--output", "nowhere/x.html"),
        ("report", "RUN", "--output", "/dev/full/x"),
        ("report", "RUN", "--lang", "de"),
        ("report", "DATA"),
        ("report", ""),
        ("eval", "RUN", "--data", "."),
        ("eval", "RUN", "--data", ""),
        ("eval", "RUN", "--data", "a\0b"),
        ("eval", "RUN", "--data", "z" * 300),
        ("eval", "DATA"),
        ("eval", "l" * 300),
        ("eval", "a\0b"),
        ("predict", "RUN", ""),
        ("predict", "RUN", "bad \udcff"),
        ("chat", "DATA"),
        ("chat", "RUN", "nowhere"),
        ("train", "DATA"),
        ("train", "RUN"),
        ("train", "/dev/null"),
        ("train", "--resume", "DATA"),
        ("train", "--resume", "RUN/adapter"),
        ("train", *WHOLE, "--output", "a\0b"),
        ("train", *WHOLE, "--output", "a\nb"),
        ("train", *WHOLE, "--output", "a\udcff"),
        ("train", *WHOLE, "--output", "o" * 300),
        ("train", *WHOLE, "--output", "DATA"),
        ("train", *WHOLE, "--output", "/proc/x/y"),
        ("train", *WHOLE, "--output", "LOOP"),
        ("train", "--model", "LOOP", "--data", "DATA", "--task", "seq_cls", "--output", "o"),
        ("train", "--model", "MODEL", "--data", "LOOP", "--task", "seq_cls", "--output", "o"),
        (*TRAIN, "train.seed=" + "9" * 30),
        (*TRAIN, "data.seed=" + "9" * 30),
        (*TRAIN, "train.epochs=1e300"),
        (*TRAIN, "method.r=" + "9" * 30),
        (*TRAIN, "method.lora_alpha=.nan"),
        ("compare", "DATA"),
        ("compare", *WHOLE, "--output", "o", "--methods", ","),
        ("compare", *WHOLE, "--output", "a\0b"),
        ("demo", "--lang", "de"),
        ("explain", "z" * 5000),
        ("explain", ""),
        ("check", "--explain", ""),
    ],
    ids=lambda words: " ".join(words)[-70:].encode("unicode_escape").decode(),
)  # fmt: skip
def test_one_wrong_argument(
    words: tuple[str, ...],
    place: Path,
    model_folders: dict[str, Path],
    review_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    known = {"RUN": place / "run", "MODEL": model_folders["bert"], "DATA": review_file, "LOOP": tmp_path / "loop"}
    given = [
        str(known.get(word, word)).replace("RUN/", f"{known['RUN']}/").replace("DATA/", f"{review_file}/")
        for word in words
    ]
    before = sorted(tmp_path.iterdir())
    refused(*given)
    assert sorted(tmp_path.iterdir()) == before
