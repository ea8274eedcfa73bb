"""adapter_config.json and adapter_model.safetensors, in and out; the contract is PEFT's format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from siliang.adapters.adapter_state import embedding_parameters
from siliang.adapters.injection import Injection
from siliang.adapters.training_state import TrainingState
from siliang.files import replacing, write_text
from siliang.language import Bilingual, local
from siliang.methods import method_of
from siliang.methods.config import CONFIG_NAME, PeftConfig
from siliang.methods.prompt import PROMPT_KEY, Prompt
from siliang.ops.stored import plain
from siliang.types import AdapterError, first_line
from siliang.weight_files import WEIGHTS_NAME, read_weights

TRAINING_NAME = "siliang_training.safetensors"


def save_adapter(
    folder: Path,
    config: PeftConfig,
    tensors: dict[str, Tensor],
    training: TrainingState,
) -> None:
    """Writes an adapter into `folder`: each file under a temporary name first, the config last.

    A folder with adapter_config.json in it is therefore complete. What training alone needs, such as the encoder of a
    P-tuning prompt, which PEFT flattens away, goes into a file of its own, which PEFT does not look at.

    Args:
        tensors: What it consists of, from `adapter_state`.
        training: What training needs in addition.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file, parts in ((TRAINING_NAME, training.for_file()), (WEIGHTS_NAME, tensors)):
        if parts:
            with replacing(folder / file) as temporary:
                save_file(_apart(parts), temporary, metadata={"format": "pt"})
        else:
            (folder / file).unlink(missing_ok=True)
    write_text(folder / CONFIG_NAME, config.to_json(inference_mode=True))  # as PEFT does


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none of which shares its memory with another: safetensors takes no such."""
    seen: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        own = plain(tensor.detach()).cpu().contiguous()
        if own.numel() and own.untyped_storage().data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        found[key] = own
    return found


def read_training(folder: Path) -> TrainingState:
    """What a resumed training needs in addition to the adapter of a folder, on the CPU; empty where it needs nothing.

    Raises:
        AdapterError: The file is damaged.
    """
    path = folder / TRAINING_NAME
    return TrainingState.of_file(read_weights(path)) if path.is_file() else TrainingState()


@contextmanager
def size_errors(folder: Path) -> Iterator[None]:
    """Within the block numbers that are too large for Python or for the memory are an error of the adapter.

    Raises:
        AdapterError: There is such a number.
    """
    try:
        yield
    except (MemoryError, RecursionError, OverflowError) as error:
        raise AdapterError(
            Bilingual(
                f"{folder} cannot be attached: {first_line(error, kind=True)}.",
                f"{folder} 无法接到模型上：{local(first_line(error, kind=True), 'zh')}。",
            )
        ) from error


@torch.no_grad()
def load_tensors(
    injection: Injection,
    name: str,
    tensors: dict[str, Tensor],
    *,
    source: str,
    training: TrainingState | None = None,
) -> None:
    """Copies `tensors` into adapter `name`; nothing is copied unless all of it fits.

    Args:
        training: From `read_training`, in place of what the adapter has; without what made it a prompt becomes a plain
            table.

    Raises:
        AdapterError: Keys are missing or unexpected, or a shape differs.
    """
    adapter = injection.adapters[name]
    own = adapter.tensors()
    tensors = method_of(adapter.config).from_file(adapter.config, tensors)
    tensors = {key: t for key, t in tensors.items() if key not in adapter.repeated_keys()}
    with injection.bare() as base:
        embeddings = {adapter.parameter_key(path): path for path in embedding_parameters(base)}
        first = {id(p): path for path, p in base.named_parameters()}
        tied = {path: first[id(p)] for path, p in base.named_parameters(remove_duplicate=False) if path != first[id(p)]}
        again = {adapter.parameter_key(a): adapter.parameter_key(b) for a, b in tied.items()}
        sizes = {path: base.get_parameter(path) for path in embeddings.values()}
    if stray := next(
        (k for k, first in again.items() if k in tensors and not {k, first} & own.keys() and first not in tensors), None
    ):
        raise AdapterError(
            Bilingual(
                f"{source}: {stray} is tied to another weight of the base model, and nothing in {CONFIG_NAME} "
                "names it: "
                "add it to modules_to_save there, or make the file again.",
                f"{source}：{stray} 与基座模型的另一个权重绑定，而 {CONFIG_NAME} 中没有写明："
                "请在其中加入 modules_to_save，或重新生成该文件。",
            )
        )
    tensors = _respelled(tensors, own, embeddings, again)
    embeddings = {key: path for key, path in embeddings.items() if key in tensors and key not in own}
    if missing := sorted(own.keys() - tensors.keys()):
        raise AdapterError(
            Bilingual(
                f"{source}: {len(missing)} of {len(own)} tensors are missing, the first is {missing[0]}.",
                f"{source}：{len(own)} 个张量缺了 {len(missing)} 个，第一个是 {missing[0]}。",
            )
        )
    if unexpected := sorted(tensors.keys() - own.keys() - embeddings.keys()):
        raise AdapterError(
            Bilingual(
                f"{source}: {len(unexpected)} tensors have no place in the model, the first is {unexpected[0]}.",
                f"{source}：有 {len(unexpected)} 个张量在模型中没有对应位置，第一个是 {unexpected[0]}。",
            )
        )
    hint = method_of(adapter.config).shape_hint
    needed = {k: t.shape for k, t in own.items()} | {k: sizes[path].shape for k, path in embeddings.items()}
    for key, shape in needed.items():
        if tensors[key].is_complex():
            raise AdapterError(
                Bilingual(
                    f"{source}: {key} holds complex numbers, of which no weight is made.",
                    f"{source}：{key} 是复数，不能用作权重。",
                )
            )
        if shape != tensors[key].shape:
            found = tuple(tensors[key].shape)
            why = hint(key, found, shape) or Bilingual(
                "Is it an adapter of another base model?", "它是不是别的基座模型的适配器？"
            )
            raise AdapterError(
                Bilingual(
                    f"{source}: {key} has shape {found}, the model needs {tuple(shape)}. {why}",
                    f"{source}：{key} 的形状是 {found}，而模型需要 {tuple(shape)}。{local(why, 'zh')}",
                )
            )
    first_keys: dict[int, str] = {}
    for key, t in own.items():
        first = first_keys.setdefault(id(t), key)
        if not torch.allclose(tensors[first], tensors[key], rtol=0.0, atol=0.0, equal_nan=True):
            raise AdapterError(
                Bilingual(
                    f"{source}: {first} and {key} are one tensor in the model, and the file has different values.",
                    f"{source}：{first} 和 {key} 在模型中是同一个张量，而文件中的值不同。",
                )
            )
    adapter.check_values(tensors, source)
    method_of(adapter.config).check_state(adapter, training.state if training is not None else {}, source)
    if training is not None:
        training.check(adapter.prompt, f"{source}/{TRAINING_NAME}")
        adapter.state.clear()
        adapter.state.update(training.state)
    for key, tensor in own.items():
        if adapter.prompt is not None and key == PROMPT_KEY:
            _load_prompt(adapter.prompt, tensors[key], training)
        else:
            tensor.copy_(tensors[key])
    if training is not None and training.state:
        method_of(adapter.config).restore(adapter)
    for key, path in embeddings.items():
        if not torch.equal(sizes[path].cpu(), tensors[key].to(sizes[path].dtype).cpu()):
            with injection.bare():
                injection.attachments.override_parameter(path, name, tensors[key])


def _respelled(
    tensors: dict[str, Tensor], own: Iterable[str], embeddings: Iterable[str], again: dict[str, str]
) -> dict[str, Tensor]:
    """The tensors under the keys that an adapter alone on its model has.

    PEFT's keys depend on what else was on the model: a bias within a layer that another adapter wraps has "base_layer"
    in its name, and with bias="all" one within a saved module is there twice, as it was before too.

    Args:
        again: Further names of parameters that are tied, and the one that they are saved under.
    """
    known = {*own, *embeddings}
    found = {key: t for key, t in tensors.items() if key in known}
    for key, tensor in tensors.items():
        if key in known:
            continue
        owner, _, last = key.rpartition(".")
        plain = key.replace(".original_module.", ".").replace(".modules_to_save.", ".")
        spellings = (key.replace(".base_layer.", "."), f"{owner}.base_layer.{last}", plain, again.get(key, key))
        spelling = next((s for s in spellings if s in known), key)
        found.setdefault(spelling, tensor)
    return found


def _load_prompt(prompt: Prompt, table: Tensor, training: TrainingState | None) -> None:
    if training is None or not training.prompt or prompt.flat:
        prompt.flatten(table)
    else:
        prompt.load_state_dict(training.prompt)
