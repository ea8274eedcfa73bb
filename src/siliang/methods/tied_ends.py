"""`ensure_weight_tying`: what an adapter does to an embedding it does to the head that is tied to it, as in PEFT.

    LoRA: W + s (B A)^T on both, of one A and one B; the head's A is B^T, and its B is A^T
    the initialization is that of LoRA on the head, a linear layer: B^T ~ U(kaiming), A = 0
    modules_to_save: one copy for both

PEFT has it where a setting names embed_tokens or lm_head, and nowhere else; files mean that, so that this has it there.
PEFT's LoRA has two parameters on one memory, each with its own step; here it is one, with the sum of the gradients.

Shapes: as in lora_embedding.py; W (V, D), A (R, V), B (D, R).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.layer import BaseForward, Layer, MakeAdapter
from siliang.methods.lora_embedding import LoraEmbedding
from siliang.methods.lora_initialization import USUAL, Initialization
from siliang.methods.low_rank import FactorModules, LoraSpec
from siliang.models.introspect import is_linear, output_layer, word_embeddings
from siliang.models.quantized import is_quantized
from siliang.module_paths import matching_paths, plain_modules
from siliang.ops.lora_linear import lora_linear
from siliang.types import AdapterError, ConfigError

NAMES = ("embed_tokens", "lm_head")  # that PEFT looks for


class Tied(NamedTuple):
    """The paths of an embedding and of the head that is tied to it."""

    embedding: str
    head: str

    def is_meant_by(self, names: Sequence[str] | str | None) -> bool:
        """Whether a list of names, or a regular expression for them, is one that PEFT ties for."""
        if names and isinstance(names, str):
            return bool(matching_paths("target_modules", NAMES, names))
        return any(name.rpartition(".")[2] in NAMES for name in names or ())

    def names(self, names: Sequence[str]) -> list[str]:
        """Names with the embedding among them, and without those that mean the head."""
        heads = [name for name in names if re.search(rf"(^|\.){re.escape(name)}($|\.)", self.head)]
        return sorted({self.embedding, *names} - set(heads))


def tied_ends(model: nn.Module) -> Tied | None:
    """The embedding and the head of a model, where they are tied.

    Raises:
        ConfigError: Other layers have the same weight, or the head is not an unquantized linear layer.
    """
    table, head = word_embeddings(model), output_layer(model)
    if table is None or head is None or head._parameters.get("weight") is not table.weight:
        return None
    found = {path: m for path, m in plain_modules(model) if m._parameters.get("weight") is table.weight}
    if len(found) > 2 or not is_linear(head) or is_quantized(head):
        raise ConfigError(
            Bilingual(
                f"ensure_weight_tying is for one embedding and one linear head, and here {', '.join(found)} share a "
                "weight: leave it out.",
                f"ensure_weight_tying 用于一个嵌入层和一个线性输出头，而这里共享同一权重的有"
                f" {'、'.join(found)}：请去掉它。",
            )
        )
    embedding = next(path for path, m in found.items() if m is table)
    return Tied(embedding, next(path for path in found if path != embedding))


def tied_for(
    model: nn.Module, targets: Sequence[str] | str | None, saved: Sequence[str] | None
) -> tuple[Tied | None, Tied | None]:
    """What is tied among the targets, and among the modules that are saved whole, which come first; None for nothing.

    Raises:
        ConfigError: As `tied_ends`.
    """
    tied = tied_ends(model)
    if tied is not None and tied.is_meant_by(saved):
        return None, tied
    if tied is not None and tied.is_meant_by(targets):
        return tied, None
    return None, None


class TiedHead(FactorModules):
    """LoRA on a head, with the factors of the embedding that it is tied to; it has none of its own."""

    def __init__(self, layer: Layer, name: str, spec: LoraSpec, embedding: LoraEmbedding) -> None:
        super().__init__(layer, name, replace(spec, init=USUAL))
        self.embedding, self.dropout_p = embedding, spec.dropout_p

    @classmethod
    def supports(cls, layer: nn.Module) -> bool:
        return is_linear(layer)

    @property
    def A(self) -> Tensor:
        return self.embedding.B.T

    @property
    def B(self) -> Tensor:
        return self.embedding.A.T

    @property
    def b(self) -> None:
        return None

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        y = base_forward(x)
        return lora_linear(y, x, self.A, self.B, self.s, dropout_p=self.dropout_p, training=self.layer.training)

    def update(self, x: Tensor, like: Tensor) -> Tensor:
        return lora_linear(torch.zeros_like(like), x, self.A, self.B, self.s)

    def delta(self) -> Tensor:
        """As the embedding's, to the last bit, so that the merged weights are tied again."""
        return self.s * (self.embedding.B @ self.embedding.A).T


