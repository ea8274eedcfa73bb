"""LoRA's settings that are not an equation, compared with the live `peft`: what is made where, and what is tied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from tiny import make

import siliang
from siliang.types import ConfigError


def test_runtime_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not saved, as in PEFT, and ignored in a file."""
    ours = siliang.LoraConfig(use_dora=True, runtime_config=siliang.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    theirs = peft.LoraConfig(use_dora=True, runtime_config=peft.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert "runtime_config" not in ours.to_dict() and "runtime_config" not in theirs.to_dict()
    ours.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"runtime_config": {"ephemeral_gpu_offload": True}}))
    assert siliang.LoraConfig.from_pretrained(tmp_path).runtime_config == siliang.LoraRuntimeConfig()
    with pytest.raises(ConfigError, match="runtime_config has no setting 'offload'"):
        siliang.LoraConfig(runtime_config={"offload": True})  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a GPU, and there is none"):
        siliang.get_peft_model(make("llama"), ours)
    with pytest.warns(UserWarning, match="no effect without use_dora"):
        siliang.get_peft_model(make("llama"), siliang.LoraConfig(runtime_config=ours.runtime_config))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_norms_elsewhere(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if device == "cpu":
        monkeypatch.setattr("siliang.methods.lora.GPU", torch.device("cpu"))
    offload = siliang.LoraRuntimeConfig(ephemeral_gpu_offload=True)
    found = []
    for runtime in (siliang.LoraRuntimeConfig(), offload):
        torch.manual_seed(0)
        config = siliang.LoraConfig(use_dora=True, init_lora_weights=False, runtime_config=runtime)
        model: Any = siliang.get_peft_model(make("llama"), config)
        found.append({n: p for n, p in model.named_parameters() if "magnitude" in n})
    for name, p in found[1].items():
        assert p.device.type == "cpu"
        assert_close(p, found[0][name])
