"""Cross-entropy of a language model's head on the labelled rows alone, without the logits of all of them at once.

    z = softcap(h W^T + b),   loss = sum_n -log softmax(z_n)[label_n]

The gradient is formed in the forward pass, chunk by chunk, so that what is kept between forward and backward is dh, as
large as h, and never a tensor of (tokens, V). The idea is that of Liger's fused linear cross-entropy and of Apple's
cut cross-entropy (Wijmans et al. 2024), in plain torch.

The sum is returned, not the mean: the caller divides by the labelled tokens of the whole optimiser step, which is the
only way in which accumulated steps equal whole ones. It also keeps the kept gradient of the order of 1, so that it
does not underflow in fp16.

Shapes: N labelled rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_BYTES = 32 * 2**20  # of fp32 logits at once: larger is little faster, smaller reads W more often
ALIGNED = 16  # elements


def masked_cross_entropy(
    hidden_ND: Tensor,
    head: nn.Module,
    labels_N: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    impl: Literal["chunked", "reference"] = "chunked",
) -> Tensor:
    """The summed loss of the rows.

    Args:
        hidden_ND: What the head reads, of labelled rows only.
        head: From (N, D) to (N, V): a linear layer, or anything else that is one in effect (adapted, quantised).
        labels_N: The right token of each row.
        softcap: Logits are capped to softcap * tanh(z / softcap), as Gemma does.
        scale: Logits are multiplied by it, before the cap.
        label_smoothing: As in torch's cross_entropy.
        impl: reference is the plain expression.

    Returns:
        A scalar in fp32. Its gradient reaches the hidden rows and whatever of the head is trained. It cannot be
        differentiated twice.
    """

    def finish(logits: Tensor) -> Tensor:
        logits = logits.float() * scale if scale != 1.0 else logits.float()
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    if impl == "reference":
        return F.cross_entropy(finish(head(hidden_ND)), labels_N, reduction="sum", label_smoothing=label_smoothing)
    trained = [p for p in head.parameters() if p.requires_grad]
    if not len(labels_N):
        # nothing to learn, and still a graph: backward gives zeros, for which other ranks may wait
        return torch.stack([x.sum() * 0.0 for x in (hidden_ND, *trained)]).sum().float()
    if type(head) is nn.Linear and not trained and not softcap and not label_smoothing:
        return _Frozen.apply(hidden_ND, head.weight, head.bias, labels_N, scale)  # type: ignore[no-any-return]

    def loss_of(rows_ND: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(finish(head(rows_ND)), labels, reduction="sum", label_smoothing=label_smoothing)

    rows = _rows_at_once(_vocabulary(head, hidden_ND))
    return _AnyHead.apply(loss_of, rows, labels_N, hidden_ND, *trained)  # type: ignore[no-any-return]


class _Frozen(torch.autograd.Function):
    """A plain linear head that is not trained: two products a chunk, everything else in place."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, W_VD: Tensor, b_V: Tensor | None, labels_N: Tensor, scale: float) -> Tensor:
        dtype = _compute_dtype(h_ND)
        keep = ctx.needs_input_grad[0]
        dh_ND = torch.empty_like(h_ND, dtype=dtype) if keep else None
        loss = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        most = _rows_at_once(len(W_VD))
        step = -(-len(h_ND) // -(-len(h_ND) // most))  # chunks of one size
        with torch.autocast(h_ND.device.type, enabled=False):
            W_VD = W_VD.to(dtype)
            b_V = None if b_V is None else b_V.to(dtype)
            for start in range(0, len(h_ND), step):
                labels = labels_N[start : start + step, None]
                z = _logits(h_ND[start : start + step].to(dtype), W_VD, b_V)
                if scale != 1.0:
                    z.mul_(scale)
                # softmax in place: torch.logsumexp would hold a second z
                label_z, top = z.gather(1, labels), z.amax(-1, keepdim=True)
                total = z.sub_(top).exp_().sum(-1, keepdim=True)
                loss += (total.log() + top - label_z).sum()
                if dh_ND is not None:
                    # d loss / d z = softmax(z) - onehot(label)
                    z.div_(total).scatter_add_(1, labels, z.new_full((1, 1), -1.0).expand_as(labels))
                    if scale != 1.0:
                        z.mul_(scale)
                    torch.mm(z.to(dtype), W_VD, out=dh_ND[start : start + step])
        if dh_ND is not None:
            ctx.save_for_backward(dh_ND)
        ctx.dtype = h_ND.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (dh_ND,) = ctx.saved_tensors
        # in fp32: 1/N rounded to bf16 would put the whole gradient off by up to 0.4%
        return (dh_ND.float() * grad).to(ctx.dtype), None, None, None, None


def _logits(h_ND: Tensor, W_VD: Tensor, b_V: Tensor | None) -> Tensor:
    """h W^T + b in fp32. Its rows begin at multiples of ALIGNED elements, whatever V is: products that write to or read
    from a crooked V are up to a third slower (docs/log.md)."""
    shape = len(h_ND), -(-len(W_VD) // ALIGNED) * ALIGNED
    z_NV = h_ND.new_empty(shape)[:, : len(W_VD)]
    if b_V is None:
        torch.mm(h_ND, W_VD.t(), out=z_NV)
    else:
        torch.addmm(b_V, h_ND, W_VD.t(), out=z_NV)
    if z_NV.dtype == torch.float32:
        return z_NV
    return z_NV.new_empty(shape, dtype=torch.float32)[:, : len(W_VD)].copy_(z_NV)


class _AnyHead(torch.autograd.Function):
    """A head of any kind: autograd, one chunk at a time, with the gradients of its parameters summed."""

    @staticmethod
    def forward(
        ctx: Any,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        rows: int,
        labels_N: Tensor,
        h_ND: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        if not any(ctx.needs_input_grad):
            parts = [loss_of(h, y) for h, y in zip(h_ND.split(rows), labels_N.split(rows), strict=True)]
            return torch.stack(parts).sum()
        loss = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        dh: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(trained)
        for h, labels in zip(h_ND.split(rows), labels_N.split(rows), strict=True):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                part = loss_of(h, labels)
            found = torch.autograd.grad(part, (h, *trained), allow_unused=True)
            loss += part.detach()
            dh.append(found[0] if found[0] is not None else torch.zeros_like(h))
            for i, g in enumerate(found[1:]):
                if g is not None:
                    so_far = sums[i]
                    sums[i] = g if so_far is None else so_far.add_(g)
        ctx.save_for_backward(torch.cat(dh), *sums)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = [None if g is None else (g.float() * grad).to(g.dtype) for g in ctx.saved_tensors]
        return (None, None, None, *kept)


def _rows_at_once(vocabulary: int) -> int:
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def _vocabulary(head: nn.Module, hidden_ND: Tensor) -> int:
    with torch.no_grad():
        return head(hidden_ND[:1].detach()).shape[-1]


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer would compute `x` in here: autocast's format, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
