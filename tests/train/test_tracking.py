"""What trackers hold is what run.json has: read back by the real packages, offline."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import WORDS, write_jsonl

from siliang.config import RunConfig
from siliang.config.comparison import CompareConfig
from siliang.records import Record
from siliang.train.run import train
from siliang.train.tracking import IDS, Trackers, check_trackers, flat_settings, values_of
from siliang.train.types import Listener
from siliang.types import ConfigError

Figures = dict[str, list[tuple[int, float]]]  # of each metric, its values by step
WHY = {
    "swanlab": "swanlab wants protobuf<7, and the pins have 7: CONTRIBUTING.md says how it is tested",
    "wandb": "wandb is not installed: CONTRIBUTING.md says how it is tested",
}
TOKEN = "hf_" + "Tq7" * 12


def each() -> list[Any]:
    """The trackers, those that are not installed skipped with the reason."""
    marks = {
        name: [] if find_spec(name) else [pytest.mark.skip(reason=WHY.get(name, f"{name} is not installed"))]
        for name in READERS
    }
    return [pytest.param(name, marks=marks[name]) for name in READERS]


# ---- what each tracker's own reader finds ----


def read_tensorboard(folder: Path) -> Figures:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_wandb(folder: Path) -> Figures:
    """wandb writes the frames of LevelDB's log, each a record of its protocol."""
    from wandb.proto.wandb_internal_pb2 import Record as Message

    (file,) = folder.rglob("*.wandb")
    found: Figures = {}
    for frame in frames(file.read_bytes()):
        message = Message.FromString(frame)
        if not message.HasField("history"):
            continue
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in message.history.item}
        step = int(row.get("_step", message.history.step.num))
        for name, value in row.items():
            if not name.startswith("_"):
                found.setdefault(name, []).append((step, value))
    return found


def frames(log: bytes) -> Iterator[bytes]:
    at, block, parts = 7, 32768, b""  # behind wandb's own header
    while at + 7 <= len(log):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def read_swanlab(folder: Path) -> Figures:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record as Message
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    (file,) = folder.rglob("*.swanlab")
    reader, found = DataStoreReader(), {}
    reader.open(file)
    for frame in reader:
        message = Message.FromString(frame)
        for scalar in [message.scalar] if message.HasField("scalar") else []:
            found.setdefault(scalar.key, []).append((scalar.step, scalar.value.number))
    reader.close()
    return found


def read_mlflow(folder: Path) -> Figures:
    (file,) = folder.glob("mlflow-*.db")
    return read_mlflow_at(f"sqlite:///{file}")


def read_mlflow_at(uri: str) -> Figures:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = client.search_experiments(filter_string="name = 'siliang'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.tags["mlflow.source.name"] == "siliang" and not run.data.tags["mlflow.user"]
    assert run.data.params["method.name"] == "lora"
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }


def read_trackio(folder: Path) -> Figures:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    assert folder == trackio.TRACKIO_DIR
    (run,) = trackio.Api().runs("siliang")
    assert run.name == "run" and run.config["method.name"] == "lora"
    found: Figures = {}
    for row in SQLiteStorage.get_logs("siliang", "run"):
        for name, value in row.items():
            if name not in ("timestamp", "step"):
                found.setdefault(name, []).append((row["step"], value))
    return found


