"""Fake tensors, of which the plan makes models."""

import copy
import gc

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from siliang.plan.fake import fake_mode


def _weak_references() -> list[int]:
    return [x.cdata for x in gc.get_objects() if type(x) is StorageWeakRef]


def test_a_copied_head_keeps_the_mode_of_its_original() -> None:
    """A copy of the mode would free each of its weak references a second time, in memory that others use by then."""
    with fake_mode() as mode:
        constant = torch.zeros(2)
        constant[0] = 3  # a constant, to whose storage the mode has a weak reference
        head = nn.Linear(4, 2)
        before = _weak_references()
        twin = copy.deepcopy(head)
    assert twin.weight is not head.weight
    assert twin.weight.fake_mode is head.weight.fake_mode is mode
    assert before
    assert sorted(_weak_references()) == sorted(before)


def test_products_by_groups_have_the_shape_and_format_that_is_asked_for() -> None:
    with fake_mode():
        a, b, ends = torch.empty(6, 4), torch.empty(3, 4, 8), torch.empty(3, dtype=torch.int32)
        grouped = torch.ops.aten._grouped_mm.default
        assert grouped(a, b, offs=ends).shape == (6, 8) and grouped(a, b, ends).dtype == torch.float32
        assert grouped(a.T, torch.empty(6, 8), ends).shape == (3, 4, 8)
        batches = grouped(torch.empty(3, 5, 4), b, out_dtype=torch.bfloat16)
        assert batches.shape == (3, 5, 8) and batches.dtype == torch.bfloat16
