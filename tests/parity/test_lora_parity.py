"""LoRA compared with the live `peft`, on the same weights: forward, gradients, steps, files both ways, merging."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import ROUNDINGS, assert_all_close, assert_close, assert_same_losses
from stepping import losses_of_steps
from tiny import batch, make

import siliang

TASK = {"llama": "CAUSAL_LM", "bloom": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"r": 4, "lora_alpha": 16, "use_rslora": True},
    {"target_modules": "all-linear", "rank_pattern": {".*1.*": 2}, "alpha_pattern": {".*1.*": 32}},
    {"layers_to_transform": [1]},
    {"bias": "all"},
    {"bias": "lora_only"},
]
pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*", "ignore:.*bias.*disable.*")


def pair(name: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The same adapter, with random A and B, on the same base in both libraries."""
    settings = {"task_type": TASK[name], "init_lora_weights": False} | copy.deepcopy(settings)
    ours = siliang.get_peft_model(make(name), siliang.LoraConfig(**settings))
    theirs = peft.get_peft_model(make(name), peft.LoraConfig(**settings))  # type: ignore[arg-type]
    theirs.load_state_dict(ours.state_dict())  # strict: every name is the same
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", TASK)
def test_names_forward_and_gradients(name: str, settings: dict[str, Any]) -> None:
    ours, theirs = pair(name, settings)
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in theirs.named_parameters() if p.requires_grad
    ]
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    exact = copy.deepcopy(theirs).double()
    for model in (ours, theirs, exact):
        out = model(**batch(name))
        out.loss.backward()
        model.out = out
    assert_close(ours.out.logits, theirs.out.logits)
    truth = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    least = max(g.abs().max() for g in truth.values()) / 100  # the bias of keys has none: softmax does not see it
    for (n, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if p.requires_grad:
            assert p.grad is not None, n
            true = truth[n]
            error, naive = ((g.double() - true).abs().max() for g in (p.grad, q.grad))
            # a scale of 16 makes rounding 16 times as large for both: the error's measure is peft's own
            scale = max(true.abs().max(), least)
            assert error <= 2 * naive + ROUNDINGS * torch.finfo(p.dtype).eps * scale, n


@pytest.mark.parametrize("name", TASK)
def test_five_steps(name: str) -> None:
    losses = [losses_of_steps(model, lambda model: model(**batch(name)).loss) for model in pair(name, {})]
    assert_same_losses(*losses)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", TASK)
def test_files_go_both_ways(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(name, settings)
    inputs = batch(name)
    wanted = theirs(**inputs).logits
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    here = siliang.PeftModel.from_pretrained(make(name), tmp_path / "theirs")
    assert_close(there(**inputs).logits, wanted)
    assert_close(here(**inputs).logits, wanted)
    assert not any(p.requires_grad for p in here.parameters())


@pytest.mark.parametrize("name", TASK)
def test_merge(name: str) -> None:
    ours, theirs = pair(name, {"bias": "all"})
    merged, merged_there = ours.merge_and_unload(), theirs.merge_and_unload()
    assert list(merged.state_dict()) == list(make(name).state_dict())
    assert_all_close(merged.state_dict(), merged_there.state_dict())


def test_starts_as_the_base_model_does() -> None:
    for init in (True, "gaussian"):
        model = siliang.get_peft_model(make("llama"), siliang.LoraConfig(init_lora_weights=init))
        inputs = batch("llama")
        torch.testing.assert_close(model(**inputs).logits, make("llama")(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", TASK)
def test_bf16_error_budget(name: str) -> None:
    """Against fp32 truth, our error on a bf16 base may not exceed that of peft with everything in bf16."""
    ours, theirs = pair(name, {})
    inputs = batch(name)
    truth = theirs(**inputs).logits
    adapters = {n: p.detach().clone() for n, p in ours.named_parameters() if "lora_" in n}
    here: Any = siliang.get_peft_model(make(name).to(torch.bfloat16), siliang.LoraConfig(task_type=TASK[name]))
    naive: Any = peft.get_peft_model(
        make(name).to(torch.bfloat16), peft.LoraConfig(task_type=TASK[name]), autocast_adapter_dtype=False
    )
    errors = []
    for model in (here, naive):
        model.load_state_dict(adapters, strict=False)
        errors.append((model.eval()(**inputs).logits.float() - truth).abs().mean().item())
    assert {p.dtype for n, p in here.named_parameters() if p.requires_grad} == {torch.float32}
    assert errors[0] <= errors[1] * 1.01