READERS: dict[str, Callable[[Path], Figures]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "swanlab": read_swanlab,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


def expected(record: Record) -> Figures:
    found: Figures = {}
    for line in record.steps:
        for name, value in values_of(line).items():
            found.setdefault(name, []).append((line.step, value))
    for name, value in record.final.items():
        found[f"final/{name}"] = [(record.steps[-1].step, value)]
    return found


def check(name: str, output: Path) -> Record:
    """What the tracker holds is the run's log, each line once."""
    record = Record.read(output)
    found, wanted = READERS[name](output / "trackers" / name), expected(record)
    memory = found.pop("train/memory_bytes")
    assert all(value > 1e6 for _, value in memory)
    if name == "tensorboard":  # which keeps float32
        wanted = {tag: [(s, float(np.float32(v))) for s, v in values] for tag, values in wanted.items()}
    assert {tag: sorted(values) for tag, values in found.items()} == wanted
    return record


# ---- runs ----


@pytest.fixture
def config(model_folders: dict[str, Path], tmp_path: Path) -> Callable[..., RunConfig]:
    rows = [{"instruction": f"say {w}", "input": "", "output": f"{w} {w}"} for w in WORDS[-24:]]
    data = write_jsonl(tmp_path / "data.jsonl", rows)

    def build(*names: str, output: str = "run", **more: object) -> RunConfig:
        quick = {"batch_size": 4, "max_steps": 6, "log_every": 2, "eval_every": 3, "save_every": 3, "precision": "fp32"}
        values = {
            "model": str(model_folders["llama"]),
            "task": "causal_lm",
            "data": {"train": str(data), "test_size": 0.25, "max_length": 32},
            "train": {**quick, "learning_rate": 0.01, "trackers": list(names), **more},
            "output": str(tmp_path / output),
        }
        return RunConfig.build(values)

    return build


def adapter(output: Path) -> str:
    return hashlib.sha256((output / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", each())
def test_a_tracker_holds_the_log(
    name: str, config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped and resumed, too; the weights are those of a run without trackers."""
    monkeypatch.setattr(sys, "argv", ["siliang", "train", f"--set=token={TOKEN}"])
    monkeypatch.setenv("SOME_API_KEY", "Zq8vK2mX4wP6")
    said: list[str] = []
    train(config(name), Listener(said.append))
    assert not [line for line in said if line.startswith("warning") and name in line], said
    record = check(name, tmp_path / "run")
    assert [line.step for line in record.steps] == [2, 3, 4, 6, 6]
    files = [p for p in (tmp_path / "run" / "trackers").rglob("*") if p.is_file()]
    assert files and not any(p.is_symlink() for p in (tmp_path / "run").rglob("*"))
    for secret in (TOKEN, "Zq8vK2mX4wP6"):
        assert not [p for p in files if secret.encode() in p.read_bytes()]
    train(config(output="plain"))
    assert not (tmp_path / "plain" / "trackers").exists()
    assert adapter(tmp_path / "plain") == adapter(tmp_path / "run")
    train(config(name, max_steps=10), resume=True)
    assert [line.step for line in check(name, tmp_path / "run").steps] == [2, 3, 4, 6, 6, 8, 9, 10, 10]


def test_lines_behind_the_checkpoint_are_not_there_twice(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The run was killed after a step that its last checkpoint has not."""
    train(config("tensorboard", save_every=4, max_steps=8))
    whole = check("tensorboard", tmp_path / "run")
    for name in ("checkpoint-8", "../adapter"):
        for file in (tmp_path / "run" / "checkpoints" / name).iterdir():
            file.unlink()
        (tmp_path / "run" / "checkpoints" / name).rmdir()
    train(config("tensorboard", save_every=4, max_steps=8), resume=True)
    again = check("tensorboard", tmp_path / "run")
    assert [(s.step, s.loss) for s in again.steps] == [(s.step, s.loss) for s in whole.steps]


def test_a_resumed_run_reads_nothing_that_others_put_there(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    train(config("mlflow"))
    place = tmp_path / "run" / "trackers"
    for file in (place / "mlflow").glob("*.db"):
        file.write_bytes(b"no database")
    (place / IDS).write_text(json.dumps({"mlflow": "../../etc", "wandb": ["x"], "evil": "abcdefgh"}))
    train(config("mlflow", max_steps=8), resume=True)
    check("mlflow", tmp_path / "run")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    said: list[str] = []
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "trackers").symlink_to(outside)
    Trackers(["mlflow"], folder=tmp_path / "linked", project="p", say=said.append).start([])
    assert "is a link" in said[0] and [p.name for p in outside.iterdir()] == ["kept"]


def test_a_place_of_the_users_own_goes_on_in_the_same_run(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    uri = f"sqlite:///{tmp_path / 'own.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    train(config("mlflow"))
    first = json.loads((tmp_path / "run" / "trackers" / IDS).read_text())
    train(config("mlflow", max_steps=10), resume=True)
    assert json.loads((tmp_path / "run" / "trackers" / IDS).read_text()) == first
    assert os.environ["MLFLOW_TRACKING_URI"] == uri
    found, wanted = read_mlflow_at(uri), expected(Record.read(tmp_path / "run"))
    assert {tag: found[tag] for tag in wanted if not tag.startswith("final")} == {
        tag: values for tag, values in wanted.items() if not tag.startswith("final")
    }
    assert [step for step, _ in found["final/eval_loss"]] == [6, 10]  # the figures at each of its two ends


def test_a_tracker_that_fails_ends_no_run(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One from its start, one in the middle; the other goes on."""
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    said: list[str] = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    train(config("mlflow", "tensorboard"), Listener(said.append))
    (warning,) = [line for line in said if "mlflow is switched off" in line]
    assert len(warning) < 300 and "\n" not in warning
    check("tensorboard", tmp_path / "run")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    said.clear()

    def break_it(progress: Any) -> None:
        if progress.step == 3 and import_module("mlflow").active_run() is not None:
            import_module("mlflow").set_tracking_uri("http://127.0.0.1:9")

    train(config("mlflow", "tensorboard", output="middle"), Listener(said.append, break_it))
    assert len([line for line in said if "mlflow is switched off" in line]) == 1
    assert Record.read(tmp_path / "middle").status == "completed"
    said.clear()
    train(config("mlflow", output="next/run"), Listener(said.append))  # its run is ended: another one starts
    assert not [line for line in said if "switched off" in line]
    assert import_module("mlflow").active_run() is None
    check("mlflow", tmp_path / "next" / "run")


def test_what_is_not_installed_is_said_before_loading(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"wandb is not installed. Install it by pip install 'siliang\[wandb\]'"):
        train(config("wandb"), Listener(said.append))
    assert not said and not (tmp_path / "run").exists()
    check_trackers([])


def test_settings_are_flat_and_without_secrets_and_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "Zq8vK2mX4wP6")
    settings = {
        "model": "/home/someone/models/bloom",
        "data": {"train": ["/home/someone/a.jsonl", {"path": "/b/c.csv"}], "eval": None},
        "url": f"https://user:{TOKEN}@host/x?token=Zq8vK2mX4wP6",
        "train": {"seed": 1, "fit": False, "learning_rate": 0.1},
    }
    found = flat_settings(settings)
    assert found == {
        "model": "bloom",
        "data.train": '["a.jsonl", {"path": "c.csv"}]',
        "url": "https://***@host/x?token=***",
        "train.seed": 1,
        "train.fit": False,
        "train.learning_rate": 0.1,
    }


@pytest.mark.parametrize("given", ["../x", "a/b", "a'b", "", "x" * 101])
def test_a_project_is_a_plain_name(given: str, config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="tracker_project"):
        config("wandb", tracker_project=given)


def test_a_comparison_tracks_nothing(config: Callable[..., RunConfig]) -> None:
    values = config("wandb").model_dump(mode="json", exclude={"method", "adapter"})
    with pytest.raises(ConfigError, match=r"train\.trackers has no effect in a comparison"):
        CompareConfig.build(values)