def on_both(tied: Tied, embedding: LoraSpec, head: LoraSpec) -> dict[str, MakeAdapter]:
    """What LoRA is on an embedding and on its head, by path.

    Raises:
        ConfigError: A setting would give the two different updates.
    """
    init = embedding.init
    apart = "rank_pattern" if embedding.r != head.r else "alpha_pattern" if embedding.scaling != head.scaling else None
    apart = f"init_lora_weights = {init.name!r}" if init.changes_weight and init.of_weight else apart
    apart = apart if embedding.kind is LoraEmbedding else "use_dora"
    if apart is not None:
        raise ConfigError(
            Bilingual(
                f"ensure_weight_tying and {apart} do not go together: {tied.embedding} and {tied.head} would not "
                "change alike.",
                f"ensure_weight_tying 与 {apart} 不能同时使用：{tied.embedding} 和 {tied.head} 的变化会不一致。",
            )
        )
    made: dict[str, LoraEmbedding] = {}

    def make(layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LoraEmbedding:
        made[name] = LoraEmbedding(layer, name, embedding)
        _draw_as_head(made[name], init, embedding.r)
        return made[name]

    def make_head(layer: Layer, name: str, shared: Mapping[str, Tensor]) -> TiedHead:
        return TiedHead(layer, name, head, made[name])

    return {tied.embedding: make, tied.head: make_head}


@torch.no_grad()
def _draw_as_head(adapter: LoraEmbedding, init: Initialization, r: int) -> None:
    """Draws B^T, the head's A, as LoRA draws a linear layer's A: PEFT initializes the head last, on the one memory."""
    if init.draw_b is None and not init.frozen_b:
        init.draw_a(adapter.B.T, r)


def targets_with(tied: Tied, targets: list[str] | str) -> list[str] | str:
    """The targets with the embedding among them, as PEFT writes them."""
    if not isinstance(targets, str):
        return tied.names(targets)
    matches = matching_paths("target_modules", [tied.embedding], targets)
    return targets if matches else rf"(?:{targets}|^{re.escape(tied.embedding)}$)"


def with_head(tied: Tied, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors with those of the head, which PEFT's files hold too."""
    return tensors | {head: tensors[key].T for key, head in _keys(tied) if key in tensors}


def without_head(tied: Tied, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back.

    Raises:
        AdapterError: The head's are not the embedding's.
    """
    for key, head in _keys(tied):
        if head in tensors and key in tensors and not torch.equal(tensors[head].T, tensors[key]):
            raise AdapterError(
                Bilingual(
                    f"{head} is not {key} transposed, and ensure_weight_tying says that it is one tensor.",
                    f"{head} 不是 {key} 的转置，而 ensure_weight_tying 表明它们是同一个张量。",
                )
            )
    return {key: t for key, t in tensors.items() if key not in {head for _, head in _keys(tied)}}


def _keys(tied: Tied) -> list[tuple[str, str]]:
    embedding, head = (f"base_model.model.{path}.lora_" for path in tied)
    return [(f"{embedding}embedding_A", f"{head}B.weight"), (f"{embedding}embedding_B", f"{head}A.weight")]
