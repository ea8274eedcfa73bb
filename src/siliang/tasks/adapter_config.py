"""The config of a run's adapter: what the settings say of the method, for the task and for new tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from siliang.config import RunConfig
from siliang.data.vocabulary import embedding_modules
from siliang.language import Bilingual
from siliang.methods import find_method
from siliang.methods.config import PeftConfig
from siliang.methods.trainable_tokens import is_table
from siliang.module_paths import matching_paths
from siliang.tasks import TASKS
from siliang.types import ConfigError


def adapter_config(config: RunConfig, model: nn.Module, new_tokens: Sequence[int] | None = None) -> PeftConfig:
    """A new config, which attaching completes; the settings keep what the user gave.

    Args:
        config: Of a run whose method is not full fine-tuning.
        model: Its base model, with or without weights, with room for the new tokens.
        new_tokens: The ids of `data.add_tokens`. None: the last ones of the vocabulary, where only their number counts.

    Raises:
        ConfigError: The method has no such settings.
    """
    method = find_method(config.method.name)
    assert method.config is not None
    arguments = dict(config.method.arguments)
    if config.data.add_tokens:
        fields = {field.name for field in dataclasses.fields(method.config)}
        _learn_new_tokens(arguments, fields, model, new_tokens, len(config.data.add_tokens))
    return method.config(task_type=TASKS[config.task].adapter_type, **arguments)


def _learn_new_tokens(
    arguments: dict[str, Any], fields: set[str], model: nn.Module, new_tokens: Sequence[int] | None, number: int
) -> None:
    """Completes a method's arguments, so that the embeddings of new tokens are learned: their rows alone where the
    method has rows and nothing else is to be done with the embeddings, otherwise the embeddings as they are.

    Args:
        fields: The names of the method's settings.
        number: Of the tokens.
    """
    tables = {path: model.get_submodule(path) for path in embedding_modules(model)}
    whole = [path for path in tables for name in arguments.get("modules_to_save") or () if path.endswith(name)]
    tuned = matching_paths("target_modules", list(tables), arguments.get("target_modules"))
    rows = len(next(iter(tables.values())).get_parameter("weight")) if tables else 0
    ids = [*new_tokens] if new_tokens is not None else [*range(max(rows - number, 0), rows)]
    first: dict[int, str] = {}  # of tied ones, which is the embedding
    for path, table in tables.items():
        first.setdefault(id(table.get_parameter("weight")), path)
    apart = list(first.values())
    if "token_indices" in fields:
        arguments["token_indices"] = sorted({*(arguments.get("token_indices") or ()), *ids})
        if arguments.get("target_modules") is None:
            arguments["target_modules"] = apart
    elif "trainable_token_indices" in fields and not (whole or tuned) and all(map(is_table, tables.values())):
        given = arguments.get("trainable_token_indices")
        if given is None:
            given = arguments["trainable_token_indices"] = ids if len(apart) == 1 else dict.fromkeys(apart, ids)
        if new_tokens is not None:
            _check_named(given, apart, ids)
    else:  # learned only where their embeddings are
        named = [*(arguments.get("modules_to_save") or []), *tables]
        arguments["modules_to_save"] = list(dict.fromkeys(named))


def _check_named(given: list[int] | Mapping[str, list[int]], tables: Sequence[str], ids: Sequence[int]) -> None:
    """
    Args:
        given: A run's trainable_token_indices.
        tables: The paths of the embeddings and the head.
        ids: Of the new tokens.

    Raises:
        ConfigError: They are not all among the trained ones.
    """
    by_name = given if isinstance(given, Mapping) else {tables[0]: given}
    for table in tables:
        trained = {i for name, own in by_name.items() if table.endswith(name) for i in own or ()}
        if not trained >= set(ids):
            raise ConfigError(
                Bilingual(
                    f"trainable_token_indices lacks new tokens of data.add_tokens for {table}. Leave it out: what "
                    "data.add_tokens names is trained, tokens that the vocabulary has already too.",
                    f"trainable_token_indices 在 {table} 上缺少 data.add_tokens 中的新词元。请去掉它：data.add_tokens "
                    "写出的词元都会被训练，词表里已有的也一样。",
                )
            )
