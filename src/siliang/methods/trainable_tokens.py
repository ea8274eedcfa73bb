"""Trainable tokens: chosen rows of an embedding table, and of the head. It has no paper: it is PEFT's own method.

    y = E'[x]        E' is the table E, its rows `token_indices` replaced by P
    z = E' h         the same on a head: on one that is tied to the table with the same P, on another with its own

P is E's own rows at the start, so the model computes what the base model does. LoRA's `trainable_token_indices` has the
same rows. What they are on a layer is in adapters/table_rows.py, because it reaches tied layers.

Shapes: E (V, D), P (K, D) for K tokens; x (...) token ids, h (..., D), z (..., V).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from torch import nn

from siliang.language import Bilingual
from siliang.methods.config import CONFIG_NAME, LayerConfig
from siliang.methods.find_targets import find_targets
from siliang.methods.method import Method, Parts, TableRows
from siliang.methods.targets import DefaultTargets
from siliang.models.introspect import word_embeddings
from siliang.module_paths import inside, plain_modules
from siliang.types import ConfigError, PeftType, TargetError, nearest


@dataclass(kw_only=True)
class TrainableTokensConfig(LayerConfig):
    """The settings, with PEFT's names and defaults.

    Attributes:
        target_modules: The tables: embeddings, or a head. None: the input embeddings, and whatever is tied to them.
        token_indices: The rows' numbers: the tokens' ids.
        init_weights: Start from the base model's rows. False: from random numbers, for tests.
    """

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    peft_type: ClassVar[str] = PeftType.TRAINABLE_TOKENS
    NOT_IN_PEFT: ClassVar[tuple[str, ...]] = ("exclude_modules", "modules_to_save")

    @classmethod
    def from_dict(cls, values: dict[str, object], *, source: str = CONFIG_NAME) -> Self:
        """As for every method. A file of PEFT has no modules: it leaves the task's new head untrained and unsaved."""
        return super().from_dict({"modules_to_save": [], **values}, source=source)


class TrainableTokens(Method[TrainableTokensConfig]):
    """Copies of some rows of the embeddings."""

    name = "trainable_tokens"
    config = TrainableTokensConfig
    learning_rate = 1e-2
    learning_rate_source = Bilingual(
        "measured: 66% on SST-2 after 100 steps, with the 100 most frequent tokens",
        "实测：对最常见的 100 个词元，SST-2 训练 100 步得 66%",
    )
    trains = Bilingual("the embeddings of chosen tokens", "所选词元的嵌入")

    needs_settings = True

    def attach(
        self, model: nn.Module, config: TrainableTokensConfig, *, saved: Sequence[str], from_file: bool
    ) -> Parts:
        if not config.token_indices:
            raise ConfigError(
                Bilingual(
                    "token_indices is empty: write the ids of the tokens to train; in a run, data.add_tokens gives "
                    "those of new tokens.",
                    "token_indices 为空：请写出要训练的词元编号；在训练任务中，新词元可写在 data.add_tokens 里。",
                )
            )
        if config.target_modules is None:
            config.target_modules = input_embeddings(model)  # as in PEFT: the path, as a regular expression
        paths = find_targets(model, config, is_table, defaults=DefaultTargets(), outside=saved, lenient=from_file)
        kind = TableRows((), at_random=not config.init_weights)
        rows = rows_of_tables(model, dict.fromkeys(paths, config.token_indices), kind)
        if len(rows) < len(paths):  # PEFT cannot read a file that names a table and a head that is tied to it
            config.target_modules = list(rows)
        return Parts(table_rows=rows)


def is_table(layer: nn.Module) -> bool:
    """Whether a layer has a row for each token, as an embedding and a head do."""
    return isinstance(layer, nn.Embedding | nn.Linear)


def input_embeddings(model: nn.Module) -> str:
    """The path of the input embeddings.

    Raises:
        TargetError: The model does not say which they are.
    """
    table = word_embeddings(model)
    path = next((path for path, module in plain_modules(model) if module is table), None)
    if table is None or path is None:
        raise TargetError(
            Bilingual(
                f"{type(model).__name__} has no input embeddings that get_input_embeddings gives: name the table.",
                f"{type(model).__name__} 的 get_input_embeddings 没有给出输入嵌入：请写出嵌入层的名称。",
            )
        )
    return path


def rows_of_tables(model: nn.Module, wanted: Mapping[str, Sequence[int]], kind: TableRows) -> dict[str, TableRows]:
    """The rows to train by table. Tied tables have one P: that of the first of them, an embedding before a head.

    Args:
        wanted: The tokens by the paths of tables.
        kind: What else the rows have in common.

    Raises:
        ConfigError: Tied tables are to have other rows.
    """
    tables = {path: model.get_submodule(path) for path in wanted}
    found: dict[str, TableRows] = {}
    first: dict[int, str] = {}  # by the weight's id
    for path in sorted(wanted, key=lambda path: not isinstance(tables[path], nn.Embedding)):
        known = first.setdefault(id(getattr(tables[path], "weight", tables[path])), path)
        rows = replace(kind, indices=tuple(wanted[path]))
        if found.setdefault(known, rows).indices != rows.indices:
            raise ConfigError(
                Bilingual(
                    f"{path} is tied to {known}, and other tokens are named for it: name {known} alone, or the same "
                    "tokens for both.",
                    f"{path} 与 {known} 绑定，却写了不同的词元：请只写 {known}，或为两者写相同的词元。",
                )
            )
    return found


def named_rows(
    model: nn.Module, named: list[int] | Mapping[str, list[int]] | None, *, saved: Sequence[str]
) -> dict[str, TableRows]:
    """The rows of LoRA's `trainable_token_indices`, by table.

    Args:
        named: Tokens of the input embeddings, or tokens by the endings of tables' paths; None for none.
        saved: The modules that are saved whole, which have no rows of their own.

    Raises:
        TargetError: A name matches nothing.
        ConfigError: Tied tables are to have other rows.
    """
    if named is None:
        return {}
    if not isinstance(named, Mapping):
        wanted: dict[str, list[int]] = {input_embeddings(model): named}
    else:
        paths, wanted = [path for path, _ in plain_modules(model) if path], {}
        for name, indices in named.items():
            # as PEFT, which takes any ending
            if not (matches := [path for path in paths if path.endswith(name)]):
                hint = nearest(name, {path.rpartition(".")[2] for path in paths})
                raise TargetError(
                    Bilingual(
                        f"trainable_token_indices: {name!r} matches no module of {type(model).__name__}.{hint}",
                        f"trainable_token_indices：{name!r} 与 {type(model).__name__} 的任何模块都不匹配。{hint.zh}",
                    )
                )
            wanted |= dict.fromkeys(matches, indices)
    if clash := [path for path in wanted if inside(path, saved)]:
        raise ConfigError(
            Bilingual(
                f"trainable_token_indices: {clash[0]} is in modules_to_save, which trains it whole: leave one of them "
                "out.",
                f"trainable_token_indices：{clash[0]} 已在 modules_to_save 中整体训练：请去掉其中之一。",
            )
        )
    kind = TableRows((), key="token_adapter.trainable_tokens_delta", saved_when_tied=False)
    return rows_of_tables(model, wanted, kind)
