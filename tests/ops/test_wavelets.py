"""Wavelet filters that are computed, against the tables that PEFT holds, and what makes them wavelets."""

import pytest
import torch
from closeness import assert_close

from siliang.ops.wavelets import FAMILIES, inverse_wavelet, lowpass


@pytest.mark.parametrize("family", FAMILIES)
def test_filters_are_those_of_the_tables(family: str) -> None:
    theirs = pytest.importorskip("peft.tuners.waveft.wavelet")  # `make compat` has no PEFT
    found = torch.tensor(lowpass(family), dtype=torch.float64)
    expected = torch.tensor(theirs._WAVELET_COEFFS[family], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for shift in range(0, len(found), 2):  # orthogonal to itself two places on
        assert abs(float(found[shift:] @ found[: len(found) - shift]) - (shift == 0)) < 1e-10


@pytest.mark.parametrize("family", ["db1", "db4", "sym7", "sym10"])
def test_the_inverse_transform_is_pefts(family: str) -> None:
    spectrum = torch.randn(44, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (cA, cH), (cV, cD) = (half.chunk(2, dim=1) for half in spectrum.chunk(2, dim=0))
    theirs = pytest.importorskip("peft.tuners.waveft.waverec2d")
    expected = theirs.waverec2d((cA, (cH, cV, cD)), family)
    torch.testing.assert_close(inverse_wavelet(spectrum, family), expected, rtol=1e-9, atol=1e-9)


def test_db1_changes_four_neighbours() -> None:
    spectrum = torch.zeros(8, 6)
    spectrum[1, 2] = 1.0
    found = inverse_wavelet(spectrum, "db1")
    assert found.shape == (8, 6) and found.count_nonzero() == 4
    assert_close(found[2:4, 4:6], torch.full((2, 2), 0.5))
