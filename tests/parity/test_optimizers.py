"""LoRA+, LoRA-FA and the preconditioner beside the live `peft`: five steps of the same gradients, the same weights."""

from __future__ import annotations

import copy
from typing import Any

import peft
import peft.optimizers
import pytest
import torch
from closeness import assert_close
from peft.optimizers import create_riemannian_optimizer
from tiny import batch, make

import siliang
from siliang.peft_api import optimizers
from siliang.types import ConfigError

SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["q_proj", "v_proj"]},
    "patterns": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
}


def pair(settings: dict[str, Any]) -> tuple[Any, Any]:
    """The same model of siliang and of PEFT, with the same adapter."""
    ours, theirs = (
        library.get_peft_model(make("llama"), library.LoraConfig(r=4, init_lora_weights=False, **settings))
        for library in (siliang, peft)
    )
    weights = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        p.data = weights[name].detach().clone()
    return ours.eval(), theirs.eval()


def five_steps(ours: Any, theirs: Any, optimizer: Any, other: Any) -> None:
    """Steps both with the gradients of PEFT's model, and compares all weights after each."""
    inputs = batch("llama")
    for _ in range(5):
        theirs.zero_grad()
        theirs(**inputs).loss.backward()
        gradients = {name: p.grad for name, p in theirs.named_parameters()}
        for name, p in ours.named_parameters():
            p.grad = None if not p.requires_grad else copy.deepcopy(gradients[name])
        optimizer.step()
        other.step()
        wanted = dict(theirs.named_parameters())
        for name, p in ours.named_parameters():
            assert_close(p, wanted[name], what=name)
    with torch.no_grad():
        assert_close(ours(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.parametrize("settings", [*SETTINGS.values(), {"target_modules": ["q_proj"], "use_dora": True}])
def test_loraplus(settings: dict[str, Any]) -> None:
    ours, theirs = pair(settings)
    given = {"lr": 1e-3, "loraplus_lr_ratio": 4.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-4}
    made = [
        library.create_loraplus_optimizer(model, torch.optim.AdamW, **given, eps=1e-7)
        for library, model in ((optimizers, ours), (peft.optimizers, theirs))
    ]
    for mine, other in zip(*(one.param_groups for one in made), strict=True):
        assert [p.shape for p in mine["params"]] == [p.shape for p in other["params"]]
        assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
    five_steps(ours, theirs, *made)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_lorafa(settings: dict[str, Any], weight_decay: float) -> None:
    ours, theirs = pair(settings)
    made = [
        library.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2, weight_decay=weight_decay)
        for library, model in ((optimizers, ours), (peft.optimizers, theirs))
    ]
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    five_steps(ours, theirs, *made)
    for name, p in ours.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
        assert not p.requires_grad or "_A." not in name


def test_lorafa_goes_on_from_its_state() -> None:
    """What a checkpoint holds of it is enough, and a schedule changes its rate."""
    found = []
    for stopped in (False, True):
        model, _ = pair(SETTINGS["linear"])
        optimizer = optimizers.create_lorafa_optimizer(model, 4, 8, 1e-2)
        for step in range(4):
            if stopped and step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = optimizers.create_lorafa_optimizer(model, 4, 8, 1.0)
                optimizer.load_state_dict(state)
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
            assert optimizer.step(lambda: 1.5) == 1.5
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_what_they_refuse() -> None:
    model, _ = pair(SETTINGS["rslora"])
    with pytest.raises(ConfigError, match="use_rslora = False, and adapter 'default' has True"):
        optimizers.create_lorafa_optimizer(model, 4, 8, 1e-3, use_rslora=False)
    with pytest.raises(ConfigError, match="lr = -1: must be at least 0"):
        optimizers.create_lorafa_optimizer(model, 4, 8, -1)
    dora, _ = pair({"target_modules": ["q_proj"], "use_dora": True})
    with pytest.raises(ConfigError, match="has use_dora: leave it out"):
        optimizers.create_lorafa_optimizer(dora, 4, 8, 1e-3)
    other: Any = siliang.get_peft_model(make("llama"), siliang.IA3Config())
    with pytest.raises(ConfigError, match="has no LoRA adapter"):
        optimizers.create_lorafa_optimizer(other, 4, 8, 1e-3)
    with pytest.raises(ConfigError, match="loraplus_lr_ratio = 0: must be above 0"):
        optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=0)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ConfigError, match="trains nothing"):
        optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_riemannian(kind: Any) -> None:
    """Five steps on the same gradients; a magnitude, which has no pair, takes the class's own step."""
    settings: Any = {"r": 4, "init_lora_weights": False, "use_dora": True}
    ours: Any = siliang.get_peft_model(make("llama"), siliang.LoraConfig(**settings))
    theirs: Any = peft.get_peft_model(make("llama"), peft.LoraConfig(**settings))
    theirs.load_state_dict(ours.state_dict())
    steps = (optimizers.create_riemannian_optimizer, create_riemannian_optimizer)
    made = [step(m, kind, lr=1e-2, reg=0.1) for step, m in zip(steps, (ours, theirs), strict=True)]
    for _ in range(5):
        for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert name == other
            if p.requires_grad:
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
        for optimizer in made:
            optimizer.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(p, q, what=name)


def test_what_riemannian_refuses() -> None:
    model: Any = siliang.get_peft_model(make("llama"), siliang.LoraConfig())
    with pytest.raises(ConfigError, match="LBFGS computes the gradients anew"):
        optimizers.create_riemannian_optimizer(model, torch.optim.LBFGS, lr=0.1)
    optimizer = optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
    blocks: Any = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}
    settings: list[dict[str, Any]] = [
        {"use_bdlora": siliang.BdLoraConfig(**blocks)},
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    ]
    for own in settings:
        other: Any = siliang.get_peft_model(make("llama"), siliang.LoraConfig(**own))
        with pytest.raises(ConfigError, match=f"adapter 'default' has {list(own)[-1]}, whose A and B"):
            optimizers.create_riemannian_optimizer(other, torch.optim.SGD, lr=0.1)
    mica: Any = siliang.get_peft_model(make("llama"), siliang.LoraConfig(init_lora_weights="mica"))
    with pytest.raises(ConfigError, match="LoRA-FA trains B alone, and MiCA's B is frozen"):
        optimizers.create_lorafa_optimizer(mica, 4, 8, 1e-3)
    with pytest.raises(ConfigError, match="of which both A and B are trained"):
        optimizers.create_riemannian_optimizer(mica, torch.optim.SGD, lr=0.1)
