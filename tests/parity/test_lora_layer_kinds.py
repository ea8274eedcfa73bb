"""LoRA and DoRA on convolutions and embeddings, compared with the live `peft`: names, answers, gradients, steps, files
both ways, merging.
"""

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
from siliang.types import ConfigError, MergeError, TargetError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*bias.*disable.*", "ignore:.*groups > 1.*", "ignore:.*lora_bias=True. was passed.*",
    "ignore:.*lora_B.bias.*A 1-D or zero-sized",  # PEFT takes a bias for a broken weight
)  # fmt: skip
LAYERS: dict[str, Any] = {
    "conv1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "conv1d-same": lambda: nn.Conv1d(4, 6, 3, padding="same", bias=False),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1),
    "conv2d-1x1": lambda: nn.Conv2d(4, 6, 1),
    "conv3d": lambda: nn.Conv3d(4, 6, (1, 2, 3), stride=2, padding=1),
    "table": lambda: nn.Embedding(20, 6, padding_idx=3),
}
GROUPED: dict[str, Any] = {
    "conv1d-groups": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    "conv2d-groups": lambda: nn.Conv2d(4, 4, (3, 2), groups=4),
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {"look": 8}},
    {"bias": "all"},
    {"lora_bias": True},
    {"use_dora": True},
    {"use_dora": True, "bias": "lora_only"},
]
CASES = [
    (kind, settings)
    for kind in (*LAYERS, *GROUPED)
    for settings in SETTINGS
    if not (kind in GROUPED and "use_dora" in settings)
    and not (kind == "table" and "lora_bias" in settings)
    and not (kind == "conv1d-same" and settings.get("bias") == "lora_only")
]


class Look(nn.Module):
    """A convolution, or a table, under a linear layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.look: nn.Module = (LAYERS | GROUPED)[kind]()
        self.last = nn.Linear(4 if kind == "conv2d-groups" else 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.look(x)
        return self.last(y if x.dtype == torch.long else y.flatten(2).square().mean(-1))


def inputs(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "table":
        return torch.randint(20, (5, 7), generator=generator)
    return torch.randn(5, 4, *[9] * int(kind[4]), generator=generator)


def pair(kind: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The same adapter, with random A and B, on the same base in both libraries."""
    settings = {"r": 4, "init_lora_weights": False, "target_modules": ["look"]} | settings
    ours: Any = siliang.get_peft_model(Look(kind), siliang.LoraConfig(**settings))
    theirs: Any = peft.get_peft_model(Look(kind), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    for name, p in ours.named_parameters():
        if "magnitude" in name or "bias.default" in name or "lora_B.default.bias" in name:
            p.data += 0.3 * torch.rand(p.shape, generator=generator)
    theirs.load_state_dict(ours.state_dict())  # strict: every name and shape is the same
    return ours, theirs


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=str)
def test_names_answers_and_gradients(kind: str, settings: dict[str, Any]) -> None:
    ours, theirs = pair(kind, settings)
    assert [(n, p.shape) for n, p in trained(ours).items()] == [(n, p.shape) for n, p in trained(theirs).items()]
    x, found = inputs(kind), []
    for model in (ours, theirs):
        y = model(x)
        y.square().mean().backward()
        found.append((y, {n: p.grad for n, p in trained(model).items()}))
    assert_close(found[0][0], found[1][0])
    assert_all_close(found[0][1], found[1][1])


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=str)
def test_five_steps(kind: str, settings: dict[str, Any]) -> None:
    x = inputs(kind)
    losses = [losses_of_steps(model, lambda model: model(x).square().mean()) for model in pair(kind, settings)]
    assert_same_losses(*losses)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=str)
