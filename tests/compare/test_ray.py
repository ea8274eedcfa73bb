"""A comparison over a real Ray: the figures of the one without, whatever is killed, and wherever the files are."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from forking import PYTHON
from safetensors.torch import load_file

# which imports Ray as a command does
pytest.importorskip("siliang.compare.cluster", reason="needs the extra `cluster`", exc_type=ImportError)

from siliang.cli.compare import RayOption
from siliang.cli.main import app, main
from siliang.compare.cluster import Cluster
from siliang.compare.packed import files_of, pack, restore_paths, unpack_once, with_user_paths
from siliang.compare.resume import can_resume
from siliang.compare.run import CompareListener, compare
from siliang.config import RunConfig
from siliang.config.comparison import CompareConfig
from siliang.files import find_damage, write_manifest
from siliang.records import Answers, Comparison, Record, Trial
from siliang.report.gather import gather
from siliang.report.summary import summarize
from siliang.report.table import table
from siliang.report.words import words
from siliang.safety.safe_yaml import dump_yaml
from siliang.train.run import train

pytestmark = [
    pytest.mark.slow,  # a Ray takes six seconds to begin, and each worker imports torch anew
    # Ray leaves sockets and processes to the interpreter's end
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
# figures of the machine, which no two comparisons have in common
MEASURED = {"minutes", "peak", "above", "train_speed", "eval_speed"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everywhere: the number of threads changes last digits."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(model: Path | str, data: Path | str, output: Path | str, steps: int = 60) -> CompareConfig:
    return CompareConfig.build(
        {
            "model": str(model),
            "task": "seq_cls",
            "data": {"train": str(data), "test_size": 0.4, "max_length": 32},
            "train": {"max_steps": steps, "batch_size": 8, "log_every": 2, "save_every": 10},
            "accept": ["SL002", "SL003"],
            "methods": [
                {"name": "full", "learning_rate": 3e-3},
                {"name": "lora", "learning_rate": 1e-2},
                {"name": "ia3", "label": "lost", "target_modules": ["nowhere"]},
            ],
            "seeds": 2,
            "prompts": ["the film was good"],
            "output": str(output),
        }
    )


def shown(folder: Path) -> list[list[str]]:
    """The table of a comparison, without what is the machine's."""
    data = gather([folder])
    columns, rows = table(summarize(data), data, words("en"))
    kept = [i for i, column in enumerate(columns) if column.key not in MEASURED]
    return [[cells[i].text.removesuffix(" ★") for i in kept] for cells in rows]  # ★ hangs on the memory


def same_runs(one: Path, other: Path) -> None:
    """To the last bit, and with the same names in them."""
    runs = sorted(p.parent.relative_to(one) for p in one.rglob("run.json"))
    assert runs and runs == sorted(p.parent.relative_to(other) for p in other.rglob("run.json"))
    for run in runs:
        a, b = Record.read(one / run), Record.read(other / run)
        assert a.final == b.final, run
        assert [s.loss for s in a.steps] == [s.loss for s in b.steps]
        assert (a.model_sha256, a.data_sha256) == (b.model_sha256, b.data_sha256)
        assert a.config | {"output": ""} == b.config | {"output": ""}
        assert Answers.open(one / run / "answers.json") == Answers.open(other / run / "answers.json")
        for file in (one / run).rglob("*.safetensors"):
            mine, its = load_file(file), load_file(other / file.relative_to(one))
            assert mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine), file


