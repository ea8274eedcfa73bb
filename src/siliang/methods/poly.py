"""Poly: Combining Modular Skills in Multitask Learning (Ponti et al., 2022, arXiv:2202.13914), and its multi-head
routing (Caccia et al., 2022, arXiv:2211.03831).

    y = W x + B_t A_t x / R        A_t = sum_s w_ts A_s,  B_t = sum_s w_ts B_s        w_t = a_t / sum_s a_ts

Each task t mixes S skills, which are low-rank updates, by weights of its own: a_t = sigmoid(Z_t), and in training a
relaxed Bernoulli sample of it for each row: sigmoid(Z_t + log(u / (1 - u))), u uniform in (0, 1). With Q > 1 splits the
inputs of A and the outputs of B are cut into Q parts, each of which has weights of its own.

Shapes: Z (tasks, Q S), A (Q, S, I / Q, R), B (Q, S, R, O / Q), w (rows, Q, S); I in, O out, R = r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.config import LayerConfig
from siliang.methods.find_targets import find_targets
from siliang.methods.layer import BaseForward, Layer, LayerAdapter, new_parameter
from siliang.methods.layer_method import check_divides
from siliang.methods.method import Method, Parts
from siliang.methods.targets import LORA_TARGETS
from siliang.methods.task_ids import TaskIds
from siliang.models.introspect import features, is_linear
from siliang.types import MergeError, PeftType

NEVER_ZERO = 1e-12  # added to a sum that is divided by
START = 1e-3  # Z is uniform within it
WHY_NOT_MERGED = Bilingual(
    "The update depends on the task of each row, and one weight cannot hold those of several: keep the adapter.",
    "更新取决于每条样本的任务，一个权重无法同时容纳多个任务的更新：请保留适配器。",
)


@dataclass(kw_only=True)
class PolyConfig(LayerConfig):
    """Poly's settings, with PEFT's names and defaults.

    Attributes:
        r: Rank of each skill.
        init_weights: B is zero at the start. False: random, for tests.
        poly_type: "poly", the one that there is.
        n_tasks: How many tasks there are.
        n_skills: S.
        n_splits: Q; more than 1 is multi-head routing.
    """

    r: int = 8
    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    peft_type: ClassVar[str] = PeftType.POLY
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r", "n_tasks", "n_skills", "n_splits")


class Router(nn.Module):
    """Z: `module_logits` (tasks, Q S)."""

    def __init__(self, logits: nn.Parameter) -> None:
        super().__init__()
        self.module_logits = logits


class PolyLayer(LayerAdapter):
    """Poly on a linear layer: `poly_lora_A.<adapter>`, `poly_lora_B` and `poly_router`."""

    def __init__(
        self, config: PolyConfig, tasks: TaskIds, layer: Layer, name: str, shared: Mapping[str, Tensor]
    ) -> None:
        R, Q, S = config.r, config.n_splits, config.n_skills
        in_features, out_features = features(layer.base_layer)
        check_divides("n_splits", Q, in_features, "inputs")
        check_divides("n_splits", Q, out_features, "outputs")
        start_B = nn.init.zeros_ if config.init_weights else partial(_uniform, fan_in=R)
        A = new_parameter(layer, Q, S, in_features // Q, R, start=partial(_uniform, fan_in=in_features // Q))
        B = new_parameter(layer, Q, S, R, out_features // Q, start=start_B)
        Z = new_parameter(layer, config.n_tasks, Q * S, start=lambda values: nn.init.uniform_(values, -START, START))
        super().__init__(layer, name, {"poly_router": Router(Z), "poly_lora_A": A, "poly_lora_B": B})
        self._tasks, self._Q, self._S, self._R = tasks, Q, S, R
        self.settings = {"r": R, "n_tasks": config.n_tasks, "n_skills": S, "n_splits": Q, "poly_type": config.poly_type}

    def mixing(self) -> Tensor:
        """w of each row's task, (rows, Q, S). In training it is drawn."""
        Z = self.module("poly_router", Router).module_logits[self._tasks.ids].unflatten(-1, (self._Q, self._S))
        if self.layer.training:
            Z = Z + torch.rand_like(Z).logit(torch.finfo(Z.dtype).eps)
        a = Z.sigmoid()
        return a / (a.sum(-1, keepdim=True) + NEVER_ZERO)

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        """y + B_t A_t x / R: each skill is multiplied, and its product weighted, so that no row has matrices of its
        own."""
        y = base_forward(x)
        A, B = self.part("poly_lora_A").to(x.dtype), self.part("poly_lora_B").to(x.dtype)
        w = self._tasks.at(self.mixing(), x, routed=self.layer.routed).unsqueeze(-1)  # in fp32, and so is what it mixes
        skills = torch.einsum("...qi,qsir->...qsr", x.unflatten(-1, (self._Q, -1)), A)
        mixed = w * (w * skills).sum((-3, -2), keepdim=True) / self._R
        return y + torch.einsum("...qsr,qsro->...qo", mixed.to(x.dtype), B).flatten(-2).to(y.dtype)

    def merged(self) -> dict[str, Tensor]:
        raise MergeError(WHY_NOT_MERGED)


class Poly(Method[PolyConfig]):
    """Low-rank skills, which each task mixes by weights of its own."""

    name = "poly"
    config = PolyConfig
    learning_rate = 5e-5
    learning_rate_source = Bilingual(
        "PEFT's example for Poly (FLAN-T5-XL): 5e-5", "PEFT 的 Poly 示例（FLAN-T5-XL）：5e-5"
    )
    trains = Bilingual("low-rank skills, and how each task mixes them", "若干低秩技能，以及各任务对它们的组合")
    why_not_mergeable = WHY_NOT_MERGED
    default_targets = LORA_TARGETS

    def attach(self, model: nn.Module, config: PolyConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        paths = find_targets(model, config, is_linear, defaults=self.default_targets, outside=saved, lenient=from_file)
        tasks = TaskIds(config.n_tasks, "n_tasks")
        return Parts(layers={path: partial(PolyLayer, config, tasks) for path in paths}, rows=tasks)


def _uniform(values: Tensor, *, fan_in: int) -> None:
    """Fills a tensor at random, as nn.Linear fills a weight of so many inputs."""
    nn.init.uniform_(values, -(fan_in**-0.5), fan_in**-0.5)
