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
from siliang.types import AdapterError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*Could not find a config file.*", "ignore:Sparse invariant checks.*")


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


def shira(folder: Path, **settings: Any) -> Any:
    """An adapter of SHiRA in `folder`, with values that are not zero."""
    config = peft.ShiraConfig(task_type="CAUSAL_LM", r=2, init_weights=False, **settings)
    if settings.get("mask_type"):
        config.mask_fn = every_other
    model = peft.get_peft_model(make("llama"), config)
    model.save_pretrained(str(folder))
    return model


def every_other(base_layer: torch.nn.Module, r: int, random_seed: int | None = None, **_: object) -> torch.Tensor:
    shape = base_layer.get_parameter("weight").shape
    mask = torch.zeros(shape.numel())
    mask[::2][: r * sum(shape)] = 1
    return mask.view(shape)


@pytest.mark.filterwarnings("ignore:Argument self.mask_type.*")
def test_shiras_places_are_those_of_the_file(tmp_path: Path) -> None:
    """A mask of the user's own has no name that could be made again, and an old seed may give other places."""
    theirs = shira(tmp_path, mask_type="mine")
    assert_close(logits(siliang.PeftModel.from_pretrained(make("llama"), tmp_path)), logits(theirs))
    with pytest.raises(ConfigError, match="mask_type = 'mine': must be 'random'"):
        siliang.get_peft_model(make("llama"), siliang.ShiraConfig(r=2, mask_type="mine"))


@pytest.mark.parametrize("place", [-1, 32])
def test_shiras_places_are_in_the_weight(place: int, tmp_path: Path) -> None:
    shira(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("shira_indices"))
    tensors[key][1, 3] = place
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="shira_indices holds places outside of the weight"):
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path)


def test_what_peft_saves_of_boft_without_its_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One factor, beside a config that has two. The error says so, and what to write there."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)
    settings: dict[str, Any] = {"boft_n_butterfly_factor": 2, "init_weights": False}
    theirs = peft.get_peft_model(make("llama"), peft.BOFTConfig(task_type="CAUSAL_LM", **settings))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=r"The file has 1 factor where .* boft_n_butterfly_factor = 2: PEFT without"):
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"boft_n_butterfly_factor": 1}))
    assert_close(logits(siliang.PeftModel.from_pretrained(make("llama"), tmp_path)), logits(theirs))
