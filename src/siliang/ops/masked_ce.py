"""Cross-entropy of a language model's head on the labelled rows alone, without the logits of all of them at once.

    z = softcap(h W^T + b),   loss = sum_n -log softmax(z_n)[label_n]

The gradient is formed in the forward pass, part by part, so that what is kept between forward and backward is dh, as
large as h, and never a tensor of (tokens, V). The idea is that of Liger's fused linear cross-entropy and of Apple's
cut cross-entropy (Wijmans et al. 2024), in plain torch.

The sum is returned, not the mean: the caller divides by the labelled tokens of the whole optimizer step, which is the
only way in which accumulated steps equal whole ones. The saved gradient is then of the order of 1, and does not
underflow in fp16.

Shapes: N labelled rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from siliang.ops.context import Context, DtypeContext
from siliang.ops.graph import leaves_of
from siliang.ops.place import kind_of
from siliang.ops.stored import plain

CHUNK_BYTES = 32 * 2**20  # of fp32 logits at once
TILE_BYTES = 8 * 2**20  # likewise on a CPU, where a tile should stay in the cache
LEAST_TILE, ROWS = 512, 2048  # vocabulary columns of a tile; rows at once
# elements: products that write to or read from rows of an unaligned length are up to a third slower (docs/log.md)
ALIGNED = 16


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
        head: From (N, D) to (N, V): a linear layer, or anything else that is one in effect (adapted, quantized).
        labels_N: The right token of each row.
        softcap: Logits are capped to softcap * tanh(z / softcap), as Gemma does.
        scale: Logits are multiplied by it, before the cap.
        label_smoothing: As in torch's cross_entropy.
        impl: reference is the plain expression.

    Returns:
        A scalar in fp32; from the reference on fp64 rows, in fp64. Its gradient reaches the hidden rows and whatever of
        the head is trained. It cannot be differentiated twice.
    """

    def loss_of(rows_ND: Tensor, labels: Tensor) -> Tensor:
        logits_NV = head_logits(rows_ND, head, softcap=softcap, scale=scale)
        return F.cross_entropy(logits_NV, labels, reduction="sum", label_smoothing=label_smoothing)

    if impl == "reference":
        return loss_of(hidden_ND, labels_N)
    linear = head if type(head) is nn.Linear else None
    own = [p for p in head.parameters() if p.requires_grad]
    if linear and not own and not softcap and len(labels_N):
        found: Tensor = _Frozen.apply(hidden_ND, linear.weight, linear.bias, labels_N, scale, label_smoothing)
        return found
    vocabulary, trained = (linear.out_features, own) if linear else _try_head(head, hidden_ND, own)
    if not len(labels_N):
        # no labels, but still a graph: other ranks may wait for the gradients, which are zero
        return torch.stack([x.sum() * 0.0 for x in (hidden_ND, *trained)]).sum().float()
    return _AnyHead.apply(loss_of, _rows_at_once(vocabulary), labels_N, hidden_ND, *trained)  # type: ignore[no-any-return]


def head_logits(hidden_ND: Tensor, head: nn.Module, *, softcap: float | None = None, scale: float = 1.0) -> Tensor:
    """The logits of all rows, (N, V), in fp32, or in fp64 if the head's are; the arguments are those of the loss."""
    logits_NV: Tensor = head(hidden_ND)
    return scaled_and_capped(logits_NV, softcap=softcap, scale=scale)


