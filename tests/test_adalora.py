"""AdaLoRA's training: ranks go as they do in peft, the file holds those that are left, and a resumed run has the same
bits.
"""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close, assert_same_losses
from safetensors.torch import load_file
from tiny import batch, make

import siliang
from siliang.config import RunConfig
from siliang.train.loop import Training
from siliang.train.run import train
from siliang.types import AdapterError, ConfigError

SETTINGS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "init_r": 6,
    "target_r": 3,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
    "total_step": 12,
    "lora_alpha": 16,
}


def tune(model: Any, steps: int, first: int = 1, optimizer: Any = None) -> list[float]:
    """As PEFT's documentation trains."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(first, first + steps):
        loss = model(**batch("llama")).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model: Any) -> torch.Tensor:
    return model.eval()(**{k: v for k, v in batch("llama").items() if k != "labels"}).logits.detach()


def both() -> tuple[Any, Any]:
    ours: Any = siliang.get_peft_model(make("llama"), siliang.AdaLoraConfig(**SETTINGS))
    theirs = peft.get_peft_model(make("llama"), peft.AdaLoraConfig(**SETTINGS))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # of peft, about its own files
def test_ranks_are_taken_away_as_in_peft(tmp_path: Path) -> None:
    ours, theirs = both()
    assert_same_losses(tune(ours, 12), tune(theirs, 12))
    pattern = ours.peft_config["default"].rank_pattern
    there = {key.removesuffix(".default"): kept for key, kept in theirs.peft_config["default"].rank_pattern.items()}
    assert pattern == there
    assert sum(map(sum, pattern.values())) == 3 * len(pattern) < 6 * len(pattern)
    assert len({sum(kept) for kept in pattern.values()}) > 1  # some layers have more than others
    tuned = logits(ours)
    assert_close(tuned, logits(theirs), roundings=1000)
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / name)
    assert_close(logits(siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "ours")), tuned)
    assert_close(logits(siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "theirs")), logits(theirs))
    assert_close(logits(peft.PeftModel.from_pretrained(make("llama"), tmp_path / "ours")), tuned)
    mine, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in other.items()}
    assert not (tmp_path / "ours" / "siliang_training.safetensors").exists()  # the schedule is over
    assert_close(logits(ours.merge_and_unload()), tuned)


@pytest.mark.parametrize("at", [1, 3, 6, 10])
def test_a_resumed_training_has_the_same_bits(at: int, tmp_path: Path) -> None:
    model, _ = both()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    tune(model, at, optimizer=optimizer)
    model.save_pretrained(tmp_path)
    again: Any = siliang.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    theirs = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-2)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # or it would share the moments
    rest = tune(model.train(), 12 - at, at + 1, optimizer)
    assert tune(again.train(), 12 - at, at + 1, theirs) == rest
    assert torch.equal(logits(model), logits(again))
    assert again.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern


def test_target_r_may_be_init_r() -> None:
    """peft's ends with an error of torch.kthvalue."""
    same: Any = SETTINGS | {"target_r": 6}
    model: Any = siliang.get_peft_model(make("llama"), siliang.AdaLoraConfig(**same))
    tune(model, 12)
    assert all(all(kept) for kept in model.peft_config["default"].rank_pattern.values())
    with pytest.raises(RuntimeError, match="kthvalue"):
        tune(peft.get_peft_model(make("llama"), peft.AdaLoraConfig(**same)), 12)


def test_a_loaded_adapter_gives_a_loss(tmp_path: Path) -> None:
    """Without the term, which is for training; in peft it is an error where the batch has labels."""
    model, _ = both()
    model.save_pretrained(tmp_path)
    loaded: Any = siliang.PeftModel.from_pretrained(make("llama"), tmp_path)
    assert_close(loaded(**batch("llama")).loss, make("llama")(**batch("llama")).loss)
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        peft.PeftModel.from_pretrained(make("llama"), tmp_path)(**batch("llama"))


def test_a_loop_without_total_step_or_gradients() -> None:
    endless: Any = SETTINGS | {"total_step": None}
    model: Any = siliang.get_peft_model(make("llama"), siliang.AdaLoraConfig(**endless))
    with pytest.raises(ConfigError, match="total_step: AdaLoRA must know how many optimizer steps"):
        tune(model, 1)
    model = siliang.get_peft_model(make("llama"), siliang.AdaLoraConfig(**SETTINGS))
    with pytest.raises(ConfigError, match="call update_and_allocate before zero_grad"):
        model.base_model.update_and_allocate(1)


def test_a_changed_rank_pattern_is_refused(tmp_path: Path) -> None:
    model, _ = both()
    tune(model, 12)
    model.save_pretrained(tmp_path)
    config = siliang.AdaLoraConfig.from_pretrained(tmp_path)
    assert config.rank_pattern is not None
    key = next(key for key, kept in config.rank_pattern.items() if not all(kept))
    config.rank_pattern[key] = config.rank_pattern[key][1:]
    config.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"ranks, and rank_pattern says .* was adapter_config.json changed"):
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path)


def settings(model: Path, data: Path, output: Path, **method: Any) -> RunConfig:
    return RunConfig.build(
        {
            "model": str(model),
            "task": "causal_lm",
            "method": {"name": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2} | method,
            "data": {"train": str(data), "test_size": 0.0, "max_length": 64},
            "train": {"max_steps": 8, "batch_size": 4, "save_every": 3, "keep": 5, "warmup_fraction": 0},
            "output": str(output),
        }
    )


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_a_run_knows_its_steps_and_goes_on_after_a_stop(
    model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = (settings(model_folders["llama"], instruction_file, tmp_path / name) for name in ("a", "b"))
    assert train(whole).status == "completed"

    make_step = Training._make_step

    def failing(self: Training, *args: Any) -> Any:
        if self.step == 7:
            raise RuntimeError("the power is gone")
        return make_step(self, *args)

    monkeypatch.setattr(Training, "_make_step", failing)
    with pytest.raises(RuntimeError, match="the power is gone"):
        train(stopped)
    monkeypatch.undo()
    train(stopped, resume=True)
    ends = [tmp_path / name / "adapter" for name in ("a", "b")]
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in ends)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    config = siliang.AdaLoraConfig.from_pretrained(ends[0])
    assert config.total_step == 8
    assert config.rank_pattern is not None and sum(map(sum, config.rank_pattern.values())) == 2 * len(
        config.rank_pattern
    )


def test_a_schedule_that_the_run_does_not_reach_is_refused(
    model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="total_step = 100: the training has 8 steps"):
        train(settings(model_folders["llama"], instruction_file, tmp_path / "a", total_step=100))
    with pytest.raises(ConfigError, match="tinit = 7, tfinal = 2 and 8 steps: no step is left between"):
        train(settings(model_folders["llama"], instruction_file, tmp_path / "b", tinit=7))
