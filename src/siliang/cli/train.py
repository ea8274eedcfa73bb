"""siliang train: one run, with settings from a file, from flags, or from both."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siliang.cli.console import command_line, named
from siliang.cli.options import Method, Model, Task
from siliang.environment import importing
from siliang.language import Bilingual, both, language

if TYPE_CHECKING:
    from siliang.config import RunConfig
    from siliang.records import Record


def train(
    settings: Annotated[
        Path | None,
        typer.Argument(
            help=both(
                "run.yaml; `siliang config` lists its settings. With --resume: the run's folder.",
                "run.yaml，`siliang config` 列出它可以包含的配置项。与 --resume 一起时：运行的文件夹。",
            )
        ),
    ] = None,
    model: Model = None,
    data: Annotated[
        str | None,
        typer.Option(
            help=both(
                "Training data: a .json, .jsonl, .csv, .tsv, .parquet, .arrow or .txt file, a file of tagged words "
                "(.conll, .bio ...), a folder from Dataset.save_to_disk, or a name on the hub.",
                "训练数据：.json、.jsonl、.csv、.tsv、.parquet、.arrow 或 .txt 文件，逐词标注的文件"
                "（.conll、.bio 等），Dataset.save_to_disk 写的文件夹，或 hub 上的名称。",
            )
        ),
    ] = None,
    task: Task = None,
    method: Method = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help=both(
                "An adapter to train further: a run, a checkpoint, or an adapter folder. Its config is the method.",
                "要继续训练的适配器：一次运行、其中的检查点，或适配器文件夹；方法就是它的配置。",
            )
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help=both("The run's folder; it must not exist, or must be empty.", "运行的文件夹；事先不存在，或为空。")
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help=both(
                "Any setting by name: --set train.learning_rate=1e-3",
                "按名称设置任意配置项：--set train.learning_rate=1e-3",
            ),
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help=both(
                "Resume an interrupted run: siliang train RUN --resume",
                "继续中断的运行：siliang train RUN --resume",
            ),
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help=both(
                "With --resume or --adapter: continue even if the base model has changed since then; with --resume, "
                "also if the data has changed.",
                "与 --resume 或 --adapter 一起：基座模型此后变过也继续；与 --resume 一起时，数据变过也继续。",
            ),
        ),
    ] = False,
    devices: Annotated[
        int,
        typer.Option(
            min=1,
            help=both(
                "The number of processes that train together: one per GPU, or with shares of the CPU.",
                "共同训练的进程数：每张显卡一个，或分用 CPU。",
            ),
        ),
    ] = 1,
) -> None:
    """Train: fine-tune a base model on your data with one method, and save the result in a run folder."""
    if "LOCAL_RANK" not in os.environ:  # the import takes seconds, during which nothing else is printed
        print(
            both("starting   loading torch and transformers ...", "启动       正在加载 torch 和 transformers ..."),
            flush=True,
        )
    from siliang.cli.show import TrainingDisplay, quiet_loading
    from siliang.types import ConfigError

    flags = {"model": model, "task": task, "method": method, "adapter": adapter, "output": output}
    if resume:
        config = _begun(settings, flags, data, set_ or [])
    elif settings is not None and settings.is_dir():
        raise ConfigError(
            Bilingual(
                f"{settings} is a folder: give a settings file, or --resume to continue the run in it.",
                f"{settings} 是文件夹：请给出配置文件，或用 --resume 继续其中的训练。",
            )
        )
    else:
        config = read_settings(settings, flags, data, set_ or [])
    if devices > 1 and "LOCAL_RANK" not in os.environ:
        from siliang.distributed.launch import launch

        _check_code(config)
        raise typer.Exit(launch(devices, sys.argv[1:], config.output))
    with importing():
        quiet_loading()
        from siliang.distributed.ranks import find_ranks
        from siliang.next_steps import next_steps
        from siliang.plan.preflight import Planner
        from siliang.run_folder import CONFIG_NAME
        from siliang.train.run import train as run
        from siliang.train.types import Listener
        from siliang.use.learned import what_is_wrong

    planner, ranks = Planner(), find_ranks()
    # torchrun restarts all processes after one was lost, but nodes whose processes survived have no restart count
    if any(ranks.gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)):
        resume = ranks.from_main(lambda: resume or (Path(config.output) / CONFIG_NAME).is_file())
    if not ranks.is_main:  # rank 0 prints
        run(config, resume=resume, force=force, planner=planner)
        return
    verdicts: list[str | None] = []
    with TrainingDisplay() as display:
        listener = Listener(display.say, display.progress, lambda trained: verdicts.append(what_is_wrong(trained)))
        record = run(config, listener, resume=resume, force=force, planner=planner)
    planner.calibrate(record)
    folder = Path(config.output)
    _say_end(record, folder, [verdict for verdict in verdicts if verdict is not None])
    by = {"name": config.method.name, **config.method.arguments}
    steps = next_steps(folder, config.task, by, of_texts=record.of_texts)
    for i, command in enumerate(command for what, command in steps.items() if what != "chat"):
        print(f"{' ' * 11 if i else both('next       ', '下一步     ')}{command_line(*command)}")


def _say_end(record: Record, folder: Path, verdicts: list[str]) -> None:
    """Prints the metrics of a finished run, and where it is saved."""
    from siliang.cli.show import duration, metrics_line, size
    from siliang.report.words import words

    metrics, w = metrics_line(record.final), words(language())
    print(both(f"done       {metrics}", f"完成       {metrics}"))
    for verdict in verdicts:
        what = w[verdict]
        print(both(f"warning    {what}, on the held-out rows", f"警告       在验证集上{what}"))
    planned, planned_zh = "", ""
    if record.memory.predicted_bytes:
        expected = size(record.memory.predicted_bytes)
        planned, planned_zh = f" ({expected} planned)", f"（预估 {expected}）"
    time, peak = duration(record.seconds.train), size(record.memory.peak_bytes)
    print(
        both(
            f"           {time} of training, peak memory {peak}{planned}",
            f"           训练用时 {time}，峰值内存 {peak}{planned_zh}",
        )
    )
    saved = folder / ("model" if (folder / "model").is_dir() else "adapter")
    adapter, path = size(record.parameters.adapter_bytes), folder / "run.json"
    print(both(f"saved      {saved} ({adapter}), record in {path}", f"已保存     {saved}（{adapter}），记录在 {path}"))


def _check_code(config: RunConfig) -> None:
    """Checks that a model's custom code is allowed, before several processes start that cannot ask the user."""
    from siliang.hub import find_file

    path = find_file(config.model, "config.json", config.revision)
    if path is not None and b"auto_map" in path.read_bytes():
        from siliang.models.own_code import find_own_code

        if (code := find_own_code(config.model, config.revision)) is not None:
            code.check_allowed()


