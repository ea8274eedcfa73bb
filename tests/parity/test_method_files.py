"""What the files of single methods hold beyond what every method's do."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file, save_file
from tiny import batch, make

import siliang

pytestmark = pytest.mark.filterwarnings("ignore:.*Could not find a config file.*")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch("llama")).logits


@pytest.mark.parametrize("init", [True, "bat"])
def test_files_of_bone_are_those_of_miss(init: bool | str, tmp_path: Path) -> None:
    """PEFT renamed the method and its tensors in 0.18, and opens Bone's files after its conversion script alone."""
    theirs = peft.get_peft_model(make("llama"), peft.MissConfig(task_type="CAUSAL_LM", init_weights=init, r=4))  # type: ignore[arg-type]
    for p in theirs.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("mini_r", "miss_dropout")} | {"peft_type": "BONE"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {k.replace("miss_block", "bone_block"): t for k, t in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    ours = siliang.PeftModel.from_pretrained(make("llama"), tmp_path)
    assert ours.peft_config["default"].peft_type == "MISS"
    assert_close(logits(ours), logits(theirs))
