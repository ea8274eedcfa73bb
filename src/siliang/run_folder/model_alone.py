"""A model that is no run's: a folder of a model that writes, such as a merged one, or an adapter alone, such as PEFT's.

It is asked as a run would be, in the tokenizer's own chat template where there is one.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from siliang.config import RunConfig
from siliang.data.templates import AUTO, template_for
from siliang.language import Bilingual
from siliang.methods import METHODS
from siliang.methods.config import CONFIG_CLASSES
from siliang.models.folder import read_config
from siliang.models.tokenizers import load_tokenizer
from siliang.paths import check_links
from siliang.records import Counts, Device, Record, Rows
from siliang.run_folder.opened import TrainedRun, find_run
from siliang.run_place import MODEL_CONFIG, is_model_alone
from siliang.tasks import TASKS
from siliang.types import ADAPTER_CONFIG, ConfigError, ModelError, TaskType

UNKNOWN = "0" * 64  # instead of a hash
# what the class of a model that writes is called at its end: of a decoder alone, and of one with an encoder
ENDINGS = {False: ("ForCausalLM", "LMHeadModel"), True: ("ForConditionalGeneration",)}
WRITES = [task for task in TASKS.values() if task.writes and task.step_loss is None]


def find_run_or_model(folder: Path, *, base: str | None = None, force: bool = False) -> TrainedRun:
    """A trained run as `find_run` finds it, or a model or an adapter alone.

    Args:
        base: The base model's place, of an adapter alone too.

    Raises:
        ConfigError: The folder is neither, or its model does not write.
        ModelError: The base model that the adapter's config names is not there.
    """
    folder = Path(folder)
    if not is_model_alone(folder):
        return find_run(folder, base=base, force=force)
    check_links(folder)
    adapter = (folder / ADAPTER_CONFIG).is_file()
    model, task, method = _of_adapter(folder, base) if adapter else _of_model(folder)
    tokenizer = load_tokenizer(model)
    config = RunConfig.build(
        {
            "model": model,
            "task": task.value,
            "method": method,
            "data": {"train": "-", "template": template_for(AUTO, tokenizer.chat_template)},
            "output": str(folder),
        }
    )
    return TrainedRun(folder, folder, folder, config, _record(config), force)


def _of_adapter(folder: Path, base: str | None) -> tuple[str, TaskType, str]:
    """(the base model, the task, the method) of an adapter's config."""
    values = read_config(folder / ADAPTER_CONFIG)
    model = base or values.get("base_model_name_or_path")
    if not isinstance(model, str) or not model:
        raise ModelError(
            Bilingual(
                f"{folder / ADAPTER_CONFIG} names no base model: give it with --base FOLDER_OR_NAME.",
                f"{folder / ADAPTER_CONFIG} 没有写明基座模型：请用 --base 给出。",
            )
        )
    kind = CONFIG_CLASSES.get(str(values.get("peft_type")))
    found = next((row.name for row in METHODS.values() if kind is not None and row.config is kind), None)
    task = next((task for task in WRITES if task.adapter_type == values.get("task_type")), None)
    if found is None or task is None:
        raise _does_not_write(folder, f"task_type = {values.get('task_type')!r}")
    return model, task.name, found


def _of_model(folder: Path) -> tuple[str, TaskType, str]:
    """The same of a model's folder."""
    named: Any = read_config(folder / MODEL_CONFIG).get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    task = next((task for task in WRITES if name.endswith(ENDINGS[task.has_encoder])), None)
    if task is None:
        raise _does_not_write(folder, f"architectures = {named!r}")
    return str(folder.absolute()), task.name, "full"


def _does_not_write(folder: Path, what: str) -> ConfigError:
    tasks = [task.title for task in WRITES]
    return ConfigError(
        Bilingual(
            f"{folder} is no run, and its model is not one that writes ({' or '.join(tasks)}): {what}. Name the "
            "folder of its run.",
            f"{folder} 不是运行，其中的模型也不是生成文本的模型（{'、'.join(tasks)}）：{what}。请给出运行的文件夹。",
        )
    )


def _record(config: RunConfig) -> Record:
    """A record that says no more than the folder does."""
    return Record(
        status="completed",
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        config=config.model_dump(mode="json"),
        seed=config.train.seed,
        versions={},
        device=Device(kind="cpu", name="", threads=1, memory_bytes=0),
        precision="fp32",
        learning_rate=0.0,
        model_sha256=UNKNOWN,
        data_sha256=UNKNOWN,
        parameters=Counts(trained=0, total=0),
        rows=Rows(train=0, eval=0),
    )
