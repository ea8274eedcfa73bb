"""Of which row each place of a layer's input is: known from the model and the batch, or refused, and never guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

import siliang
from siliang.methods.batch_rows import BatchRows
from siliang.models.introspect import is_routed
from siliang.ops.layout import Layout
from siliang.types import ConfigError

CPU = torch.device("cpu")
INPUTS = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}


def mixture() -> Any:
    """An encoder with two experts, which read the tokens that a router chooses, flattened."""
    torch.manual_seed(0)
    sizes: Any = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 2, "num_experts": 2}
    config = SwitchTransformersConfig(vocab_size=20, num_sparse_encoder_layers=1, expert_capacity=64, **sizes)
    return SwitchTransformersEncoderModel(config).eval()


def rows_of(rows: int, width: int, layout: Layout | None = None) -> BatchRows:
    found = BatchRows("test")
    found.begin(rows, CPU)
    found._widths, found.layout = {width}, layout
    return found


def test_places_that_are_known() -> None:
    rows = rows_of(2, 3)
    for x in (torch.zeros(2, 3, 4), torch.zeros(2, 4)):  # (B, N, D), and (B, D) of a pooler
        assert rows.numbers(x, routed=False) is None
    flat = rows.numbers(torch.zeros(6, 4), routed=False)
    assert flat is not None and flat.tolist() == [0, 0, 0, 1, 1, 1]
    packed = rows_of(2, 3, Layout.of((3, 1), 3, CPU)).numbers(torch.zeros(1, 4, 4), routed=False)
    assert packed is not None and packed.tolist() == [0, 0, 0, 1]
    at = rows.at(torch.tensor([[5.0], [7.0]]), torch.zeros(6, 4), routed=False)
    assert at.tolist() == [[5.0]] * 3 + [[7.0]] * 3


@pytest.mark.parametrize("places", [2, 6])
def test_as_many_tokens_as_rows_are_not_the_rows(places: int) -> None:
    """An expert may be given as many tokens as the batch has rows, or all tokens in another order."""
    with pytest.raises(ConfigError, match=r"test: a layer reads \(\d, 4\) where the batch has 2 rows"):
        rows_of(2, 3).numbers(torch.zeros(places, 4), routed=True)
    with pytest.raises(ConfigError, match="cannot be known"):
        rows_of(2, 3, Layout.of((3, 1), 3, CPU)).numbers(torch.zeros(1, 4, 4), routed=True)


def test_which_modules_are_routed() -> None:
    model = mixture()
    routed = {path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and is_routed(model, path)}
    assert routed and all(".experts.expert_" in path for path in routed)
    assert any(path.endswith("router.classifier") for path, _ in model.named_modules())
    for name in ("llama", "bert", "t5", "gpt2", "bloom"):
        plain = make(name)
        assert not any(is_routed(plain, path) for path, _ in plain.named_modules() if path)


@pytest.mark.parametrize("method", ["poly", "adapter_names"])
def test_routed_tokens_are_refused(method: str) -> None:
    """Each expert reads the tokens of both rows, however many they are."""
    model = mixture()
    for path, m in model.named_modules():
        if path.endswith("router.classifier"):
            torch.nn.init.zeros_(m.weight)  # all tokens go to the first expert: 6 of 2 rows of 3
    targets = ["wi"]
    if method == "poly":
        adapted: Any = siliang.get_peft_model(model, siliang.PolyConfig(n_tasks=2, r=2, target_modules=targets))
        call = {"task_ids": torch.tensor([0, 1])}
    else:
        config = siliang.LoraConfig(r=2, init_lora_weights=False, target_modules=[r"experts.expert_0.wi"])
        adapted = siliang.get_peft_model(model, config)
        adapted.add_adapter("other", config)
        call = {"adapter_names": ["default", "other"]}
    with torch.no_grad(), pytest.raises(ConfigError, match=r"a layer reads \(6, 16\) where the batch has 2 rows"):
        adapted.eval()(**INPUTS, **call)
