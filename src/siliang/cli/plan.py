"""siliang plan: predicts the memory and time of each method without loading weights, and changes that make it fit."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siliang.cli.console import command_line, named, print_json
from siliang.cli.options import Json, Task
from siliang.cli.used_run import show_notes
from siliang.environment import importing
from siliang.language import Bilingual, both, local
from siliang.terminal import one_line, raw_stream
from siliang.types import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from siliang.config import RunConfig
    from siliang.plan import PlanRecord

NO_DATA = "(no data)"  # placeholder for data.train; nothing reads it


def plan(
    settings: Annotated[
        Path | None,
        typer.Argument(
            help=both(
                "run.yaml, as for `siliang train`, or compare.yaml, for each of its methods.",
                "run.yaml，与 `siliang train` 相同；或 compare.yaml，对其中每种方法预估。",
            )
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=both(
                "A folder, a name on the Hub, or the name of a known architecture (`--model list`).",
                "文件夹、Hub 上的名称，或一种已知模型结构的名称：`--model list` 列出这些结构。",
            )
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help=both(
                "Training data: with it, the plan is for the longest batch.", "训练数据：给出时按其中最长的批次预估。"
            )
        ),
    ] = None,
    task: Task = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=both("A method, several separated by commas, or all.", "一种方法，用逗号分隔的几种，或 all。")
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help=both(
                "The available memory, such as 8GB. Default: the free memory of this machine.",
                "可用的内存，如 8GB。默认为本机的空闲内存。",
            )
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help=both("cpu or cuda; this machine need not have it.", "cpu 或 cuda；本机不必有该设备。")),
    ] = None,
    devices: Annotated[
        int,
        typer.Option(
            min=1,
            help=both(
                "The number of devices. The plan is for each of them, and --memory is the memory of each.",
                "设备的个数；预估的是其中每一个，--memory 是每个设备的内存。",
            ),
        ),
    ] = 1,
    strategy: Annotated[
        str | None,
        typer.Option(
            help=both(
                "The strategy of several devices: ddp, fsdp, or auto (distributed.strategy).",
                "多个设备的并行策略：ddp、fsdp 或 auto（distributed.strategy）。",
            )
        ),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(
            help=both(
                "Floating-point operations per second of the device, such as 65e12, to predict the time.",
                "设备每秒的浮点运算次数，如 65e12，用于估计时间。",
            )
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help=both(
                "Any setting by name: --set train.batch_size=4", "按名称设置任意配置项：--set train.batch_size=4"
            ),
        ),
    ] = None,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline",
            help=both(
                "Also show the memory of PEFT with transformers.Trainer.",
                "同时给出使用 PEFT 和 transformers.Trainer 时的需求。",
            ),
        ),
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help=both("Write a run.yaml that fits.", "写出一个放得下的 run.yaml。"))
    ] = None,
    json: Json = False,
) -> None:
    """Predict the memory and time of a run for each method, and the smallest changes with which it fits.

    No weights are loaded: the step runs on fake tensors. The exit code is 1 if none of the methods fits.
    """
    from siliang.units import parse_bytes

    memory_bytes = parse_bytes(memory) if memory else None
    with importing():  # building a config needs torch
        pass

    if model == "list":
        _list_shapes()
        return
    _check_flags(memory, memory_bytes, flops)
    source = named(settings)
    values, names = _gather(settings, {"model": model, "task": task}, data, set_ or [], method)
    comparison = _comparison_in(values)
    if comparison and write is not None:
        raise ConfigError(
            Bilingual(
                "--write writes a run with one method, but this is a comparison: leave it out.",
                "--write 只能写出单个方法的配置，而这是一个比较：请去掉它。",
            )
        )
    with_data = _fill_in(values, strategy)
    with importing():
        from siliang.cli.show import quiet_loading
        from siliang.cli.show_plan import show
        from siliang.distributed.sharding import fake_mesh
        from siliang.plan import plan as make
        from siliang.plan import target_device
        from siliang.plan.device import share_memory

        quiet_loading()
    config, base_config = _config(values, source, with_data=with_data)
    target = target_device(config, device, memory_bytes=memory_bytes, flops=flops)
    runs = {"": (config, names)}
    if comparison:
        runs = _runs_of(values, comparison, names if method not in (None, "all") else None, source)
    with fake_mesh(devices) as mesh:
        plans = {
            label: make(
                run,
                share_memory(target, devices),
                methods=methods,
                with_data=with_data,
                base_config=base_config,
                baseline=baseline,
                mesh=mesh,
                say=_Say(not json),
            )
            for label, (run, methods) in runs.items()
        }
    record = _merge(plans)
    if json:
        print_json(record.model_dump(mode="json"), indent=1)
    else:
        show(record)
    if write is not None:
        _write(config, record, write)
    if not any(m.fits is not False and not m.error for m in record.methods):
        raise typer.Exit(1)


def _check_flags(memory: str | None, memory_bytes: int | None, flops: float | None) -> None:
    if memory_bytes == 0:
        raise ConfigError(
            Bilingual(
                f"--memory {memory}: must be more than 0, such as 8GB.", f"--memory {memory}：必须大于 0，如 8GB。"
            )
        )
    if flops is not None and not 0 < flops < math.inf:
        raise ConfigError(
            Bilingual(
                f"--flops {flops}: must be a number above 0, such as 65e12.",
                f"--flops {flops}：必须是大于 0 的数，如 65e12。",
            )
        )


def _gather(
    settings: Path | None, flags: dict[str, str | None], data: str | None, sets: list[str], method: str | None
) -> tuple[dict[str, Any], list[str]]:
    """The settings, and the methods to plan: those of --method, otherwise of the settings file, otherwise all.

    Raises:
        ConfigError: The model is missing, or a method does not exist.
    """
    from siliang.cli.train import gather, with_adapter
    from siliang.methods import METHODS, canonical_name, find_method

    values = with_adapter(gather(settings, flags, data, sets))
    if "model" not in values:
        raise ConfigError(
            Bilingual(
                "give a model: siliang plan run.yaml, or --model with a folder, a name on the Hub, or a known "
                "architecture (--model list).",
                "请指定模型：siliang plan run.yaml，或 --model 加文件夹、Hub 上的名称或结构名（见 --model list）。",
            )
        )
    chosen = values.get("method", "lora")
    own = canonical_name(str(chosen.get("name", "lora") if isinstance(chosen, dict) else chosen))
    if method in (None, "all"):
        choices = [name for name, m in METHODS.items() if not (m.is_baseline or m.needs_settings)]
        names = [own] if settings and method is None else choices
    else:
        names = [canonical_name(name) for name in method.split(",")]
    for name in names:
        find_method(name)
    if own not in names:
        values["method"] = names[0]
    return values, names


def _fill_in(values: dict[str, Any], strategy: str | None) -> bool:
    """Fills in settings that a config needs and a plan does not. Returns whether the settings have data."""
    section = values.setdefault("data", {})
    with_data = isinstance(section, dict) and bool(section.get("train"))
    if not with_data and isinstance(section, dict):
        section["train"] = NO_DATA
    values.setdefault("output", "siliang-run")
    if strategy is not None:
        values["distributed"] = {"strategy": strategy}
    return with_data


def _config(values: dict[str, Any], source: str, *, with_data: bool) -> tuple[RunConfig, PretrainedConfig | None]:
    """The config of the run, and that of the base model if it was read to find the task.

    Raises:
        ConfigError: Data is given for an architecture, which has no tokenizer; or a setting is wrong.
    """
    from siliang.config import RunConfig
    from siliang.plan import model_config
    from siliang.plan.shapes import meant_by, shape_name, shape_of, task_of

    name = values["model"] = shape_name(str(values["model"]))
    show_notes(meant_by(name))
    base_config = None
    if "task" not in values:
        base_config = model_config(RunConfig.build(values | {"task": "causal_lm"}, source=source))
        values["task"] = task_of(values["model"], base_config).title
    config = RunConfig.build(values, source=source)
    if with_data and shape_of(config.model) is not None:
        raise ConfigError(
            Bilingual(
                f"{config.model} is an architecture without a tokenizer, which the data needs: give the model's "
                "folder, or leave out the data and set data.max_length.",
                f"{config.model} 只是一个结构，没有处理数据所需的分词器：请给出模型文件夹，"
                "或不给数据而设置 data.max_length。",
            )
        )
    return config, base_config


def _comparison_in(values: dict[str, Any]) -> dict[str, Any]:
    """Removes the settings of a comparison from `values`, and returns them."""
    from siliang.config.comparison import CompareSettings

    return {key: values.pop(key) for key in CompareSettings.model_fields if key in values}


def _runs_of(
    values: dict[str, Any], comparison: dict[str, Any], only: list[str] | None, source: str
) -> dict[str, tuple[RunConfig, list[str]]]:
    """The runs of a comparison whose memory may differ, by label. Methods without settings are planned together, under
    the label "".

    Args:
        only: The methods to plan; None for all.
    """
    from siliang.config import RunConfig
    from siliang.config.comparison import CompareConfig

    given = {key: value for key, value in values.items() if key != "method"}
    settings = CompareConfig.build(given | comparison, source=source).settings
    entries = [entry for entry in settings.methods if only is None or entry.name in only]
    if not entries:
        wanted = ",".join(only or [])
        raise ConfigError(
            Bilingual(
                f"--method {wanted}: {source} does not compare it.",
                f"--method {wanted}：{local(source, 'zh')} 没有比较这种方法。",
            )
        )
    plain: list[str] = []
    found: dict[str, tuple[RunConfig, list[str]]] = {}
    for entry in entries:
        for choice in settings.choices(entry) or [{}]:
            tried = {key: value for key, value in choice.items() if key != "learning_rate"}  # it takes no memory
            arguments = entry.arguments | tried
            if not arguments and entry.label == entry.name:
                plain += [entry.name] * (entry.name not in plain)
                continue
            label = ", ".join([entry.label, *(f"{key}={value}" for key, value in tried.items())])
            config = RunConfig.build(given | {"method": {"name": entry.name, **arguments}}, source=source)
            found[label] = (config, [entry.name])
    return ({"": (RunConfig.build(given, source=source), plain)} if plain else {}) | found


def _merge(plans: dict[str, PlanRecord]) -> PlanRecord:
    """Merges the plans of a comparison into one, with each method under its label."""
    first = next(iter(plans.values()))
    for label, plan in plans.items():
        if label:
            plan.methods[0].method = label
    first.methods = [method for plan in plans.values() for method in plan.methods]
    return first


class _Say:
    """Shows on a terminal what is being planned, and removes the line at the end."""

    def __init__(self, on: bool) -> None:
        self._on = on and sys.stderr.isatty()

    def __call__(self, what: str) -> None:
        if self._on:
            name = one_line(local(what))
            line = both(f"planning {name} ...", f"正在预估：{name} ...") if what else ""
            print(f"\r\033[K{line}", end="", file=raw_stream(sys.stderr), flush=True)


def _write(config: RunConfig, record: PlanRecord, path: Path) -> None:
    """Writes the config of the first method that fits, with the changes that it needs."""
    from siliang.files import write_text
    from siliang.safety.safe_yaml import dump_yaml, parse_yaml

    fitting = [m for m in record.methods if not m.error and (m.fits is not False or m.fit is not None)]
    if not fitting:
        raise ConfigError(
            Bilingual(f"no method fits, so {path} is not written.", f"没有放得下的方法，因此没有写出 {path}。")
        )
    if os.path.lexists(path):  # a broken link too
        raise ConfigError(
            Bilingual(
                f"{path} exists: choose another name for --write.",
                f"{path} 已存在：请为 --write 换一个文件名。",
            )
        )
    best = next((m for m in fitting if m.method == config.method.name), fitting[0])
    values = config.model_dump(mode="json", exclude_defaults=True)
    values["task"] = config.task.lower()
    if best.method != config.method.name:
        values["method"] = best.method
    if values["data"]["train"] == NO_DATA:
        values["data"]["train"] = "data.jsonl"
    for change in best.fit.changes if best.fit and not best.fits else []:
        *sections, last = change.setting.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = parse_yaml(change.after)
    write_text(path, dump_yaml(values))
    method, command = best.method, command_line("train", path)
    print(
        both(
            f"written    {path} ({method}); start it with: {command}",
            f"已写出     {path}（{method}）；用它训练：{command}",
        )
    )


def _list_shapes() -> None:
    from siliang.plan.shapes import SHAPES

    for name, shape in SHAPES.items():
        print(f"{name:<26}{shape.parameters:>16,}  {shape.task.title}")
