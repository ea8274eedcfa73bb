"""Every method through the rest of siliang: the plan, a run, its checkpoints, recomputing, bf16, and the merge."""

from __future__ import annotations

import signal
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import word_tokenizer

from siliang.config import RunConfig
from siliang.methods import METHODS
from siliang.plan.preflight import Planner
from siliang.records import MethodPlan, Record
from siliang.run_folder import open_run
from siliang.train.log import Progress
from siliang.train.run import train
from siliang.train.types import Listener, Run
from siliang.types import InterruptedRunError, MergeError
from siliang.use.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
INVOCATION = word_tokenizer().encode("Assistant :", add_special_tokens=False)
SMALL: dict[str, dict[str, Any]] = {  # for layers of 16 to 64
    "lora": {"r": 2, "lora_dropout": 0.1},
    "adalora": {"init_r": 3, "target_r": 2, "lora_dropout": 0.1},
    "loha": {"r": 2, "rank_dropout": 0.1},
    "lokr": {"r": 2},
    "fourierft": {"n_frequency": 40},
    "c3a": {"block_size": 8},
    "shira": {"r": 2},
    "oft": {"oft_block_size": 8},
    "miss": {"r": 2, "miss_dropout": 0.1},
    "vera": {"r": 4, "vera_dropout": 0.1},
    "hira": {"r": 2},
    "delora": {"r": 2},
    "gralora": {"r": 4},
    "randlora": {"r": 4},
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 8},
    "lily": {"r": 2, "stride_A": 2},
    "adaption_prompt": {"adapter_len": 3},
    "hra": {"r": 2},
    "waveft": {"n_frequency": 40},
    "road": {"group_size": 8},
    "poly": {"r": 2, "n_skills": 2},
    "cpt": {"cpt_token_ids": [5, 9, 11, 4], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "multitask_prompt_tuning": {"num_virtual_tokens": 4, "num_ranks": 2},
    "trainable_tokens": {"token_indices": [28, 30, 31]},
    # variants of LoRA
    "alora": {"name": "lora", "r": 2, "lora_dropout": 0.1, "alora_invocation_tokens": INVOCATION},
    "bdlora": {
        "name": "lora",
        "r": 2,
        "lora_dropout": 0.1,
        "use_bdlora": {"target_modules_bd_b": ["proj"], "nblocks": 2},
    },
    "velora": {"name": "lora", "r": 2, "lora_dropout": 0.1, "velora_config": {"num_groups": 4}},
    "velora_once": {"name": "lora", "r": 2, "velora_config": {"num_groups": 4, "init_type": "batch_average_once"}},
    "kasa": {"name": "lora", "r": 2, "lora_dropout": 0.1, "kasa_config": {"gamma": 0.1}},
}
NOT_HERE = ("bitfit", "prompt_tuning", "p_tuning", "prefix_tuning", "head", "full", "xlora")  # which other tests have
VARIANTS = [name for name, settings in SMALL.items() if "name" in settings]
EVERY = [name for name in METHODS if name not in NOT_HERE] + VARIANTS
MERGEABLE = [name for name in EVERY if name in VARIANTS or METHODS[name].mergeable]
CLASSIFIED = ("loha", "oft", "shira", "vera", "randlora", "trainable_tokens")


def configured(
    model_folders: dict[str, Path], data: Path, output: Path, method: str, base: str = "llama", **settings: Any
) -> RunConfig:
    """Four steps, each of them logged."""
    steps = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "log_every": 1}
    values = {
        "model": str(model_folders[base]),
        "task": "causal_lm" if base == "llama" else "seq_cls",
        "method": {"name": method, **SMALL.get(method, {})},
        "data": {"train": str(data), "test_size": 0.2, "max_length": 32},
        "train": steps | settings,
        "output": str(output),
        "accept": ["SL042"],
    }
    return RunConfig.build(values)


@dataclass(frozen=True)
class Done:
    """A finished run, and what was said of it before."""

    config: RunConfig
    record: Record
    planned: MethodPlan
    counted: int

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def losses(self) -> list[float]:
        return losses_of(self.record)


def planned_run(config: RunConfig) -> Done:
    """Plans and trains, and counts the parameters of the model itself."""
    planner, counts = Planner(), list[int]()

    def count(run: Run) -> None:
        counts.append(sum(p.numel() for p in run.model.parameters() if p.requires_grad))

    record = train(config, Listener(trained=count), planner=planner)
    assert planner.last_plan is not None
    return Done(config, record, planner.last_plan, counts[0])


