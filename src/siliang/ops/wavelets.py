"""Orthogonal wavelets: Daubechies' filters, from their equation, and one step of the inverse transform of a matrix.

    H(z) = (1 + z)^N  prod (z - z_k)        z_k: of each pair z, 1/z of zeros of the half-band polynomial, one

The extremal-phase ones (db) take the zeros inside the unit circle, and the least asymmetric ones (sym) some outside.

Shapes: a spectrum (H, W), of which each quarter is a band; the matrix has L - 2 rows and columns less, L the filter's
length.
"""

from __future__ import annotations

import functools
from math import comb, sqrt

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Of each zero, or pair of conjugate ones, in the order of their size: 1 takes those outside the unit circle.
LEAST_ASYMMETRIC = {2: "0", 3: "0", 4: "01", 5: "10", 6: "101", 7: "100", 8: "0101", 9: "0110", 10: "10101"}
FAMILIES = (*(f"db{N}" for N in range(1, 11)), *(f"sym{N}" for N in LEAST_ASYMMETRIC))


@functools.cache
def lowpass(family: str) -> tuple[float, ...]:
    """The low-pass filter that the inverse transform uses, (2 N,), of norm 1.

    Args:
        family: One of FAMILIES, which end in N.
    """
    kind, N = family.rstrip("0123456789"), int(family.lstrip("dbsym"))
    zeros = []
    for y in np.roots([comb(N - 1 + k, k) for k in reversed(range(N))]):
        if np.imag(y) > -1e-9:  # of conjugate ones the first
            middle = 1 - 2 * y
            z = middle + np.sqrt(middle * middle - 1 + 0j)
            zeros.append(z if abs(z) < 1 else 1 / z)
    outside = LEAST_ASYMMETRIC[N] if kind == "sym" else "0" * len(zeros)
    found = np.poly([-1.0] * N)
    for z, chosen in zip(sorted(zeros, key=abs), outside, strict=True):
        z = 1 / z if chosen == "1" else z
        for zero in [z] if abs(z.imag) < 1e-9 else [z, z.conjugate()]:
            found = np.convolve(found, [1, -zero])
    real = np.real(found)
    return tuple((real / real.sum() * sqrt(2)).tolist())


def inverse_wavelet(spectrum_HW: Tensor, family: str) -> Tensor:
    """The matrix of a spectrum, (H - L + 2, W - L + 2). H and W are even.

    As PEFT has it, the upper right quarter is high in the rows' direction, and the lower left one in the columns'.
    """
    low = torch.tensor(lowpass(family), dtype=spectrum_HW.dtype, device=spectrum_HW.device)
    signs = torch.ones_like(low)
    signs[1::2] = -1
    filters = torch.stack([low, signs * low.flip(0)])[:, None]
    (cA, cH), (cV, cD) = (half.chunk(2, dim=1) for half in spectrum_HW.chunk(2, dim=0))
    bands = torch.stack([torch.cat([cA, cV], dim=1), torch.cat([cH, cD], dim=1)])  # low and high rows
    rows = _synthesis(bands.permute(2, 0, 1), filters)  # (W, rows)
    return _synthesis(torch.stack(rows.chunk(2, dim=0)).permute(2, 0, 1), filters)


def _synthesis(bands: Tensor, filters: Tensor) -> Tensor:
    """Sequences of twice the length, (B, 2 n - L + 2), from their low and high halves (B, 2, n)."""
    found = F.conv_transpose1d(bands, filters, stride=2)[:, 0]
    margin = filters.shape[-1] - 2
    return found[:, margin : found.shape[1] - margin]
