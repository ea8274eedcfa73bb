"""What PEFT's own tests read of models and layers beside the answers, compared with the live `peft`: attributes, return
values, state dicts of injected models, the layers' own functions, biases of every method.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from block_diagonal import BlockDiagonal
from closeness import assert_all_close, assert_close
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from tiny import batch, make
from torch import nn

import siliang
from siliang.adapters.adapted_layer import AdaptedLayer
from siliang.peft_api import names
from siliang.peft_api.optimizers import create_riemannian_optimizer
from siliang.peft_api.tuners import TUNERS
from siliang.types import ConfigError

# by config: what makes it small, and not the identity
BIASED: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2, "init_lora_weights": False},
    "BOFTConfig": {"boft_block_size": 2, "init_weights": False},
    "C3AConfig": {"block_size": 2, "init_weights": False},
    "DeloraConfig": {"r": 2, "init_weights": False},
    "FourierFTConfig": {"n_frequency": 5, "init_weights": False},
    "GraloraConfig": {"r": 4, "init_weights": False},
    "HRAConfig": {"r": 2, "init_weights": False},
    "MissConfig": {"r": 2, "init_weights": False},
    "OFTConfig": {"oft_block_size": 2, "init_weights": False},
    "VBLoRAConfig": {"r": 2, "num_vectors": 8, "vector_length": 2, "topk": 2},
    "VeraConfig": {"r": 2, "init_weights": False},
    "WaveFTConfig": {"n_frequency": 5, "init_weights": False},
}


class Small(nn.Module):
    """Two linear layers with biases, of which the first is tuned, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.look, self.lin0, self.lin1 = nn.Conv2d(3, 8, 2), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(torch.tanh(self.lin0(torch.tanh(self.look(x)).flatten(2).mean(-1))))


def picture() -> torch.Tensor:
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def two_loras(**settings: Any) -> Any:
    """Two active adapters on a model by siliang."""
    configs = [siliang.LoraConfig(target_modules=["lin0"], init_lora_weights=False, **settings) for _ in range(2)]
    model = siliang.get_peft_model(Small(), configs[0], "first")
    model.add_adapter("second", configs[1])
    return model.eval()


def layers(model: nn.Module) -> list[AdaptedLayer]:
    return [module for module in model.modules() if isinstance(module, AdaptedLayer)]


def test_prefixes() -> None:
    theirs = {kind.value: prefix for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if kind in TUNERS}
    assert {str(kind): prefix for kind, prefix in theirs.items()} == names.PEFT_TYPE_TO_PREFIX_MAPPING


def test_sizes_of_layers() -> None:
    for kind in (
        nn.Linear(3, 4),
        nn.Embedding(5, 6),
        nn.Conv2d(3, 6, 2),
        nn.Conv1d(2, 4, 3),
        nn.MultiheadAttention(4, 2),
    ):
        found = []
        for library in (siliang, peft):
            config = library.LoraConfig(target_modules=["0"])
            model = library.get_peft_model(nn.Sequential(deepcopy(kind)), config)
            found.append((model.base_model.model[0].in_features, model.base_model.model[0].out_features))
        assert found[0] == found[1], kind


def test_loading_returns_no_missing_keys(tmp_path: Path) -> None:
    model = siliang.get_peft_model(Small(), siliang.LoraConfig(target_modules=["lin0"]))
    model.save_pretrained(tmp_path)
    assert model.load_adapter(tmp_path, "other") == ([], [])
    found = siliang.set_peft_model_state_dict(model, siliang.get_peft_model_state_dict(model))
    assert (found.missing_keys, found.unexpected_keys) == ([], [])


@pytest.mark.parametrize("name", ["LoraConfig", "RandLoraConfig", "OFTConfig"])
def test_states_of_injected_models(name: str) -> None:
    settings: dict[str, Any] = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
    if name == "OFTConfig":
        settings["oft_block_size"] = 2
    found = []
    for library in (siliang, peft):
        model = library.inject_adapter_in_model(getattr(library, name)(**settings), Small())
        found.append(library.get_peft_model_state_dict(model))
    ours = {key for key in found[0] if "randlora_" not in key or "lambda" in key or "gamma" in key}
    theirs = {key for key in found[1] if "randlora_" not in key or "lambda" in key or "gamma" in key}
    assert ours == theirs  # RandLoRA's bases: docs/porting.md
    again: Any = siliang.inject_adapter_in_model(getattr(siliang, name)(**settings), Small())
    assert again.peft_config["default"].target_modules == ["lin0"]
    siliang.set_peft_model_state_dict(again, {key: torch.ones_like(t) for key, t in found[0].items()})
    assert all(bool((t == 1).all()) for t in siliang.get_peft_model_state_dict(again).values())
    with pytest.raises(ConfigError, match="has no adapters: get_peft_model or inject_adapter_in_model"):
        siliang.get_peft_model_state_dict(Small())