def test_files_go_both_ways(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(kind, settings)
    x = inputs(kind)
    wanted = theirs(x)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert_close(peft.PeftModel.from_pretrained(Look(kind), str(tmp_path / "ours"))(x), wanted)
    assert_close(siliang.PeftModel.from_pretrained(Look(kind), tmp_path / "theirs")(x), wanted)


@pytest.mark.parametrize(("kind", "settings"), [case for case in CASES if case[0] in LAYERS], ids=str)
def test_merging_and_back(kind: str, settings: dict[str, Any]) -> None:
    ours, theirs = pair(kind, settings)
    x = inputs(kind)
    wanted, before = theirs(x), ours(x)
    if kind == "conv1d-same" and settings.get("lora_bias"):
        with pytest.raises(MergeError, match="lora_bias cannot be merged"):
            ours.merge_adapter()
        return
    ours.merge_adapter()
    assert_close(ours(x), wanted)
    ours.unmerge_adapter()
    assert torch.equal(ours(x), before)
    for found, there in zip(ours.merge_and_unload().parameters(), theirs.merge_and_unload().parameters(), strict=True):
        assert_close(found, there)
    again: Any = pair(kind, settings)[0]
    base = Look(kind).state_dict()
    assert all(torch.equal(t, base[n]) for n, t in again.unload().state_dict().items())


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", [*LAYERS, "conv1d-groups"])
def test_dropout_as_in_peft(kind: str, use_dora: bool) -> None:
    """The same draws leave out the same."""
    if use_dora and kind in GROUPED:
        pytest.skip("not with groups")
    ours, theirs = pair(kind, {"lora_dropout": 0.3, "use_dora": use_dora})
    for seed in range(4):
        found = []
        for model in (ours, theirs):
            torch.manual_seed(seed)
            found.append(model.train()(inputs(kind)))
        assert_close(*found)


@pytest.mark.parametrize("kind", LAYERS)
def test_starts_as_the_base_model_does(kind: str) -> None:
    for settings in ({}, {"init_lora_weights": "gaussian"}, {"use_dora": True}):
        config = siliang.LoraConfig(target_modules=["look"], **settings)
        assert_close(siliang.get_peft_model(Look(kind), config)(inputs(kind)), Look(kind)(inputs(kind)))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_bf16_error_budget(kind: str, use_dora: bool) -> None:
    """Against fp32 truth, our error on a bf16 base may not exceed that of peft with everything in bf16."""
    settings: dict[str, Any] = {"use_dora": use_dora, "r": 4, "target_modules": ["look"], "init_lora_weights": False}
    ours, theirs = pair(kind, settings)
    x, adapters = inputs(kind), {n: p.detach().clone() for n, p in ours.named_parameters() if "lora_" in n}
    truth = theirs(x)
    here: Any = siliang.get_peft_model(Look(kind).to(torch.bfloat16), siliang.LoraConfig(**settings))
    naive: Any = peft.get_peft_model(
        Look(kind).to(torch.bfloat16), peft.LoraConfig(**settings), autocast_adapter_dtype=False
    )
    errors = []
    for model in (here, naive):
        model.load_state_dict(adapters, strict=False)
        y = model(x if kind == "table" else x.to(torch.bfloat16))
        assert y.dtype == torch.bfloat16
        errors.append((y.float() - truth).abs().mean().item())
    assert {p.dtype for p in trained(here).values()} == {torch.float32}
    assert errors[0] <= errors[1] * 1.05


@pytest.mark.parametrize("kind", GROUPED)
def test_groups(kind: str) -> None:
    ours, theirs = pair(kind, {})
    with pytest.raises(MergeError, match="groups cannot be merged"):
        ours.merge_adapter()
    with pytest.raises(NotImplementedError, match="groups"):
        theirs.merge_adapter()
    groups = Look(kind).look.groups
    with pytest.raises(ConfigError, match=f"multiple of a convolution's groups, and a layer has {groups}"):
        pair(kind, {"r": 5})
    with pytest.raises(ConfigError, match="use_dora does not work on a convolution in groups"):
        pair(kind, {"use_dora": True})


def test_dora_and_groups_in_peft() -> None:
    """PEFT reads the norm off a matrix that is not the update, whose numbers happen to be as many."""
    settings: dict[str, Any] = {"r": 4, "use_dora": True, "init_lora_weights": False, "target_modules": ["look"]}
    theirs: Any = peft.get_peft_model(Look("conv1d-groups"), peft.LoraConfig(**settings))
    assert theirs.base_model.model.look.lora_magnitude_vector["default"].weight.shape == (1, 6, 1)


def test_padding_and_dilation_are_the_layers_own() -> None:
    """PEFT's A pads with zeros and has no dilation: its forward is not its merge."""
    torch.manual_seed(0)
    for settings in ({"padding_mode": "circular", "padding": 1}, {"dilation": 2, "padding": "same"}):
        base = nn.Sequential(nn.Conv1d(4, 6, 3, **settings))
        state = {name: t.clone() for name, t in base.state_dict().items()}
        x, merged = torch.randn(2, 4, 9), []
        config = {"r": 4, "init_lora_weights": False, "target_modules": ["0"]}
        ours: Any = siliang.get_peft_model(base, siliang.LoraConfig(**config))
        there = nn.Sequential(nn.Conv1d(4, 6, 3, **settings))
        there.load_state_dict(state)
        theirs: Any = peft.get_peft_model(there, peft.LoraConfig(**config))
        theirs.load_state_dict(ours.state_dict())
        y, of_peft = ours(x), theirs(x)
        for model in (ours, theirs):
            model.merge_adapter()
            merged.append(model(x))
        assert_close(y, merged[0])
        assert_close(y, merged[1])
        assert (of_peft - merged[1]).abs().max() > 0.1


def test_what_does_not_work_on_a_convolution() -> None:
    with pytest.raises(ConfigError, match="'pissa' does not work on a convolution"):
        pair("conv1d", {"init_lora_weights": "pissa"})
    with pytest.raises(ConfigError, match="lora_bias is not for embeddings"):
        pair("table", {"lora_bias": True})

    class Doubled(nn.Conv1d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    with pytest.raises(TargetError, match="which LORA cannot wrap"):
        siliang.get_peft_model(nn.Sequential(Doubled(4, 4, 3)), siliang.LoraConfig(target_modules=["0"]))


def test_all_linear_stays_linear() -> None:
    model: Any = siliang.get_peft_model(Look("conv2d"), siliang.LoraConfig(target_modules="all-linear"))
    assert set(trained(model)) == {f"base_model.model.last.lora_{side}.default.weight" for side in "AB"}


@pytest.mark.parametrize("kind", LAYERS)
def test_two_adapters_and_mixed_rows(kind: str) -> None:
    found = []
    for library in (siliang, peft):
        model: Any = library.get_peft_model(Look(kind), library.LoraConfig(r=2, target_modules=["look"]), "one")
        model.add_adapter("two", library.LoraConfig(r=3, target_modules=["look"]))
        for i, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        adapt = model if library is siliang else model.base_model
        adapt.set_adapter(["one", "two"])
        both = model(inputs(kind))
        adapt.set_adapter("two")
        alone = model(inputs(kind))
        rows = model.eval()(inputs(kind), adapter_names=["one", "two", "__base__", "two", "one"])
        found.append((both, alone, rows))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("way", ["cat", "linear", "svd"])
@pytest.mark.parametrize("kind", LAYERS)
def test_weighted_adapters(kind: str, way: str) -> None:
    if way == "svd" and kind.startswith(("conv1d", "conv3d")):
        pytest.skip("PEFT's fails on them")
    found = []
    for library in (siliang, peft):
        model: Any = library.get_peft_model(Look(kind), library.LoraConfig(r=2, target_modules=["look"]), "one")
        model.add_adapter("two", library.LoraConfig(r=2, target_modules=["look"]))
        for i, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        adapt = model if library is siliang else model.base_model
        adapt.add_weighted_adapter(["one", "two"], [0.7, -0.4], "new", way)
        adapt.set_adapter("new")
        found.append(model(inputs(kind)))
    assert_close(*found)
