"""Ways to combine the same tensor of several adapters into one: what `add_weighted_adapter` offers.

arithmetic        sum_k w_k t_k
magnitude_prune   sum_k w_k top(t_k), the share `density` of each with the largest magnitudes
ties              TIES-Merging (Yadav et al., 2023, arXiv:2306.01708): those, where their sign is the majority's;
                  divided by how many have that sign
dare_linear       DARE (Yu et al., 2023, arXiv:2311.03099): sum_k w_k drop(t_k) / density
dare_ties         both
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from siliang.language import Bilingual
from siliang.types import ConfigError

MajoritySign = Literal["total", "frequency"]
WAYS = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")


def combine(
    way: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float | None = None,
    majority_sign: MajoritySign = "total",
) -> Tensor:
    """One tensor of several.

    Args:
        way: One of `WAYS`.
        tensors: One of each adapter, of one shape.
        weights: One for each.
        density: The share of each tensor that is kept; not for linear.
        majority_sign: Of ties: the sign of the sum, or of most.

    Raises:
        ConfigError: `density` is missing or not from 0 to 1.
    """
    if way != "linear":
        if density is None or density < 0:
            raise ConfigError(
                Bilingual(
                    f"density = {density}: {way} keeps this share of each tensor; give 0 to 1.",
                    f"density = {density}：{way} 保留每个张量的这一比例；请给出 0 到 1 之间的数。",
                )
            )
        if density >= 1:
            kept = Bilingual(
                f"density = {density:g} keeps all of each tensor.", f"density = {density:g} 会保留整个张量。"
            )
            warnings.warn(kept, stacklevel=4)
        elif way.startswith("dare"):
            tensors = [t * torch.bernoulli(torch.full_like(t, density)) / density for t in tensors]
        else:
            tensors = [_largest(t, density) for t in tensors]
    stacked = torch.stack(list(tensors))
    shape = (-1, *[1] * (stacked.dim() - 1))
    weighted = stacked * torch.tensor(list(weights), dtype=stacked.dtype, device=stacked.device).view(shape)
    if not way.endswith("ties"):
        return weighted.sum(0)
    votes = stacked if majority_sign == "total" else stacked.sign()
    agrees = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The tensor with zeros in place of all but its share `density` of the largest magnitudes."""
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    return torch.zeros_like(tensor).flatten().index_copy(0, kept, tensor.flatten()[kept]).view_as(tensor)
