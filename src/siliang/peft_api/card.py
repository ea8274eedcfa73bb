"""The model card of an adapter: README.md with the base model, the method, and what a run says of itself.

Nothing private is in it: of local folders and files it has the names alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel

from siliang.files import write_text
from siliang.methods.config import PEFT_FORMAT_VERSION, PeftConfig
from siliang.secrets import without_secrets
from siliang.types import PeftType, TaskType

CARD_NAME = "README.md"
PIPELINES = {TaskType.CAUSAL_LM: "text-generation", TaskType.SEQ_CLS: "text-classification"}
PIPELINES |= {TaskType.TOKEN_CLS: "token-classification", TaskType.QUESTION_ANS: "question-answering"}
FRAMEWORK = "### Framework versions"


def write_card(
    folder: Path, config: PeftConfig, facts: Mapping[str, str] | None = None, model: nn.Module | None = None
) -> None:
    """Writes the card of an adapter into its folder; other text of a card that exists is kept.

    Args:
        config: The adapter's.
        model: The base model, whose own tags the adapter gets; None: a model of transformers without tags.
        facts: What else is known, such as {"data": "reviews.csv", "accuracy": "0.91"}.
    """
    path = folder / CARD_NAME
    base = base_name(config) if model is None or hasattr(model, "config") else None  # else it has no page on the hub
    card = ModelCard.load(path) if path.is_file() else ModelCard(_text(config, base, facts or {}))
    data = card.data
    assert isinstance(data, ModelCardData)
    data.library_name = "peft"
    tags = {"siliang", *(getattr(model, "model_tags", None) or ())}
    tags |= {"lora"} if config.peft_type == PeftType.LORA else set()
    tags |= {"transformers"} if model is None or isinstance(model, PreTrainedModel) else set()
    tags |= {f"base_model:adapter:{base}"} if base else set()
    own: list[str] = data.tags or []
    data.tags = sorted(tags | set(own))
    data.base_model = data.base_model or base
    pipeline = PIPELINES.get(config.task_type) if config.task_type is not None else None
    data.pipeline_tag = data.pipeline_tag or pipeline
    version = f"- PEFT {PEFT_FORMAT_VERSION}"
    if version not in card.text:
        heading = "" if FRAMEWORK in card.text else f"\n{FRAMEWORK}\n"
        card.text = f"{card.text.rstrip()}\n{heading}\n{version}\n"
    write_text(path, without_secrets(str(card)))


def base_name(config: PeftConfig) -> str | None:
    """The base model's name on the hub, or that of its folder without the way to it."""
    name = config.base_model_name_or_path
    if name is None:
        return None
    local = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or Path(name).exists()
    return Path(name).name if local else name


def _text(config: PeftConfig, base: str | None, facts: Mapping[str, str]) -> str:
    rows = {"base model": base or "not named", "method": config.peft_type, **facts}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    title = f"# An adapter for {base or 'its base model'}"
    return f"---\nlibrary_name: peft\n---\n\n{title}\n\n| | |\n| --- | --- |\n{table}\n"
