"""A hub that does not answer: asked once, by no one else, and again when a while is over."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from siliang import hub
from siliang.data.reading import Reading
from siliang.data.sources import open_source
from siliang.hub import adapter_folder
from siliang.models.base_config import load_config
from siliang.models.load import load_model
from siliang.models.tokenizers import load_tokenizer
from siliang.tasks import SEQ_CLS
from siliang.types import AdapterError, DataError, ModelError


class Hub:
    """A port of this machine that hangs up on whoever comes, or says 404."""

    def __init__(self) -> None:
        self.asked_for: list[str] = []  # the first line of each request
        self.answers = False
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return
            with caller:
                self.asked_for.append(caller.recv(4096).decode().partition("\r\n")[0])
                if self.answers:
                    caller.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    @property
    def asked(self) -> int:
        """How often somebody wanted to know whether it is there."""
        return sum(line.startswith("HEAD / ") for line in self.asked_for)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    here = Hub()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", here.address)
    path = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here.address + path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", here.address)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    close_session()
    yield here
    close_session()
    here.close()


def test_a_hub_that_does_not_answer_is_asked_once(silent: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"nor in the hub's cache; the hub cannot be reached"):
        load_config("nobody/no-such-model")
    with pytest.raises(AdapterError, match=r"nor in the hub's cache; the hub cannot be reached"):
        adapter_folder("nobody/no-such-adapter")
    with pytest.raises(DataError, match=r"not in the cache of `datasets`; the hub cannot be reached"):
        open_source("nobody/no-such-data")
    assert silent.asked == 1
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE  # the user's process is as it was
    silent.answers = True
    assert "cannot be reached" in (hub.hub_is_off() or "")
    monkeypatch.setattr(hub, "CACHE_S", 0.0)
    assert hub.hub_is_off() is None and silent.asked == 2


def test_data_that_datasets_has_made_is_read_without_the_hub(silent: Hub, tmp_path: Path) -> None:
    """From the cache of `datasets`, as its own `load_dataset` has left it there."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "made"))
    made = next((tmp_path / "made").rglob("dataset_info.json")).parent
    there = tmp_path / "someone___rows" / "default" / "0.0.0"
    there.mkdir(parents=True)
    shutil.copytree(made, there / "abc")
    (arrow,) = there.rglob("*.arrow")
    arrow.rename(arrow.with_name("rows-train.arrow"))
    opened = open_source("someone/rows")
    assert [row.values["text"] for row in opened.rows("train", Reading())] == ["one", "two"]
    assert silent.asked == 1


def test_a_cached_model_is_loaded_without_the_hub(
    silent: Hub, model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--someone--bert"
    commit = "0" * 40
    shutil.copytree(model_folders["bert"], folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    model = load_model("someone/bert", SEQ_CLS.model, dtype=torch.float32, labels=["a", "b"])
    assert model.config.num_labels == 2 and len(load_tokenizer("someone/bert")) > 9
    assert silent.asked == 1 and not [line for line in silent.asked_for if "someone" in line]
