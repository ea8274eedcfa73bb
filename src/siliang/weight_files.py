"""Reads an adapter's weights. A file is checked before: an untrusted one may be small and demand gigabytes."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from siliang.language import Bilingual, local
from siliang.safety.safe_json import parse_json
from siliang.secrets import shortened
from siliang.types import AdapterError, first_line

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
MOST_TENSORS = 1_000_000
MOST_HEADER_BYTES = 64 * 2**20
# the names in a pickle of plain tensors; torch's own reader allows more, such as a bytearray of any size
NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
    "torch Size",
}
STORAGES = ("torch", "torch.storage")


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, on the CPU. A pickled `.bin` is read without running code.

    Raises:
        AdapterError: No weights are there, or they are damaged.
    """
    path, pickled = folder / WEIGHTS_NAME, folder / PICKLED_NAME
    for file in (path, pickled):
        if file.is_file():
            return read_weights(file)
    raise AdapterError(
        Bilingual(
            f"{folder} holds no adapter weights: {WEIGHTS_NAME} is missing there.",
            f"{folder} 中没有适配器权重：缺少 {WEIGHTS_NAME}。",
        )
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        AdapterError: It is damaged.
    """
    try:
        check_weights(path)
        if path.suffix == ".bin":
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            check_tensors(tensors, path.stat().st_size)
        else:
            tensors = load_file(path)
    except (
        SafetensorError,
        UnpicklingError,
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
        KeyError,
        MemoryError,
        OverflowError,
    ) as error:
        raise AdapterError(
            Bilingual(
                f"{path} is damaged: {first_line(error).rstrip('.')}.\nDownload it, or train it, again.",
                f"{path} 已损坏：{local(first_line(error), 'zh').rstrip('.。')}。\n请重新下载或重新训练。",
            )
        ) from error
    if (name := next((n for n, t in tensors.items() if t.is_complex()), None)) is not None:
        raise AdapterError(
            Bilingual(
                f"{path}: {shortened(name, 80)} holds complex numbers, which no method has.",
                f"{path}：{shortened(name, 80)} 是复数，没有方法使用复数。",
            )
        )
    return tensors


def check_weights(path: Path, *, older: bool = False) -> None:
    """Checks that a safetensors file, or torch's zip, has only plain tensors that are within the file.

    Args:
        older: Accept also a `.bin` from before torch 1.6, which is not a zip and is read sequentially.

    Raises:
        ValueError: It has something else; the message says what.
        OSError: It cannot be read.
    """
    if path.suffix == ".bin":
        if not older or zipfile.is_zipfile(path):
            _check_zip(path)
    else:
        _check_safetensors(path)


def check_tensors(tensors: object, file_bytes: int) -> None:
    """Checks that the content of a `.bin` is plain tensors that are not larger than the file.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(tensors, dict):
        raise ValueError(Bilingual("it is not a dictionary of tensors", "其中没有张量的字典"))
    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise ValueError(
                Bilingual(f"{shortened(name, 80)!r} is not a plain tensor", f"{shortened(name, 80)!r} 不是普通张量")
            )
        total += tensor.nbytes
        if tensor.device.type != "cpu" or tensor.is_quantized or total > file_bytes:
            raise ValueError(
                Bilingual(
                    f"{shortened(name, 80)!r} has more numbers than the file",
                    f"{shortened(name, 80)!r} 的元素比文件还多",
                )
            )


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MOST_HEADER_BYTES):
            raise ValueError(
                Bilingual("its header is longer than the file, or than any model's", "文件头比文件或任何模型的都长")
            )
        header = parse_json(file.read(length).decode("utf-8"), foreign=True)
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise ValueError(Bilingual("its header is not a table of tensors", "文件头不是张量表"))
    # safetensors itself checks that shapes, types and offsets agree, and that nothing overlaps
    for name, entry in header.items():
        shape = entry.get("shape", []) if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= size for n in shape):
            raise ValueError(
                Bilingual(f"{shortened(name, 80)!r} is larger than the file", f"{shortened(name, 80)!r} 比文件还大")
            )


def _check_zip(path: Path) -> None:
    """Checks torch's zip: its entries are not compressed, so that it is as large as it seems; its pickle names only
    tensors."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries):
                raise ValueError(
                    Bilingual("it has a compressed entry, which torch never writes", "其中有压缩的内容，torch 不会压缩")
                )
            if sum(e.file_size for e in entries) > size or len({e.filename for e in entries}) != len(entries):
                raise ValueError(Bilingual("its entries overlap", "其中的内容相互重叠"))
            pickles = [e for e in entries if e.filename.endswith(("data.pkl", ".pickle"))]
            if len(pickles) != 1 or pickles[0].file_size > MOST_HEADER_BYTES:
                raise ValueError(
                    Bilingual("it has no list of tensors, or too long a list", "其中没有张量列表，或列表过长")
                )
            _check_pickle(archive.read(pickles[0]))
    except zipfile.BadZipFile:
        raise ValueError(
            Bilingual("it is not a zip, as torch has written since 1.6", "不是 torch 1.6 以来的 zip 格式")
        ) from None
    except (NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(str(error)) from None


def _check_pickle(data: bytes) -> None:
    for code, argument, _ in pickletools.genops(data):
        if code.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise ValueError(Bilingual("it names more than tensors", "其中不只有张量"))
        if code.name == "GLOBAL" and argument not in NAMES:
            home, _, name = str(argument).rpartition(" ")
            if home not in STORAGES or not (
                name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
            ):
                raise ValueError(
                    Bilingual(
                        f"it names {shortened(argument, 80)}, which is not a tensor",
                        f"其中有 {shortened(argument, 80)}，它不是张量",
                    )
                )
