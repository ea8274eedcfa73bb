"""Several adapters on one layer: one computation, merged, unmerged and in the live `peft`."""

from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from tiny import batch, make
from torch import nn

import siliang
from siliang.types import ConfigError, MergeError

DORA, LORA, BIASED = {"use_dora": True}, {}, {"lora_bias": True}
pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*", "ignore:.*lora_bias=True. was passed.*")


def together(library: Any, name: str, first: dict[str, Any], second: dict[str, Any], targets: list[str]) -> Any:
    """Two active adapters, away from where they start."""
    model = library.get_peft_model(make(name), library.LoraConfig(r=4, target_modules=targets, **first))
    model.add_adapter("b", library.LoraConfig(r=2, target_modules=targets[-1:], **second))
    generator = torch.Generator().manual_seed(3)
    for n, p in sorted(model.named_parameters()):
        if "lora_" in n:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    (model if library is siliang else model.base_model).set_adapter(["default", "b"])
    return model.eval()


@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ["v_proj", "q_proj"]), ("bert", ["value", "query"]), ("gpt2", ["c_attn"])]
)
@pytest.mark.parametrize(
    ("first", "second"), [(DORA, DORA), (LORA, DORA), (DORA, LORA), (BIASED, DORA), (DORA, BIASED)]
)
def test_merged_is_unmerged_is_peft(
    name: str, targets: list[str], first: dict[str, Any], second: dict[str, Any]
) -> None:
    if name == "llama" and BIASED in (first, second):
        pytest.skip("no biases to merge into")
    inputs = {k: v for k, v in batch(name).items() if k != "labels"}
    ours = together(siliang, name, first, second, targets)
    theirs = together(peft, name, first, second, targets)
    theirs.load_state_dict(ours.state_dict())  # the names are the same as well
    unmerged = ours(**inputs).logits
    assert_close(unmerged, theirs(**inputs).logits)
    ours.merge_adapter()
    assert_close(ours(**inputs).logits, unmerged)
    ours.unmerge_adapter()
    assert torch.equal(ours(**inputs).logits, unmerged)
    assert_close(ours.merge_and_unload()(**inputs).logits, unmerged)


def test_dora_together_with_dropout_has_the_same_mean() -> None:
    """Training with dropout is the same computation in expectation, for the second adapter too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5))
    config = siliang.LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=0.3, init_lora_weights=False)
    model = siliang.get_peft_model(net, config)
    model.add_adapter("b", config)
    model.set_adapter(["default", "b"])
    x = torch.randn(1, 6)
    exact = model.eval()(x)
    with torch.no_grad():
        sampled = model.train()(x.expand(40_000, -1)).mean(0, keepdim=True)
    assert (sampled - exact).abs().max() < 0.03 * exact.abs().max()


def test_dora_with_a_bias_of_b_is_refused_as_in_peft() -> None:
    with pytest.raises(ValueError):
        peft.LoraConfig(use_dora=True, lora_bias=True)
    with pytest.raises(ConfigError, match="use_dora and lora_bias do not go together"):
        siliang.LoraConfig(use_dora=True, lora_bias=True)


def test_merging_a_bias_into_a_layer_without_one_is_an_error() -> None:
    ours = together(siliang, "llama", BIASED, BIASED, ["q_proj"])
    inputs = {"input_ids": batch("llama")["input_ids"]}
    before = ours(**inputs).logits
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(MergeError, match="the base model's layer has no bias"):
            merge()
        assert torch.equal(ours(**inputs).logits, before)


def test_two_copies_of_a_norm_are_not_merged_over_each_other() -> None:
    model = siliang.get_peft_model(make("llama"), siliang.LNTuningConfig())
    model.add_adapter("b", siliang.LNTuningConfig())
    with pytest.raises(MergeError, match="Adapters 'default' and 'b' cannot be active together"):
        model.merge_adapter(["default", "b"])


def test_padding_of_an_embedding_is_not_trained() -> None:
    gradients = []
    for library in (siliang, peft):
        net = nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 3))
        model = library.get_peft_model(net, library.LoraConfig(r=2, target_modules=["0"]))
        model(torch.tensor([[1, 2, 3]])).sum().backward()
        gradients.append(next(p.grad for n, p in model.named_parameters() if "lora_embedding_A" in n))
    assert [g[:, 2].abs().max().item() for g in gradients] == [0.0, 0.0]
    assert gradients[0][:, 1].abs().max() > 0