def scaled_and_capped(logits: Tensor, *, softcap: float | None = None, scale: float = 1.0) -> Tensor:
    """What a model makes of its head's output z, in fp32 or fp64: scale z, or c tanh(scale z / c), c the softcap."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits * scale if scale != 1.0 else logits
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class _Frozen(torch.autograd.Function):
    """A plain linear head that is not trained, tile by tile of the vocabulary, each while it is in the cache.

        z_j = scale (h W_j + b_j)
        m = max_j z_j,   o = sum_j e^(z_j - m),   g = sum_j e^(z_j - m) W_j      over all j but the label y
        lse = log(o e^m + e^z_y),   loss = lse - z_y,   dh = scale e^(m - lse) (g - o W_y)

    m, o and g are carried from tile to tile as flash attention does over keys (Milakov and Gimelshein 2018). The label
    stays out of the sums: softmax(z)_y - 1 would be lost to rounding where the model is sure.
    """

    @staticmethod
    def forward(
        ctx: DtypeContext,
        h_ND: Tensor,
        W_VD: Tensor,
        b_V: Tensor | None,
        labels_N: Tensor,
        scale: float,
        label_smoothing: float,
    ) -> Tensor:
        dtype = _compute_dtype(h_ND)
        keep = ctx.needs_input_grad[0]
        dh_ND = torch.empty_like(h_ND, dtype=dtype) if keep else None
        loss = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        parts = -(-len(h_ND) // ROWS)
        step = -(-len(h_ND) // parts)  # parts of one size
        with torch.autocast(h_ND.device.type, enabled=False):
            W_VD = W_VD.to(dtype)
            b_V = None if b_V is None else b_V.to(dtype)
            means = _means(W_VD, b_V) if label_smoothing else None
            for start in range(0, len(h_ND), step):
                part = slice(start, start + step)
                own = None if dh_ND is None else dh_ND[part]
                h_nD, y_n1 = h_ND[part].to(dtype), labels_N[part, None]
                loss += _loss_by_tiles(h_nD, W_VD, b_V, y_n1, scale, own)
                if means is not None:
                    loss += _smoothing(h_nD, W_VD, b_V, y_n1, scale, label_smoothing, *means, own)
        if dh_ND is not None:
            ctx.save_for_backward(dh_ND)
        ctx.dtype = h_ND.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: DtypeContext, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (dh_ND,) = ctx.saved_tensors
        # in fp32: 1/N rounded to bf16 would put the whole gradient off by up to 0.4%
        return (dh_ND.float() * grad).to(ctx.dtype), None, None, None, None, None


def _loss_by_tiles(
    h_ND: Tensor, W_VD: Tensor, b_V: Tensor | None, y_N1: Tensor, scale: float, dh_ND: Tensor | None
) -> Tensor:
    """The summed loss; its gradient goes into `dh_ND`, where there is one. The names are `_Frozen`'s."""
    (N, D), V = h_ND.shape, len(W_VD)
    tile = min(V, max(LEAST_TILE, _tile_bytes(h_ND) // (4 * N)) // ALIGNED * ALIGNED)
    in_fp32 = h_ND.dtype == torch.float32
    # one more column than a tile has, for the labels of other tiles; rows begin at multiples of ALIGNED
    z_whole = h_ND.new_empty(N, -(-(tile + 1) // ALIGNED) * ALIGNED, dtype=torch.float32)
    low_NV = z_whole if in_fp32 else h_ND.new_empty(N, -(-tile // ALIGNED) * ALIGNED)
    gW_ND = None if in_fp32 or dh_ND is None else torch.empty_like(h_ND)
    g_ND = h_ND.new_zeros(N, D, dtype=torch.float32) if dh_ND is not None else None
    m_N1 = z_whole.new_full((N, 1), torch.finfo(torch.float32).min)
    o_N1 = torch.zeros_like(m_N1)
    for start in range(0, V, tile):
        W = plain(W_VD[start : start + tile])
        low, z = low_NV[:, : len(W)], z_whole[:, : len(W)]
        if b_V is None:
            torch.mm(h_ND, W.t(), out=low)
        else:
            torch.addmm(b_V[start : start + tile], h_ND, W.t(), out=low)
        if not in_fp32:
            z.copy_(low)
        if scale != 1.0:
            z.mul_(scale)
        here = y_N1 - start
        z_whole.scatter_(1, torch.where((here >= 0) & (here < len(W)), here, len(W)), float("-inf"))
        m_before, m_N1 = m_N1, torch.maximum(m_N1, z.amax(-1, keepdim=True))
        rescale_N1 = (m_before - m_N1).exp_()
        e = z.sub_(m_N1).exp_()
        o_N1 = o_N1 * rescale_N1 + e.sum(-1, keepdim=True)
        if g_ND is None:
            continue
        g_ND.mul_(rescale_N1)
        if in_fp32:
            g_ND.addmm_(e, W)
        else:
            g_ND += torch.mm(low.copy_(e), W, out=gW_ND)
    W_y = W_VD[y_N1[:, 0]].float()
    z_y = (h_ND.float() * W_y).sum(-1, keepdim=True)
    z_y = (z_y if b_V is None else z_y + b_V[y_N1].float()) * scale
    lse = torch.logaddexp(m_N1 + o_N1.log(), z_y)
    if g_ND is not None and dh_ND is not None:
        dh_ND.copy_(g_ND.sub_(o_N1 * W_y).mul_(scale * (m_N1 - lse).exp()))
    return (lse - z_y).sum()


def _means(W_VD: Tensor, b_V: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """The mean row of the output layer (D,), and the mean of its bias, in fp32."""
    return W_VD.mean(0, dtype=torch.float32), 0.0 if b_V is None else b_V.mean(dtype=torch.float32)


def _smoothing(
    h_ND: Tensor,
    W_VD: Tensor,
    b_V: Tensor | None,
    y_N1: Tensor,
    scale: float,
    a: float,
    W_mean_D: Tensor,
    b_mean: Tensor | float,
    dh_ND: Tensor | None,
) -> Tensor:
    """What smoothing adds to the summed loss; its gradient is added to `dh_ND`. The names are `_Frozen`'s."""
    step_ND = W_VD[y_N1[:, 0]].float() - W_mean_D
    z_N = (h_ND.float() * step_ND).sum(-1)
    if b_V is not None:
        z_N = z_N + b_V[y_N1[:, 0]].float() - b_mean
    if dh_ND is not None:
        dh_ND.add_(step_ND, alpha=a * scale)
    return a * scale * z_N.sum()


def _tile_bytes(x: Tensor) -> int:
    return TILE_BYTES if kind_of(x) == "cpu" else CHUNK_BYTES


class _AnyHead(torch.autograd.Function):
    """A head of any kind: autograd, one chunk at a time, with the gradients of its parameters summed."""

    @staticmethod
    def forward(
        ctx: Context,
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
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = [None if g is None else (g.float() * grad).to(g.dtype) for g in ctx.saved_tensors]
        return (None, None, None, *kept)


def _rows_at_once(vocabulary: int) -> int:
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def _try_head(head: nn.Module, hidden_ND: Tensor, own: list[nn.Parameter]) -> tuple[int, list[Tensor]]:
    """The columns of the head's output, and all trained tensors that it is made of.

    Adapters on the head may share tensors with other layers (VeRA does), which are not among the head's parameters:
    they are found in the graph of one row.

    Args:
        own: The head's own trained parameters.
    """
    with torch.enable_grad():
        out = head(hidden_ND[:1].detach())
    if any(isinstance(p, DTensor) for p in own):  # FSDP puts gathered tensors in their place: they are not other ones
        return out.shape[-1], list(own)
    known = {id(p) for p in own}
    others = [leaf for leaf in leaves_of(out) if id(leaf) not in known]
    return out.shape[-1], [*own, *others]


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer would compute `x` in here: autocast's format, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
