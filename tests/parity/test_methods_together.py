"""Several methods on one model and on one layer: what they compute together, and what the live `peft` computes.

peft's mixed models put one wrapper around another, the last attached outside. `peft.inject_adapter_in_model` does so
for methods that PeftMixedModel does not let in.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import batch, make
from torch import Tensor

import siliang
from siliang.types import ConfigError, MergeError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`.*", "ignore:.*fan_in_fan_out.*", "ignore:Unsupported layer.*"
)
NEAR: Any = {"rtol": 1e-5, "atol": 1e-6}
LORA = ("LoraConfig", {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False})
DORA = ("LoraConfig", {"target_modules": ["q_proj"], "r": 2, "use_dora": True, "init_lora_weights": False})
OUT = ("IA3Config", {"target_modules": ["q_proj"], "feedforward_modules": []})
IN = ("IA3Config", {"target_modules": ["v_proj"], "feedforward_modules": ["v_proj"]})
NORM = ("LNTuningConfig", {"target_modules": ["input_layernorm"]})


def logits(model: Any) -> Tensor:
    return model(**{k: v for k, v in batch("llama").items() if k != "labels"}).logits.detach()


def plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace("base_layer.", "")


def attach(*settings: tuple[str, dict[str, Any]]) -> Any:
    """Ours, with adapters a, b, ... of these methods, all of them active, away from where they start."""
    (kind, values), *others = settings
    model: Any = siliang.get_peft_model(make("llama"), getattr(siliang, kind)(**values), adapter_name="a")
    for name, (kind, values) in zip("bcd", others, strict=False):
        model.add_adapter(name, getattr(siliang, kind)(**values))
    model.set_adapter(list("abcd"[: len(settings)]))
    generator = torch.Generator().manual_seed(5)
    for _, p in sorted(model.named_parameters()):
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    "settings", [(LORA, OUT), (OUT, LORA), (LORA, IN), (IN, LORA), (NORM, LORA, OUT), (OUT, DORA), (LORA, NORM)]
)
def test_as_peft_s_wrappers_around_each_other(settings: tuple[tuple[str, dict[str, Any]], ...]) -> None:
    ours = attach(*settings)
    theirs: Any = make("llama")
    for name, (kind, values) in zip("abcd", settings, strict=False):
        theirs = peft.inject_adapter_in_model(getattr(peft, kind)(**values), theirs, name)
    values = {plain(n): p.detach() for n, p in ours.named_parameters()}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(values[plain(name)])
    torch.testing.assert_close(logits(ours), logits(theirs.eval()), **NEAR)


@pytest.mark.parametrize("settings", [(LORA, OUT, NORM), (OUT, LORA), (IN, DORA), (LORA, DORA, OUT)])
def test_merged_and_saved_each_for_itself(settings: tuple[tuple[str, dict[str, Any]], ...], tmp_path: Path) -> None:
    model = attach(*settings)
    names = model.active_adapters
    together = logits(model)
    model.save_pretrained(tmp_path)
    alone: dict[str, Tensor] = {}
    for name in names:
        model.set_adapter(name)
        alone[name] = logits(model)
        # the file is that of the method by itself: peft opens it on a plain model
        theirs = peft.PeftModel.from_pretrained(make("llama"), str(tmp_path / name))
        torch.testing.assert_close(logits(theirs.eval()), alone[name], **NEAR)
    assert all(not torch.equal(one, together) for one in alone.values())
    again: Any = siliang.PeftModel.from_pretrained(make("llama"), tmp_path / names[0], adapter_name=names[0])
    for name in names[1:]:
        again.load_adapter(tmp_path / name, name)
    again.set_adapter(names)
    assert torch.equal(logits(again), together)
    model.set_adapter(names)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), together, **NEAR)
    model.unmerge_adapter()
    assert torch.equal(logits(model), together)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make("llama").eval()))
    model.delete_adapter(names[1])
    model.set_adapter(names[0])
    assert torch.equal(logits(model), alone[names[0]])
    again.set_adapter(names)
    torch.testing.assert_close(logits(again.merge_and_unload().eval()), together, **NEAR)


def test_rows_of_several_methods() -> None:
    model = attach(LORA, OUT)
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    rows = len(inputs["input_ids"])
    names = (["a", "b", "__base__"] * rows)[:rows]
    mixed = model(**inputs, adapter_names=names).logits
    for i, name in enumerate(names):
        with model.disable_adapter():
            expected = logits(model)[i]
        if name != "__base__":
            model.set_adapter(name)
            expected = logits(model)[i]
        torch.testing.assert_close(mixed[i], expected, **NEAR)


@pytest.mark.parametrize("first", ["prompt", "lora"])
def test_a_prompt_beside_adapters_in_layers(first: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "prompt": siliang.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),  # type: ignore[arg-type]
        "lora": siliang.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),  # type: ignore[arg-type]
    }
    other = "lora" if first == "prompt" else "prompt"
    model: Any = siliang.get_peft_model(make("llama"), settings[first], adapter_name=first)
    model.add_adapter(other, settings[other])
    model.set_adapter(["lora", "prompt"])
    assert all(p.requires_grad == ("lora" in n or "prompt_encoder" in n) for n, p in model.named_parameters())
    model.train()
    model(**batch("llama")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    together = logits(model.eval())
    model.save_pretrained(tmp_path)
    for name in settings:
        model.set_adapter(name)
        theirs = peft.PeftModel.from_pretrained(make("llama"), str(tmp_path / name)).eval()
        torch.testing.assert_close(logits(model)[:, -4:], logits(theirs)[:, -4:], **NEAR)
    model.set_adapter(["lora", "prompt"])
    assert torch.equal(logits(model), together)
    with pytest.raises(MergeError, match="A prompt is no change of the weights"):
        model.merge_adapter()
    model.merge_adapter("lora")
    torch.testing.assert_close(logits(model), together, **NEAR)
    with pytest.raises(ConfigError, match="a batch of their own"):
        model.unmerge_adapter()
        model(**batch("llama"), adapter_names=["lora", "prompt"] * (len(batch("llama")["input_ids"]) // 2))
    assert torch.equal(logits(model.unload().eval()), logits(make("llama").eval()))
