"""Fixtures: tiny model folders, small files, and optional test data."""

from __future__ import annotations

import gc
import multiprocessing.spawn
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported; it would retry for minutes

from forking import stand_in
from tiny import SHARED, WORDS, make, word_tokenizer, write_jsonl

# the same examples in every run, so that a failure is the change's; --hypothesis-profile=random looks for new ones
settings.register_profile("random", derandomize=False)
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests do not use the user's cache and permissions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SILIANG_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("settings")))
        patch.delenv("SILIANG_ALLOW_CODE", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def oracle() -> Iterator[None]:
    """Where a test file has imported PEFT, it finds the names that it knows in newer transformers."""
    with pytest.MonkeyPatch.context() as patch:
        if "peft" in sys.modules:
            from bench.peft_on_new_transformers import show_old_name

            show_old_name(patch.setattr)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_processes(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`[sys.executable, "-m", "siliang", ...]` begins where the slow imports are done (forking.py), and so do the
    processes that multiprocessing spawns."""
    real = multiprocessing.spawn.get_executable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", stand_in(tmp_path_factory.mktemp("python")))
        multiprocessing.set_executable(sys.executable)
        yield
        multiprocessing.set_executable(real)


@pytest.fixture(scope="session", autouse=True)
def quick_collections() -> None:
    """What was imported stays: a training, which collects garbage several times, need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny base models with a tokenizer, as from_pretrained opens them."""
    folders = {}
    for name in ("bert", "llama", "bloom"):
        folders[name] = tmp_path_factory.mktemp("models") / name
        make(name).save_pretrained(folders[name])  # type: ignore[operator]
        word_tokenizer().save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def review_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 separable reviews."""
    rows = [
        {"text": f"the {noun} was {word}", "label": label}
        for i in range(10)
        for noun in ("film", "story", "actor")
        for word, label in (((("good", "bright")[i % 2]), "pos"), ((("bad", "dull")[i % 2]), "neg"))
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "reviews.jsonl", rows)


@pytest.fixture(scope="session")
def instruction_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 instructions with answers."""
    rows = [{"instruction": f"say {w}", "input": "", "output": f"{w} {w}"} for w in WORDS[-20:]]
    return write_jsonl(tmp_path_factory.mktemp("data") / "instructions.jsonl", rows)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's test data; the test is skipped where it is not."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not there")
    return SHARED


@pytest.fixture(scope="session")
def encoder() -> Path:
    """The demo's encoder; the test is skipped where the extra `demo` is not installed."""
    from siliang.demo import encoder_folder
    from siliang.types import ModelError

    try:
        return encoder_folder()
    except ModelError as error:
        pytest.skip(str(error))
