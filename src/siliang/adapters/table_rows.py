"""Rows of an embedding table, or of a head, that an adapter trains: a few new tokens cost a few rows, not the table.

    y = E'[x]        E' is the table E, its rows `indices` replaced by P
    z = E' h         a head that is tied to the table has the same rows

Neither builds E'. PEFT calls P `trainable_tokens_delta`, although it holds the rows themselves.

Shapes: E (V, D), P (K, D); x (...) token ids, h (..., D), z (..., V).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliang.adapters.adapted_layer import AdaptedLayer
from siliang.language import Bilingual
from siliang.methods.layer import BaseForward, LayerAdapter, trained_dtype
from siliang.methods.method import TableRows
from siliang.models.introspect import output_layer
from siliang.models.quantized import is_quantized
from siliang.module_paths import inside, plain_modules
from siliang.types import ConfigError, KindError

PART = "trainable_tokens_delta"


class RowsAdapter(LayerAdapter):
    """P on one layer that holds the table.

    Attributes:
        rows: Which rows they are.

    Args:
        source: The adapter on the table itself, whose P a tied layer uses; None on the table.
    """

    def __init__(self, layer: AdaptedLayer, name: str, rows: TableRows, source: RowsAdapter | None = None) -> None:
        weight = layer.base_parameter("weight")
        self.rows, self._tied = rows, source is not None
        self._indices = torch.tensor(rows.indices, device=weight.device)
        if source is None:
            start = weight.detach()[self._indices].to(trained_dtype(weight), copy=True)
            if rows.at_random:
                start = torch.randn_like(start)
            P = nn.Parameter(start, requires_grad=False)
        else:
            P = source.P
        super().__init__(layer, name, {PART: P})
        self.settings = {"token_indices": list(rows.indices)}

    @property
    def is_the_method(self) -> bool:
        """Whether the method is trainable tokens, and not LoRA with rows beside it."""
        return self.rows.key == PART

    @property
    def P(self) -> Tensor:
        found = self.part(PART)
        assert isinstance(found, Tensor)  # a plain one where torch's first FSDP holds the parameter
        return found

    def merged(self) -> dict[str, Tensor]:
        weight = self.layer.base_layer.weight
        wide = weight.to(torch.promote_types(weight.dtype, self.P.dtype), copy=True)
        return {"weight": wide.index_copy_(0, self._at(weight), self.P.to(wide.dtype))}

    def tensors(self) -> dict[str, Tensor]:
        return {self.rows.key: self.P} if self.rows.saved_when_tied or not self._tied else {}

    def _at(self, reference: Tensor) -> Tensor:
        """The rows' numbers, on the device of `reference`."""
        if self._indices.device != reference.device:
            self._indices = self._indices.to(reference.device)
        return self._indices


class EmbeddingRows(RowsAdapter):
    """On an embedding."""

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        y, base, (ordered, order) = base_forward(x), self.layer.base_layer, self._at(x).sort()
        nearest = torch.searchsorted(ordered, x).clamp(max=len(ordered) - 1)
        padding = base.padding_idx  # whose row has no gradient
        row = self.rows.indices.index(padding) if padding in self.rows.indices else None
        new = F.embedding(order[nearest], self.P, padding_idx=row)
        # BART's and Gemma's embeddings multiply their output by a constant
        scale = getattr(base, "embed_scale", None)
        new = new if scale is None else new * scale
        return torch.where((ordered[nearest] == x).unsqueeze(-1), new.to(y.dtype), y)


class HeadRows(RowsAdapter):
    """On a linear layer whose weight is the table."""

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        z, base, indices = base_forward(x), self.layer.base_layer, self._at(x)
        bias = None if base.bias is None else base.bias[indices].to(x.dtype)
        return z.index_copy(-1, indices, F.linear(x, self.P.to(x.dtype), bias).to(z.dtype))


def check_table_rows(model: nn.Module, table_rows: Mapping[str, TableRows], others: Iterable[str]) -> None:
    """Before anything is made.

    Args:
        model: The base model, nothing attached to it.
        others: The paths of the layers and modules that the adapter also tunes.

    Raises:
        ConfigError: Rows cannot be trained there.
    """
    taken = list(others)
    for path, rows in table_rows.items():
        table = model.get_submodule(path)
        a_head = isinstance(table, nn.Linear) and table is output_layer(model)
        if not (isinstance(table, nn.Embedding) or a_head) or is_quantized(table):
            raise ConfigError(
                Bilingual(
                    f"{path} is a {type(table).__name__}: rows can be trained of a plain embedding or head only.",
                    f"{path} 是 {type(table).__name__}：只有普通的嵌入层或输出头才能按行训练。",
                )
            )
        tied, length = tied_layers(model, path), len(model.get_parameter(f"{path}.weight"))
        if a_head and tied:
            raise ConfigError(
                Bilingual(
                    f"{path} is tied to {tied[0]}: name that one, and the rows of both are trained.",
                    f"{path} 与 {tied[0]} 绑定：请写后者，两者的行会一起训练。",
                )
            )
        if clash := next((p for p in (path, *tied) if inside(p, taken)), None):
            raise KindError(
                Bilingual(
                    f"{clash} is tuned otherwise by the same adapter: leave it out there, or train no rows.",
                    f"{clash} 已由同一适配器以别的方式微调：请在那边去掉它，或不按行训练。",
                )
            )
        if not rows.indices or len(set(rows.indices)) < len(rows.indices):
            raise ConfigError(
                Bilingual(
                    f"The rows of {path} to train must be at least one, each named once.",
                    f"{path} 要训练的行至少一行，且每行只写一次。",
                )
            )
        if missing := [i for i in rows.indices if not 0 <= i < length]:
            raise ConfigError(
                Bilingual(
                    f"{path} has no row {missing[0]}: it has {length:,} rows, from 0 on.",
                    f"{path} 没有第 {missing[0]} 行：共 {length:,} 行，从 0 开始。",
                )
            )
        for other in tied:
            if not isinstance(model.get_submodule(other), nn.Embedding | nn.Linear):
                kind = type(model.get_submodule(other)).__name__
                raise ConfigError(
                    Bilingual(
                        f"{path} is tied to {other}, a {kind}: its rows cannot be trained alone.",
                        f"{path} 与 {other}（{kind}）绑定：它的行不能单独训练。",
                    )
                )


def tied_layers(model: nn.Module, path: str) -> list[str]:
    """The paths of the other layers whose weight is that of the layer at `path`. Nothing may be attached."""
    weight = model.get_parameter(f"{path}.weight")
    return [p for p, m in plain_modules(model) if p != path and m._parameters.get("weight") is weight]


def make_table_rows(layers: Mapping[str, AdaptedLayer], name: str, rows: TableRows) -> dict[str, RowsAdapter]:
    """Makes adapter `name` on a table and on the layers that are tied to it.

    Args:
        layers: They by their paths, the table first.
    """
    found: dict[str, RowsAdapter] = {}
    for path, layer in layers.items():
        kind = EmbeddingRows if isinstance(layer.base_layer, nn.Embedding) else HeadRows
        found[path] = kind(layer, name, rows, next(iter(found.values()), None))
    return found
