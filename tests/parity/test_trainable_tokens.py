"""Trainable tokens where peft does otherwise, and settings that are refused. tests/parity/test_every_method.py has the
rest.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from tiny import batch, make

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
            p.data += torch.randn(p.shape, generator=generator)
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