def losses_of(record: Record) -> list[float]:
    return [line.loss for line in record.steps if line.loss is not None]


def saved(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def run_of(
    model_folders: dict[str, Path], instruction_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Done]:
    """The run of a method on the Llama, which is made once."""
    done: dict[str, Done] = {}

    def give(method: str) -> Done:
        if method not in done:
            folder = tmp_path_factory.mktemp("runs") / method
            done[method] = planned_run(configured(model_folders, instruction_file, folder, method))
        return done[method]

    return give


def some_of(methods: Iterable[str], short: Container[str]) -> list[Any]:
    """These methods; those that are not in `short` run in `make test-long` alone."""
    return [method if method in short else pytest.param(method, marks=pytest.mark.long) for method in methods]


# one of each family in `make test`; all of them in `make test-long`
FAMILIES = ("adaption_prompt", "lily", "loha", "oft", "osf", "road", "vera", "trainable_tokens")
# and those that plan, resume or merge in a way of their own
WITH_OWN_WAYS = (*FAMILIES, "adalora", "alora", "beft", "cpt", "kasa", "multitask_prompt_tuning", "poly")


@pytest.mark.parametrize("method", some_of(EVERY, WITH_OWN_WAYS))
def test_the_plan_says_what_the_run_has(method: str, run_of: Callable[[str], Done]) -> None:
    done = run_of(method)
    assert done.record.status == "completed" and len(done.losses) == 4 and len(set(done.losses)) == 4
    check_plan(done)


def check_plan(done: Done) -> None:
    """The parameters are those of the model, and the bytes those of the file's tensors."""
    tensors = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    assert done.planned.error is None and done.planned.peak_bytes > 0
    assert done.planned.trained == done.record.parameters.trained == done.counted
    found = sum(t.nbytes for t in tensors.values())
    if METHODS[done.config.method.name].learned:  # the training leaves out what turned out not to matter
        assert found < done.planned.adapter_bytes
    else:
        assert done.planned.adapter_bytes == found


@pytest.mark.parametrize("method", some_of(EVERY, WITH_OWN_WAYS))
def test_stopped_and_resumed(
    method: str, run_of: Callable[[str], Done], model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    stopped: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.step == 2 and not stopped:  # a second signal would not wait for the checkpoint
            stopped.append(progress.step)
            signal.raise_signal(signal.SIGTERM)

    config = configured(model_folders, instruction_file, tmp_path / "run", method)
    with pytest.raises(InterruptedRunError):
        train(config, Listener(progress=stop))
    record = train(config, resume=True)
    assert losses_of(record) == run_of(method).losses
    assert saved(tmp_path / "run") == saved(run_of(method).folder)


@pytest.mark.parametrize("method", some_of(EVERY, FAMILIES))
def test_recomputing_changes_no_loss(
    method: str, run_of: Callable[[str], Done], model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    config = configured(model_folders, instruction_file, tmp_path / "run", method, gradient_checkpointing=True)
    assert losses_of(train(config)) == run_of(method).losses
    assert saved(tmp_path / "run") == saved(run_of(method).folder)


@pytest.mark.parametrize("method", some_of(EVERY, FAMILIES))
def test_on_a_frozen_base_in_bf16(
    method: str, model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    config = configured(model_folders, instruction_file, tmp_path / "run", method, precision="bf16")
    record = train(config)
    assert len(set(losses_of(record))) == 4
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("method", some_of(MERGEABLE, WITH_OWN_WAYS))
def test_merged(method: str, run_of: Callable[[str], Done], tmp_path: Path) -> None:
    if method == "alora":
        with pytest.raises(MergeError, match="aLoRA cannot be merged"):
            merge(open_run(run_of(method).folder), tmp_path / "merged")
        return
    if method == "beft":  # it trains a bias, and Llama's layers have none to add it to
        with pytest.raises(MergeError, match="layer has none to add it to"):
            merge(open_run(run_of(method).folder), tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return
    assert merge(open_run(run_of(method).folder), tmp_path / "merged").holds
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("method", CLASSIFIED)
def test_a_classifier(method: str, model_folders: dict[str, Path], review_file: Path, tmp_path: Path) -> None:
    check_plan(planned_run(configured(model_folders, review_file, tmp_path / "run", method, "bert")))
    assert merge(open_run(tmp_path / "run"), tmp_path / "merged").holds
