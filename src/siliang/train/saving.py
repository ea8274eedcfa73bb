"""A checkpoint: all that a run needs to resume as if it had never stopped, in safetensors and JSON.

    checkpoints/checkpoint-40/
        adapter_config.json ...    the adapter, as every other adapter folder; of full fine-tuning model.safetensors
        state.json                 step, schedule, loss scale, random states, the log so far, ...
        state.safetensors          the tensors of it: Adam's moments first of all
        manifest.json              sizes and hashes of all these, written last

The folder has its name only when all of it is on the disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from siliang.adapters.files import load_tensors, read_training
from siliang.disk_errors import translate_disk_errors
from siliang.distributed.deepspeed import gathered, is_partitioned, without_hooks
from siliang.distributed.sharding import copy_full, full_tensors, is_sharded, reshard
from siliang.files import find_damage, remove, remove_stale, replacing_folder
from siliang.language import Bilingual, local
from siliang.methods import method_of
from siliang.models.save import save_config
from siliang.paths import is_link
from siliang.peft_api.model import PeftModel
from siliang.records import MAX_BYTES
from siliang.run_folder import PREFIX, checkpoints
from siliang.safety.safe_json import read_values
from siliang.secrets import shortened
from siliang.train.state import check_state
from siliang.types import ConfigError, RecordError, first_line
from siliang.weight_files import read_adapter

STATE_NAME = "state"
STATE_FILE = f"{STATE_NAME}.json"
MODEL_WEIGHTS = "model.safetensors"


def save_checkpoint(
    folder: Path, model: PreTrainedModel, state: dict[str, object], *, keep: int, best: int | None, is_main: bool
) -> None:
    """Writes the checkpoint of a step, and deletes the oldest ones. Every rank must call this; rank 0 writes.

    Args:
        folder: Of all checkpoints of the run.
        state: As state.py has it; its shards are gathered.
        keep: Number of checkpoints that are kept, besides the one of the best step.
    """
    weights = full_weights(model) if is_main or is_sharded_over_ranks(model) else {}
    with gathered_adapter(model):
        if is_main:
            with translate_disk_errors(folder.parent):
                folder.mkdir(exist_ok=True)
                with replacing_folder(folder / f"{PREFIX}{state['step']}") as checkpoint:
                    write_weights(checkpoint, model, weights)
                    write_state(checkpoint, state)
                prune(folder, keep, spare=best)


def last_good(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is as it was written; damaged ones are renamed, each with a warning.

    Raises:
        ConfigError: The folder is a link.
    """
    if is_link(folder):
        raise ConfigError(
            Bilingual(
                f"{folder} is a link: put the folder itself there, in which checkpoints are made and removed.",
                f"{folder} 是链接：请改成文件夹本身，检查点要在其中建立和删除。",
            )
        )
    if folder.is_dir():
        remove_stale(folder, rf"(damaged-)?{PREFIX}[0-9]+")
    found = checkpoints(folder)
    for path in reversed(found.values()):
        if (problem := find_damage(path)) is None:
            return path
        renamed = path.with_name(f"damaged-{path.name}")
        with suppress(OSError):
            remove(renamed)
            path.rename(renamed)
        warn(
            Bilingual(
                f"{path} is damaged ({problem}) and now named {renamed.name}: the checkpoint before it is used",
                f"{path} 已损坏（{local(problem, 'zh')}），现改名为 {renamed.name}：改用它之前的检查点",
            )
        )
    if found:
        warn(Bilingual(f"no intact checkpoint is left in {folder}", f"{folder} 中没有完好的检查点"))
    return None


def prune(folder: Path, keep: int, *, spare: int | None = None) -> None:
    """Deletes the oldest checkpoints, so that `keep` are left, and the one of step `spare`."""
    found = checkpoints(folder)
    for step in list(found)[:-keep]:
        if step != spare:
            remove(found[step])


# ---- weights ----


