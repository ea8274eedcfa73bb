"""Loads the config of a base model from a folder or the Hub. Custom code runs only if the user allowed it, and the
config is checked before it is used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from siliang.capabilities import why_missing
from siliang.hub import cached_file, find_file, hub_is_off, only_cached
from siliang.language import Bilingual, local
from siliang.models.extra import make_known
from siliang.models.folder import check_hub_names, check_names, clean_quantization, read_config
from siliang.models.own_code import OwnCode, find_own_code
from siliang.models.sizes import check_counts, check_files
from siliang.paths import check_links, near_names
from siliang.types import ModelError, first_line

NEEDED = ("attention and kernels chosen only by siliang", "adapters next to a model ignored")  # capabilities
# exceptions of transformers for inconsistent configs
MISFITS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError)


def load_config(name: str, *, revision: str | None = None) -> PreTrainedConfig:
    """Loads the config of a base model.

    Raises:
        ModelError: `name` is not a model, neither a folder nor on the Hub.
        OwnCodeError: The model has custom code, which the user has not allowed.
    """
    check_folder(name, revision)
    for needed in NEEDED:
        if (missing := why_missing(needed)) is not None:
            raise ModelError(
                Bilingual(
                    f"{name} is not loaded: {missing}, and siliang needs it to keep code out of models.",
                    f"没有加载 {name}：{local(missing, 'zh')}，而 siliang 需要它来防止模型运行代码。",
                )
            )
    try:
        config, code = _read_config(name, revision)
    except ModelError:
        raise
    except Exception as error:  # the checks of a config class may raise any exception
        raise ModelError(why_not(name, error)) from error
    for part in _parts(config):
        # settings of a downloaded file that would run code, its own or a kernel from the Hub, are ignored
        if code is None:
            part.__dict__.pop("auto_map", None)
        part.__dict__.pop("fusion_config", None)
        # as are other implementations, which the training step does not know
        part.return_dict = True
        if "chunk_size_feed_forward" in part.__dict__:
            part.chunk_size_feed_forward = 0
        part._attn_implementation = part._experts_implementation = None
        if (bits := part.__dict__.get("quantization_config")) is not None:
            part.quantization_config = clean_quantization(name, bits)
    return config


def check_folder(name: str, revision: str | None = None) -> None:
    """Checks that the files of a base model exist, name no files outside of its folder, and have allowed sizes.

    Raises:
        ModelError: A check fails.
    """
    path = Path(name)
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            raise ModelError(
                Bilingual(
                    f"{name} is a folder, but no model: config.json is missing there.",
                    f"{name} 是文件夹，但不是模型：缺少 config.json。",
                )
            )
        check_links(path, ModelError)
        values = read_config(config)
        if not isinstance(values.get("model_type"), str):
            raise ModelError(
                Bilingual(
                    f"{config} names no model_type, so it is not a transformers model.",
                    f"{config} 没有写明 model_type，因此不是 transformers 模型。",
                )
            )
        make_known(values.get("model_type"))
        check_counts(values, config)
        if (generation := path / "generation_config.json").is_file():
            check_counts(read_config(generation), generation)
        check_names(path)
        check_files(path)
    elif path.is_file():
        raise ModelError(
            Bilingual(
                f"{name} is a file: give the folder of the model, which holds config.json and the weights.",
                f"{name} 是文件：请给出模型的文件夹，其中有 config.json 和权重。",
            )
        )
    elif _looks_like_a_path(name):
        near = near_names(path)
        raise ModelError(Bilingual(f"There is no model folder {name}.{near}", f"找不到模型文件夹 {name}。{near.zh}"))
    elif (why := hub_is_off()) is not None and cached_file(name, "config.json", revision=revision) is None:
        near = near_names(path)
        raise ModelError(
            Bilingual(
                f"{name} is neither a folder here nor in the hub's cache; {why}.{near} Give the model's folder.",
                f"{name} 既不是本机的文件夹，也不在 Hub 的缓存中；{local(why, 'zh')}。{near.zh}请给出模型的文件夹。",
            )
        )
    else:
        check_hub_names(name, revision)
        if (found := find_file(name, "config.json", revision)) is not None:
            values = read_config(found)
            make_known(values.get("model_type"))
            check_counts(values, found)


def why_not(name: str, error: Exception, what: str | None = None) -> str:
    """The message for an error of a library that loads a model or a part of it."""
    what = what or Bilingual("model", "模型")
    why = first_line(error, kind=isinstance(error, TypeError | AttributeError | LookupError | ArithmeticError))
    if "weights_only" in why:  # torch would advise to allow code in the file
        why = Bilingual(
            "a .bin file of its weights holds something else than tensors, or is damaged.",
            "权重的 .bin 文件中不只有张量，或已损坏。",
        )
    if not Path(name).is_dir():
        return Bilingual(
            f"{name} is not a folder here, and the hub did not give its {what}: {why}",
            f"{name} 不是本机的文件夹，也无法从 Hub 取得它的{local(what, 'zh')}：{local(why, 'zh')}",
        )
    return Bilingual(
        f"{name}: its {what} cannot be loaded: {why}", f"{name}：无法加载它的{local(what, 'zh')}：{local(why, 'zh')}"
    )


def _read_config(name: str, revision: str | None) -> tuple[PreTrainedConfig, OwnCode | None]:
    """The config, and the model's custom code, if its config class is in it."""
    code = find_own_code(name, revision)
    if code is None:
        try:
            cached = only_cached(name)
            return AutoConfig.from_pretrained(
                name, revision=revision, trust_remote_code=False, local_files_only=cached
            ), None
        except ValueError:
            code = find_own_code(name, revision)  # on the Hub; its config.json is downloaded by now
            if code is None:
                raise
    config = code.find_class("AutoConfig").from_pretrained(str(code.folder))
    config.name_or_path = name
    return config, code


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and its sub-configs."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _looks_like_a_path(name: str) -> bool:
    """Whether the name is neither owner/name nor a name of the Hub's old models."""
    strange = (
        name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name or ":" in name
    )
    return (
        strange
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII)
        or ("/" in name and Path(name).parent.is_dir())
    )
