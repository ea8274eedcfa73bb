"""Arguments and classes of PEFT's API: AutoPeft, classes by task, where adapters are loaded from, dtypes, keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file, save_file
from tiny import batch, make

import siliang
from siliang.types import AdapterError, ConfigError, TaskType

TASKS = {"llama": "CausalLM", "t5": "Seq2SeqLM", "bert": "SequenceClassification"}


@torch.no_grad()
def logits(model: Any, name: str = "llama") -> torch.Tensor:
    return model(**batch(name)).logits


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Base models, and an adapter of PEFT's for each."""
    for name, kind in TASKS.items():
        plain: Any = make(name)
        plain.save_pretrained(tmp_path / "base" / name)
        base: Any = getattr(__import__("transformers"), f"AutoModelFor{kind}").from_pretrained(tmp_path / "base" / name)
        task = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}[name]
        model: Any = peft.get_peft_model(base, peft.LoraConfig(task_type=task, init_lora_weights=False))
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in TASKS}


@pytest.mark.parametrize("name", TASKS)
def test_an_adapter_with_its_base_model(name: str, folders: dict[str, Path]) -> None:
    ours: Any = getattr(siliang, f"AutoPeftModelFor{TASKS[name]}").from_pretrained(folders[name])
    theirs: Any = getattr(peft, f"AutoPeftModelFor{TASKS[name]}").from_pretrained(folders[name])
    assert type(ours).__name__ == type(theirs).__name__ == f"PeftModelFor{TASKS[name]}"
    assert isinstance(ours, getattr(siliang, f"PeftModelFor{TASKS[name]}"))
    assert_close(logits(ours, name), logits(theirs, name))
    trained = getattr(siliang, f"AutoPeftModelFor{TASKS[name]}").from_pretrained(folders[name], is_trainable=True)
    assert any(p.requires_grad for p in trained.parameters())
    half = getattr(siliang, f"AutoPeftModelFor{TASKS[name]}").from_pretrained(folders[name], dtype=torch.bfloat16)
    assert half.get_base_model().dtype is torch.bfloat16


def test_auto_classes_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"has task type CAUSAL_LM: load it with AutoPeftModelForCausalLM"):
        siliang.AutoPeftModelForSeq2SeqLM.from_pretrained(folders["llama"])
    with pytest.raises(AdapterError, match="load it with AutoPeftModelForCausalLM"):
        siliang.AutoPeftModel.from_pretrained(folders["llama"])
    with pytest.raises(OSError, match="from_pretrained"):
        siliang.AutoPeftModel()
    base: Any = make("llama")
    base.save_pretrained(tmp_path / "plain")
    base = type(base).from_pretrained(tmp_path / "plain")
    model = siliang.get_peft_model(base, siliang.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "untyped")
    again = siliang.AutoPeftModel.from_pretrained(tmp_path / "untyped")
    assert_close(logits(again), logits(model.eval()))
    config = (tmp_path / "untyped" / "adapter_config.json").read_text()
    package = type(base).__module__
    (tmp_path / "untyped" / "adapter_config.json").write_text(config.replace(package, "os.path"))
    with pytest.raises(AdapterError, match=r"wants a class of the package 'os.path'. If you trust it"):
        siliang.AutoPeftModel.from_pretrained(tmp_path / "untyped")
    with pytest.raises(AdapterError, match=r"os\.path has no model class"):
        siliang.AutoPeftModel.from_pretrained(tmp_path / "untyped", import_allowlist=["os"])


def test_a_subfolder(folders: dict[str, Path]) -> None:
    root = folders["llama"].parent
    plain = siliang.PeftModel.from_pretrained(make("llama"), folders["llama"])
    model = siliang.PeftModel.from_pretrained(make("llama"), root, subfolder="llama", torch_device="cpu")
    assert type(model) is siliang.PeftModelForCausalLM
    assert torch.equal(logits(model), logits(plain))
    model.load_adapter(root, "other", subfolder="llama", low_cpu_mem_usage=True)
    assert siliang.PeftConfig.from_pretrained(root, subfolder="llama").task_type == TaskType.CAUSAL_LM
    assert (
        siliang.load_peft_weights(root, subfolder="llama").keys() == siliang.load_peft_weights(folders["llama"]).keys()
    )
    for wrong in ("../x", "/x"):
        with pytest.raises(AdapterError, match="must be a folder inside"):
            siliang.PeftConfig.from_pretrained(root, subfolder=wrong)
    with pytest.raises(TypeError, match=r"unexpected argument 'revison'.*'revision'"):
        siliang.PeftModel.from_pretrained(make("llama"), folders["llama"], revison="main")


def test_keys_are_rewritten(tmp_path: Path) -> None:
    """Adapters of a model whose layers had other names."""
    found = []
    for library in (siliang, peft):
        model = library.get_peft_model(
            make("llama"), library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        )
        if library is siliang:
            model.save_pretrained(tmp_path)
            path = tmp_path / "adapter_model.safetensors"
            save_file({key.replace(".layers.", ".blocks."): t for key, t in load_file(path).items()}, path)
        mapping = {r"^model\.blocks": "model.layers", "nothing": "x"}
        loaded = library.PeftModel.from_pretrained(make("llama"), tmp_path, key_mapping=mapping)
        found.append(logits(loaded.eval()))
    assert_close(*found)
    with pytest.raises(AdapterError):
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path)


@pytest.mark.parametrize("wide", [True, False])
def test_the_dtype_of_adapters(wide: bool, tmp_path: Path) -> None:
    for library in (siliang, peft):
        base = make("llama").to(torch.bfloat16)
        config = library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        model: Any = library.get_peft_model(base, config, autocast_adapter_dtype=wide)
        model.add_adapter("other", config, autocast_adapter_dtype=wide)
        model.save_pretrained(tmp_path / library.__name__)
        again: Any = library.PeftModel.from_pretrained(
            make("llama").to(torch.bfloat16), tmp_path / library.__name__, autocast_adapter_dtype=wide
        )
        again.load_adapter(tmp_path / library.__name__ / "other", "other", autocast_adapter_dtype=wide)
        for one in (model, again):
            dtypes = {p.dtype for key, p in one.named_parameters() if "lora_" in key}
            assert dtypes == {torch.float32 if wide else torch.bfloat16}


def test_no_pickles(tmp_path: Path) -> None:
    model = siliang.get_peft_model(make("llama"), siliang.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="writes safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_mixed_models() -> None:
    config = siliang.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model: Any = siliang.get_peft_model(make("llama"), config, mixed=True)
    assert type(model) is siliang.PeftMixedModel
    model.add_adapter("other", siliang.LoHaConfig(target_modules=["q_proj"], init_weights=False))
    model.set_adapter(["default", "other"])
    theirs: Any = peft.get_peft_model(
        make("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), mixed=True
    )
    theirs.add_adapter("other", peft.LoHaConfig(target_modules=["q_proj"], init_weights=False))
    theirs.set_adapter(["default", "other"])
    # PEFT puts one layer around the other, siliang puts both on one
    nested = {".base_layer.base_layer.": ".base_layer.", ".base_layer.lora_": ".lora_"}
    state = model.state_dict()
    for key, p in theirs.named_parameters():
        for deep, flat in nested.items():
            key = key.replace(deep, flat)
        p.data.copy_(state.pop(key))
    assert not state
    assert_close(logits(model.eval()), logits(theirs.eval()))
