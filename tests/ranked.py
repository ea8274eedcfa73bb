"""Several ranks on this machine: forked, so that what is imported already need not be imported again; and the same
training on one, to compare."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from faults.runs import Child, Ending, Place
from siliang.config import QuantizationConfig, RunConfig
from siliang.records import Record
from siliang.run_folder import CHECKPOINTS
from siliang.train.saving import checkpoints
from siliang.train.types import Planner

ARGUMENTS = {
    "lora": {"r": 4},
    "qlora": {"r": 4},
    "bitfit": {},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "full": {},
}


def _become(rank: int, size: int, port: int) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    for state in (AcceleratorState, PartialState, GradientState):  # the parent may have trained alone
        state._reset_state()


def start(
    config: RunConfig,
    size: int,
    *,
    resume: bool = False,
    pace_s: float = 0.0,
    planner: Planner | None = None,
    before: Callable[[], None] = lambda: None,
) -> list[Child]:
    """A training on `size` ranks; `before` is called in each."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]

    def become(rank: int) -> None:
        _become(rank, size, port)
        before()

    return [
        Child(config, resume=resume, hook=partial(become, rank), pace_s=pace_s, planner=planner) for rank in range(size)
    ]


def stopped(config: RunConfig) -> RunConfig:
    """A training on two ranks that is stopped after its seventh step, by a signal to the second rank alone."""
    children = _signalled(config, signal.SIGTERM, step=7)
    endings = [child.end() for child in children]
    assert [e.code for e in endings] == [130, 130], endings[0].output
    assert 7 <= max(checkpoints(Path(config.output) / CHECKPOINTS)) < 20
    return config


def killed(config: RunConfig) -> str:
    """A training on two ranks whose second is killed behind the eighth step: what the first says of it, and ends."""
    first, second = _signalled(config, signal.SIGKILL, step=8)
    gone, left = second.end(), first.end()
    assert gone.code == -signal.SIGKILL and left.code == 2, left.output
    assert "error[SLE12]: Rank 0 of 2 has lost another rank" in left.output
    return left.output


def _signalled(config: RunConfig, number: signal.Signals, *, step: int) -> list[Child]:
    children = start(config, 2, pace_s=0.05)
    assert children[0].wait_for(f"step {step}\n"), children[0].end().output
    children[1].signal(number)
    return children


def train_on(config: RunConfig, size: int, *, resume: bool = False) -> list[Ending]:
    """A training on `size` ranks, to its end."""
    return [child.end() for child in start(config, size, resume=resume)]


def changed(config: RunConfig, folder: Path, strategy: str = "ddp") -> RunConfig:
    """The same training with other settings."""
    distributed = config.distributed.model_copy(update={"strategy": strategy})
    return config.model_copy(update={"output": str(folder), "distributed": distributed})


def configured(place: Place, folder: Path, method: str = "lora", **train: Any) -> RunConfig:
    """A method by name; qlora is LoRA on a base in 4 bits."""
    name = "lora" if method == "qlora" else method
    config = place.config(folder, name, **({"max_steps": 20, "log_every": 1, "eval_every": 10} | train))
    bits = QuantizationConfig(compute_dtype="fp32") if method == "qlora" else None
    changes = {"method": type(config.method)(name=name, **ARGUMENTS[method]), "quantization": bits}
    return config.model_copy(update=changes)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/*.safetensors")]
    return {name: t for path in found for name, t in load_file(path).items()}


def assert_same(one: Path, several: Path) -> None:
    a, b = Record.read(one), Record.read(several)
    losses = [[(s.step, s.loss, s.eval_loss) for s in r.steps] for r in (a, b)]
    assert [s for s, *_ in losses[0]] == [s for s, *_ in losses[1]] and len(losses[0]) >= 20
    for (_, *expected), (_, *found) in zip(*losses, strict=True):
        for x, y in zip(expected, found, strict=True):
            assert (x is None) == (y is None) and (x is None or abs(x - y) < 1e-4), (expected, found)  # type: ignore[operator]
    assert a.tokens_trained == b.tokens_trained
    expected_weights, found_weights = weights_of(one), weights_of(several)
    assert expected_weights.keys() == found_weights.keys() and expected_weights
    for name, value in expected_weights.items():
        if name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is rounding, which Adam makes steps of
            continue
        torch.testing.assert_close(
            found_weights[name], value, rtol=1e-3, atol=2e-5, msg=lambda said, name=name: f"{name}: {said}"
        )