def test_state_shared_by_layers_needs_a_wrapper() -> None:
    """An optimizer of the model's parameters would not have VB-LoRA's bank."""
    for library in (siliang, peft):
        config = library.VBLoRAConfig(target_modules=["lin0"], **BIASED["VBLoRAConfig"])
        with pytest.raises(ValueError, match="shared state"):
            library.inject_adapter_in_model(config, Small())


def test_a_layers_own_functions() -> None:
    """What layers activate by themselves is what is merged, and what is active again after `disable_adapter`."""
    model, x = two_loras(), picture()
    alone, base = model(x), Small()(x)
    (layer,) = layers(model)
    layer.set_adapter(["first", "second"])
    both = model(x)
    assert not torch.allclose(both, alone)
    assert layer.lora_A["second"].weight.requires_grad
    model.merge_adapter()
    assert layer.merged_adapters == ["first", "second"]
    assert_close(model(x), both)
    model.unmerge_adapter()
    assert_close(model(x), both)
    with model.disable_adapter():
        assert_close(model(x), base)
    assert_close(model(x), both)
    layer.enable_adapters(False)
    assert_close(model(x), base)
    assert not any(p.requires_grad for p in model.parameters())
    layer.enable_adapters(True)
    assert_close(model(x), both)


def test_layers_that_differ() -> None:
    model = siliang.get_peft_model(Small(), siliang.LoraConfig(target_modules=["lin0", "lin1"]), "first")
    model.add_adapter("second", siliang.LoraConfig(target_modules=["lin0", "lin1"]))
    layers(model)[0].set_adapter("second")
    with pytest.raises(ConfigError, match="The layers have different active adapters"):
        model.merge_adapter()
    assert not any(layer.merged_adapters for layer in layers(model))
    with pytest.warns(UserWarning, match="The layers differ in what is active"), model.disable_adapter():
        pass
    assert all(layer.active_adapters == ["first"] for layer in layers(model))