def is_sharded_over_ranks(model: nn.Module) -> bool:
    """Whether no rank has all of its weights, and all have to bring theirs to what is saved."""
    return is_sharded(model) or any(map(is_partitioned, model.parameters()))


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model that is tuned whole, gathered where they are sharded over the ranks; all ranks must then
    call this. Of an adapter, nothing: every rank holds all of it."""
    if isinstance(model, PeftModel):
        return {}
    return {name: _full(t) for name, t in _saved_tensors(model).items()}


@contextmanager
def gathered_adapter(model: nn.Module, *, changing: bool = False) -> Iterator[None]:
    """Within the block an adapter that is sharded is gathered on all ranks, all of which must call this."""
    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, PeftModel) else []
    with (
        gathered(trained, writing=changing),
        without_hooks(model) if any(map(is_partitioned, trained)) else nullcontext(),
    ):
        yield


def _full(tensor: Tensor) -> Tensor:
    with gathered([tensor]):  # which are sharded again behind the block
        found = full_tensors(tensor.detach()).cpu().contiguous()
        return found.clone() if is_partitioned(tensor) else found


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a tied weight once; sharded, if they are."""
    reshard(model)
    named, saved = {**dict(model.named_parameters()), **dict(model.named_buffers())}, set(model.state_dict())
    return {name: t for name, t in named.items() if name in saved}


def write_weights(folder: Path, model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """The adapter as an adapter folder; of a model that is tuned whole, its `full_weights` and config."""
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, model_card=False, to_resume=True)
        return
    save_config(folder, model.config)
    save_file(weights, folder / MODEL_WEIGHTS, metadata={"format": "pt"})


def read_weights(folder: Path, model: nn.Module) -> None:
    """Puts a checkpoint's weights into the model that it is of.

    Raises:
        AdapterError: They do not fit.
    """
    if isinstance(model, PeftModel):
        name = model.active_adapters[0]
        with gathered_adapter(model, changing=True):
            config, read = model.peft_config[name], read_adapter(folder)
            if learned := method_of(config).learned:
                saved = type(config).from_pretrained(folder)
                for field in learned:
                    setattr(config, field, getattr(saved, field))
            load_tensors(model.injection, name, read, source=str(folder), training=read_training(folder))
        return
    weights, tensors = load_file(folder / MODEL_WEIGHTS), _saved_tensors(model)
    assert weights.keys() == tensors.keys(), weights.keys() ^ tensors.keys()
    for name, tensor in tensors.items():
        with gathered([tensor], writing=True):
            copy_full(tensor, weights[name])


# ---- state ----


def write_state(folder: Path, state: dict[str, object]) -> None:
    """A tree of dicts, lists, tuples, numbers, texts and tensors."""
    tensors: dict[str, Tensor] = {}
    tree = _split(state, tensors, "")
    (folder / STATE_FILE).write_text(json.dumps(tree), encoding="utf-8")
    save_file(tensors, folder / f"{STATE_NAME}.safetensors")


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote of a training.

    Raises:
        RecordError: It is damaged, or of another step than the folder's name says.
    """
    path = folder / STATE_FILE
    tree = read_values(path, RecordError, most_bytes=MAX_BYTES)
    try:
        state = _join(tree, load_file(path.with_suffix(".safetensors")))
    except OSError as error:
        raise RecordError(
            Bilingual(
                f"{path} cannot be read: {error.strerror or error}.", f"{path} 无法读取：{error.strerror or error}。"
            )
        ) from None
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise RecordError(
            Bilingual(
                f"{path} is damaged: {shortened(first_line(error, kind=True), 200)}.",
                f"{path} 已损坏：{shortened(first_line(error, kind=True), 200)}。",
            )
        ) from None
    check_state(state, int(folder.name.rpartition("-")[2]), path)
    return state


def _split(value: object, tensors: dict[str, Tensor], path: str) -> object:
    match value:
        case Tensor():
            tensors[path] = value.detach().cpu().contiguous()
            return {"tensor": path}
        case dict():  # as pairs: JSON has no numbers for keys
            return {"dict": [[key, _split(v, tensors, f"{path}/{key}")] for key, v in value.items()]}
        case tuple():
            return {"tuple": [_split(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]}
        case list():
            return [_split(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
        case np.generic():
            return _split(value.item(), tensors, path)
        case float() if not math.isfinite(value):  # which JSON does not have
            return {"float": str(value)}
        case _:
            return value


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    match tree:
        case {"tensor": path}:
            return tensors[path]
        case {"float": "nan" | "inf" | "-inf" as text}:
            return float(text)
        case {"dict": pairs}:
            return {key: _join(v, tensors) for key, v in pairs}
        case {"tuple": values}:
            return tuple(_join(v, tensors) for v in values)
        case list():
            return [_join(v, tensors) for v in tree]
        case _:
            return tree
