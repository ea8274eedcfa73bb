"""Trainable tokens where peft does otherwise, and settings that are refused (tests/parity/test_every_method.py has the
rest); and those of LoRA.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_all_close, assert_close
from safetensors.torch import load_file
from tiny import TASK, VOCABULARY, batch, make

import siliang
from siliang.types import ConfigError, TargetError

TOKENS = [*dict.fromkeys(batch("llama")["input_ids"][0].tolist())][:5]
CAUSAL: Any = "CAUSAL_LM"
CLASSES: Any = "SEQ_CLS"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Could not find a config file.*",
    "ignore:Model has `tie_word_embeddings=True`.*",  # PEFT ties the rows, whatever it says
)


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    return model.eval()(**batch(name)).logits


def moved(model: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def test_a_classifier_learns_its_head_too(tmp_path: Path) -> None:
    """PEFT leaves the new head of a classifier at its random start, and out of the file. Such files are read."""
    ours: Any = siliang.get_peft_model(
        make("bert"), siliang.TrainableTokensConfig(task_type=CLASSES, token_indices=TOKENS)
    )
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert any("classifier" in name for name in trained)
    moved(ours).save_pretrained(tmp_path / "ours")
    back = siliang.PeftModel.from_pretrained(make("bert"), tmp_path / "ours")
    assert torch.equal(logits(back, "bert"), logits(ours, "bert"))
    theirs = moved(
        peft.get_peft_model(make("bert"), peft.TrainableTokensConfig(task_type=CLASSES, token_indices=TOKENS))
    )
    assert not any("classifier" in name for name, p in theirs.named_parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    here = siliang.PeftModel.from_pretrained(make("bert"), tmp_path / "theirs")
    assert_close(logits(here, "bert"), logits(theirs, "bert"))


@pytest.mark.parametrize(("name", "tables"), [("llama", ["embed_tokens", "lm_head"]), ("gpt2", ["wte", "lm_head"])])
def test_rows_of_the_head_too(name: str, tables: list[str], tmp_path: Path) -> None:
    """Apart from the embeddings, and tied to them: PEFT breaks on a tied head that is named, so our file does not."""
    settings: dict[str, Any] = {"task_type": CAUSAL, "target_modules": tables, "token_indices": TOKENS}
    ours: Any = moved(siliang.get_peft_model(make(name), siliang.TrainableTokensConfig(**settings)))
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert len(trained) == (2 if name == "llama" else 1)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours")
    assert_close(logits(theirs, name), logits(ours, name))
    moved(theirs).save_pretrained(tmp_path / "theirs")
    here: Any = siliang.PeftModel.from_pretrained(make(name), tmp_path / "theirs")
    assert_close(logits(here, name), logits(theirs, name))
    merged: Any = here.merge_and_unload()
    assert_close(logits(merged, name), logits(theirs, name))
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == (name == "gpt2")


@pytest.mark.parametrize(
    ("name", "settings", "kind", "message"),
    [
        ("llama", {"target_modules": "all-linear"}, ConfigError, "of a plain embedding or head only"),
        ("llama", {"target_modules": ["q_proj"]}, ConfigError, "q_proj is a Linear: rows can be trained"),
        ("gpt2", {"target_modules": ["lm_head"]}, ConfigError, "lm_head is tied to transformer.wte: name that one"),
        ("llama", {"modules_to_save": ["embed_tokens"]}, TargetError, "holds all that target_modules matches"),
        ("gpt2", {"modules_to_save": ["lm_head"]}, ConfigError, "lm_head is tuned otherwise by the same adapter"),
        ("plain", {"task_type": None}, TargetError, "has no input embeddings"),
    ],
)
def test_refused(name: str, settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    values: dict[str, Any] = {"task_type": CAUSAL, "token_indices": TOKENS} | settings
    with pytest.raises(kind, match=message):
        siliang.get_peft_model(make(name), siliang.TrainableTokensConfig(**values))


# ---- LoRA's trainable_token_indices ----

NAMED: dict[str, tuple[str, Any]] = {
    "llama": ("llama", TOKENS),
    "llama, by name": ("llama", {"embed_tokens": TOKENS, "lm_head": TOKENS[:3]}),
    "gpt2, tied": ("gpt2", TOKENS),
    "gpt2, tied, by name": ("gpt2", {"wte": TOKENS}),
    "gpt2, tied, both": ("gpt2", {"wte": TOKENS, "lm_head": TOKENS}),
    "bloom, tied": ("bloom", TOKENS),
    "t5, tied": ("t5", TOKENS),
    "bart, tied": ("bart", TOKENS),
    "bert": ("bert", TOKENS),
}


def lora(library: Any, case: str, **more: Any) -> Any:
    name, tokens = NAMED[case]
    settings: dict[str, Any] = {"task_type": TASK[name], "r": 4, "trainable_token_indices": tokens} | more
    return library.get_peft_model(make(name), library.LoraConfig(**settings))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out.*")
@pytest.mark.parametrize("case", NAMED)
def test_beside_lora_as_in_peft(case: str, tmp_path: Path) -> None:
    """Files both ways, forward and gradients, and merged."""
    name, _ = NAMED[case]
    ours = moved(lora(siliang, case)).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours", is_trainable=True).eval()
    gradients = []
    for model in (ours, theirs):
        loss = model(**batch(name)).loss
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        gradients.append({n.replace(".token_adapter", "").replace(".base_layer.", "."): g for n, g in found.items()})
    assert_all_close(*gradients)
    assert_close(logits(ours, name), logits(theirs, name))
    moved(theirs).save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    here: Any = siliang.PeftModel.from_pretrained(make(name), tmp_path / "theirs")
    wanted = logits(theirs, name)
    assert_close(logits(here, name), wanted)
    here.merge_adapter(safe_merge=True)
    assert_close(logits(here, name), wanted)
    here.unmerge_adapter()
    assert_close(logits(here, name), wanted)
    with here.disable_adapter():
        assert torch.equal(logits(here, name), logits(make(name), name)) or name == "bert"  # whose head is new
    assert_close(logits(here.merge_and_unload(safe_merge=True), name), wanted)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out.*", "ignore:Setting `save_embedding_layers`.*")
@pytest.mark.parametrize("case", ["llama", "llama, by name", "gpt2, tied"])
def test_a_file_of_peft_with_resized_embeddings(case: str, tmp_path: Path) -> None:
    """It holds the embeddings too, and a tied head's rows once more."""
    name, tokens = NAMED[case]
    make(name).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    bases: list[Any] = [make(name, seed) for seed in (0, 0)]
    for seed, base in enumerate(bases):
        torch.manual_seed(seed)
        base.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    bases[0].name_or_path = str(tmp_path / "base")
    theirs = peft.get_peft_model(bases[0], peft.LoraConfig(task_type=CAUSAL, trainable_token_indices=tokens))
    moved(theirs).save_pretrained(tmp_path / "adapter")
    here = siliang.PeftModel.from_pretrained(bases[1], tmp_path / "adapter")
    assert_close(logits(here, name), logits(theirs, name))