def workers() -> list[psutil.Process]:
    """The processes that train, among those that this one's Ray has begun."""
    found = []
    for process in psutil.process_iter():
        try:
            if "siliang.compare.worker" in process.cmdline() and psutil.Process() in process.parents():
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def alone(
    model_folders: dict[str, Path], review_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CompareConfig, Path]:
    """The comparison without Ray, one run after the other: the folder that holds all."""
    folder = tmp_path_factory.mktemp("ray")
    shutil.copytree(model_folders["bert"], folder / "user" / "model")
    shutil.copy(review_file, folder / "user" / "reviews.jsonl")
    config = settings(folder / "user" / "model", folder / "user" / "reviews.jsonl", folder / "alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        compare(config)
    return config, folder


def with_output(config: CompareConfig, output: Path) -> CompareConfig:
    return CompareConfig(config.run.model_copy(update={"output": str(output)}), config.settings)


def test_the_same_table_though_a_worker_is_killed(
    alone: tuple[CompareConfig, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two workers, and one of Ray's processes gone in the middle of a run. The current folder holds a stranger's code,
    and Ray's processes import from the current folder, unless they are given another."""
    mark, strange = tmp_path / "mark", tmp_path / "strange"
    for name in ("siliang/__init__.py", "sitecustomize.py", "filelock.py"):
        (strange / name).parent.mkdir(parents=True, exist_ok=True)
        (strange / name).write_text(f"open({str(mark)!r}, 'a').close()\n")
    monkeypatch.chdir(strange)
    config, folder = alone
    said: list[str] = []
    most = 0
    killed: list[psutil.Process] = []

    def kill(trial: Trial, progress: dict[str, Any]) -> None:
        nonlocal most
        most = max(most, len(found := workers()))
        if not killed and progress["step"] < progress["steps"]:
            victim = found[0].parent()
            assert victim is not None and "ray" in victim.name()
            killed.append(victim)
            victim.send_signal(signal.SIGKILL)

    compare(with_output(config, tmp_path / "out"), CompareListener(say=said.append, progress=kill), jobs=2, ray="local")
    assert killed and most == 2
    lost = [line for line in said if line.startswith("lost ")]
    assert len(lost) == 1 and "its process was killed on " in lost[0] and "run again" in lost[0]
    assert "cluster    Ray on this machine: 2 runs at a time, with 1 thread each" in said
    assert shown(tmp_path / "out") == shown(folder / "alone")
    same_runs(folder / "alone", tmp_path / "out")
    trials = Comparison.open(tmp_path / "out" / "comparison.json").trials
    assert sum(t.attempts for t in trials) == len(trials) + 1
    assert not list((tmp_path / "out").glob(".shared-*")) and not workers()
    assert "raylet" not in "".join(capfd.readouterr())  # Ray's own messages
    assert not mark.exists()


def test_machines_with_disks_of_their_own(
    alone: tuple[CompareConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine of a cluster sees nothing of the user's folder: a real one, joined by its address, in a namespace where
    that folder is empty."""
    hides = ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*hides, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare, and the right to use it")
    config, folder = alone
    port, cache = free_port(), tmp_path / "cache"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)  # as a cluster asks for one
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    ray = Path(PYTHON).with_name("ray")
    start = f"{ray} start --head --port {port} --num-cpus 2 --include-dashboard false --disable-usage-stats --block"
    command = [*hides, "sh", "-c", f"mount -t tmpfs none {folder} && exec {start}"]
    environment = os.environ | {"SILIANG_CACHE": str(cache), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    with (tmp_path / "ray.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        until = time.monotonic() + 60
        while "To terminate" not in (tmp_path / "ray.log").read_text() and time.monotonic() < until:
            time.sleep(0.2)
        out = folder / "apart"
        file = tmp_path / "compare.yaml"
        file.write_text(with_output(config, out).to_yaml())
        # a process of its own: in this one Ray has already looked whether there is a token
        done = subprocess.run(
            [sys.executable, "-m", "siliang", "compare", str(file), "--jobs", "1", "--ray", f"127.0.0.1:{port}"],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
    finally:
        begun = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in begun:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(30)
    said = (done.stdout + done.stderr).splitlines()
    assert sum(line.startswith("files ") for line in said) == 2  # the model and the data, once each
    assert shown(out) == shown(folder / "alone")
    same_runs(folder / "alone", out)
    for file in out.rglob("*.*"):
        if file.suffix in (".json", ".yaml"):
            assert str(cache) not in file.read_text(), file
    assert sorted(p.name for p in (cache / "cluster").iterdir() if p.name.startswith("run-")) == []
    run = out / "runs" / "lora" / "seed-42"
    assert yaml.safe_load((run / "run.yaml").read_text()) == Record.read(run).config


def test_stopped_far_away_it_goes_on_from_there(
    alone: tuple[CompareConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C brings the checkpoint of a machine without the user's disk; so does a worker that is killed, from whose
    machine only its process is gone."""
    import ray

    _, folder = alone
    values = yaml.safe_load((folder / "alone" / "runs" / "lora" / "seed-42" / "run.yaml").read_text())
    values |= {"output": str(tmp_path / "run")}
    values["data"]["train"] = str(folder / "user" / "review*.jsonl")
    values["train"] |= {"max_steps": 300, "log_every": 10, "save_every": 25}  # not over before it is stopped
    run = RunConfig.build(values)
    train(RunConfig.build(values | {"output": str(tmp_path / "whole")}))
    request = {"kind": "train", "config": run.model_dump(mode="json"), "prompts": [], "max_new_tokens": 4}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with monkeypatch.context() as patch, Cluster("local", 1, tmp_path / "logs") as cluster:
            patch.setattr("siliang.compare.cluster.version", lambda name: "0")
            events = list(cluster.run([request | {"resume": False}] * 2))
            assert [event.kind for event in events] == ["failed", "failed"]
            assert all("not 0: install the same version" in event.message["error"] for event in events)
        with Cluster("local", 1, tmp_path / "logs") as cluster:
            cluster.marker.unlink()  # as if no machine shared the disk
            for event in cluster.run([request | {"resume": False}]):
                assert event.kind not in ("done", "failed"), event
                if event.kind == "progress" and event.message["progress"]["step"] > 20:
                    break
            assert cluster.resources["memory"] > 2**26  # each worker reserves what its runs take, by the plan
            cluster.resources["memory"] = 2**60
            assert cluster._slots() == 1
        assert Record.read(tmp_path / "run").status == "interrupted"
        assert can_resume(run)
        steps, lost, end = [], 0, ""
        with Cluster("local", 1, tmp_path / "logs") as cluster:
            cluster.marker.unlink()  # as if no machine shared the disk
            for event in cluster.run([request | {"resume": True}]):
                end = event.kind
                lost += event.kind == "lost"
                if event.kind == "progress":
                    steps.append(event.message["progress"]["step"])
                    if not lost and len(steps) == 1:
                        workers()[0].kill()
    finally:
        ray.shutdown()
    assert end == "done" and lost == 1 and min(steps) > 20
    whole, cut = Record.read(tmp_path / "whole"), Record.read(tmp_path / "run")
    assert cut.final == whole.final and [s.loss for s in cut.steps] == [s.loss for s in whole.steps]
    assert cut.config == request["config"]
    assert (cut.model_sha256, cut.data_sha256) == (whole.model_sha256, whole.data_sha256)


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_what_is_wrong_is_said(
    alone: tuple[CompareConfig, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, _ = alone
    file = tmp_path / "compare.yaml"
    file.write_text(config.to_yaml())

    def error(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["siliang", *map(str, arguments), "--output", str(tmp_path / "out")])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr().err
        assert stopped.value.code == 2, said
        assert said.startswith("error[SLE13]") and said.count("\n") <= 2 and "Traceback" not in said
        return said

    assert "the Ray cluster cannot be joined: Connection refused" in error(
        "compare", file, "--ray", f"127.0.0.1:{free_port()}"
    )
    assert "Invalid address format: nonsense" in error("compare", file, "--ray", "nonsense")
    assert "does not support the Ray client" in error("compare", file, "--ray", "ray://head:10001")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'siliang[cluster]'" in error("compare", "--ray", file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "address"),
    [
        (["--ray", "c.yaml"], "local"),
        (["c.yaml", "--ray"], "local"),
        (["c.yaml", "--ray", "--jobs", "2"], "local"),
        (["c.yaml", "--ray", "auto"], "auto"),
        (["--ray", "10.0.0.1:6379", "c.yaml"], "10.0.0.1:6379"),
        (["--ray=head:6379", "c.yaml"], "head:6379"),
        (["c.yaml"], None),
    ],
)
def test_an_address_or_none(given: list[str], address: str | None) -> None:
    from typer.main import get_command

    command: Any = get_command(app)
    assert isinstance(command.commands["compare"], RayOption)
    context = command.commands["compare"].make_context("compare", given)
    assert (str(context.params["settings"]), context.params["ray"]) == ("c.yaml", address)


def test_files_and_their_names(tmp_path: Path) -> None:
    user, cache = tmp_path / "user", tmp_path / 'a "cache" of 大家'
    for name in ("model/config.json", "model/deep/a.bin", "model/.git/b", "data/one.jsonl", "data/two.jsonl"):
        (user / name).parent.mkdir(parents=True, exist_ok=True)
        (user / name).write_text(name)
    cache.mkdir()
    given = [f"{user}/model", f"{user}/data/*.jsonl", f"{user}/data/two.jsonl"]
    found = [files_of(name) for name in given]
    assert [[str(p.relative_to(user)) for p in files] for files in found] == [
        ["model/config.json", "model/deep/a.bin"],
        ["data/one.jsonl", "data/two.jsonl"],
        ["data/two.jsonl"],
    ]
    assert files_of("owner/name") == files_of("data/*.jsonl") == files_of(f"{user}/none") == []
    pieces = dict[int, bytes]()

    def put(piece: bytes) -> int:
        pieces[len(pieces)] = piece
        return len(pieces) - 1

    packed = pack([*found[0], *found[1]], put)
    for _ in range(2):
        unpack_once(packed, cache, pieces.__getitem__)
    there = cache / packed.folder
    for path in (*found[0], *found[1]):
        assert Path(f"{there}{path}").read_text() == path.read_text()
    (user / "model" / "config.json").write_text("longer than before")
    assert pack([*found[0], *found[1]], put).folder != packed.folder
    # what a run writes there has the user's names, in whatever way the path of the cache is written
    message = {"kind": "say", "line": f"{there}{user}/data/one.jsonl:3", "more": [f"see {there}{user}/model"]}
    assert with_user_paths(message, cache) == {
        "kind": "say",
        "line": f"{user}/data/one.jsonl:3",
        "more": [f"see {user}/model"],
    }
    values = {"model": f"{there}{user}/model", "about": "a text as long as a line of yaml can be, and more " * 3}
    run = cache / ("run-" + "0" * 32)
    for name, text in (
        ("run.yaml", dump_yaml(values)),
        ("run.json", json.dumps(values, indent=1, ensure_ascii=False) + "\n"),
        ("adapter/adapter_config.json", json.dumps(values)),
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    write_manifest(run / "adapter")
    restore_paths(run, cache)
    values["model"] = given[0]
    assert (run / "run.yaml").read_text() == dump_yaml(values)
    assert (run / "run.json").read_text() == json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    assert json.loads((run / "adapter" / "adapter_config.json").read_text()) == values
    assert find_damage(run / "adapter") is None
