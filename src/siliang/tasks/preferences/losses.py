"""The losses of preferences, each a row of `LOSSES`.

Legend, per pair: c, r: log-probabilities of the chosen and the rejected answer, given the prompt, summed over their
tokens; c', r': those of the base model; m, n: their numbers of tokens. All are (N,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.config import LossName, PreferenceConfig


@dataclass(frozen=True)
class Pairs:
    """The pairs of a step.

    Attributes:
        chosen: c.
        rejected: r.
        chosen_tokens: m.
        rejected_tokens: n.
        base_chosen: c'; 0 for a loss without a base model.
        base_rejected: r'; likewise.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    base_chosen: Tensor
    base_rejected: Tensor

    @classmethod
    def of(cls, values: Sequence[Tensor], reference: Sequence[Tensor]) -> Pairs:
        """
        Args:
            values: Of each pair, (2, 2): the log-probability and the number of tokens of the chosen answer, and of the
                rejected one.
            reference: Likewise, of the base model; empty for a loss without it.
        """
        own = torch.stack(list(values))
        base = torch.stack(list(reference)) if reference else torch.zeros_like(own)
        return cls(own[:, 0, 0], own[:, 1, 0], own[:, 0, 1], own[:, 1, 1], base[:, 0, 0], base[:, 1, 0])

    @property
    def gains(self) -> tuple[Tensor, Tensor]:
        """c - c' and r - r'."""
        return self.chosen - self.base_chosen, self.rejected - self.base_rejected

    @property
    def mean_gains(self) -> tuple[Tensor, Tensor]:
        """(c - c') / m and (r - r') / n."""
        chosen, rejected = self.gains
        return chosen / self.chosen_tokens.clamp(min=1), rejected / self.rejected_tokens.clamp(min=1)


def smoothed(logits: Tensor, share: float) -> Tensor:
    """-log sigmoid(x), with a share of the pairs taken for swapped."""
    return -(1 - share) * F.logsigmoid(logits) - share * F.logsigmoid(-logits)


def sigmoid(pairs: Pairs, s: PreferenceConfig) -> Tensor:
    """-log sigmoid(beta ((c - c') - (r - r'))).

    DPO, Rafailov et al. 2023, arXiv 2305.18290.
    """
    chosen, rejected = pairs.gains
    return smoothed(s.beta * (chosen - rejected), s.label_smoothing)


def sigmoid_norm(pairs: Pairs, s: PreferenceConfig) -> Tensor:
    """-log sigmoid(beta ((c - c') / m - (r - r') / n)).

    DPO by the token, Lambert et al. 2024, arXiv 2411.15124.
    """
    chosen, rejected = pairs.mean_gains
    return smoothed(s.beta * (chosen - rejected), s.label_smoothing)


def hinge(pairs: Pairs, s: PreferenceConfig) -> Tensor:
    """max(0, 1 - beta ((c - c') - (r - r'))).

    SLiC, Zhao et al. 2023, arXiv 2305.10425, with a base model as Liu et al. 2024.
    """
    chosen, rejected = pairs.gains
    return torch.relu(1 - s.beta * (chosen - rejected))


def ipo(pairs: Pairs, s: PreferenceConfig) -> Tensor:
    """((c - c') / m - (r - r') / n - 1 / (2 beta))^2.

    IPO, Azar et al. 2023, arXiv 2310.12036.
    """
    chosen, rejected = pairs.mean_gains
    return (chosen - rejected - 1 / (2 * s.beta)).square()


def robust(pairs: Pairs, s: PreferenceConfig) -> Tensor:
    """(-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2 e), x as in sigmoid.

    Robust DPO, Chowdhury et al. 2024, arXiv 2403.00409.
    """
    chosen, rejected = pairs.gains
    x, e = s.beta * (chosen - rejected), s.label_smoothing
    return (e * F.logsigmoid(-x) - (1 - e) * F.logsigmoid(x)) / (1 - 2 * e)


def orpo(pairs: Pairs, s: PreferenceConfig) -> Tensor:
    """-beta log sigmoid(log(p / (1 - p)) - log(q / (1 - q))), p = exp(c / m), q = exp(r / n).

    ORPO, Hong et al. 2024, arXiv 2403.07691.
    """
    chosen, rejected = pairs.mean_gains
    odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return -s.beta * F.logsigmoid(odds)


def simpo(pairs: Pairs, s: PreferenceConfig) -> Tensor:
    """-log sigmoid(beta (c / m - r / n) - gamma).

    SimPO, Meng et al. 2024, arXiv 2405.14734.
    """
    chosen, rejected = pairs.mean_gains
    return smoothed(s.beta * (chosen - rejected) - (s.gamma or 0.0), s.label_smoothing)


def cpo(pairs: Pairs, s: PreferenceConfig) -> Tensor:
    """-log sigmoid(beta (c - r)).

    CPO, Xu et al. 2024, arXiv 2401.08417.
    """
    return smoothed(s.beta * (pairs.chosen - pairs.rejected), s.label_smoothing)


def likelihood(pairs: Pairs) -> Tensor:
    """The loss of the chosen answers' tokens, their mean over all of the step, a scalar."""
    return -pairs.chosen.sum() / pairs.chosen_tokens.sum().clamp(min=1)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Maechler 2012)."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


@dataclass(frozen=True)
class PairLoss:
    """A loss.

    Attributes:
        loss: Of each pair, (N,).
        by_tokens: A reward is a mean over tokens, otherwise a sum.
    """

    loss: Callable[[Pairs, PreferenceConfig], Tensor]
    by_tokens: bool = False


LOSSES: dict[LossName, PairLoss] = {
    "sigmoid": PairLoss(sigmoid),
    "hinge": PairLoss(hinge),
    "ipo": PairLoss(ipo, by_tokens=True),
    "robust": PairLoss(robust),
    "sigmoid_norm": PairLoss(sigmoid_norm, by_tokens=True),
    "orpo": PairLoss(orpo, by_tokens=True),
    "simpo": PairLoss(simpo, by_tokens=True),
    "cpo": PairLoss(cpo),
}
