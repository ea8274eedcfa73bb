"""The losses of models that do not write, in fp32, and summed over what a batch counts.

A model's own loss is a mean in the format of its logits: rounded in bf16, and not a number where nothing in the batch
has a label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from siliang.data.encode import IGNORED

if TYPE_CHECKING:  # slow to import: the table of tasks is read where no model is
    from torch import Tensor

    from siliang.data.batch import Batch


class WithLogits(Protocol):
    """The output of a model for classes of rows, (S, C), or for each token's tags, (S, W, C)."""

    logits: Tensor


class WithEndLogits(Protocol):
    """The output of a model for an answer's first and last token, each (S, W)."""

    start_logits: Tensor
    end_logits: Tensor


def cross_entropy(output: WithLogits, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Over classes of rows, or over each token's tags.

    Args:
        label_smoothing: The share of a label that is spread over all classes.
    """
    import torch.nn.functional as F

    logits, labels = output.logits.float(), batch.inputs["labels"]
    return F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def cross_entropy_of_ends(output: WithEndLogits, batch: Batch) -> Tensor:
    """Over the places of an answer's first and last token, the mean of both."""
    import torch
    import torch.nn.functional as F

    # an answer is not padding: with it among the choices the loss would depend on the longest row of the batch
    padding = torch.arange(batch.width)[None] >= torch.tensor(batch.lengths)[:, None]
    padding = padding.to(output.start_logits.device)
    ends = ((output.start_logits, "start_positions"), (output.end_logits, "end_positions"))
    losses = [
        F.cross_entropy(logits.float().masked_fill(padding, -torch.inf), batch.inputs[name], reduction="sum")
        for logits, name in ends
    ]
    return torch.stack(losses).mean()
