"""LoRA's settings that are not an equation, compared with the live `peft`: what is made where, and what is tied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close, assert_same_losses
from safetensors.torch import load_file, save_file
from tiny import batch, make
from transformers import LlamaConfig, LlamaForCausalLM

import siliang
from siliang.types import AdapterError, ConfigError


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


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
def test_norms_elsewhere(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if device == "cpu":
        monkeypatch.setattr("siliang.methods.lora_layers.GPU", torch.device("cpu"))
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


def tied(tie: bool = True) -> Any:
    """A Llama whose head is its embedding."""
    torch.manual_seed(0)
    plain: Any = make("llama").config
    return LlamaForCausalLM(LlamaConfig(**plain.to_dict() | {"tie_word_embeddings": tie})).eval()


TIED: list[dict[str, Any]] = [
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 3, "use_rslora": True},
    {"target_modules": r".*\.q_proj|.*embed_tokens"},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
]
PEFTS = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*", "ignore:Setting `save_embedding_layers`.*")


def both(settings: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """The same tied adapter in both libraries, with the same values."""
    settings = {"r": 4, "ensure_weight_tying": True, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings
    ours: Any = siliang.get_peft_model(tied(), siliang.LoraConfig(**settings | more))
    theirs: Any = peft.get_peft_model(tied(), peft.LoraConfig(**settings | more))
    peft.set_peft_model_state_dict(theirs, siliang.get_peft_model_state_dict(ours))
    return ours, theirs


@PEFTS
@pytest.mark.parametrize("settings", TIED, ids=str)
def test_tied_names_answers_and_steps(settings: dict[str, Any]) -> None:
    """PEFT has each of LoRA's tied factors twice, on one memory: SGD's two steps are those of the sum."""
    ours, theirs = both(settings)
    mine, peers = siliang.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    heads = {key for key in peers if key.endswith("base_layer.weight")}  # PEFT saves tuned embeddings along
    assert {key: t.shape for key, t in mine.items()} == {k: t.shape for k, t in peers.items() if k not in heads}
    if isinstance(settings["target_modules"], list):
        assert set(ours.peft_config["default"].target_modules) == set(theirs.peft_config["default"].target_modules)
    losses = []
    for model in (ours, theirs):
        params = {id(p): p for p in model.parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(params.values(), lr=0.1)
        steps = []
        for _ in range(5):
            loss = model(**batch("llama")).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(loss.item())
        losses.append(steps)
    assert_same_losses(*losses)
    assert losses[0][-1] < losses[0][0]


@PEFTS
@pytest.mark.parametrize("init", [True, "gaussian", False])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj", "lm_head", "embed_tokens"]], ids=str)
def test_tied_start_is_that_of_the_head(targets: list[str], init: bool | str) -> None:
    """The shared B starts as the A of a linear layer, which an embedding's own B does not: nn.Embedding's is normal."""
    found = []
    for library in (siliang, peft):
        torch.manual_seed(0)
        config: Any = library.LoraConfig(
            r=16, target_modules=targets, ensure_weight_tying=True, init_lora_weights=init, task_type="CAUSAL_LM"
        )
        model: Any = library.get_peft_model(tied(), config)
        start = {key.rpartition("lora_embedding_")[2]: p for key, p in model.named_parameters() if "embedding_" in key}
        found.append([start[key].detach() for key in ("A.default", "B.default")])
    (A, B), (A_peft, B_peft) = found
    assert A.count_nonzero() == A_peft.count_nonzero() == (0 if init else A.numel())
    assert B.shape == B_peft.shape
    assert B.std().item() == pytest.approx(B_peft.std().item(), rel=0.1)
    bound = B.shape[0] ** -0.5  # of U(-1/sqrt(D), 1/sqrt(D)), which is what the start is with True alone
    for values in (B, B_peft):
        largest = values.abs().max().item()
        assert 0.95 * bound < largest <= bound if init is True else largest > bound


@PEFTS
@pytest.mark.parametrize("settings", TIED, ids=str)
def test_tied_files_go_both_ways(settings: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both(settings)
    wanted = theirs(**batch("llama")).logits
    assert_close(ours(**batch("llama")).logits, wanted)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert_close(peft.PeftModel.from_pretrained(tied(), str(tmp_path / "ours"))(**batch("llama")).logits, wanted)
    assert_close(siliang.PeftModel.from_pretrained(tied(), tmp_path / "theirs")(**batch("llama")).logits, wanted)
    again: Any = siliang.PeftModel.from_pretrained(tied(), tmp_path / "ours", is_trainable=True)
    assert again.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()


@PEFTS
@pytest.mark.parametrize("settings", TIED, ids=str)
def test_tied_merged_stay_tied(settings: dict[str, Any]) -> None:
    """PEFT adds the update of LoRA to the one weight twice, for each of its names."""
    ours, theirs = both(settings)
    wanted = ours(**batch("llama")).logits
    ours.merge_adapter()
    assert_close(ours(**batch("llama")).logits, wanted)
    ours.unmerge_adapter()
    merged = ours.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings
    assert_close(merged(**batch("llama")).logits, wanted)
    there = theirs.merge_and_unload()(**batch("llama")).logits
    assert ((there - wanted).abs().max() < 1e-3) == ("modules_to_save" in settings)


@PEFTS
def test_what_cannot_be_tied(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"use_dora": True}, {"rank_pattern": {"lm_head": 2}}, {"init_lora_weights": "loftq"}]
    for one in wrong:
        settings: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True} | one
        with pytest.raises(ConfigError, match=r"ensure_weight_tying and .* do not go together"):
            siliang.get_peft_model(tied(), siliang.LoraConfig(**settings))
    for model, targets in ((tied(tie=False), "embed_tokens"), (tied(), "q_proj")):
        with pytest.warns(UserWarning, match="ensure_weight_tying has no effect"):
            siliang.get_peft_model(model, siliang.LoraConfig(target_modules=[targets], ensure_weight_tying=True))
    with pytest.raises(ConfigError, match="for one embedding and one linear head, and here shared, enc"):
        siliang.get_peft_model(make("t5"), siliang.LoraConfig(target_modules=["q"], ensure_weight_tying=True))
    ours: Any = siliang.get_peft_model(
        tied(), siliang.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False)
    )
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors |= {key: t + 1 for key, t in tensors.items() if "lm_head" in key}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"is not .* transposed"):
        siliang.PeftModel.from_pretrained(tied(), tmp_path)