@pytest.mark.parametrize("case", ["llama, by name", "gpt2, tied"])
def test_on_a_half_precision_base(case: str) -> None:
    """P is fp32 on a bf16 model, and gives what it gives there in fp32 within bf16's rounding."""
    name, tokens = NAMED[case]
    model = siliang.get_peft_model(
        make(name).to(torch.bfloat16),
        siliang.LoraConfig(task_type=CAUSAL, r=4, trainable_token_indices=tokens),
    )
    rows = [p for n, p in model.named_parameters() if "trainable_tokens" in n]
    assert rows and all(p.dtype == torch.float32 for p in rows)
    whole = moved(lora(siliang, case))
    siliang.set_peft_model_state_dict(model, siliang.get_peft_model_state_dict(whole))
    torch.testing.assert_close(logits(model, name).float(), logits(whole, name), rtol=0.1, atol=0.1)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out.*")
@pytest.mark.parametrize(
    ("case", "more", "kind", "message"),
    [
        ("llama", {"target_modules": ["embed_tokens"]}, ConfigError, "embed_tokens is tuned otherwise"),
        ("llama", {"modules_to_save": ["embed_tokens"]}, ConfigError, "is in modules_to_save, which trains it whole"),
        ("gpt2, tied", {"modules_to_save": ["lm_head"]}, ConfigError, "lm_head is tuned otherwise"),
        ("llama", {"trainable_token_indices": {"embed": [3]}}, TargetError, "'embed' matches no module"),
        ("llama", {"trainable_token_indices": {"q_proj": [3]}}, ConfigError, "q_proj is a Linear: rows can be"),
        ("llama", {"trainable_token_indices": [3, 3]}, ConfigError, "each named once"),
        ("llama", {"trainable_token_indices": []}, ConfigError, "at least one"),
        ("llama", {"trainable_token_indices": [10**6]}, ConfigError, "has no row 1000000"),
        ("llama", {"trainable_token_indices": ["a"]}, ConfigError, "trainable_token_indices = "),
        (
            "gpt2, tied",
            {"trainable_token_indices": {"wte": [3], "lm_head": [4]}},
            ConfigError,
            "other tokens are",
        ),
    ],
)
def test_refused_beside_lora(case: str, more: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        lora(siliang, case, **more)


def test_rows_are_not_combined() -> None:
    model = lora(siliang, "llama")
    with pytest.raises(ConfigError, match="'default' has trainable_token_indices: only A and B"):
        model.add_weighted_adapter(["default"], [1.0], "new")
