"""What a file of weights may hold, looked at before it is read: a stranger's may be small and ask for gigabytes."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from siliang.safety.safe_json import parse_json
from siliang.secrets import shortened

MOST_TENSORS = 1_000_000
MOST_HEADER_BYTES = 64 * 2**20
# what a pickle of plain tensors names; torch's own reader allows more, such as a bytearray of any size
NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
    "torch Size",
}
STORAGES = ("torch", "torch.storage")


def check_weights(path: Path, *, older: bool = False) -> None:
    """Whether a safetensors file, or torch's zip, is one of plain tensors that lie within it.

    Args:
        older: A `.bin` from before torch 1.6 passes as well: it is not a zip, and what is in it is read in turn.

    Raises:
        ValueError: It is not; says why.
        OSError: It cannot be read.
    """
    if path.suffix == ".bin":
        if not older or zipfile.is_zipfile(path):
            _check_zip(path)
    else:
        _check_safetensors(path)


def check_tensors(tensors: object, file_bytes: int) -> None:
    """Whether what a `.bin` gave are plain tensors whose numbers were all in the file.

    Raises:
        ValueError: They are not.
    """
    if not isinstance(tensors, dict):
        raise ValueError("it holds no dictionary of tensors")
    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise ValueError(f"{shortened(name, 80)!r} is not a plain tensor")
        total += tensor.nbytes
        if tensor.device.type != "cpu" or tensor.is_quantized or total > file_bytes:
            raise ValueError(f"{shortened(name, 80)!r} has more numbers than the file")


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MOST_HEADER_BYTES):
            raise ValueError("its header is longer than the file, or than any model's")
        header = parse_json(file.read(length).decode("utf-8"), foreign=True)
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise ValueError("its header is not a table of tensors")
    # that shapes, types and places agree, and nothing overlaps, safetensors itself sees to
    for name, entry in header.items():
        shape = entry.get("shape", []) if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= size for n in shape):
            raise ValueError(f"{shortened(name, 80)!r} is larger than the file")


def _check_zip(path: Path) -> None:
    """torch's zip: nothing in it is packed, so that it holds no more than it says; its pickle names tensors alone."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries):
                raise ValueError("something in it is compressed, which torch does not do")
            if sum(e.file_size for e in entries) > size or len({e.filename for e in entries}) != len(entries):
                raise ValueError("what is in it overlaps")
            pickles = [e for e in entries if e.filename.endswith(("data.pkl", ".pickle"))]
            if len(pickles) != 1 or pickles[0].file_size > MOST_HEADER_BYTES:
                raise ValueError("it holds no list of tensors, or one too long")
            _check_pickle(archive.read(pickles[0]))
    except zipfile.BadZipFile:
        raise ValueError("it is not torch's zip, as it has been written since torch 1.6") from None
    except (NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(str(error)) from None


def _check_pickle(data: bytes) -> None:
    for code, argument, _ in pickletools.genops(data):
        if code.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise ValueError("it names something else than tensors")
        if code.name == "GLOBAL" and argument not in NAMES:
            home, _, name = str(argument).rpartition(" ")
            if home not in STORAGES or not (
                name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
            ):
                raise ValueError(f"it names {shortened(argument, 80)}, which is not a tensor")
