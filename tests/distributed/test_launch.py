"""Several processes as their user starts them: --devices, torchrun, accelerate launch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import pytest
import yaml
from commands import run
from safetensors.torch import load_file

from faults.runs import Place
from siliang.records import Record

pytestmark = pytest.mark.slow
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# without cards it starts several processes for FSDP alone
ACCELERATE = ["-m", "accelerate.commands.launch", "--use_fsdp", "--num_processes", "2"]
STARTS = {
    "--devices": ["-m", "siliang"],
    "torchrun": [*TORCHRUN, "-m", "siliang"],
    "accelerate": [*ACCELERATE, "-m", "siliang"],
}


def settings(place: Place, folder: Path, method: str = "lora", **train: object) -> list[str]:
    path = folder / "run.yaml"
    values = {
        "model": str(place.model),
        "task": "causal_lm",
        "method": {"name": "lora", "r": 4} if method == "lora" else method,
        "data": {"train": str(place.data), "max_length": 32},
        "train": {"max_steps": 12, "batch_size": 4, "log_every": 4, "precision": "fp32", "learning_rate": 1e-2} | train,
        "output": str(folder / "run"),
    }
    path.write_text(yaml.safe_dump(values))
    return ["train", str(path)]


@pytest.fixture(scope="module")
def alone(still_place: Place, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a method's run on one process, which is made once."""

    @cache
    def train_alone(method: str) -> Path:
        folder = tmp_path_factory.mktemp("one")
        assert run(*settings(still_place, folder, method)).code == 0
        return folder / "run"

    return train_alone


@pytest.mark.parametrize("start", STARTS)
def test_the_same_from_every_launcher(
    start: str, still_place: Place, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    """In full under FSDP, where the first rank's plan has made the same operations on paper before."""
    sharded = start == "accelerate"
    method, weights = ("full", "model/model") if sharded else ("lora", "adapter/adapter_model")
    one = alone(method)
    command = [sys.executable, *STARTS[start], *settings(still_place, tmp_path, method)]
    command += ["--devices", "2"] if start == "--devices" else []
    env = {name: value for name, value in ENV.items() if name != "OMP_NUM_THREADS"}  # as users have it
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("^done ", done.stdout, re.MULTILINE)) == 1
    found, expected = Record.read(tmp_path / "run"), Record.read(one)
    assert len(found.memory.peak_bytes_by_rank) == 2
    assert found.config["distributed"]["strategy"] == ("fsdp" if sharded else "ddp")
    assert found.final == pytest.approx(expected.final, abs=1e-4)
    mine, its = (load_file(folder / f"{weights}.safetensors") for folder in (tmp_path / "run", one))
    assert mine.keys() == its.keys() and mine
    assert all((mine[name] - value).abs().max() < 1e-4 for name, value in its.items())


def kill_rank(folder: Path, rank: int) -> None:
    """Kills a process of the run whose settings are in `folder`."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(folder / "run.yaml") in process.cmdline() and process.environ().get("RANK") == str(rank):
                process.kill()


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 180
    while not list(folder.glob("run/checkpoints/checkpoint-*")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)


def test_a_killed_rank_ends_the_run_with_a_word(still_place: Place, tmp_path: Path) -> None:
    command = [
        sys.executable,
        *STARTS["--devices"],
        *settings(still_place, tmp_path, max_steps=100, save_every=10),
        "--devices",
        "2",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV) as process:
        wait_for_checkpoint(tmp_path, process)
        kill_rank(tmp_path, 1)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Rank 1 of 2 was killed by signal 9" in error and "Traceback" not in error
    assert f"siliang train --resume {tmp_path / 'run'}" in error
    command = [sys.executable, *STARTS["--devices"], "train", str(tmp_path / "run"), "--resume", "--devices", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Record.read(tmp_path / "run").status == "completed"


def test_torchrun_begins_again_by_itself(still_place: Place, tmp_path: Path) -> None:
    arguments = settings(still_place, tmp_path, max_steps=100, save_every=10)
    command = [sys.executable, *TORCHRUN, "--max-restarts", "1", "-m", "siliang", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV) as process:
        wait_for_checkpoint(tmp_path, process)
        kill_rank(tmp_path, 1)
        said, error = process.communicate(timeout=300)
    assert process.returncode == 0, said + error
    record = Record.read(tmp_path / "run")
    assert record.status == "completed" and record.steps[-1].step == 100
