"""What is particular to each variant of LoRA, compared with the live `peft`: starts, terms of the loss, refusals."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_all_close, assert_close
from tiny import TASK, batch, make

import siliang
from siliang.engine.method_hooks import extra_loss
from siliang.peft_api.hotswap import check_hotswap_configs_compatible
from siliang.peft_api.optimizers import create_lorafa_optimizer
from siliang.types import AdapterError, ConfigError
from tests.parity.test_every_method import pair


def logits(model: Any, name: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(name)).logits


def adapted(name: str = "llama", seed: int = 0, **settings: Any) -> Any:
    return siliang.get_peft_model(make(name, seed), siliang.LoraConfig(task_type=TASK[name], **settings))


def there(name: str = "llama", seed: int = 0, **settings: Any) -> Any:
    return peft.get_peft_model(make(name, seed), peft.LoraConfig(task_type=TASK[name], **settings))


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    return {key: t for key, t in model.state_dict().items() if key.endswith("base_layer.weight")}


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kasa_config": {"betta": 1.0}}, "kasa_config has no setting 'betta'. Did you mean 'beta'"),
        ({"kasa_config": {"beta": -1.0}}, "kasa_config: beta = -1.0: must be at least 0"),
        ({"kasa_config": {"gamma": "much"}}, "kasa_config: gamma = 'much': must be a number"),
        ({"kasa_config": 3}, "kasa_config = 3: must be a mapping with beta, gamma"),
        (
            {"kasa_config": {}, "use_dora": True},
            "use_dora and kasa_config do not go together: each is a LoRA of its own",
        ),
        ({"kasa_config": {}, "init_lora_weights": "pissa"}, "kasa_config and init_lora_weights = 'pissa' do not go"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        siliang.LoraConfig(**settings)
    with pytest.raises(AdapterError, match=message):
        siliang.LoraConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kasa_config": {}, "r": 32}, "kasa_config: r = 32, and a layer has 32 rows or columns"),
        (
            {"kasa_config": {}, "r": 4, "target_modules": ["embed_tokens"]},
            "kasa_config is for linear layers: leave model",
        ),
    ],
)
def test_layers_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(**settings)


@pytest.mark.parametrize("variant", ["kasa_config"])
def test_what_needs_a_and_b_alone_refuses_a_variant(variant: str) -> None:
    settings = {"r": 4, variant: {}}
    model = adapted(**settings)
    with pytest.raises(ConfigError, match=f"adapter 'default' has {variant}"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ConfigError, match=f"adapter 'default' has {variant}"):
        create_lorafa_optimizer(model, 4, 8, 1e-3)
    with pytest.raises(ConfigError, match=f"not with {variant}: use load_adapter"):
        check_hotswap_configs_compatible(siliang.LoraConfig(**settings), siliang.LoraConfig(**settings))


# ---- KaSA ----


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_kasas_start(name: str, tmp_path: Path) -> None:
    """The base weight without its smallest singular values is PEFT's; without the adapter it is what it was."""
    ours, theirs = (give(name, r=4, kasa_config={}).eval() for give in (adapted, there))
    found, wanted = base_weights(ours), base_weights(theirs)
    assert found.keys() == wanted.keys()
    assert_all_close(found, wanted)
    assert_close(logits(ours, name), logits(theirs, name))
    assert not torch.allclose(logits(ours, name), logits(make(name), name))
    with ours.disable_adapter():
        assert torch.equal(logits(ours, name), logits(make(name), name))
    assert torch.equal(logits(ours.unload(), name), logits(make(name), name))


def test_kasas_terms_of_the_loss() -> None:
    ours, theirs = pair("lora-kasa", "llama")
    settings = siliang.KasaConfig(beta=0.3, gamma=0.7)
    ours, theirs = adapted(r=4, kasa_config=settings), there(r=4, kasa_config=peft.KasaConfig(beta=0.3, gamma=0.7))
    theirs.load_state_dict(ours.state_dict())
    for p in ours.parameters():
        p.data += 0.05 if p.requires_grad else 0.0
    theirs.load_state_dict(ours.state_dict())
    found, wanted = extra_loss(ours), theirs.base_model._get_kasa_loss()
    assert found is not None
    assert_close(found, wanted)
    found.backward()
    wanted.backward()
    grads, expected = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs))
    assert_all_close(grads, expected)


def test_kasa_beside_other_adapters() -> None:
    """PEFT refuses it, for its base weight is changed for good."""
    model = adapted(r=4, kasa_config={}, init_lora_weights=False).eval()
    alone = logits(model)
    model.add_adapter("plain", siliang.LoraConfig(r=4, init_lora_weights=False))
    assert torch.equal(logits(model), alone)
    model.set_adapter("plain")
    plain = logits(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match="KaSA cannot be combined"):
        there(r=4, kasa_config={}).add_adapter("plain", peft.LoraConfig(r=4))


@pytest.mark.parametrize("settings", [{"kasa_config": {}}, {"init_lora_weights": "pissa"}])
@pytest.mark.filterwarnings("ignore:.*is LoRA already.*")
def test_as_lora_on_the_whole_base_weight(settings: dict[str, Any]) -> None:
    model = adapted(r=4, **settings).eval()
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p) if p.requires_grad else 0.0
    config, tensors = siliang.convert_to_lora(model, 8)
    lora: Any = siliang.get_peft_model(make("llama"), config).eval()
    siliang.set_peft_model_state_dict(lora, tensors)
    assert_close(logits(lora), logits(model))
