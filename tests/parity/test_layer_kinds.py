"""Methods on convolutions and embeddings, compared with the live `peft`: answers, gradients, files and merges."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_all_close, assert_close
from torch import nn

import siliang
from siliang.types import TargetError

WINDOWS: dict[str, tuple[Any, Any, int]] = {
    "conv1d": (nn.Conv1d, 3, 1),
    "conv2d": (nn.Conv2d, (3, 2), 2),
    "conv2d-1x1": (nn.Conv2d, 1, 2),
    "conv3d": (nn.Conv3d, (1, 2, 3), 3),
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "hira": ("HiraConfig", {"r": 2, "init_weights": False}),
    "lokr": ("LoKrConfig", {"r": 1, "init_weights": False}),
    "lokr-whole": ("LoKrConfig", {"r": 8, "init_weights": False}),
    "loha": ("LoHaConfig", {"r": 2, "init_weights": False}),
}
CASES = [(method, kind) for method in CONFIGS for kind in WINDOWS if method == "hira" or kind != "conv3d"]


class Picture(nn.Module):
    """A convolution, or a table, under a linear layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        if kind == "table":
            self.look: nn.Module = nn.Embedding(20, 6)
        else:
            layer, window, _ = WINDOWS[kind]
            self.look = layer(4, 6, window, stride=2, padding=1, padding_mode="zeros")
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.look(x)
        return self.last(y if x.dtype == torch.long else y.flatten(2).mean(-1))


def inputs(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "table":
        return torch.randint(20, (5, 7), generator=generator)
    return torch.randn(5, 4, *[9] * WINDOWS[kind][2], generator=generator)


@pytest.mark.parametrize(("method", "kind"), [*CASES, ("hira", "table")])
def test_as_in_peft(method: str, kind: str, tmp_path: Path) -> None:
    name, settings = CONFIGS[method]
    settings = settings | {"target_modules": ["look"]}
    ours: Any = siliang.get_peft_model(Picture(kind), getattr(siliang, name)(**settings))
    theirs = peft.get_peft_model(Picture(kind), getattr(peft, name)(**settings))
    theirs.load_state_dict(ours.state_dict())
    x, found = inputs(kind), []
    for model in (ours, theirs):
        y = model.eval()(x)
        y.square().mean().backward()
        found.append((y, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert_close(found[0][0], found[1][0])
    assert_all_close(found[0][1], found[1][1])
    theirs.save_pretrained(str(tmp_path))
    again = siliang.PeftModel.from_pretrained(Picture(kind), tmp_path)
    assert_close(again(x), found[1][0])
    ours.merge_adapter()
    assert_close(ours(x), found[1][0])
    assert_close(ours.merge_and_unload()(x), found[1][0])


def test_a_convolution_in_groups_is_not_for_hira() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    with pytest.raises(TargetError, match="which HIRA cannot wrap"):
        siliang.get_peft_model(model, siliang.HiraConfig(target_modules=["0"]))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig"])
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_dropout_of_rows_and_of_whole_updates_as_in_peft(name: str, kind: str, scaled: bool) -> None:
    """The same draws leave out the same."""
    if name == "LoHaConfig" and not scaled:
        pytest.skip("LoHa's always scales")
    settings: dict[str, Any] = {"r": 2, "init_weights": False, "rank_dropout": 0.4, "module_dropout": 0.2}
    settings |= {"target_modules": ["look"] if kind != "linear" else ["last"]}
    settings |= {"rank_dropout_scale": scaled} if name == "LoKrConfig" else {}
    kind = kind if kind != "linear" else "conv2d"
    ours: Any = siliang.get_peft_model(Picture(kind), getattr(siliang, name)(**settings))
    theirs = peft.get_peft_model(Picture(kind), getattr(peft, name)(**settings))
    theirs.load_state_dict(ours.state_dict())
    x = inputs(kind)
    for seed in range(8):
        found = []
        for model in (ours, theirs):
            torch.manual_seed(seed)
            found.append(model.train()(x))
        assert_close(*found)
