"""A run's folder: what is where in it, and how to open it again. Later commands need only the folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from siliang.config import RunConfig, read_yaml
from siliang.data.vocabulary import fit_embeddings, grow_vocabulary
from siliang.files import damage
from siliang.models.load import load_model, load_tokenizer
from siliang.peft_model import PeftModel
from siliang.record import RECORD_NAME, Record
from siliang.types import AdapterError, ConfigError, OutputError, TaskType

CONFIG_NAME = "run.yaml"
ADAPTER = "adapter"  # the trained adapter
MODEL = "model"  # the trained model, for full fine-tuning
CHECKPOINTS = "checkpoints"


@dataclass
class OpenedRun:
    """A trained run, ready to use: the model in eval mode, with the adapter on it."""

    folder: Path
    config: RunConfig
    record: Record
    model: Any  # PeftModel or PreTrainedModel
    tokenizer: Any

    @property
    def labels(self) -> list[str]:
        return self.record.labels or []


def claim(folder: Path) -> bool:
    """Makes the output folder; returns whether it was new.

    Raises:
        OutputError: Something is there already, or the folder cannot be made.
    """
    try:
        if folder.is_dir() and any(folder.iterdir()):
            hint = " Go on with --resume, or choose" if (folder / RECORD_NAME).is_file() else " Choose"
            raise OutputError(f"output folder {folder} is not empty.{hint} another with --output.")
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"output folder {folder} cannot be made: {error.strerror or error}.") from None
    return new


def read_config(folder: Path) -> RunConfig:
    """The resolved config of a run.

    Raises:
        ConfigError: The folder is no run.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(f"{folder} is no run folder: {CONFIG_NAME} is missing there.")
    return RunConfig.build(read_yaml(path), source=str(path))


def open_run(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    quantised: bool = True,
) -> OpenedRun:
    """Opens a finished run.

    Args:
        quantised: Its base model in few bits, if it was trained on that. False: in `dtype`, as for merging.

    Raises:
        ConfigError: The folder is no run, or the run was not finished.
        ModelError: Its base model is not where it was.
        AdapterError: Its adapter is damaged.
    """
    config, record = read_config(folder), Record.read(folder)
    if not (folder / ADAPTER).is_dir() and not (folder / MODEL).is_dir():
        raise ConfigError(
            f"{folder} was not finished (it is {record.status}): go on with `siliang train --resume {folder}`."
        )
    for part in (ADAPTER, MODEL):
        if (folder / part).is_dir() and (problem := damage(folder / part)) is not None:
            raise AdapterError(
                f"{folder / part} is damaged: {problem}.\n"
                f"`siliang train --resume {folder}` makes it again from the last sound checkpoint, where there is one."
            )
    tokenizer = load_tokenizer(config.model, revision=config.revision, remote_code=config.remote_code)
    grow_vocabulary(tokenizer, config.data.add_tokens)
    if (folder / MODEL).is_dir():
        model: Any = load_model(str(folder / MODEL), config.task, dtype=dtype, labels=record.labels)
    else:
        base = load_base(config, record.labels, tokenizer, dtype=dtype, device=device, quantised=quantised)
        model = PeftModel.from_pretrained(base, folder / ADAPTER)
    if not (quantised and config.quantization):
        model.to(device or torch.device("cpu"))
    return OpenedRun(folder, config, record, model.eval(), tokenizer)


def load_base(
    config: RunConfig,
    labels: list[str] | None,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    quantised: bool = True,
) -> Any:
    """The run's base model, told which token is padding, its embeddings grown by the run's new tokens."""
    model = load_model(
        config.model,
        config.task,
        dtype=dtype,
        labels=labels,
        revision=config.revision,
        remote_code=config.remote_code,
        seed=config.train.seed,
        quantization=config.quantization if quantised else None,
        to_be_dealt=config.distributed.strategy == "fsdp",
        device=device,
    )
    if config.data.add_tokens:
        fit_embeddings(model, tokenizer)
    if config.task is TaskType.SEQ_CLS:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model