def test_wrappers_list_the_adapters_that_they_have() -> None:
    model: Any = siliang.get_peft_model(Small(), siliang.LoraConfig(target_modules=["lin0"]))
    model.add_adapter("other", siliang.LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"]))
    wrapper = model.base_model.model.lin1
    assert wrapper.active_adapters == []
    wrapper.set_adapter("other")
    assert wrapper.active_adapters == ["other"] and wrapper.modules_to_save["other"].weight.requires_grad


def test_disabled_adapters_are_frozen() -> None:
    for library in (siliang, peft):
        model = library.get_peft_model(Small(), library.LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"]))
        before = {name for name, p in model.named_parameters() if p.requires_grad}
        with model.disable_adapter():
            assert not any(p.requires_grad for p in model.parameters())
        assert before == {name for name, p in model.named_parameters() if p.requires_grad}


def test_scalings_of_a_deleted_adapter() -> None:
    model = two_loras()
    scaling = layers(model)[0].scaling
    assert set(scaling) == {"first", "second"}
    model.delete_adapter("second")
    assert set(scaling) == {"first"}


def test_a_second_merge_warns() -> None:
    for library in (siliang, peft):
        model = library.get_peft_model(Small(), library.LoraConfig(target_modules=["lin0"]))
        model.merge_adapter()
        with pytest.warns(UserWarning, match="already"):
            model.merge_adapter()


@pytest.mark.parametrize(
    "config",
    [
        siliang.OFTConfig(oft_block_size=2, module_dropout=0.5, init_weights=False, target_modules=["lin0"]),
        siliang.BOFTConfig(boft_block_size=2, boft_dropout=0.5, init_weights=False, target_modules=["lin0"]),
    ],
    ids=["oft", "boft"],
)
def test_a_merge_in_training_drops_nothing(config: Any) -> None:
    model = siliang.get_peft_model(Small(), config)
    wanted = model.eval()(picture())
    model.train()
    (layer,) = layers(model)
    assert torch.equal(layer.get_delta_weight("default"), layer.get_delta_weight("default"))
    model.merge_adapter()
    assert layer.training
    assert_close(model(picture()), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*BIASED, "bat"])
def test_adapters_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """With autocast_adapter_dtype=False the adapter has the dtype of the base model."""
    settings = {"r": 2, "init_weights": "bat"} if name == "bat" else BIASED[name]
    config = getattr(siliang, "MissConfig" if name == "bat" else name)(target_modules=["lin0"], **settings)
    model = siliang.get_peft_model(Small().to(dtype), config, autocast_adapter_dtype=False)
    y = model(picture().to(dtype))
    assert y.dtype == dtype and torch.isfinite(y).all()
    y.float().square().mean().backward()
    merged = model.merge_and_unload()(picture().to(dtype))
    torch.testing.assert_close(merged, y, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("which", ["all", "only"])
@pytest.mark.parametrize("name", BIASED)
def test_biases(name: str, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", BlockDiagonal())
    kind = getattr(peft, name)(target_modules=["lin0"], **BIASED[name]).peft_type.value.lower()
    bias = "all" if which == "all" else f"{kind}_only"
    settings = BIASED[name] | {"target_modules": ["lin0"], "bias": bias}
    ours: Any = siliang.get_peft_model(Small(), getattr(siliang, name)(**settings)).eval()
    theirs = peft.get_peft_model(Small(), getattr(peft, name)(**settings)).eval()
    trained = {n.replace(".base_layer", "") for n, p in theirs.named_parameters() if p.requires_grad and "bias" in n}
    assert trained == {
        n.replace(".base_layer", "") for n, p in ours.named_parameters() if p.requires_grad and "bias" in n
    }
    assert len(trained) == (3 if which == "all" else 1)
    for model in (ours, theirs):
        for n, p in model.named_parameters():
            if "bias" in n and p.requires_grad:
                p.data = torch.linspace(-1, 1, p.numel())
    theirs.save_pretrained(str(tmp_path))
    siliang.set_peft_model_state_dict(ours, siliang.load_peft_weights(tmp_path))
    x, found = picture(), []
    for model in (ours, theirs):
        y = model(x)
        y.square().mean().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        # VB-LoRA's bank is called otherwise; PEFT's C3A has another gradient below (test_c3as_gradient)
        left_out = ("vblora_vector_bank", "look" if name == "C3AConfig" else "vblora_vector_bank")
        own = {
            n.replace(".base_layer", ""): grad for n, grad in trained.items() if not any(part in n for part in left_out)
        }
        found.append(own | {"y": y.detach()})
    assert_all_close(*found)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Small(), str(tmp_path / "ours"))
    assert_close(again(x), found[1]["y"])
    with ours.disable_adapter():
        assert_close(ours(x), Small()(x))
    assert_close(ours.merge_and_unload()(x), found[1]["y"])


def test_a_model_that_is_none_of_transformers(tmp_path: Path) -> None:
    config = siliang.LoraConfig(target_modules=["lin0"], base_model_name_or_path="Small")
    model = siliang.get_peft_model(Small(), config)
    with pytest.warns(UserWarning, match="embeddings may not be found"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model:" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert model.base_model.targeted_module_names == ["lin0"]


def test_shared_tensors_on_the_layers() -> None:
    for name, parts in {"VeraConfig": ["vera_A", "vera_B"], "VBLoRAConfig": ["vblora_vector_bank"]}.items():
        found = []
        for library in (siliang, peft):
            config = getattr(library, name)(target_modules=["lin0"], **BIASED[name])
            layer = library.get_peft_model(Small(), config).base_model.model.lin0
            found.append([getattr(layer, part)["default"].shape for part in parts])
        assert found[0] == found[1]


def test_prepare_model_for_gradient_checkpointing() -> None:
    for library in (siliang, peft):
        model = library.get_peft_model(make("llama"), library.LoraConfig(target_modules=["q_proj"]))
        model.prepare_model_for_gradient_checkpointing(model.get_base_model())
        assert model.get_input_embeddings()(batch("llama")["input_ids"]).requires_grad


def test_what_is_no_optimizer() -> None:
    model = two_loras()
    with pytest.raises(TypeError, match="must be a class of optimizers"):
        create_riemannian_optimizer(model, dict, lr=0.1)  # type: ignore[arg-type]


def test_lora_ga_on_no_linear_layer() -> None:
    config = siliang.LoraConfig(
        init_lora_weights="lora_ga", target_modules=["look"], lora_ga_config=siliang.LoraGAConfig()
    )
    with pytest.raises(ConfigError, match="is for linear layers, and target_modules names none"):
        siliang.preprocess_loraga(Small(), config, lambda: None)
