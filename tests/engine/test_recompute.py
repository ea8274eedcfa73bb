"""Layers recompute just so far as the budget asks, and nothing else changes."""

from typing import Any

import pytest
import torch
from closeness import assert_close
from tiny import make

import siliang
from siliang.data.collate import PadCollator
from siliang.engine.batches import Batch, StepCollator
from siliang.engine.budget import MemoryBudget
from siliang.engine.recompute import Recompute
from siliang.engine.step import Engine
from siliang.tasks import CAUSAL_LM
from siliang.types import ConfigError
from siliang.units import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("12GB", 12 * 10**9), ("800 mb", 8 * 10**8), ("1.5GiB", 3 * 2**29), ("4096", 4096)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["much", "12XB", "-1GB", "1.2.3GB", ""])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="write it as 12GB"):
        parse_bytes(text)


def batch(rows: int, length: int) -> Batch:
    made = [{"input_ids": [5 + (i + j) % 90 for j in range(length)], "labels": [7] * length} for i in range(rows)]
    return StepCollator(PadCollator(0), CAUSAL_LM, rows)(made)["batches"][0]


def step(engine: Engine, model: torch.nn.Module, what: Batch) -> dict[str, torch.Tensor]:
    with engine.loss(model, what) as loss:
        loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_as_many_as_need(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = siliang.get_peft_model(make(name), siliang.LoraConfig(init_lora_weights=False)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    engine = Engine(model, CAUSAL_LM, memory_budget="auto")
    recompute, small, large = engine.recompute, batch(2, 8), batch(8, 32)
    expected = step(engine, model, large)
    assert recompute.most == 0 and len(recompute.bytes_per_token) == 2 and min(recompute.bytes_per_token) > 0
    whole = sum(recompute.bytes_per_token) * large.tokens
    for room, wanted in ((whole * 1.01, 0), (whole * 0.9, 2)):
        monkeypatch.setattr(recompute, "_room", room)
        found = step(engine, model, large)
        assert recompute.recomputed == wanted
        for key, value in expected.items():
            assert_close(found[key], value)
    step(engine, model, small)
    assert recompute.recomputed == 0  # the same room is enough for a small batch
    assert recompute.most == 2


@pytest.mark.parametrize(("room", "count"), [(1000, 0), (999, 2), (915, 3), (300, 9), (199, 10), (0, 10)])
def test_how_many(room: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten layers of 100 bytes a token, whose inputs have 10; a layer that recomputes is whole again for a while."""
    recompute = Recompute(torch.nn.Identity(), MemoryBudget(torch.nn.Identity(), None))
    for name, value in (("bytes_per_token", [100.0] * 10), ("_boundary", 10.0), ("_room", room)):
        monkeypatch.setattr(recompute, name, value)
    assert recompute.needed(1) == count


def test_what_is_measured_is_what_autograd_keeps() -> None:
    """The bytes of a linear layer's saved tensors, told exactly: its input, which no other layer has kept."""
    model = make("llama").train().requires_grad_(False)
    recompute = Recompute(model, MemoryBudget(model, "auto"))
    embeds = torch.randn(1, 16, 32, requires_grad=True)
    with recompute.chosen(16):
        model(inputs_embeds=embeds, use_cache=False).logits.sum().backward()
    one = recompute.bytes_per_token[1]
    assert 10 * 32 * 4 < one < 40 * 32 * 4 + 4 * 16 * 4  # between 10 and 40 vectors of the hidden size for each token


def test_a_budget_below_everything_recomputes_all() -> None:
    model = siliang.get_peft_model(make("llama"), siliang.LoraConfig()).train()
    engine = Engine(model, CAUSAL_LM, memory_budget=10**6)
    step(engine, model, batch(2, 8))  # measured
    step(engine, model, batch(2, 8))
    assert engine.recompute.recomputed == 2


@pytest.mark.parametrize("how", [{"checkpointing": True}, {"memory_budget": 1}, {}])
def test_the_next_engine_on_the_same_base_is_as_alone(how: dict[str, Any]) -> None:
    base = make("llama")
    before = checkpointing_of(base)
    model = siliang.get_peft_model(base, siliang.LoraConfig())
    engine = Engine(model, CAUSAL_LM, **how)
    if not how:
        assert engine.recompute.recompute_all()  # as a step does that did not fit
    step(engine, model, batch(2, 8))
    assert checkpointing_of(base) != before
    engine.close()
    base = model.unload()
    assert checkpointing_of(base) == before

    calls = list[int]()
    model = siliang.get_peft_model(base, siliang.LoraConfig()).train()
    layer: Any = base.get_submodule("model.layers.0.mlp")
    layer.register_forward_hook(lambda *_: calls.append(1))
    engine = Engine(model, CAUSAL_LM)
    calls.clear()
    step(engine, model, batch(2, 8))
    assert len(calls) == 1  # a layer that recomputes runs twice


def checkpointing_of(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    return [
        (
            getattr(m, "gradient_checkpointing", None),
            getattr(m, "_gradient_checkpointing_func", None),
            len(m._forward_hooks),
        )
        for m in model.modules()
    ]
