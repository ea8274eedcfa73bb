"""Starts of LoRA from the base weight. Most change it: W = W' + s B A (or nearly), and W' replaces W in the base layer.

PiSSA (Meng et al., 2024, arXiv:2404.02948): W = U S V^T, A = sqrt(S_R / s) V_R^T, B = U_R sqrt(S_R / s).
OLoRA (Buyukakyuz, 2024, arXiv:2406.01775): W = Q R, A = R_R, B = Q_R.
LoftQ (Li et al., 2023, arXiv:2310.08659): W' = quantized(W - B A), B A = the best approximation of W - W' of rank R,
alternately.
Two leave it as it is, because B A = 0:
orthogonal (Datta, https://datta0.github.io/posts/rethink-lora-init/): A = Q_1^T N_1 / 10, B = N_2 Q_2 / 10; Q_1 and Q_2
(R/2, R) are every other row of an orthogonal matrix, N_1 (R/2, I) and N_2 (O, R/2) normal.
MiCA (arXiv:2604.01694): W = U S V^T, A = 0, B = the last R columns of U, which is not trained.

Shapes: W (O, I), A (R, I), B (O, R).
"""

from __future__ import annotations

import torch
from torch import Tensor

from siliang.language import Bilingual
from siliang.types import AdapterError, ConfigError

RESIDUAL_STARTS = ("pissa", "olora", "loftq")
FACTORS = (".lora_A.weight", ".lora_embedding_A", ".lora_B.weight", ".lora_embedding_B")


def not_quantized(init: str) -> Bilingual:
    """Why a start that changes the base weight needs all of its bits."""
    return Bilingual(
        f"init_lora_weights = {init!r} starts from a base model in 16 or 32 bits, not a quantized one.",
        f"init_lora_weights = {init!r} 须从 16 位或 32 位的基座模型开始，不能是量化模型。",
    )


@torch.no_grad()
def initialize(
    init: str, W_OI: Tensor, *, r: int, scaling: float, bits: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and the weight that replaces the base layer's, in fp32.

    Args:
        init: "pissa", "pissa_niter_N", "olora" or "loftq".
        scaling: s.
        bits, iterations: LoftQ's 4 (NF4) or 8 (int8), and its iterations.

    Raises:
        ConfigError: The weight is quantized already, or bitsandbytes is not there for LoftQ.
    """
    if not W_OI.is_floating_point():
        raise ConfigError(not_quantized(init))
    W_OI = W_OI.detach().float()
    if init == "loftq":
        return _loftq(W_OI, r, bits, iterations)
    if init == "olora":
        Q, R = torch.linalg.qr(W_OI)
        A, B = R[:r], Q[:, :r]
    else:
        if init == "pissa":
            U, S, Vh = torch.linalg.svd(W_OI, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(W_OI, r, niter=int(init.removeprefix("pissa_niter_")))
            Vh = V.T
        root = (S[:r] / scaling).sqrt()
        A, B = root[:, None] * Vh[:r], U[:, :r] * root
    A, B = A.contiguous(), B.contiguous()
    return A, B, W_OI - scaling * (B @ A)


def _loftq(W_OI: Tensor, r: int, bits: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    A, B = W_OI.new_zeros(r, W_OI.shape[1]), W_OI.new_zeros(W_OI.shape[0], r)
    quantized = W_OI
    for _ in range(iterations):
        quantized = _quantized(W_OI - B @ A, bits)
        U, S, Vh = torch.linalg.svd(W_OI - quantized, full_matrices=False)
        A, B = S[:r, None].sqrt() * Vh[:r], U[:, :r] * S[:r].sqrt()
    return A.contiguous(), B.contiguous(), quantized


def _quantized(W: Tensor, bits: int) -> Tensor:
    """W quantized to NF4 or int8 and dequantized."""
    try:
        from bitsandbytes import functional
    except ImportError:
        raise ConfigError(
            Bilingual(
                "init_lora_weights = 'loftq' needs bitsandbytes, which is not installed: pip install 'siliang[cuda]'.",
                "init_lora_weights = 'loftq' 需要 bitsandbytes，而它没有安装：pip install 'siliang[cuda]'。",
            )
        ) from None
    if bits == 4:
        return functional.dequantize_4bit(*functional.quantize_4bit(W.contiguous(), quant_type="nf4"))
    values, scale, _ = functional.int8_vectorwise_quant(W.half())
    return functional.int8_vectorwise_dequant(values, scale)


def orthogonal(r: int, in_features: int, out_features: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """A and B, in fp32: random, with B A = 0.

    Raises:
        ConfigError: r is odd.
    """
    check_even(r)
    Q, _ = torch.linalg.qr(torch.randn(r, r, device=device))
    A = (torch.randn(in_features, r // 2, device=device) @ Q[0::2]).T / 10.0
    B = torch.randn(r // 2, out_features, device=device).T @ Q[1::2] / 10.0
    return A.contiguous(), B.contiguous()


def check_even(r: int) -> None:
    """
    Raises:
        ConfigError: The orthogonal start cannot have this r.
    """
    if r % 2:
        raise ConfigError(
            Bilingual(
                f"init_lora_weights = 'orthogonal' with r = {r}: each layer's r must be even.",
                f"init_lora_weights = 'orthogonal' 而 r = {r}：每层的 r 须为偶数。",
            )
        )


@torch.no_grad()
def minor_directions(W_OI: Tensor, r: int) -> Tensor:
    """MiCA's B, (O, R), in fp32: the left singular vectors of the smallest singular values."""
    U, _, _ = torch.linalg.svd(W_OI.detach().float(), full_matrices=False)
    return U[:, -r:].contiguous()


def check_rank(init: str, r: int, most: int) -> None:
    """
    Raises:
        ConfigError: A weight has fewer directions than such a start needs.
    """
    if r > most:
        raise ConfigError(
            Bilingual(
                f"init_lora_weights = {init!r}: r = {r}, and a layer has {most} rows or columns. Use a smaller r.",
                f"init_lora_weights = {init!r}：r = {r}，而有一层只有 {most} 行或列。请用更小的 r。",
            )
        )


def twice_the_rank(tensors: dict[str, Tensor], start: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """A trained PiSSA or OLoRA adapter as LoRA of twice the rank, on the original base weight.

        W - s B0 A0 + s B A = W + s [B | -B0] [A ; A0]

    Args:
        tensors: The adapter's, by their keys in the file.
        start: Its tensors before training.
        source: Where `start` is from, for the error.

    Raises:
        AdapterError: `start` is of another adapter.
    """
    found = {}
    for key, tensor in tensors.items():
        side = next((side for side in FACTORS if key.endswith(side)), None)
        if side is None:
            found[key] = tensor
            continue
        if key not in start or start[key].shape != tensor.shape:
            raise AdapterError(
                Bilingual(
                    f"{source} is not what this adapter started from: {key} is missing or of another shape.",
                    f"{source} 不是这个适配器的起点：{key} 缺失或形状不同。",
                )
            )
        before = start[key].to(tensor)
        found[key] = torch.cat([tensor, before], 0) if "_A" in side else torch.cat([tensor, -before], 1)
    return found
