"""LLaMA-Adapter: on Mistral, beside LoRA, on packed rows, and where it differs from PEFT."""

from typing import Any

import peft
import pytest
import torch
from closeness import assert_all_close, assert_close
from tiny import batch, make
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import siliang
from siliang.types import ConfigError, MergeError, TargetError, TaskType
from tests.parity.test_every_method import in_peft, randomize

SHAPE: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SETTINGS: dict[str, Any] = {"adapter_len": 4, "adapter_layers": 2}


def on(base: Any, **settings: Any) -> Any:
    """Ours on a base model, its gates open."""
    config = siliang.AdaptionPromptConfig(task_type=TaskType.CAUSAL_LM, **(SETTINGS | settings))
    model: Any = siliang.get_peft_model(base, config)
    randomize(model)
    return model.eval()


def mistral() -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SHAPE))


def test_on_mistral_as_in_peft() -> None:
    ours = on(mistral())
    theirs: Any = peft.get_peft_model(mistral(), peft.AdaptionPromptConfig(task_type="CAUSAL_LM", **SETTINGS)).eval()
    theirs.load_state_dict({in_peft(n): t for n, t in ours.state_dict().items()})
    found = []
    for model in (ours, theirs):
        output = model(**batch("llama"))
        output.loss.backward()
        grads = {in_peft(n): p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((output.logits, grads))
    assert_close(found[0][0], found[1][0])
    assert_all_close(found[0][1], found[1][1])


def test_training_starts_from_the_base_model_where_the_output_layer_has_a_bias() -> None:
    """PEFT adds the bias of o_proj once more for the prompt."""

    def base() -> Any:
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True))
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.data.fill_(0.1)
        return model.eval()

    wanted = base()(**batch("llama")).logits
    ours: Any = siliang.get_peft_model(base(), siliang.AdaptionPromptConfig(task_type=TaskType.CAUSAL_LM, **SETTINGS))
    theirs: Any = peft.get_peft_model(base(), peft.AdaptionPromptConfig(task_type="CAUSAL_LM", **SETTINGS))
    assert_close(ours.eval()(**batch("llama")).logits, wanted)
    assert not torch.allclose(theirs.eval()(**batch("llama")).logits, wanted, atol=1e-3)


def test_beside_lora_on_the_projections() -> None:
    """The prompt goes through the projections with their adapters."""
    lora = siliang.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False, r=2)
    model = on(make("llama"))
    alone = model(**batch("llama")).logits
    model.add_adapter("lora", lora)
    model.set_adapter(["default", "lora"])
    both = model(**batch("llama")).logits
    merged: Any = siliang.get_peft_model(make("llama"), lora)
    siliang.set_peft_model_state_dict(merged, siliang.get_peft_model_state_dict(model, adapter_name="lora"))
    again = on(merged.merge_and_unload())
    siliang.set_peft_model_state_dict(again, siliang.get_peft_model_state_dict(model, adapter_name="default"))
    assert_close(both, again(**batch("llama")).logits)
    assert (both - alone).abs().max() > 1e-3


def test_two_add_up() -> None:
    model = on(make("llama"))
    model.add_adapter("other", siliang.AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    found = []
    for names in ("default", "other", ["default", "other"], ["other", "default"]):
        model.set_adapter(names)
        if names == "other":
            randomize(model)
        found.append(model(**batch("llama")).logits)
    assert_close(found[2], found[3])
    assert min((found[2] - one).abs().max() for one in found[:2]) > 1e-4


def test_a_batch_mixes_prompts_without_a_cache() -> None:
    model = on(make("llama"))
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    names = ["default", "__base__", "default"]
    own = model(**inputs).logits
    with model.disable_adapter():
        base = model(**inputs).logits
    mixed = model(**inputs, adapter_names=names, use_cache=False).logits
    assert_close(mixed, torch.stack([own[0], base[1], own[2]]))
    with pytest.raises(ConfigError, match="use_cache=False"):
        model(**inputs, adapter_names=names, use_cache=True)


def test_packed_rows() -> None:
    from siliang.engine.step import Engine
    from siliang.tasks import TASKS

    assert Engine(on(make("llama")), TASKS[TaskType.CAUSAL_LM]).padding is not None


def test_what_it_fills_in_and_refuses() -> None:
    model: Any = siliang.get_peft_model(make("llama"), siliang.AdaptionPromptConfig(task_type=TaskType.CAUSAL_LM))
    config = model.peft_config["default"]
    assert (config.target_modules, config.adapter_len, config.adapter_layers) == ("self_attn", 10, 2)
    with pytest.raises(MergeError, match="work inside the attention"):
        model.merge_and_unload()
    with pytest.raises(ConfigError, match="knows the attention of llama, mistral, gpt2, not that of 'bloom'"):
        siliang.get_peft_model(make("bloom"), siliang.AdaptionPromptConfig(task_type=TaskType.CAUSAL_LM))
    with pytest.raises(ConfigError, match="adapter_layers = 3: the model has 2 layers"):
        on(make("llama"), adapter_layers=3)
    with pytest.raises(TargetError, match="target_modules = 'mlp': must be the name of the model's attentions"):
        on(make("llama"), target_modules="mlp")
    with pytest.raises(ConfigError, match="adapter_len = 0: must be at least 1"):
        siliang.AdaptionPromptConfig(adapter_len=0)
