"""What scripts do with layers and adapters by PEFT's names, beside the live `peft`: scalings, status, combined and
injected adapters, the base model's own state, conversion to LoRA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from tiny import batch, make
from torch import nn

import siliang
from siliang.adapters.adapted_layer import AdaptedLayer
from siliang.peft_api.weighted import COMBINATIONS
from siliang.types import ConfigError, TaskType

pytestmark = pytest.mark.filterwarnings("ignore:Setting .scaling.*", "ignore:.*already merged.*", "ignore:.*unmerge.*")
RANKS = {"first": 4, "second": 4, "third": 2}


def several(library: Any, **settings: Any) -> Any:
    """A model with three LoRA adapters, whose weights depend on their names alone."""
    model: Any = None
    for i, (name, r) in enumerate(RANKS.items()):
        config = library.LoraConfig(r=r, lora_alpha=2 * r, init_lora_weights=False, **settings)
        if model is None:
            model = library.get_peft_model(make("llama"), config, name)
        else:
            model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(i)
        for key, p in model.named_parameters():
            if f".{name}." in key or key.endswith(f".{name}"):
                p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**batch("llama")).logits


def kept(t: torch.Tensor) -> torch.Tensor:
    rows, columns = (torch.arange(n) for n in t.shape)
    return ((rows[:, None] + columns) % 5 < 3).to(t)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["embed_tokens", "q_proj"]], ids=["linear", "embedding"])
@pytest.mark.parametrize("way", COMBINATIONS)
def test_weighted_adapters(way: str, targets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # DARE drops the same places whatever was drawn before, also of a transposed update
    monkeypatch.setattr(torch, "bernoulli", kept)
    names = ["first", "second"] if way != "cat" and "svd" not in way else ["first", "second", "third"]
    weights = [0.7, -1.3, 0.4][: len(names)]
    found = []
    for library in (siliang, peft):
        model = several(library, target_modules=targets)
        density = None if way in ("linear", "cat", "svd") else 0.6
        adapt = model if library is siliang else model.base_model
        adapt.add_weighted_adapter(names, weights, "new", way, density=density)
        model.set_adapter("new")
        found.append(logits(model))
        assert model.peft_config["new"].r == (sum(RANKS.values()) if way == "cat" else 4)
    assert_close(*found)


def test_weighted_adapters_cat_is_the_sum() -> None:
    model = several(siliang, target_modules=["q_proj"])
    model.add_weighted_adapter(["first", "second", "third"], [1.0, 1.0, 1.0], "new", "cat")
    model.set_adapter(["first", "second", "third"])
    wanted = logits(model)
    model.set_adapter("new")
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((["first", "third"], [1.0, 1.0], "new", "linear"), "needs adapters of one rank"),
        ((["first", "x"], [1.0, 1.0], "new", "cat"), "adapter 'x' is not there"),
        ((["first"], [1.0, 1.0], "new", "cat"), "give one for each"),
        ((["first", "second"], [1.0, 1.0], "new", "tie"), "must be one of .*'ties'"),
        ((["first", "second"], [1.0, 1.0], "new", "ties"), "density = None: ties keeps this share"),
    ],
)
def test_weighted_adapters_that_cannot_be(call: tuple[Any, ...], message: str) -> None:
    model = several(siliang, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(*call)
    assert list(model.peft_config) == list(model.injection.adapters) == list(RANKS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "its initialization has changed the base weight"),
        ({"init_lora_weights": "olora"}, "its initialization has changed the base weight"),
        ({"bias": "lora_only"}, "has bias = 'lora_only': only A and B"),
        ({"bias": "all"}, "has bias = 'all': only A and B"),
    ],
)
def test_what_is_more_than_a_and_b_is_not_lost_in_weighted_adapters(settings: dict[str, Any], message: str) -> None:
    """PEFT refuses neither: its adapter then computes s B A alone."""
    model = several(siliang, target_modules=["q_proj"])
    model.add_adapter("other", siliang.LoraConfig(r=4, target_modules=["q_proj"], **settings))
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(["first", "other"], [1.0, 1.0], "new", "cat")
    assert "new" not in model.peft_config


def ia3s(library: Any, **second: Any) -> Any:
    """Two adapters of IA3 with factors that are not 1."""
    settings = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    model = library.get_peft_model(make("llama"), library.IA3Config(**settings), adapter_name="first")
    model.add_adapter("second", library.IA3Config(**(settings | second)))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "ia3_l" in name:
                p.copy_(torch.rand(p.shape) + 0.5)
    return model.eval()


def test_weighted_adapters_of_ia3() -> None:
    found = []
    for library in (siliang, peft):
        model = ia3s(library)
        model.base_model.add_weighted_adapter(["first", "second"], [0.3, -0.5], "new")
        model.set_adapter("new")
        found.append(logits(model))
    assert_close(*found)


def test_weighted_adapters_of_ia3_on_unlike_layers() -> None:
    """Where an adapter has no factors they are 1. PEFT takes 0."""
    model = ia3s(siliang, target_modules=["q_proj"], feedforward_modules=[])
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "new")
    parts = model.base_model.model.model.layers[0].mlp.down_proj.ia3_l
    torch.testing.assert_close(parts["new"], 0.5 * parts["first"] + 0.5)
    for unlike, message in (
        ({"feedforward_modules": []}, "down_proj: some of the adapters scale its input, and others its output"),
        ({"target_modules": ".*q_proj", "feedforward_modules": []}, "target_modules: adapters can be combined where"),
    ):
        model = ia3s(siliang, **unlike)
        with pytest.raises(ConfigError, match=message):
            model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "new")
        assert list(model.peft_config) == list(model.injection.adapters) == ["first", "second"]
    model.add_adapter("lora", siliang.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="combines adapters of LoRA, or adapters of IA3"):
        model.add_weighted_adapter(["first", "lora"], [1.0, 1.0], "new")


def layer_of(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


def test_scalings_of_a_layer() -> None:
    found: list[list[Any]] = []
    for library in (siliang, peft):
        model = several(library, target_modules=["q_proj", "v_proj"])
        layer, seen = layer_of(model), []
        seen += [dict(layer.scaling), dict(layer.r), dict(layer.lora_alpha), layer.active_adapters]
        layer.set_scale("first", 3)
        layer.scale_layer(0.5)
        seen += [dict(layer.scaling), logits(model)]
        layer.unscale_layer()
        seen.append(dict(layer.scaling))
        layer.scaling["first"] = 0.25
        seen += [logits(model), layer.get_delta_weight("first"), layer.merged, layer.disable_adapters]
        model.base_model.disable_adapter_layers()
        seen += [layer.disable_adapters, logits(model)]
        model.base_model.enable_adapter_layers()
        model.base_model.set_adapter("third")
        seen += [layer.active_adapters, logits(model)]
        model.merge_adapter()
        seen += [layer.merged_adapters, logits(model)]
        found.append(seen)
    for ours, theirs in zip(*found, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert_close(ours, theirs)
        else:
            assert bool(ours) == theirs if isinstance(theirs, bool) else ours == theirs


def test_the_scale_is_changed_for_a_while() -> None:
    model = several(siliang, target_modules=["q_proj"])
    before = logits(model)
    with siliang.rescale_adapter_scale(model, 0.0):
        changed = logits(model)
        with model.disable_adapter():
            assert torch.equal(changed, logits(model))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("state", ["plain", "disabled", "merged", "two", "head"])
def test_status(state: str) -> None:
    found = []
    for library in (siliang, peft):
        saved = ["lm_head"] if state == "head" else None
        config = library.LoraConfig(target_modules=["q_proj"], modules_to_save=saved)
        model = library.get_peft_model(make("llama"), config)
        if state == "disabled":
            model.base_model.disable_adapter_layers()
        elif state == "merged":
            model.merge_adapter()
        elif state == "two":
            model.add_adapter("other", library.LoraConfig(target_modules=["v_proj"]))
            model.set_adapter("other")
        layers = {one.name: vars(one) for one in library.get_layer_status(model)}
        found.append((vars(library.get_model_status(model)), layers))
    (ours, our_layers), (theirs, their_layers) = found
    assert ours == theirs
    assert our_layers.keys() == their_layers.keys()
    for name, layer in our_layers.items():
        assert layer | {"module_type": ""} == their_layers[name] | {"module_type": ""}


def test_no_status_without_layers() -> None:
    with pytest.raises(ConfigError, match="no layers with adapters"):
        siliang.get_layer_status(make("llama"))


def test_adapters_are_injected() -> None:
    config = {"target_modules": ["q_proj"], "init_lora_weights": False}
    ours: Any = siliang.inject_adapter_in_model(siliang.LoraConfig(**config), make("llama"), "mine")
    theirs: Any = peft.inject_adapter_in_model(peft.LoraConfig(**config), make("llama"), "mine")
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing and not unexpected
    assert_close(logits(ours.eval()), logits(theirs.eval()))
    siliang.inject_adapter_in_model(siliang.LoraConfig(target_modules=["v_proj"]), ours, "next")
    assert siliang.get_model_status(ours).available_adapters == ["mine", "next"]
    state = siliang.get_peft_model_state_dict(several(siliang, target_modules=["down_proj"]), adapter_name="first")
    third: Any = siliang.inject_adapter_in_model(siliang.LoraConfig(r=4), make("llama"), state_dict=state)
    assert {path.rpartition(".")[2] for path, m in third.named_modules() if isinstance(m, AdaptedLayer)} == {
        "down_proj"
    }
    with pytest.raises(ConfigError, match="names no layer"):
        siliang.inject_adapter_in_model(
            siliang.LoraConfig(), make("llama"), state_dict={"x.lora_A.weight": torch.ones(1)}
        )


def test_the_base_models_own_state() -> None:
    base = make("gpt2")
    before = {key: t.clone() for key, t in base.state_dict().items()}
    model: Any = siliang.get_peft_model(base, siliang.LoraConfig(modules_to_save=["lm_head"]))
    found = siliang.get_base_model_state_dict(model)
    assert found.keys() == before.keys() and all(torch.equal(found[key], before[key]) for key in found)
    doubled = {key: 2 * t for key, t in before.items()}
    siliang.set_base_model_state_dict(model, doubled)
    assert all(torch.equal(t, doubled[key]) for key, t in siliang.get_base_model_state_dict(model).items())
    with pytest.raises(RuntimeError, match="Missing key"):
        siliang.set_base_model_state_dict(model, {})


@pytest.mark.parametrize("kind", ["dora", "loha", "oft", "ia3"])
def test_as_lora(kind: str, tmp_path: Path) -> None:
    """What was converted answers as the adapter did, also in PEFT."""
    configs: dict[str, Any] = {
        "dora": siliang.LoraConfig(use_dora=True, init_lora_weights=False),
        "loha": siliang.LoHaConfig(r=2, init_weights=False),
        "oft": siliang.OFTConfig(oft_block_size=8, init_weights=False),
        "ia3": siliang.IA3Config(init_ia3_weights=False),
    }
    model: Any = siliang.get_peft_model(make("llama"), configs[kind]).eval()
    wanted = logits(model)
    done = siliang.save_as_lora(tmp_path / "whole", model, 1.0)
    assert done.error < 1e-3
    for library in (siliang, peft):
        again = library.PeftModel.from_pretrained(make("llama"), tmp_path / "whole").eval()
        torch.testing.assert_close(logits(again), wanted, rtol=1e-3, atol=1e-4)
    config, tensors = siliang.convert_to_lora(model, 2)
    assert config.r == 2 and not config.rank_pattern
    assert all(t.shape[0] == 2 for key, t in tensors.items() if "lora_A" in key)
    small = siliang.save_as_lora(tmp_path / "small", model, 2)
    assert done.error < small.error < 1


@pytest.mark.parametrize(
    ("config", "rank", "message"),
    [
        (siliang.LoHaConfig(target_modules=["q_proj"]), 0, "rank = 0: must be a whole number"),
        (siliang.LoHaConfig(target_modules=["q_proj"]), 10**4, "choose no more"),
        (siliang.LNTuningConfig(), 2, "changes more than"),
        (
            siliang.PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2),
            2,
            "changes more than linear weights",
        ),
    ],
)
def test_what_lora_cannot_be(config: Any, rank: float, message: str) -> None:
    model: Any = siliang.get_peft_model(make("llama"), config)
    with pytest.raises(ConfigError, match=message):
        siliang.convert_to_lora(model, rank)


def test_a_tuner_model_alone() -> None:
    """LoraModel and its like, as scripts use them without PeftModel."""
    base = make("llama")
    plain = logits(base.eval())
    tuner: Any = siliang.LoraModel(base, siliang.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "x")
    assert isinstance(tuner, siliang.LoraModel) and isinstance(tuner, nn.Module)
    assert not torch.allclose(logits(tuner.eval()), plain)
    assert tuner.active_adapter == "x"
    assert torch.equal(logits(tuner.unload().eval()), plain)
