"""The adapter that a training starts from: a run's, a checkpoint's, or a folder of siliang's or of PEFT's. Its config
is the method. The base model, task, template and labels of its run are those of the new run where none are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siliang.data.hashes import file_sha256, joined
from siliang.language import Bilingual
from siliang.methods import method_of
from siliang.methods.config import PeftConfig
from siliang.other_names import is_method
from siliang.paths import check_links
from siliang.records import RECORD_NAME, Record
from siliang.run_folder import ADAPTER, CHECKPOINTS, CONFIG_NAME, MODEL, checkpoints
from siliang.safety.safe_yaml import read_yaml
from siliang.tasks.record import read_record
from siliang.types import OTHER_HEADS, TASK_HEADS, AdapterError, ConfigError, TaskType

HUB_FIELDS = ("task_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "revision")
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "siliang_training.safetensors")


# Settings of sections that say what the model's outputs are, and so belong to the adapter.
OUTPUTS = {
    "classification": ("problem", "label_separator", "min_confidence", "threshold"),
    "embedding": ("pooling", "normalize", "query_prompt", "document_prompt", "prompt_name"),
    "preference": ("loss",),
    "reranker": ("loss",),
}


@dataclass(frozen=True)
class StartAdapter:
    """An adapter that is trained further.

    Attributes:
        folder: Of its files.
        config: Its config.
        run: The settings of the run that it is of; empty where it is of none.
        record: That run's record; None where it is of none.
    """

    folder: Path
    config: PeftConfig
    run: dict[str, Any] = field(default_factory=dict)
    record: Record | None = None

    @property
    def method(self) -> dict[str, object]:
        """The method, as `method:` takes it."""
        now, defaults = self.config.to_dict(), type(self.config)().to_dict()
        own = {key: value for key, value in now.items() if key not in HUB_FIELDS and value != defaults.get(key)}
        heads = (*TASK_HEADS.get(TaskType(self.config.task_type), ()), *OTHER_HEADS) if self.config.task_type else ()
        if own.pop("modules_to_save", None):  # a task's head is saved without being named
            named = [name for name in self.config.modules_to_save or () if name not in heads]
            own |= {"modules_to_save": named} if named else {}
        return {"name": method_of(self.config).name, **own}

    @property
    def sha256(self) -> str:
        return joined(file_sha256(self.folder / name) for name in WEIGHTS if (self.folder / name).is_file())

    def filled_in(self, values: Mapping[str, object]) -> dict[str, object]:
        """The settings of a run that starts from it, with what they leave open.

        Raises:
            ConfigError: They want another method.
        """
        values = dict(values)
        given = values.get("method")
        given = {"name": given} if isinstance(given, str) else given
        if isinstance(given, dict):
            self._check_method(given)
        values["method"] = self.method
        own = ("model", "revision", "task", "quantization") if self.run else ("model", "revision", "task")
        known = self.run or {
            "model": self.config.base_model_name_or_path,
            "revision": self.config.revision,
            "task": self.config.task_type,
        }
        with_model = "model" in values
        for name in own:
            if known.get(name) is not None and name not in values and not (with_model and name == "revision"):
                values[name] = str(known[name]) if name == "task" else known[name]
        same_task = str(values.get("task")).lower() == str(self.run.get("task")).lower()
        for section, names in OUTPUTS.items():
            of_run, given_here = self.run.get(section), values.get(section) or {}
            if not (same_task and isinstance(of_run, dict) and isinstance(given_here, dict)):
                continue
            kept = {name: of_run[name] for name in names if name in of_run}
            other_problem = given_here.get("problem", kept.get("problem")) != kept.get("problem")
            values[section] = given_here if other_problem else kept | given_here
        data = values.get("data")
        if isinstance(data, dict) and self.record is not None:
            text = {name: self.run["data"].get(name) for name in ("template", "template_arguments", "add_tokens")}
            text["labels"] = self.record.labels
            values["data"] = {name: value for name, value in text.items() if value} | data
        return values

    def _check_method(self, given: Mapping[str, object]) -> None:
        from siliang.methods import canonical_name

        for key, value in given.items():
            wanted = self.method.get(key, self.config.to_dict().get(key))
            if key == "name":
                value = canonical_name(str(value))
            if value != wanted:
                raise ConfigError(
                    Bilingual(
                        f"method.{key} = {value!r}, and the adapter in {self.folder} has {wanted!r}: it is "
                        "trained further "
                        "as it is. Leave `method` out.",
                        f"method.{key} = {value!r}，而 {self.folder} 中的适配器是 {wanted!r}：继续训练时适配器保持"
                        "原样。请去掉 `method`。",
                    )
                )


def filled_in(values: dict[str, object]) -> dict[str, object]:
    """The settings of a run, completed from the adapter that it starts from: method, base model, task and text. They
    stay as they are without such an adapter, and where a run is resumed whose start adapter is no longer there.

    Raises:
        AdapterError, ConfigError: As of `find_start_adapter`; or the settings want another method.
    """
    name = values.get("adapter")
    if not isinstance(name, str):
        return values
    path = Path(name).expanduser()
    if is_method(name) and not path.exists():
        return values  # which the config refuses, and says what it is here
    if values.keys() >= {"model", "task", "method"} and path.is_absolute() and not path.exists():
        return values
    return find_start_adapter(name).filled_in(values)


def find_start_adapter(name: str) -> StartAdapter:
    """The adapter of that name: a run's folder, a checkpoint's, an adapter's, or a name on the hub.

    Raises:
        AdapterError: There is none, it is damaged, or a link in it leads out.
        ConfigError: It is a run without an adapter, or a link in that leads out.
    """
    path = Path(name).expanduser()
    run = next((p for p in (path, path.absolute().parent, path.absolute().parent.parent) if _is_run(p)), None)
    if run is not None:
        check_links(run)
    if run is not None and run == path:
        folder = path / ADAPTER
        if not folder.is_dir() and (path / MODEL).is_dir():
            raise ConfigError(
                Bilingual(
                    f"{path} was fully tuned and has no adapter: give its model, --model {path / MODEL}.",
                    f"{path} 是全参数微调，没有适配器：请给出它的模型，--model {path / MODEL}。",
                )
            )
        if not folder.is_dir():
            saved = list(checkpoints(path / CHECKPOINTS).values())
            instead = (
                Bilingual(
                    f": name one of its checkpoints, such as {saved[-1]}", f"：请给出它的一个检查点，例如 {saved[-1]}"
                )
                if saved
                else Bilingual(", and has no checkpoint", "，也没有检查点")
            )
            raise ConfigError(Bilingual(f"{path} was not finished{instead}.", f"{path} 没有训练完{instead.zh}。"))
    elif path.is_dir():
        check_links(path, AdapterError)
        folder = path
    else:
        from siliang.hub import adapter_folder

        folder = adapter_folder(name)
    if run is not None and run != path and folder.name != ADAPTER and folder.absolute().parent.parent != run:
        run = None  # another folder in a run's folder
    values, record = ({}, None) if run is None else (_read_settings(run), read_record(run))
    return StartAdapter(folder, PeftConfig.from_pretrained(folder), values, record)


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() and (folder / RECORD_NAME).is_file()


def _read_settings(run: Path) -> dict[str, Any]:
    values = read_yaml(run / CONFIG_NAME)
    if not isinstance(values.get("data"), dict):
        raise AdapterError(
            Bilingual(f"{run / CONFIG_NAME} holds no settings of a run.", f"{run / CONFIG_NAME} 不是一次运行的设置。")
        )
    return values
