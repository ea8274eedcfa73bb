"""The table of LoRA's initializations: whole, described, and open to one that is not there yet."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import batch, make

import siliang
from siliang.methods.lora_initialization import Initialization, of_its_rank
from siliang.methods.lora_initializations import INITIALIZATIONS, NAMES
from siliang.types import ConfigError

DOCS = Path(__file__).resolve().parents[1] / "docs"
LINEAR = [row for row in INITIALIZATIONS.values() if not row.on_any_layer]


def test_each_is_described() -> None:
    page, docstring = (DOCS / "methods.md").read_text(encoding="utf-8"), siliang.LoraConfig.__doc__ or ""
    for name in NAMES:
        assert f'"{name}"' in page and f'"{name}"' in docstring, name


@pytest.mark.parametrize("row", INITIALIZATIONS.values(), ids=lambda row: str(row.name))
def test_a_row_is_whole(row: Initialization) -> None:
    assert row.on_any_layer == (row.name in (True, False, "gaussian"))
    assert row.of_weight is None or row.from_data is None
    assert not row.changes_weight or not row.on_any_layer
    config = siliang.LoraConfig(init_lora_weights="pissa_niter_2" if row.numbered else row.name)
    assert (config.initialization_settings is None) == (row.settings is None)
    quantized = siliang.methods.find_method("lora").why_not_quantized(config)
    assert (quantized is not None) == row.changes_weight


@pytest.mark.parametrize("row", LINEAR, ids=lambda row: str(row.name))
def test_what_needs_a_linear_layer_is_refused_elsewhere(row: Initialization) -> None:
    init = "pissa_niter_2" if row.numbered else row.name
    with pytest.raises(ConfigError, match=f"target_parameters and init_lora_weights = '{init}' do not go together"):
        siliang.LoraConfig(init_lora_weights=init, target_parameters=["gate_up_proj"])
    with pytest.raises(ConfigError, match=f"init_lora_weights = '{init}' and use_bdlora do not go together"):
        siliang.LoraConfig(init_lora_weights=init, use_bdlora={"target_modules_bd_a": ["q_proj"]})  # type: ignore


def test_a_new_one_is_one_file_and_one_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That of docs/extending.md: attached, trained, saved, loaded and merged."""
    page = (DOCS / "extending.md").read_text(encoding="utf-8").partition("## An initialization of LoRA")[2]
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    module = ModuleType("largest_rows")
    exec(compile(code, "largest_rows.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "largest_rows", module)
    made = re.search(r"The row: `(Initialization\(.*?\))`", page)
    assert made is not None
    row = eval(made[1], {"Initialization": Initialization, "of_its_rank": of_its_rank} | module.__dict__)
    monkeypatch.setitem(INITIALIZATIONS, "largest_rows", row)
    config = siliang.LoraConfig(init_lora_weights="largest_rows", r=4, target_modules=["q_proj"])
    model: Any = siliang.get_peft_model(make("llama"), config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    A, W = layer.lora_A.default.weight, layer.base_layer.weight
    assert all(any(torch.equal(a, w) for w in W) for a in A) and not layer.lora_B.default.weight.any()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(**batch("llama")).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(**batch("llama")).logits
        loaded = siliang.PeftModel.from_pretrained(make("llama"), tmp_path).eval()
        assert torch.equal(loaded(**batch("llama")).logits, wanted)
        torch.testing.assert_close(loaded.merge_and_unload()(**batch("llama")).logits, wanted)
    with pytest.raises(ConfigError, match="r = 64, and a layer has 32 rows or columns"):
        siliang.get_peft_model(make("llama"), siliang.LoraConfig(init_lora_weights="largest_rows", r=64))
