"""Equal but for rounding, on any processor.

Two orders of the same sums differ by some units in the last place of the *largest* number that took part, whatever the
size of the element that is looked at; a constant tolerance holds only for values of the size that it was tried with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ROUNDINGS = 64  # of a few layers of sums, one after the other, each in another order on another processor


def assert_close(
    found: Tensor, expected: Tensor, *, roundings: float = ROUNDINGS, scale: float | None = None, what: str = ""
) -> None:
    """Asserts |found - expected| <= roundings * eps * scale, elementwise.

    Args:
        roundings: How many times eps, the distance of 1 to the next number in the coarser of the two dtypes.
        scale: The size of the numbers that were added up; None: the largest absolute value of `expected`. A gradient
            that cancels to nearly nothing has the scale of the other gradients.
        what: Said where it fails.
    """
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)} beside {tuple(expected.shape)}"
    eps = max(torch.finfo(t.dtype).eps for t in (found, expected))
    found, expected = found.detach().double(), expected.detach().double()
    if scale is None:
        scale = float(expected.abs().max()) if expected.numel() else 0.0
    difference = float((found - expected).abs().max()) if found.numel() else 0.0
    assert difference <= roundings * eps * scale, (
        f"{what}: differs by {difference:.3g}, {difference / (eps * scale or 1):.0f} roundings of {scale:.3g}; "
        f"allowed are {roundings:.0f}"
    )


def assert_all_close(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], *, roundings: float = 4 * ROUNDINGS
) -> None:
    """The same for tensors by name, such as gradients, which pass through twice as many sums and through differences.

    One that cancels to nearly nothing is compared on the scale of a hundredth of the largest of all.
    """
    assert found.keys() == expected.keys()
    sizes = {name: float(t.abs().max()) for name, t in expected.items() if t is not None and t.numel()}
    least = max(sizes.values(), default=0.0) / 100
    for name, value in expected.items():
        other = found[name]
        assert (other is None) == (value is None), name
        if value is not None and other is not None:
            assert_close(other, value, roundings=roundings, scale=max(sizes.get(name, 0.0), least), what=name)


def assert_same_losses(found: Sequence[float], expected: Sequence[float], *, roundings: float = ROUNDINGS) -> None:
    """The same for the fp32 losses of a few steps."""
    assert_close(torch.tensor(found), torch.tensor(expected), roundings=roundings, what=f"{found} beside {expected}")
