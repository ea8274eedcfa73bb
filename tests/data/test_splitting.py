"""Which rows are held out: those that `datasets` holds out for the size and the seed."""

import pytest
from datasets import Dataset

from siliang.data.splitting import split


@pytest.mark.parametrize("n", [2, 10, 999, 2500])
@pytest.mark.parametrize("size", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 42])
def test_rows_are_held_out_as_by_datasets(n: int, size: float, seed: int) -> None:
    parts = Dataset.from_dict({"row": list(range(n))}).train_test_split(size, seed=seed)
    assert split(n, size, seed) == (parts["train"]["row"][:], parts["test"]["row"][:])