def _begun(settings: Path | None, flags: dict[str, str | None], data: str | None, sets: list[str]) -> RunConfig:
    """The settings of a run to resume, given by its folder, its settings file, or the flags of its start. Flags and
    --set override the run's settings."""
    from siliang.paths import check_links
    from siliang.records import RECORD_NAME
    from siliang.run_folder import CONFIG_NAME
    from siliang.types import ConfigError

    if settings is None and flags["output"] is None:
        raise ConfigError(
            Bilingual(
                "--resume continues a run: give its folder, as in siliang train --resume RUN.",
                "--resume 用于继续训练：请给出运行文件夹，如 siliang train --resume RUN。",
            )
        )
    folder = settings if settings is not None and settings.is_dir() else None
    if settings is not None and settings.name == CONFIG_NAME and (settings.parent / RECORD_NAME).is_file():
        folder = settings.parent
    if folder is None:
        return read_settings(settings, flags, data, sets)
    own = folder / CONFIG_NAME
    if not own.is_file():
        raise ConfigError(
            Bilingual(
                f"{folder} is not a run's folder: it has no {CONFIG_NAME}, so --resume cannot continue it.",
                f"{folder} 不是运行文件夹：其中没有 {CONFIG_NAME}，无法用 --resume 继续。",
            )
        )
    check_links(folder)
    if flags["output"] is not None and Path(flags["output"]).absolute() != folder.absolute():
        raise ConfigError(
            Bilingual(
                f"--resume continues in {folder}: leave out --output {flags['output']}.",
                f"--resume 在 {folder} 中继续训练：请去掉 --output {flags['output']}。",
            )
        )
    return read_settings(own, flags | {"output": str(folder)}, data, sets)


def gather(settings: Path | None, flags: dict[str, str | None], data: str | None, sets: list[str]) -> dict[str, Any]:
    """The settings of the file, overridden by the flags, and then by each --set."""
    from siliang.config import RunConfig, assign
    from siliang.safety.safe_yaml import read_yaml

    values = read_yaml(settings) if settings else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    if data is not None:
        section = values.setdefault("data", {})
        if isinstance(section, dict):  # otherwise the schema reports the error
            section["train"] = data
    for assignment in sets:
        assign(values, assignment, RunConfig)
    return values


def read_settings(settings: Path | None, flags: dict[str, str | None], data: str | None, sets: list[str]) -> RunConfig:
    """Gathers and validates the settings of a run."""
    from siliang.config import RunConfig

    values = with_adapter(gather(settings, flags, data, sets))
    return RunConfig.build(values, source=named(settings))


def with_adapter(values: dict[str, Any]) -> dict[str, Any]:
    """The settings, completed from the adapter that the run starts from. Unchanged without an adapter."""
    if values.get("adapter") is None:
        return values
    from siliang.train.start_adapter import filled_in  # imports torch, so only with an adapter

    return filled_in(values)
