"""Every method that merges: the merged model computes what the unmerged one does, and what peft's merged one does; and
it can be undone, bit for bit.
"""

from typing import Any

import pytest
import torch
from closeness import assert_close
from tiny import make

import siliang
from siliang.types import ConfigError
from tests.parity.test_every_method import (
    CASES,
    EVERYWHERE,
    METHODS,
    NOT_IN_PEFT,
    PROMPTS,
    configs,
    loss_and_logits,
    pair,
    pytestmark,  # noqa: F401, which warnings are expected
    randomize,
)

MODELS = ("llama", "gpt2", "bert", "plain")
# a bias needs one of the layer's own; aLoRA is not merged
NOT_MERGED = {("lora-bias", "llama"), ("beft", "llama"), ("lora-alora", "llama"), ("lora-alora", "gpt2")}
NEVER = ("LilyConfig", "PolyConfig", "AdaptionPromptConfig")  # whose updates depend on the rows
MERGEABLE = [method for method, (kind, _) in METHODS.items() if method not in PROMPTS and kind not in NEVER]
MERGED = [case for case in CASES if case[0] in MERGEABLE and case[1] in MODELS and case not in NOT_MERGED]


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    return loss_and_logits(model, name)[1]


# in `make test` the variants of a method on one model
SOME = [
    case
    if case[1] == "llama" or case[0] in EVERYWHERE or "-" not in case[0]
    else pytest.param(*case, marks=pytest.mark.long)
    for case in MERGED
]


@pytest.mark.parametrize(("method", "name"), SOME)
def test_merged_as_in_peft(method: str, name: str) -> None:
    ours, theirs = pair(method, name)
    merged = check_merge(ours, name)
    assert_close(merged, logits(theirs.merge_and_unload(safe_merge=True), name))


@pytest.mark.parametrize(("method", "name"), sorted(case for case in NOT_IN_PEFT if case[0] in MERGEABLE))
def test_merged_where_peft_does_not_go(method: str, name: str) -> None:
    model: Any = siliang.get_peft_model(make(name), configs(method, name)[0])
    randomize(model)
    assert not torch.equal(check_merge(model.eval(), name), logits(make(name), name))


def check_merge(model: Any, name: str) -> torch.Tensor:
    """Merges an adapter, undoes it, and merges it for good.

    Returns:
        What the merged model gives.
    """
    unmerged = logits(model, name)
    model.merge_adapter(safe_merge=True)
    merged = logits(model, name)
    assert_close(merged, unmerged)
    model.unmerge_adapter()
    assert torch.equal(logits(model, name), unmerged)
    with model.disable_adapter():
        assert torch.equal(logits(model, name), logits(make(name), name))
    assert torch.equal(logits(model.merge_and_unload(safe_merge=True), name), merged)
    return merged


@pytest.mark.parametrize("method", [method for method, name in MERGED if name == "llama"])
def test_two_adapters_merge_as_they_compute_together(method: str) -> None:
    """Each is a function of the base alone, or of what the one before it leaves: the same unmerged and merged."""
    model: Any = siliang.get_peft_model(make("llama"), configs(method, "llama")[0])
    model.add_adapter("other", configs(method, "llama")[0])
    for name in ("default", "other"):
        model.set_adapter(name)
        randomize(model)
    try:
        model.set_adapter(["default", "other"])
    except ConfigError as error:
        assert "cannot be active together" in str(error)
        return
    together = logits(model.eval(), "llama")
    model.set_adapter("default")
    assert not torch.allclose(logits(model, "llama"), together)
    model.merge_adapter(["default", "other"])
    assert_close(logits(model, "llama"), together)
