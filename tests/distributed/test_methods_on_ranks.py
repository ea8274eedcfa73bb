"""Every method, and LoRA's variants and starts, on two ranks: the same losses and the same adapter as on one."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ranked import ARGUMENTS, assert_same, changed, configured, stopped, train_on

import siliang
from faults.runs import Place, run
from siliang.config import MethodConfig, RunConfig
from siliang.methods import METHODS
from tests.test_methods_everywhere import SMALL

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked, which this system cannot")

# One of each family: tensors that layers share, ranks that are allocated and a term of the loss, a rotation, matrices
# that layers share, a router, rows of a table, a computed weight, virtual tokens.
OFTEN = ("vera", "adalora", "oft", "lily", "poly", "trainable_tokens", "osf", "cpt", "xlora")
STARTS = ("gaussian", "pissa", "olora", "loftq", "orthogonal", "mica", "eva", "corda", "lora_ga")
OF_LORA: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "bias": "all"},
    **{init: {"init_lora_weights": init} for init in STARTS},
    # few tokens are learned
    "eva": {"init_lora_weights": "eva", "eva_config": {"use_label_mask": False}},
    "trainable_indices": {"trainable_token_indices": [8, 10, 11]},
    "alora": {"alora_invocation_tokens": [5, 6]},  # "Assistant :"
    "velora": {"velora_config": {"num_groups": 4, "init_type": "random"}},
}
EVERY = [*SMALL, *OF_LORA, *(name for name in METHODS if name not in (*SMALL, *ARGUMENTS, "head"))]
# A mean over each batch, or random numbers that each rank draws: their losses are not those of one process.
OF_THEIR_OWN = ("lily", "poly")


def settings_of(method: str, experts: dict[str, str]) -> dict[str, Any]:
    """Without dropout, which ranks draw on their own."""
    if method in OF_LORA:
        return {"name": "lora", "r": 4} | OF_LORA[method]
    if method == "xlora":
        return {"name": "xlora", "adapters": experts, "xlora_dropout_p": 0.0}
    own = {key: value for key, value in SMALL.get(method, {}).items() if "dropout" not in key}
    return {"name": method} | own


@pytest.fixture(scope="module")
def experts(still_place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two LoRA adapters, for X-LoRA."""
    from transformers import AutoModelForCausalLM

    found: dict[str, str] = {}
    for name in ("law", "food"):
        folder = tmp_path_factory.mktemp("experts") / name
        config = siliang.LoraConfig(r=2, init_lora_weights=False)
        siliang.get_peft_model(AutoModelForCausalLM.from_pretrained(still_place.model), config).save_pretrained(folder)
        found[name] = str(folder)
    return found


@pytest.fixture(scope="module")
def alone(
    still_place: Place, experts: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], RunConfig]:
    """Trains on one rank."""

    @cache
    def train_alone(method: str) -> RunConfig:
        config = configured(still_place, tmp_path_factory.mktemp("one") / "run", "lora", tokens_at_once=16)
        config = config.model_copy(update={"method": MethodConfig(**settings_of(method, experts))})
        ending = run(config)
        assert ending.code == 0, ending.output
        return config

    return train_alone


def why_not_sharded(config: RunConfig) -> str | None:
    """What says that a method does not train under FSDP."""
    method = METHODS[config.method.name]
    assert method.config is not None
    settings = method.config(**config.method.arguments)
    if getattr(settings, "init_lora_weights", None) in ("eva", "corda", "lora_ga"):
        return "is learned on the whole model"
    return "adds a term to the loss" if method.adds_to_the_loss(settings) else None


WAYS = [(method, strategy) for method in EVERY for strategy in ("ddp", "fsdp")]
# in `make test` OFTEN under DDP, and under FSDP those whose tensors it has to shard, keep whole or refuse
SHORT = {(method, "ddp") for method in OFTEN} | {(method, "fsdp") for method in ("vera", "adalora", "osf")}


@pytest.mark.parametrize(
    ("method", "strategy"), [w if w in SHORT else pytest.param(*w, marks=pytest.mark.long) for w in WAYS]
)
def test_as_one(method: str, strategy: str, alone: Callable[[str], RunConfig], tmp_path: Path) -> None:
    """Where ranks compute means or random numbers of their own, they train all the same."""
    one = alone(method)
    endings = train_on(changed(one, tmp_path / "several", strategy), 2)
    if method == "velora_once":  # each rank would keep the mean of its own first batch
        assert [e.code for e in endings] == [2, 2] and "batch_average_once" in endings[0].output, endings[0].output
        return
    if strategy == "fsdp" and (why := why_not_sharded(one)) is not None:
        assert [e.code for e in endings] == [2, 2] and why in endings[0].output, endings[0].output
        return
    assert [e.code for e in endings] == [0, 0], endings[0].output + endings[1].output
    if method not in OF_THEIR_OWN:
        assert_same(Path(one.output), tmp_path / "several")


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", [m for m in EVERY if m != "velora_once"])
def test_resumed(method: str, strategy: str, alone: Callable[[str], RunConfig], tmp_path: Path) -> None:
    """Stopped by a signal to one rank alone."""
    one = alone(method)
    if method in OF_THEIR_OWN:
        one = changed(one, tmp_path / "whole", strategy)
        assert [e.code for e in train_on(one, 2)] == [0, 0]
    if strategy == "fsdp" and why_not_sharded(one) is not None:
        pytest.skip("refused, as the other test says")
    two = stopped(changed(one, tmp_path / "two", strategy))
    endings = train_on(two, 2, resume=True)
    assert [e.code for e in endings] == [0, 0], endings[0].output
    assert_same(Path(one.output), tmp_path / "two")
