"""What an initialization has learned from data, in a file that the next adapter is made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from siliang.files import replacing
from siliang.language import Bilingual, local
from siliang.types import ConfigError, first_line
from siliang.weight_files import check_weights


def read_cache(file: str | None, keys: Iterable[str], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a file of `write_cache`, beside the layers; empty where there is none yet.

    Raises:
        ConfigError: It is none, or of other layers.
    """
    if file is None or not Path(file).is_file():
        return {}
    try:
        check_weights(Path(file))
        found = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(
            Bilingual(
                f"{file} cannot be read as safetensors: {first_line(error)}. Remove it to have it made again.",
                f"{file} 无法按 safetensors 读取：{local(first_line(error), 'zh')}。删除它即可重新生成。",
            )
        ) from None
    if found.keys() != set(keys):
        raise ConfigError(
            Bilingual(
                f"{file} is of other layers than these: name another file, or remove it.",
                f"{file} 不是这些层的：请换一个文件名，或删除它。",
            )
        )
    device = next(iter(layers.values())).get_parameter("weight").device
    return {key: t.to(device) for key, t in found.items()}


def write_cache(file: str | None, tensors: Mapping[str, Tensor]) -> None:
    """Keeps what was learned, where a file is named for it."""
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(file)) as temporary:
            save_file({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}, temporary)
