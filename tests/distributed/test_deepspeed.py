"""DeepSpeed's ZeRO on CPUs: the same losses as one process, the same checkpoints; and what is refused."""

from __future__ import annotations

import inspect
import json
import os
import re
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import every_task
import pytest
import torch
from accelerate import Accelerator
from every_task import make_models
from ranked import assert_same, changed, configured, killed, stopped, train_on

from faults.runs import Place, run
from siliang.config import DistributedConfig, RunConfig
from siliang.distributed.deepspeed import PRIVATE, no_sync, require_deepspeed, without_hooks
from siliang.records import Record
from siliang.types import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")  # DeepSpeed's own are many
with_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None or not hasattr(os, "fork"),
    reason="needs DeepSpeed: pip install 'siliang[deepspeed]'",
)
STAGES = [2, 3]
BARE: dict[str, Any] = {"model": "m", "task": "causal_lm", "data": {"train": "d"}, "output": "o"}


def under_zero(config: RunConfig, folder: Path, stage: int) -> RunConfig:
    """Nothing stays whole because it is small, and no message holds all."""
    small = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    settings: dict[str, Any] = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 2000, **small}}
    distributed = DistributedConfig(strategy="deepspeed", deepspeed=settings)
    return config.model_copy(update={"output": str(folder), "distributed": distributed})


@with_deepspeed
@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "prefix_tuning"])
@pytest.mark.parametrize("stage", STAGES)
def test_as_one(method: str, stage: int, still_place: Place, tmp_path: Path) -> None:
    """Steps of one to several batches, of which the last of an epoch has fewer rows than there are ranks."""
    config = configured(still_place, tmp_path / "one", method, tokens_at_once=16)
    assert run(config).code == 0
    endings = train_on(under_zero(config, tmp_path / "two", stage), 2)
    if method == "prefix_tuning" and stage == 3:  # it would wait forever
        assert 0 not in [e.code for e in endings] and "does not work with ZeRO-3" in endings[0].output
        return
    assert [e.code for e in endings] == [0, 0], endings[0].output + endings[1].output
    assert_same(tmp_path / "one", tmp_path / "two")
    assert not list((tmp_path / "two").rglob("*.p[tk]*")) + list((tmp_path / "two").rglob("*.bin"))  # nothing pickled


@with_deepspeed
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_goes_on_with_another_strategy(method: str, stage: int, still_place: Place, tmp_path: Path) -> None:
    """Checkpoints are those of every run: from ZeRO to itself, to one process, and from DDP to ZeRO."""
    config = configured(still_place, tmp_path / "one", method)
    assert run(config).code == 0
    zero = stopped(under_zero(config, tmp_path / "zero", stage))
    assert [e.code for e in train_on(zero, 2, resume=True)] == [0, 0]
    assert_same(tmp_path / "one", tmp_path / "zero")
    alone = stopped(under_zero(config, tmp_path / "alone", stage))
    assert run(alone, resume=True).code == 0
    assert_same(tmp_path / "one", tmp_path / "alone")
    stopped(changed(config, tmp_path / "ddp"))
    assert [e.code for e in train_on(under_zero(config, tmp_path / "ddp", stage), 2, resume=True)] == [0, 0]
    assert_same(tmp_path / "one", tmp_path / "ddp")


@with_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_the_best_step_is_kept(stage: int, still_place: Place, tmp_path: Path) -> None:
    config = configured(still_place, tmp_path / "one", best="loss", eval_every=4, learning_rate=0.7)
    assert run(config).code == 0
    endings = train_on(under_zero(config, tmp_path / "two", stage), 2)
    assert [e.code for e in endings] == [0, 0], endings[0].output
    one, two = Record.read(tmp_path / "one"), Record.read(tmp_path / "two")
    assert one.best_step == two.best_step and one.best_step < 20
    assert two.final["eval_loss"] == pytest.approx(one.final["eval_loss"], abs=1e-3)


