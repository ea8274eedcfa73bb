"""An adapter of every method as the start of a training: its config becomes the method, its weights are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from tiny import make

from siliang import get_peft_model
from siliang.config import RunConfig
from siliang.engine.attach import attach
from siliang.hardware import choose_precision
from siliang.methods import METHODS
from siliang.train.start_adapter import filled_in, find_start_adapter
from siliang.types import ConfigError, TaskType

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "use_rslora": True, "rank_pattern": {"v_proj": 2}, "modules_to_save": ["lm_head"]},
    "miss": {"r": 4},
    "fourierft": {"n_frequency": 40},
    "c3a": {"block_size": 8},
    "shira": {"r": 2},
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 8},
    "waveft": {"n_frequency": 40},
    "road": {"group_size": 8},
    "trainable_tokens": {"token_indices": [3, 5]},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "multitask_prompt_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "prefix_tuning": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16},
}
BASES = {"bitfit": "bloom", "head": "bert"}


def saved(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    injection: Any = model.injection
    return {name: t.detach().clone() for name, t in injection.adapters["default"].tensors().items()}


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.config is not None and m.name != "xlora"])
def test_every_method(name: str, tmp_path: Path) -> None:
    base, method = BASES.get(name, "llama"), METHODS[name]
    assert method.config is not None
    task = TaskType.SEQ_CLS if base == "bert" else TaskType.CAUSAL_LM
    first = get_peft_model(make(base), method.config(task_type=task, **SETTINGS.get(name, {})))
    torch.manual_seed(7)
    for p in trained(first).values():
        torch.nn.init.normal_(p, std=0.1)
    first.save_pretrained(tmp_path / "adapter")
    values = {"adapter": str(tmp_path / "adapter"), "model": "m", "data": {"train": "d"}, "output": "o"}
    config = RunConfig.build(filled_in(values))
    assert (config.method.name, config.task) == (name, task)
    assert RunConfig.build(config.model_dump(mode="json")) == config  # as it is read again from run.yaml
    precision = choose_precision("fp32", torch.device("cpu"))
    model, count, _ = attach(make(base), method, config, precision, start=tmp_path / "adapter")
    assert saved(model).keys() == saved(first).keys()
    for key, tensor in saved(first).items():
        torch.testing.assert_close(saved(model)[key], tensor, rtol=1e-6, atol=1e-7)
    assert trained(model).keys() == trained(first).keys()
    # what the plan looks at: the method alone, without the weights
    planned, planned_count, _ = attach(make(base), method, config, precision)
    assert planned_count == count and trained(planned).keys() == trained(model).keys()


def test_pefts_own(tmp_path: Path) -> None:
    for theirs in (
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
    ):
        folder = tmp_path / type(theirs).__name__
        model = peft.get_peft_model(make("llama"), theirs)
        model.save_pretrained(str(folder))
        values = {"adapter": str(folder), "model": "m", "data": {"train": "d"}, "output": "o"}
        config = RunConfig.build(filled_in(values))
        precision = choose_precision("fp32", torch.device("cpu"))
        ours, _, _ = attach(make("llama"), METHODS[config.method.name], config, precision, start=folder)
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            assert_close(ours.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
        assert trained(ours)


def test_a_run_that_was_fully_tuned_or_not_finished(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\ndata: {train: d}\n")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="was not finished, and has no checkpoint"):
        find_start_adapter(str(tmp_path))
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="was fully tuned and has no adapter: give its model, --model"):
        find_start_adapter(str(tmp_path))
