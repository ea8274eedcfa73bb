"""Checks what the files of a base model name: only files in its folder, and formats that siliang loads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from siliang.hub import cached_file, find_file
from siliang.language import Bilingual
from siliang.paths import inside
from siliang.safety.safe_json import read_json, read_values
from siliang.secrets import short_repr
from siliang.types import ModelError

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
NO_ADAPTER = "no-adapter-is-looked-for"  # given to transformers as the folder of an adapter
# transformers loads the first of these that a folder has
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDEX = ".index.json"
MOST_INDEX_BYTES = 128 * 2**20  # limit for the index of a model's weights
SHARDED = re.compile(r"shard-\d{5}-model-.*\.safetensors")  # files of torch's distributed checkpoints
VERSIONED = re.compile(r"tokenizer\.[\w.+-]+\.json", re.ASCII)
SPECIAL = ("extra_special_tokens", "additional_special_tokens")
TEXTS = ("chat_template", "added_tokens_decoder", *SPECIAL)
ELSEWHERE = re.compile(r"[/~\\].*|[A-Za-z]:[/\\].*|(.*[/\\])?\.\.([/\\].*)?|\w+:(//|:).*", re.DOTALL)
DTYPES = ("float32", "float16", "bfloat16")
MODULE = re.compile(r"[\w.-]{1,200}", re.ASCII)
MOST_MODULES = 10_000
MOST_SPECIAL = 10_000  # limit for special tokens in a tokenizer's config: transformers adds them one by one
# The fields of a bitsandbytes config, and their allowed values.
BITS_AND_BYTES: dict[str, tuple[object, ...] | type[float]] = {
    "load_in_4bit": (True, False),
    "load_in_8bit": (True, False),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": (True, False),
    "bnb_4bit_compute_dtype": DTYPES,
    "bnb_4bit_quant_storage": (*DTYPES, "uint8", "int8"),
    "llm_int8_threshold": float,
    "llm_int8_has_fp16_weight": (False,),
    "llm_int8_enable_fp32_cpu_offload": (False,),
}


def check_names(folder: Path) -> None:
    """Checks that the weights and configs which a base model's files name are in its folder.

    Raises:
        ModelError: A name points out of the folder, or to a format that siliang does not load.
    """
    _check_config(folder / CONFIG)
    if (sharded := next((p.name for p in folder.iterdir() if SHARDED.fullmatch(p.name)), None)) is not None:
        raise ModelError(
            Bilingual(
                f"{folder} holds a distributed checkpoint ({sharded}): save the model by save_pretrained.",
                f"{folder} 是分布式检查点（{sharded}）：请用 save_pretrained 保存模型。",
            )
        )
    if (folder / NO_ADAPTER).exists():
        raise ModelError(
            Bilingual(
                f"{folder / NO_ADAPTER} may not be there: remove it.", f"{folder / NO_ADAPTER} 不应存在：请删除。"
            )
        )
    for index in folder.glob(f"*{INDEX}"):
        check_index(index)


def check_hub_names(name: str, revision: str | None) -> None:
    """The same for a model on the Hub, whose configs and index of weights are downloaded.

    Raises:
        ModelError: As for `check_names`.
    """
    if (config := find_file(name, CONFIG, revision)) is not None:
        _check_config(config)
    if cached_file(name, WEIGHT_FILES[0], revision=revision) is not None:
        return
    for file in WEIGHT_FILES:
        if file.endswith(INDEX) and (index := find_file(name, file, revision)) is not None:
            check_index(index)


def check_tokenizer_names(name: str, revision: str | None) -> dict[str, None]:
    """Checks that the files which a tokenizer's config names are in its folder. Returns settings that override the
    config: file names that transformers would look up elsewhere, and finds by itself.

    Raises:
        ModelError: A name points out of the folder, and cannot be ignored.
    """
    if (path := find_file(name, TOKENIZER_CONFIG, revision)) is None:
        return {}
    values = read_config(path)
    if values.get("init_inputs"):
        raise ModelError(
            Bilingual(
                f"{path} gives its tokenizer init_inputs, which siliang does not pass on: take them out.",
                f"{path} 给分词器写了 init_inputs，siliang 不会传递它：请去掉。",
            )
        )
    for file in _listed(values.get("fast_tokenizer_files")):
        if not isinstance(file, str) or not VERSIONED.fullmatch(file):
            raise ModelError(
                Bilingual(
                    f"{path} names {short_repr(file)} among fast_tokenizer_files, which is not a file of its folder.",
                    f"{path} 的 fast_tokenizer_files 中有 {short_repr(file)}，它不是该文件夹中的文件。",
                )
            )
    for key in SPECIAL:
        if isinstance(tokens := values.get(key), dict | list) and len(tokens) > MOST_SPECIAL:
            raise ModelError(
                Bilingual(
                    f"{path} has {len(tokens):,} {key}: at most {MOST_SPECIAL:,} are allowed.",
                    f"{path} 有 {len(tokens):,} 个 {key}：最多允许 {MOST_SPECIAL:,} 个。",
                )
            )
    ignored: dict[str, None] = {}
    for key, value in values.items():
        if key in TEXTS or key.endswith(("_token", "_tokens")):
            continue
        if isinstance(value, str) and (ELSEWHERE.fullmatch(value) or key.endswith("_file")):
            ignored[key] = None
        elif (text := next((t for t in _texts(value) if ELSEWHERE.fullmatch(t)), None)) is not None:
            raise ModelError(
                Bilingual(
                    f"{path} names {short_repr(text)} in {key}, which is not in the model's folder.",
                    f"{path} 的 {key} 中写有 {short_repr(text)}，它不在模型的文件夹中。",
                )
            )
    return ignored


MOST_CONFIG_BYTES = 2**22  # the config is read several times; configs of known models have a tenth of this


def read_config(path: Path) -> dict[str, object]:
    """Reads the config of a model or a tokenizer.

    Raises:
        ModelError: The config cannot be read, or is not a mapping.
    """
    values = read_values(
        path, ModelError, Bilingual("cannot be read", "无法读取"), most_bytes=MOST_CONFIG_BYTES, foreign=True
    )
    if not isinstance(values, dict):
        raise ModelError(Bilingual(f"{path} holds no mapping.", f"{path} 不是映射。"))
    return values


def check_index(path: Path) -> None:
    """Checks the index of weights in several files.

    Raises:
        ModelError: The index is damaged, or names a file outside of the folder.
    """
    for name in parts_of(path):
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(
                Bilingual(
                    f"{path} names {short_repr(name)}, which is not in the model's folder.",
                    f"{path} 中写有 {short_repr(name)}，它不在模型的文件夹中。",
                )
            )
        inside(path.parent, name, kind=ModelError, source=str(path))
        if path.name in WEIGHT_FILES and not name.endswith((".safetensors", ".bin")):
            raise ModelError(
                Bilingual(
                    f"{path} names {short_repr(name)}, which is not a file of weights (.safetensors or .bin).",
                    f"{path} 中写有 {short_repr(name)}，它不是权重文件（.safetensors 或 .bin）。",
                )
            )


def parts_of(index: Path) -> list[object]:
    """The files that an index of weights names.

    Raises:
        ModelError: The index is damaged.
    """
    try:
        values = read_json(index, most_bytes=MOST_INDEX_BYTES, foreign=True)
        return sorted(set(values["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(Bilingual(f"{index} is damaged.", f"{index} 已损坏。")) from None


def weight_files(folder: Path) -> list[str]:
    """The weight files that transformers loads from a folder, and their index, if there is one."""
    first = next((file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if first is None or not first.endswith(INDEX):
        return [first] if first else []
    with suppress(ModelError):
        return [first, *(str(name) for name in parts_of(folder / first))]
    return [first]


def clean_quantization(source: str, values: object) -> dict[str, object]:
    """The quantization in a model's config, with the fields that siliang knows.

    Raises:
        ModelError: siliang does not load this quantization, or a field has a value that is not allowed.
    """
    if not isinstance(values, dict):
        raise ModelError(
            Bilingual(
                f"{source}: quantization_config in its config.json is not a mapping.",
                f"{source}：config.json 中的 quantization_config 不是映射。",
            )
        )
    values = {key.removeprefix("_"): value for key, value in values.items() if isinstance(key, str)}
    kind = values.get("quant_method", "bitsandbytes")
    four, eight = (values.get(f"load_in_{bits}bit") is True for bits in (4, 8))
    if kind != "bitsandbytes" or four == eight:
        kind = kind if kind != "bitsandbytes" else "bitsandbytes without load_in_4bit or load_in_8bit"
        raise ModelError(
            Bilingual(
                f"{source}: its weights are quantized by {short_repr(kind)}, which siliang does not load. Allowed: "
                "bitsandbytes (nf4 or fp4 in 4 bits, or 8 bits). Take the model's plain weights, and set quantization.",
                f"{source}：权重以 {short_repr(kind)} 量化，siliang 无法加载。可用："
                "bitsandbytes（4 位的 nf4 或 fp4，或 8 比特）。请用模型的原始权重，"
                "并设置 quantization。",
            )
        )
    clean: dict[str, object] = {"quant_method": kind}
    for key, allowed in BITS_AND_BYTES.items():
        if (value := values.get(key)) is None:
            continue
        known = type(value) in (int, float) and 0 <= value <= 1000 if allowed is float else value in allowed
        if not known or (isinstance(value, int) and not isinstance(value, bool) and allowed is not float):
            raise ModelError(
                Bilingual(
                    f"{source}: {key} = {short_repr(value)} in its quantization_config. Allowed: {allowed}.",
                    f"{source}：quantization_config 中 {key} = {short_repr(value)}。可用：{allowed}。",
                )
            )
        clean[key] = value
    skipped = _listed(values.get("llm_int8_skip_modules"))
    if len(skipped) > MOST_MODULES or not all(isinstance(s, str) and MODULE.fullmatch(s) for s in skipped):
        raise ModelError(
            Bilingual(
                f"{source}: llm_int8_skip_modules in its quantization_config are no names of modules.",
                f"{source}：quantization_config 中的 llm_int8_skip_modules 不是模块名。",
            )
        )
    return clean | ({"llm_int8_skip_modules": skipped} if skipped else {})


def _check_config(path: Path) -> None:
    values = read_config(path)
    if values.get("configuration_files"):
        raise ModelError(
            Bilingual(
                f"{path} names other configs (configuration_files), which siliang does not read: take it out.",
                f"{path} 指向其他配置文件（configuration_files），siliang 不会读取：请去掉。",
            )
        )
    weights = values.get("transformers_weights")
    if weights is not None and weights not in WEIGHT_FILES:
        raise ModelError(
            Bilingual(
                f"{path} says that the weights are in {short_repr(weights)} (transformers_weights). siliang reads "
                f"{', '.join(WEIGHT_FILES)} of the model's folder.",
                f"{path} 写明权重在 {short_repr(weights)} 中（transformers_weights）。siliang 只读模型文件"
                f"夹中的 {'、'.join(WEIGHT_FILES)}。",
            )
        )


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _texts(value: object) -> Iterator[str]:
    """All texts in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
