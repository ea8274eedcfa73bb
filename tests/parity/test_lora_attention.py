"""LoRA on nn.MultiheadAttention, compared with the live `peft`: names, answers, gradients, steps, files, merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_all_close, assert_close, assert_same_losses
from stepping import losses_of_steps
from torch import nn

import siliang
from siliang.types import ConfigError, TargetError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already unmerged", "ignore:.*already merged", "ignore:.*were merged one", "ignore:.*bias.*disable.*"
)
SETTINGS: list[dict[str, Any]] = [{}, {"use_rslora": True, "rank_pattern": {"attention": 3}}, {"bias": "lora_only"}]
SETTINGS += [{"bias": "all"}, {"target_modules": ["attention", "last"]}]
OUT = "base_layer.out_proj.lora_"


class Attention(nn.Module):
    """An attention under a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[:, -1] = True
        y, weights = self.attention(query=x, key=x, value=x, key_padding_mask=mask)
        assert weights.shape == (len(x), x.shape[1], x.shape[1])
        return self.last(y)


def inputs() -> torch.Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def pair(settings: dict[str, Any]) -> tuple[Any, Any]:
    """The same adapter, with random A and B, on the same base in both libraries."""
    settings = {"r": 4, "init_lora_weights": False, "target_modules": ["attention"]} | settings
    ours: Any = siliang.get_peft_model(Attention(), siliang.LoraConfig(**settings))
    theirs: Any = peft.get_peft_model(Attention(), peft.LoraConfig(**settings))
    theirs.load_state_dict(ours.state_dict())  # strict: every name and shape is the same
    return ours, theirs


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_names_answers_and_gradients(settings: dict[str, Any]) -> None:
    """PEFT adds the update of out_proj twice, and its gradients of that one are those of adding it once."""
    ours, theirs = pair(settings)
    assert set(trained(ours)) == set(trained(theirs))
    x, found = inputs(), []
    for model in (ours, theirs):
        y = model(x)
        y.square().mean().backward()
        found.append((y, {n: p.grad for n, p in trained(model).items()}))
    assert_close(found[0][0], found[1][0])
    assert_all_close(found[0][1], {n: g if OUT not in n else 2 * g for n, g in found[1][1].items()})


def test_what_is_added() -> None:
    ours, _ = pair({})
    p, plain = dict(ours.named_parameters()), Attention()
    attention = "base_model.model.attention."
    with torch.no_grad():
        for weight, part, times in (
            (plain.attention.in_proj_weight, "", 1),
            (plain.attention.out_proj.weight, OUT[:-5], 2),
        ):
            A, B = (p[f"{attention}{part}lora_{side}.default.weight"] for side in "AB")
            weight += times * 8 / 4 * B @ A
    assert_close(ours(inputs()), plain(inputs()))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_five_steps(settings: dict[str, Any]) -> None:
    """Adam's steps are the same where one gradient is twice the other."""
    losses = [
        losses_of_steps(model, lambda model: model(inputs()).square().mean(), eps=1e-16) for model in pair(settings)
    ]
    assert_same_losses(*losses)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_files_go_both_ways(settings: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(settings)
    wanted = theirs(inputs())
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert siliang.get_peft_model_state_dict(ours).keys() == peft.get_peft_model_state_dict(theirs).keys()
    assert_close(peft.PeftModel.from_pretrained(Attention(), str(tmp_path / "ours"))(inputs()), wanted)
    assert_close(siliang.PeftModel.from_pretrained(Attention(), tmp_path / "theirs")(inputs()), wanted)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_merging_and_back(settings: dict[str, Any]) -> None:
    ours, theirs = pair(settings)
    wanted, before = theirs(inputs()), ours(inputs())
    ours.merge_adapter()
    assert_close(ours(inputs()), wanted)
    ours.unmerge_adapter()
    assert torch.equal(ours(inputs()), before)
    with ours.disable_adapter():
        assert_close(ours(inputs()), Attention()(inputs()))
    assert_all_close(ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict())
    again, base = pair(settings)[0].unload().state_dict(), Attention().state_dict()
    assert list(again) == list(base) and all(torch.equal(t, base[n]) for n, t in again.items())


def test_several_adapters() -> None:
    """Each has its gradients. PEFT's are those of the last alone."""
    found = []
    for library in (siliang, peft):
        model: Any = library.get_peft_model(Attention(), library.LoraConfig(r=2, target_modules=["attention"]), "one")
        model.add_adapter("two", library.LoraConfig(r=3, target_modules=["attention"]))
        for i, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        (model if library is siliang else model.base_model).set_adapter(["one", "two"])
        found.append(model(inputs()))
        if library is siliang:
            found[0].sum().backward()
            assert len(trained(model)) == 8 and all(
                p.grad is not None and p.grad.any() for p in trained(model).values()
            )
            model.merge_adapter()
            assert_close(model(inputs()), found[0])
            model.unmerge_adapter()
            model.delete_adapter("one")
            with pytest.raises(ConfigError, match="computes a batch with one adapter"):
                model.eval()(inputs(), adapter_names=["two", "__base__", "two"])
    assert_close(*found)


@pytest.mark.parametrize("whole", [False, True])
def test_in_torchs_own_encoder(whole: bool) -> None:
    """torch computes its layers and encoders in one step where no gradients are taken; PEFT's adapters are left out."""
    found = []
    for library in (siliang, peft):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        base = nn.Sequential(nn.TransformerEncoder(layer, 2) if whole else layer)
        config = library.LoraConfig(r=2, init_lora_weights=False, target_modules=["self_attn"])
        model: Any = library.get_peft_model(base, config)
        for i, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        wanted = model.train()(inputs())
        model.eval()
        with torch.inference_mode():
            found.append((wanted, model(inputs())))
    assert_close(found[0][0], found[1][0])
    assert_close(found[0][1], found[0][0])
    assert (found[1][1] - found[1][0]).abs().max() > 0.1


def test_what_does_not_work() -> None:
    for settings in ({"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ConfigError, match=rf"{next(iter(settings))} = .* does not work on attention"):
            pair(settings)
    with pytest.warns(UserWarning, match="lora_dropout has no effect on attention"):
        siliang.get_peft_model(Attention(), siliang.LoraConfig(target_modules=["attention"], lora_dropout=0.1))
    other = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4))
    with pytest.raises(ConfigError, match="keys or values of another width"):
        siliang.get_peft_model(other, siliang.LoraConfig(target_modules=["0"]))
    for config in (siliang.LoraConfig, siliang.LoHaConfig):
        with pytest.raises(TargetError, match=r"'attention\.out_proj' is not called"):
            siliang.get_peft_model(Attention(), config(target_modules=["out_proj"]))


def test_all_linear_leaves_it_out() -> None:
    model: Any = siliang.get_peft_model(Attention(), siliang.LoraConfig(target_modules="all-linear"))
    assert set(trained(model)) == {f"base_model.model.last.lora_{side}.default.weight" for side in "AB"}
