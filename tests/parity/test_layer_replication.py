"""LoRA on replicated layers, compared with the live `peft`: names, answers, gradients, steps, files, merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_all_close, assert_close, assert_same_losses
from stepping import losses_of_steps
from tiny import batch, make
from transformers import AutoModelForCausalLM

import siliang
from siliang.types import ConfigError

RANGES = [[0, 2], [0, 1], [1, 2]]
NAMES = ("llama", "bert", "qwen2")
SETTINGS: dict[str, Any] = {"r": 4, "init_lora_weights": False, "target_modules": "all-linear"}


def pair(name: str, **settings: Any) -> tuple[Any, Any]:
    """The same adapter on the same replicated base in both libraries."""
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    settings = SETTINGS | {"layer_replication": RANGES, "task_type": task} | settings
    ours: Any = siliang.get_peft_model(make(name), siliang.LoraConfig(**settings))
    there: Any = make(name)
    if name == "qwen2":  # PEFT leaves the list of its layers' kinds as it was, and fails
        there.config.layer_types = there.config.layer_types * 2
    theirs: Any = peft.get_peft_model(there, peft.LoraConfig(**settings))
    theirs.load_state_dict(ours.state_dict())  # strict: every name is the same
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("name", NAMES)
def test_names_answers_and_gradients(name: str) -> None:
    ours, theirs = pair(name)
    assert ours.get_base_model().config.num_hidden_layers == 4
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    found = []
    for model in (ours, theirs):
        out = model(**batch(name))
        out.loss.backward()
        found.append((out.logits, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert_close(found[0][0], found[1][0])
    assert_all_close(found[0][1], found[1][1])


@pytest.mark.parametrize("name", NAMES)
def test_five_steps(name: str) -> None:
    losses = [losses_of_steps(model, lambda model: model(**batch(name)).loss) for model in pair(name)]
    assert_same_losses(*losses)
    assert losses[0][-1] < losses[0][0]


def test_files_go_both_ways(tmp_path: Path) -> None:
    ours, theirs = pair("llama")
    wanted = theirs(**batch("llama")).logits
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    there = peft.PeftModel.from_pretrained(make("llama"), str(tmp_path / "ours"))
    assert_close(there(**batch("llama")).logits, wanted)
    here: Any = siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "theirs")
    assert_close(here(**batch("llama")).logits, wanted)


def test_merged_layers_have_their_own_weights(tmp_path: Path) -> None:
    """PEFT adds the updates of all replicas to the one weight that they share."""
    ours, theirs = pair("llama")
    wanted = ours(**batch("llama")).logits
    ours.merge_adapter()
    assert_close(ours(**batch("llama")).logits, wanted)
    ours.unmerge_adapter()
    assert torch.equal(ours(**batch("llama")).logits, wanted)
    merged = ours.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(again(**batch("llama")).logits, wanted)
    assert (theirs.merge_and_unload()(**batch("llama")).logits - wanted).abs().max() > 1e-3


def test_the_base_model_is_what_it_was() -> None:
    twice: Any = [(0, 2), (0, 2)]  # PEFT's are tuples
    for end in ("unload", "delete"):
        base: Any = make("qwen2")
        plain, config = base(**batch("qwen2")).logits, base.config.to_dict()
        model: Any = siliang.get_peft_model(base, siliang.LoraConfig(layer_replication=twice))
        assert len(base.model.layers) == 4 == len(base.config.layer_types)
        with pytest.raises(ConfigError, match="has layer_replication, and is the only one on its model"):
            model.add_adapter("other", siliang.LoraConfig())
        base = model.unload() if end == "unload" else (model.delete_adapter("default"), model.get_base_model())[1]
        assert torch.equal(base(**batch("qwen2")).logits, plain) and base.config.to_dict() == config


def test_generation_with_a_cache() -> None:
    model: Any = siliang.get_peft_model(make("qwen2"), siliang.LoraConfig(**SETTINGS, layer_replication=RANGES)).eval()
    ids = batch("qwen2")["input_ids"]
    with_cache, without = (model.generate(input_ids=ids, max_new_tokens=5, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([[0, 3]], "3 is past the last of the model's 2 layers"),
        ([[1, 1]], "must be \\[first, end\\]"),
        ([[0, 1, 2]], "must be \\[first, end\\]"),
        ([[0, 2]] * 501, "makes 1,002 layers"),
        ([[0, "2"]], "must be a list of lists of whole numbers"),
    ],
)
def test_errors(ranges: Any, message: str) -> None:
    base: Any = make("llama")
    with pytest.raises(ConfigError, match=message):
        siliang.get_peft_model(base, siliang.LoraConfig(layer_replication=ranges))
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration has none"):
        siliang.get_peft_model(make("t5"), siliang.LoraConfig(layer_replication=RANGES))
    model: Any = siliang.get_peft_model(base, siliang.LoraConfig())
    with pytest.raises(ConfigError, match="changes the base model's layers, on which adapter 'default' is"):
        model.add_adapter("other", siliang.LoraConfig(layer_replication=RANGES))
    assert len(base.model.layers) == 2
    wrong = siliang.LoraConfig(layer_replication=RANGES, target_modules=["nothing"])
    other: Any = make("llama")
    with pytest.raises(ConfigError, match="matches no module"):
        siliang.get_peft_model(other, wrong)
    assert len(other.model.layers) == 2


@pytest.mark.filterwarnings("ignore:.*is LoRA already")
def test_as_lora_it_keeps_the_replication(tmp_path: Path) -> None:
    ours, _ = pair("llama")
    wanted = ours(**batch("llama")).logits
    siliang.save_as_lora(tmp_path, ours, 4)
    again = siliang.PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    assert_close(again(**batch("llama")).logits, wanted)