@with_deepspeed
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("task", "method"), [("embedding", "lora"), ("embedding", "full"), ("preference", "full")])
def test_losses_of_whole_steps(task: str, method: str, stage: int, tmp_path: Path) -> None:
    """Vectors are compared over all ranks; the reference of full tuning is taken before the first step."""
    models = make_models(tmp_path / "models")
    config = every_task.configured(task, models, tmp_path, method, max_steps=6, batch_size=5, log_every=1)
    assert run(config).code == 0
    endings = train_on(under_zero(config, tmp_path / "two", stage), 2)
    assert [e.code for e in endings] == [0, 0], endings[0].output + endings[1].output
    one, two = Record.read(Path(config.output)), Record.read(tmp_path / "two")
    losses = [[line.loss for line in record.steps if line.loss is not None] for record in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 6
    assert two.final == pytest.approx(one.final, rel=1e-3, abs=1e-4)


@with_deepspeed
def test_half_precision_needs_a_card(still_place: Place, tmp_path: Path) -> None:
    config = configured(still_place, tmp_path / "two", precision="bf16")
    endings = train_on(under_zero(config, tmp_path / "two", 2), 2)
    assert [e.code for e in endings] == [2, 2] and "set train.precision=fp32" in endings[0].output


@with_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_is_killed(stage: int, still_place: Place, tmp_path: Path) -> None:
    zero = under_zero(configured(still_place, tmp_path / "two", save_every=3), tmp_path / "two", stage)
    killed(zero)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"train_batch_size": 32},
            "train_batch_size = 32: it is set by train.batch_size and",
        ),
        ({"gradient_clipping": 0.5}, "it is set by train.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = True: it is set by train.precision"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "settings determine the optimizer"),
        ({"optimizer": {"type": "Lamb", "params": {"lr": "auto"}}}, "settings determine the optimizer"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}},
            "settings determine the scheduler",
        ),
        ({"zero_optimization": {"stage": 4}}, "stage = 4: must be 1, 2 or 3"),
        ({"zero_optimisation": {"stage": 2}}, "Did you mean 'zero_optimization'"),
        ({"zero_optimization": 2}, "zero_optimization must be a mapping"),
    ],
)
def test_what_would_contradict_the_run_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        RunConfig.build(BARE | {"distributed": {"strategy": "deepspeed", "deepspeed": settings}})


def test_a_file_as_it_stands_in_the_tutorials(tmp_path: Path, still_place: Place) -> None:
    auto = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    written = {
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": auto},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_prefetch_bucket_size": "auto"},
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    (tmp_path / "ds.json").write_text(json.dumps(written))
    found = DistributedConfig(strategy="deepspeed", deepspeed=str(tmp_path / "ds.json"))  # type: ignore[arg-type]
    assert found.deepspeed == written and found.zero["zero_optimization"]["stage"] == 3
    config = configured(still_place, tmp_path / "run").model_copy(update={"distributed": found})
    assert RunConfig.build(config.model_dump(mode="json")).distributed == found  # run.yaml holds what the file did


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("quantization", {"bits": 4}, "quantization cannot be used with distributed.strategy"),
        ("train", {"on_nan": "skip 2"}, "train.on_nan cannot be used with distributed.strategy"),
        ("train", {"fit": True}, "train.fit cannot be used with distributed.strategy"),
        ("train", {"precision": "pure-bf16"}, "train.precision cannot be used with distributed.strategy"),
        (
            "distributed",
            {"strategy": "ddp", "zero_stage": 3},
            "zero_stage has no effect with distributed.strategy = ddp",
        ),
        ("distributed", {"deepspeed": {"zero_optimization": {"stage": 2}}, "zero_stage": 3}, "has stage 2"),
        ("distributed", {"deepspeed": "not-there.json"}, "cannot be read: No such file"),
        ("distributed", {"zero_stage": 4}, "zero_stage"),
    ],
)
def test_what_does_not_go_with_it(section: str, values: dict[str, Any], words: str) -> None:
    run = BARE | {"distributed": {"strategy": "deepspeed"}}
    with pytest.raises(ConfigError, match=words):
        RunConfig.build(run | {section: {**run.get(section, {}), **values}})


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed here")
def test_where_it_is_not_installed(still_place: Place, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'siliang\[deepspeed\]'"):
        require_deepspeed(torch.device("cpu"), half=False)
    endings = train_on(under_zero(configured(still_place, tmp_path / "run"), tmp_path / "run", 2), 2)
    assert [e.code for e in endings] == [2, 2] and "needs DeepSpeed" in endings[0].output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", PRIVATE)
def test_what_is_private_to_other_libraries_is_there(place: str) -> None:
    """Where a release has changed it, a failure says in one line what is gone, and nothing of a training has begun."""
    module, _, name = place.partition(":")
    library = module.partition(".")[0]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    here = f"{library} {version(library)}"
    try:
        source = inspect.getsource(getattr(import_module(module), name))
    except (ImportError, AttributeError):
        pytest.fail(f"{here} has no {module}.{name}: distributed/deepspeed.py reaches into it", pytrace=False)
    for attribute in PRIVATE[place]:
        if re.search(rf"\b{attribute}\b", source) is None:
            pytest.fail(f"{here}: {name} has no {attribute}: distributed/deepspeed.py uses it", pytrace=False)


def test_modules_are_called_without_hooks() -> None:
    model, calls = torch.nn.Sequential(torch.nn.Linear(2, 2)), list[str]()
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: calls.append("before"))
        module.register_forward_hook(lambda *_: calls.append("after"))
    with without_hooks(model):
        model(torch.ones(1, 2))
    assert calls == []
    model(torch.ones(1, 2))
    assert calls == ["before", "before", "after", "after"]


def test_no_sync_keeps_the_state_of_accelerate() -> None:
    accelerator = Accelerator(cpu=True)
    with no_sync(accelerator):
        assert not accelerator.sync_gradients
    assert accelerator.sync_gradients
