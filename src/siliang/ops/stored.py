"""Frozen weights that stay in the format of their file, bf16 or fp16, where fp32 is computed.

A `StoredWeight` is a tensor of fp32 to everything that reads it. Its numbers are those of the file, which fp32 holds
exactly: a product converts the weight into a temporary tensor, in the forward pass and again in the backward pass, and
gives the same bits as with a weight that was converted once. So a weight takes 2 bytes a number and not 4; they are
pages of the mapped file, which processes share.

A product in the format of the file, as under autocast, takes the numbers as they are. Lookups and slices convert only
what they take. Whatever would write into the weight is an error, and whatever asks for the memory of its fp32 numbers,
which are nowhere: their address, or their bits as another format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

HALF = (torch.bfloat16, torch.float16)
LEAST_NUMBERS = 2**17  # of a weight: smaller ones are converted, since each operator on a StoredWeight costs some 20 us
aten = torch.ops.aten
OTHER_FORMATS = {aten.view.dtype, aten.view_as_complex.default}
LOOKUPS = {aten.embedding.default, aten.index_select.default, aten.index.Tensor}


class StoredWeight(Tensor):
    """A frozen matrix, which reads as fp32.

    Attributes:
        stored: Its numbers, as the file has them.
    """

    stored: Tensor

    @staticmethod
    def __new__(cls, stored: Tensor, dtype: torch.dtype = torch.float32) -> StoredWeight:
        made = Tensor._make_wrapper_subclass(
            cls, stored.shape, strides=stored.stride(), dtype=dtype, device=stored.device
        )
        made.stored = stored
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        first, more = args[0] if args else None, dict(kwargs or {})
        if isinstance(first, StoredWeight):
            if func in OTHER_FORMATS:
                raise RuntimeError(f"{func} would show the bits of fp32, and {first._where()}")
            if _is_view(func):  # of which whatever writes into it is an error, too
                views = func(first.stored, *args[1:], **more)
                return tree_map_only(Tensor, partial(StoredWeight, dtype=first.dtype), views)
            if func is aten._to_copy.default and _only_to(first.stored.dtype, more, first):
                return StoredWeight(first.stored, first.stored.dtype)
            if func in LOOKUPS:
                return func(first.stored, *args[1:], **more).to(first.dtype)
        _check_unwritten(func, args, more)
        return func(*tree_map_only(StoredWeight, plain, list(args)), **tree_map_only(StoredWeight, plain, more))

    def data_ptr(self) -> NoReturn:
        """
        Raises:
            RuntimeError: Always: an address of 0 would make all such weights tied to one another.
        """
        raise RuntimeError(f"data_ptr() would be the address of fp32 numbers, and {self._where()}")

    def storage(self) -> NoReturn:
        """
        Raises:
            RuntimeError: Always. safetensors, and so `save_pretrained`, asks for it.
        """
        raise RuntimeError(f"storage() would be that of fp32 numbers, and {self._where()}")

    def _where(self) -> str:
        return (
            f"a frozen weight of {tuple(self.shape)} is kept as its file has it, in {self.stored.dtype}.\n"
            "Take a copy with .clone(), or of a model with copy.deepcopy, or set train.frozen_weights=converted."
        )

    def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
        """A copy may be trained: it is a plain tensor."""
        copied = plain(self).clone()
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, *, tensor_contents: str | None = None) -> str:
        return f"StoredWeight({tuple(self.shape)}, {self.dtype} from {self.stored.dtype})"


def plain(x: Tensor) -> Tensor:
    """The tensor itself, or a copy of a stored weight in the format that it reads as, laid out as it is."""
    return x.stored.to(x.dtype) if isinstance(x, StoredWeight) else x


def as_kept(x: Tensor) -> Tensor:
    """The tensor that takes the memory: the stored numbers of a stored weight."""
    return x.stored if isinstance(x, StoredWeight) else x


def is_fake(x: object) -> bool:
    """Whether it is a tensor without values: of a plan."""
    return isinstance(x, Tensor) and isinstance(as_kept(x), FakeTensor)


def may_stay(stored: torch.dtype, wanted: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether a weight of a file is kept as it is there.

    Args:
        stored: Its format in the file.
        wanted: The format that it is loaded in.
    """
    return stored in HALF and wanted is torch.float32 and is_large(shape)


def is_large(shape: Sequence[int]) -> bool:
    """Whether a weight is a matrix that is large enough to stay as its file has it."""
    return len(shape) == 2 and shape[0] * shape[1] >= LEAST_NUMBERS


def _only_to(dtype: torch.dtype, copy: Mapping[str, Any], x: Tensor) -> bool:
    """Whether the arguments of a copy of `x` change its format to this one, and neither its device nor its layout."""
    same = copy.get("device") in (None, x.device) and copy.get("memory_format") in (None, torch.preserve_format)
    return copy.get("dtype") is dtype and same and not copy.get("pin_memory")


@cache
def _is_view(func: torch._ops.OpOverload) -> bool:
    """Whether the operator's results are views of its first argument. Where `to` reaches a tensor as such (in inference
    mode), it may convert."""
    if func.overloadpacket is aten.to:
        return False
    schema: torch.FunctionSchema = func._schema
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _check_unwritten(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """
    Raises:
        RuntimeError: The operator writes into a stored weight.
    """
    schema: torch.FunctionSchema = func._schema
    if not schema.is_mutable:
        return
    for i, argument in enumerate(schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, StoredWeight):
            raise RuntimeError(f"{func} would write into a frozen weight that is kept as its file has it")
