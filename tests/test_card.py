"""The card of an adapter: what it says, what it keeps, and what it keeps to itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from tiny import make

import siliang
from siliang.peft_api.card import base_name, write_card
from siliang.types import TaskType

TOKEN = "hf_" + "aBcD" * 9


def test_the_card_of_a_saved_adapter(tmp_path: Path) -> None:
    base: Any = make("llama")
    base.name_or_path = str(tmp_path / "private" / "tiny-llama")
    model = siliang.get_peft_model(base, siliang.LoraConfig(task_type=TaskType.CAUSAL_LM))
    model.save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == "tiny-llama" and card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert "private" not in str(card)
    siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "adapter")


def test_a_card_that_is_there_keeps_its_words(tmp_path: Path) -> None:
    config = siliang.IA3Config(base_model_name_or_path="Qwen/Qwen3-0.6B")
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# My own words\n")
    for _ in range(2):
        write_card(tmp_path, config)
    text = (tmp_path / "README.md").read_text()
    assert "# My own words" in text and text.count("- PEFT ") == 1 and "license: mit" in text
    assert {"mine", "base_model:adapter:Qwen/Qwen3-0.6B"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)


def test_nothing_private(tmp_path: Path) -> None:
    for name in (str(tmp_path / "m"), "./m", "~/m", f"/data/{TOKEN}/m"):
        assert base_name(siliang.LoraConfig(base_model_name_or_path=name)) == "m"
    write_card(tmp_path, siliang.LoraConfig(base_model_name_or_path="a/b"), {"data": f"x-{TOKEN}.csv"})
    assert TOKEN not in (tmp_path / "README.md").read_text()
