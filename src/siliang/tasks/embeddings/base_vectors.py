"""How the base model makes a vector of a text: what its folder says, for the settings that leave it open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from siliang.config import EmbeddingConfig, RunConfig
from siliang.hub import find_file
from siliang.language import Bilingual
from siliang.models.base_config import load_config
from siliang.safety.safe_json import read_values
from siliang.tasks.task import Task
from siliang.types import ConfigError, ModelError

MODES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}  # sentence-transformers' names, and ours
FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
DOCUMENTS = ("document", "passage", "corpus")  # sentence-transformers' names of a document's prompt
KNOWN = ("Transformer", "Pooling", "Normalize")


def settle(task: Task, config: RunConfig) -> tuple[RunConfig, str]:
    """The settings with those of the base model for what they leave open, so that a run's record has them.

    Raises:
        ConfigError: As `resolved`.
    """
    return config.model_copy(update={"embedding": resolved(config)}), ""


def check_settled(settings: EmbeddingConfig) -> None:
    """
    Raises:
        ConfigError: They leave something to the base model, whose files may have changed since.
    """
    left = {"pooling": settings.pooling == "auto"}
    left |= {"prompt_name": settings.prompt_name == "auto" and bool(settings.query_prompt or settings.document_prompt)}
    left |= {name: getattr(settings, name) is None for name in ("query_prompt", "document_prompt")}
    for name in (name for name, is_left in left.items() if is_left):
        raise ConfigError(
            Bilingual(
                f"embedding.{name} is left to the base model, and the run has no record of it: train the run again.",
                f"embedding.{name} 取自基座模型，而这次运行没有记录它的值：请重新训练。",
            )
        )


def resolved(config: RunConfig) -> EmbeddingConfig:
    """The settings of the task embedding, with those of the base model for what is left open. A model without files has
    the pooling of an encoder.

    Raises:
        ConfigError: The base model is of a kind that makes vectors in another way.
    """
    settings = config.embedding or EmbeddingConfig()
    try:
        model = load_config(config.model, revision=config.revision)
    except ModelError:  # loading will raise it
        model = None
    if getattr(model, "is_encoder_decoder", False):
        raise ConfigError(
            Bilingual(
                f"{config.model} has an encoder and a decoder: task=embedding takes an encoder, or a model that "
                "writes on from what it reads.",
                f"{config.model} 由编码器和解码器组成：task=embedding 只支持编码器模型或只有解码器的模型。",
            )
        )
    width = getattr(model.get_text_config(), "hidden_size", None) if model is not None else None
    for dims in settings.matryoshka_dims:
        if isinstance(width, int) and dims > width:
            raise ConfigError(
                Bilingual(
                    f"embedding.matryoshka_dims has {dims:,}, and the vectors of {config.model} have {width:,} "
                    "dimensions.",
                    f"embedding.matryoshka_dims 中有 {dims:,}，而 {config.model} 的向量只有 {width:,} 维。",
                )
            )
    own = _own(config.model, config.revision)
    pooling = settings.pooling
    if pooling == "auto":
        pooling = _own_pooling(config, own) or _usual_pooling(getattr(model, "model_type", ""))
    prompts = own.get("prompts")
    prompts = prompts if isinstance(prompts, dict) else {}
    query, document = settings.query_prompt, settings.document_prompt
    if query is None:
        query = _text(prompts.get("query"))
    if document is None:
        document = next((_text(prompts[name]) for name in DOCUMENTS if prompts.get(name)), "")
    name = settings.prompt_name
    if name == "auto":
        of_the_base = prompts and settings.query_prompt is None and settings.document_prompt is None
        name = _of_single_texts(config.model, own.get("default_prompt_name"), prompts) if of_the_base else "document"
    update = {"pooling": pooling, "query_prompt": query, "document_prompt": document, "prompt_name": name}
    return settings.model_copy(update=update)


def _of_single_texts(model: str, default: object, prompts: dict[str, Any]) -> str:
    """The prompt of a text that stands alone, by the base model's default prompt.

    Raises:
        ConfigError: The default is neither a query's nor a document's prompt.
    """
    if default == "query" or default in DOCUMENTS:
        return "query" if default == "query" else "document"
    if not (isinstance(default, str) and _text(prompts.get(default))):
        return "none"
    raise ConfigError(
        Bilingual(
            f"{model} puts its prompt {default!r} in front of texts that stand alone, and siliang has those of queries "
            "and documents: set embedding.prompt_name to query, document or none (query_prompt may be any text).",
            f"{model} 在单独的文本前加提示 {default!r}，而 siliang 只有查询和文档的提示：请把 embedding.prompt_name "
            "设为 query、document 或 none（query_prompt 可以是任意文字）。",
        )
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _usual_pooling(model_type: str) -> str:
    """last for a model that writes on from what it reads, mean for an encoder."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    encodes = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "last" if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not encodes else "mean"


def _own(name: str, revision: str | None) -> dict[str, Any]:
    """What sentence-transformers has saved of the model: its settings, `modules` and `pooling`; empty if it has not."""
    modules = _read(name, "modules.json", revision)
    if not isinstance(modules, list):
        return {}
    found = _read(name, "config_sentence_transformers.json", revision)
    found = dict(found) if isinstance(found, dict) else {}
    parts = [m for m in modules if isinstance(m, dict) and isinstance(m.get("type"), str)]
    found["modules"] = [m["type"].rpartition(".")[2] for m in parts]
    place = next((m.get("path") for m in parts if m["type"].endswith(".Pooling")), None)
    if isinstance(place, str) and Path(place).name == place:
        found["pooling"] = _read(name, f"{place}/config.json", revision)
    return found


def _read(name: str, file: str, revision: str | None) -> object:
    path = find_file(name, file, revision)
    return None if path is None else read_values(path, ModelError)


def _own_pooling(config: RunConfig, own: dict[str, Any]) -> str | None:
    """The pooling that the model was saved with; None if it was saved without.

    Raises:
        ConfigError: siliang does not have it.
    """
    if not own:
        return None
    others = [name for name in own["modules"] if name not in KNOWN]
    saved = own.get("pooling")
    saved = saved if isinstance(saved, dict) else {}
    mode = saved.get("pooling_mode")
    flags = [FLAGS.get(name, name) for name, on in saved.items() if on is True and name != "include_prompt"]
    modes = [str(name) for name in (mode if isinstance(mode, list) else [mode] if mode else flags)]
    if saved.get("include_prompt") is False:
        modes.append("include_prompt=false")
    if others or len(modes) > 1 or (modes and modes[0] not in MODES):
        what = others[0] if others else "+".join(modes)
        raise ConfigError(
            Bilingual(
                f"{config.model} was saved by sentence-transformers with {what}, which siliang does not have: set "
                "embedding.pooling to mean, cls or last to train its transformer alone.",
                f"{config.model} 由 sentence-transformers 保存，用到 siliang 没有的 {what}："
                "请把 embedding.pooling 设为 mean、cls 或 last，只训练其中的 transformer。",
            )
        )
    return MODES[modes[0]] if modes else None
