"""The losses of classes, several labels, ordered classes and numbers: each a sum over rows.

The engine divides the sum by the number of rows, whatever the batches and ranks. So a weighted loss is
sum_i w(y_i) l_i / N: `balanced` weights have the mean 1 over the training rows, and the loss keeps its scale. torch's
CrossEntropyLoss(weight) with its default reduction divides by the weights of the batch instead, by which a row would
count more or less with the rows beside it.

    cross-entropy   -w_y log p_y
    focal           -w_y (1 - p_y)^gamma log p_y                       Lin et al. 2017 (arXiv 1708.02002), eq. 5
    several labels  mean over labels of -w y log p - (1 - y) log(1 - p)
    ordered         -w_y sum_k q_k log p_k, q = softmax(-(k - y)^2)    Diaz and Marathe 2019 (CVPR, SORD), eq. 1
    number          (x - y)^2

Ordered classes have the head and the softmax of classes without an order: their probabilities, calibration and the
saved model are the same, and a mistake costs more the further away it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from siliang.tasks.losses import WithLogits

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

    from siliang.data.batch import Batch

SMALLEST = 1e-12  # of 1 - p: below, its power has no gradient


def one_of(
    weights: Sequence[float] | None,
    gamma: float | None,
    output: WithLogits,
    batch: Batch,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of one class a row, or the focal loss.

    Args:
        weights: Of the classes, by number.
        gamma: Of the focal loss; None for plain cross-entropy.
        label_smoothing: Only without `gamma`.
    """
    import torch.nn.functional as F

    logits, labels = output.logits.float(), batch.inputs["labels"]
    weight = None if weights is None else logits.new_tensor(weights)
    if gamma is None:
        return F.cross_entropy(logits, labels, weight=weight, reduction="sum", label_smoothing=label_smoothing)
    logs = F.log_softmax(logits, -1).gather(1, labels[:, None]).squeeze(1)
    focal = -((-logs.expm1()).clamp_min(SMALLEST) ** gamma) * logs
    return (focal if weight is None else weight[labels] * focal).sum()


def several_of(weights: Sequence[float] | None, gamma: float | None, output: WithLogits, batch: Batch) -> Tensor:
    """Binary cross-entropy of each label, or the focal loss, the mean over the labels of a row.

    Args:
        weights: Of the rows that have the label, by its number.
    """
    import torch.nn.functional as F

    logits = output.logits.float()  # (S, C)
    labels = batch.inputs["labels"][:, : logits.shape[1]].float().expand_as(logits)
    weight = None if weights is None else logits.new_tensor(weights)
    losses = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight, reduction="none")
    if gamma is not None:
        signed = logits * (1 - 2 * labels)  # 1 - p of what is right is sigmoid of this
        losses = losses * (gamma * F.logsigmoid(signed)).exp()
    return losses.mean(1).sum()


def ordered(weights: Sequence[float] | None, output: WithLogits, batch: Batch) -> Tensor:
    """Cross-entropy of targets that fall off with the squared distance from the right class."""
    import torch

    logits, labels = output.logits.float(), batch.inputs["labels"]
    ranks = torch.arange(logits.shape[1], device=logits.device)
    targets = (-(ranks[None] - labels[:, None]).float().square()).softmax(-1)
    losses = -(targets * logits.log_softmax(-1)).sum(-1)
    return (losses if weights is None else logits.new_tensor(weights)[labels] * losses).sum()


def squared_error(output: WithLogits, batch: Batch) -> Tensor:
    """Of one number a row."""
    return (output.logits.float().squeeze(-1) - batch.inputs["labels"].float()).square().sum()
