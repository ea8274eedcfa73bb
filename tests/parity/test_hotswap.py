"""Hot-swapping beside the live `peft`: after a swap both answer as the other adapter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import peft.utils.hotswap
import pytest
import torch
from closeness import assert_close
from tiny import batch, make

import siliang
from siliang.peft_api import hotswap
from siliang.types import ConfigError

BOTH = ((siliang, hotswap), (peft, peft.utils.hotswap))
OTHERS: dict[str, dict[str, Any]] = {
    "same": {"r": 4, "lora_alpha": 4},
    "alpha": {"r": 4, "lora_alpha": 12},
    "smaller": {"r": 2, "lora_alpha": 12},
    "larger": {"r": 6, "lora_alpha": 3},
    "patterns": {"r": 4, "rank_pattern": {"v_proj": 2}},
    "fewer layers": {"r": 4, "target_modules": ["q_proj"]},
}


def saved(place: Path, **settings: Any) -> Path:
    """The folder of an adapter with random weights."""
    given = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | settings
    model: Any = peft.get_peft_model(make("llama"), peft.LoraConfig(**given))
    generator = torch.Generator().manual_seed(len(str(settings)))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(place)
    return place


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**batch("llama")).logits


def loaded(library: Any, folder: Path) -> Any:
    return library.PeftModel.from_pretrained(make("llama"), folder).eval()


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_hotswap(settings: dict[str, Any], prepared: bool, tmp_path: Path) -> None:
    first, second = saved(tmp_path / "first", r=4, lora_alpha=8), saved(tmp_path / "second", **settings)
    found = []
    for library, module in BOTH:
        model = loaded(library, first)
        if prepared:
            module.prepare_model_for_compiled_hotswap(model, target_rank=6)
            assert_close(logits(model), logits(loaded(library, first)))
        shape = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.shape
        module.hotswap_adapter(model, str(second), "default")
        if library is siliang or "rank_pattern" not in settings:  # PEFT 0.21.2 finds no layer by its patterns here
            assert_close(logits(model), logits(loaded(siliang, second)))
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        after = layer.lora_A["default"].weight.shape
        assert after == shape or (not prepared and settings["r"] > 4)
        found.append((after, float(layer.scaling["default"]), logits(model)))
        if library is siliang:
            model.save_pretrained(tmp_path / "again")
            for other in (siliang, peft):
                assert_close(logits(loaded(other, tmp_path / "again")), logits(model))
    assert found[0][0] == found[1][0]
    if "rank_pattern" not in settings:
        assert found[0][1] == pytest.approx(found[1][1])
        assert_close(found[0][2], found[1][2])


def test_a_compiled_model_is_not_compiled_anew(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "first", r=4), saved(tmp_path / "second", r=2, lora_alpha=30)
    model = loaded(siliang, first)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
    compiled: Any = torch.compile(model, backend="eager")
    logits(compiled)
    hotswap.hotswap_adapter(compiled, second, "default")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(logits(compiled), logits(loaded(siliang, second)))
    with pytest.raises(ConfigError, match="compiled already"):
        hotswap.prepare_model_for_compiled_hotswap(compiled, target_rank=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_rslora": True}, "use_rslora = True, and the loaded adapter has False"),
        ({"lora_dropout": 0.1}, "lora_dropout = 0.1"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "tensors have no place in adapter 'default'"),
    ],
)
def test_what_does_not_fit(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    first, second = saved(tmp_path / "first"), saved(tmp_path / "second", **settings)
    for library, module in BOTH:
        model = loaded(library, first)
        before = logits(model)
        with pytest.raises(
            (ValueError, RuntimeError), match=message if library is siliang else "[Ii]ncompat|unexpected"
        ):
            module.hotswap_adapter(model, str(second), "default")
        assert torch.equal(logits(model), before)


def learned(init: str) -> Any:
    """An adapter whose initialization was learned from data, trained a little."""
    model, tokens = make("llama"), batch("llama")
    config = siliang.LoraConfig(r=4, init_lora_weights=init, target_modules=["q_proj", "v_proj"])
    if init == "corda":
        siliang.preprocess_corda(model, config, lambda: model(input_ids=tokens["input_ids"]))
    elif init == "lora_ga":
        siliang.preprocess_loraga(model, config, lambda: model(**tokens).loss.backward())
    peft_model: Any = siliang.get_peft_model(model, config)
    if init == "eva":
        siliang.initialize_lora_eva_weights(peft_model, [tokens])
    for name, p in peft_model.named_parameters():
        p.data += 0.05 * ("lora_" in name)
    return peft_model.eval()


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_factors_of_a_changed_base_weight_are_not_swapped(init: str, tmp_path: Path) -> None:
    first = saved(tmp_path / "first", init_lora_weights=True)
    own = learned(init)
    own.save_pretrained(tmp_path / "to_resume", to_resume=True)
    config, state = own.peft_config["default"], own.state_dict()
    of_lora = {key: t for key, t in state.items() if ".lora_" in key}
    model = loaded(siliang, first)
    for target, source in ((own, first), (model, tmp_path / "to_resume")):
        before = logits(target)
        with pytest.raises(ConfigError, match=f"'{init}' belongs to a changed base weight"):
            siliang_hotswap(target, source)
        assert torch.equal(logits(target), before)
    with pytest.raises(ConfigError, match=f"'{init}' belongs to a changed base weight"):
        hotswap.hotswap_adapter_from_state_dict(model, of_lora, "default", config)
    with pytest.raises(ConfigError, match="is not plain LoRA"):
        hotswap.hotswap_adapter_from_state_dict(own, of_lora, "default", model.peft_config["default"])
    own.save_pretrained(tmp_path / "plain")  # LoRA of twice the rank, on the base model's own weights
    siliang_hotswap(model, tmp_path / "plain")
    assert_close(logits(model), logits(own))


def siliang_hotswap(model: Any, folder: Path) -> None:
    hotswap.hotswap_adapter(model, str(folder), "default")


def test_eva_is_swapped_both_ways(tmp_path: Path) -> None:
    """It leaves the base weight as it is: its A and B are all."""
    first = saved(tmp_path / "first", init_lora_weights=True)
    own, model = learned("eva"), loaded(siliang, first)
    own.save_pretrained(tmp_path / "eva")
    wanted, of_first = logits(own), logits(model)
    siliang_hotswap(model, tmp_path / "eva")
    assert_close(logits(model), wanted)
    siliang_hotswap(own, first)
    assert_close(logits(own), of_first)
    own.save_pretrained(tmp_path / "again")
    assert_close(logits(loaded(siliang, tmp_path / "again")), of_first)


def test_a_merged_adapter_is_not_swapped(tmp_path: Path) -> None:
    first = saved(tmp_path / "first")
    for library, module in BOTH:
        model = loaded(library, first)
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged into the"):
            module.hotswap_adapter(model, str(first), "default")
        model.unmerge_adapter()
        module.hotswap_adapter(model, str(first), "default")


def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    model = loaded(siliang, saved(tmp_path / "first"))
    with pytest.raises(ConfigError, match="target_rank = 4: must be at least the loaded adapters' rank, 8"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
    with pytest.raises(ConfigError, match="has no LoRA adapter"):
        hotswap.prepare_model_for_compiled_hotswap(make("llama"), target_rank=4)
