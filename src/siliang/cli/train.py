"""siliang train: one run, from a settings file, from flags, or from both."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siliang.cli.console import command_line

if TYPE_CHECKING:
    from siliang.config import RunConfig


def train(
    settings: Annotated[
        Path | None,
        typer.Argument(help="run.yaml; `siliang config` lists what it may hold. With --resume: the run's folder."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a folder, or a name on the hub.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training data: .json, .jsonl, .csv, .tsv, a saved data set.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="causal_lm, seq_cls, token_cls, seq_2_seq_lm or question_ans.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="What is tuned: see `siliang methods`.")] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Train this further: a run, a checkpoint of one, or an adapter folder; its config is the method."
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="The run's folder; must not hold anything yet.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting by name: --set train.learning_rate=1e-3")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run: siliang train RUN --resume")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="With --resume or --adapter: go on where the base model has changed since then; with --resume also "
            "where the data has.",
        ),
    ] = False,
    devices: Annotated[
        int,
        typer.Option(min=1, help="Processes that train together: one a card, or shares of the CPU."),
    ] = 1,
) -> None:
    """Train: attach a method to a base model, tune it on your data, and keep the result in a run folder."""
    if "LOCAL_RANK" not in os.environ:  # the libraries take seconds, in which a terminal would stay empty
        print("starting   loading torch and transformers ...", flush=True)
    from siliang.cli.show import TrainingDisplay, duration, figures, quiet_loading, size
    from siliang.types import ConfigError

    flags = {"model": model, "task": task, "method": method, "adapter": adapter, "output": output}
    if resume:
        config = _begun(settings, flags, data, set_ or [])
    elif settings is not None and settings.is_dir():
        raise ConfigError(f"{settings} is a folder: give a settings file, or --resume to go on with the run in it.")
    else:
        config = read_settings(settings, flags, data, set_ or [])
    if devices > 1 and "LOCAL_RANK" not in os.environ:
        from siliang.distributed.launch import launch

        _check_code(config)
        raise typer.Exit(launch(devices, sys.argv[1:], config.output))
    quiet_loading()
    from siliang.compare.learned import what_is_wrong
    from siliang.distributed.ranks import find_ranks
    from siliang.plan.preflight import Planner
    from siliang.report.words import words
    from siliang.run_folder import CONFIG_NAME
    from siliang.train.prepare import Listener
    from siliang.train.run import train as run

    planner, ranks = Planner(), find_ranks()
    # torchrun began all processes anew after one was lost, of which it does not tell a node whose own lived
    if any(ranks.gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)):
        resume = ranks.from_main(lambda: resume or (Path(config.output) / CONFIG_NAME).is_file())
    if not ranks.is_main:  # one speaks for all
        run(config, resume=resume, force=force, planner=planner)
        return
    verdicts: list[str | None] = []
    with TrainingDisplay() as display:
        listener = Listener(display.say, display.progress, lambda trained: verdicts.append(what_is_wrong(trained)))
        record = run(config, listener, resume=resume, force=force, planner=planner)
    planner.calibrate(record)
    folder = Path(config.output)
    print(f"done       {figures(record.final)}")
    for verdict in filter(None, verdicts):
        print(f"warning    {words('en')[verdict]}, on rows that were held out")
    planned = f" ({size(record.memory.predicted_bytes)} planned)" if record.memory.predicted_bytes else ""
    peak = size(record.memory.peak_bytes) + planned
    print(f"           {duration(record.seconds.train)} of training, peak memory {peak}")
    what = "model" if (folder / "model").is_dir() else "adapter"
    print(f"saved      {folder / what} ({size(record.parameters.adapter_bytes)}), record in {folder / 'run.json'}")
    from siliang.next_steps import next_steps

    steps = next_steps(folder, config.task, config.method.name)
    for i, command in enumerate(command for what, command in steps.items() if what != "chat"):
        print(f"{'' if i else 'next':<11}{command_line(*command)}")


def _check_code(config: Any) -> None:
    """A model's own code is allowed before many processes begin, none of which may ask."""
    from siliang.hub import find_file

    path = find_file(config.model, "config.json", config.revision)
    if path is not None and b"auto_map" in path.read_bytes():
        from siliang.models.own_code import find_own_code

        if (code := find_own_code(config.model, config.revision)) is not None:
            code.check_allowed()


def _begun(settings: Path | None, flags: dict[str, str | None], data: str | None, sets: list[str]) -> RunConfig:
    """The settings of a run that is resumed, named by its folder, its settings file, or the flags that it was started
    with. Flags and --set override its own settings."""
    from siliang.paths import check_links
    from siliang.records import RECORD_NAME
    from siliang.run_folder import CONFIG_NAME
    from siliang.types import ConfigError

    if settings is None and flags["output"] is None:
        raise ConfigError("--resume goes on with a run: say which, as in siliang train --resume RUN.")
    folder = settings if settings is not None and settings.is_dir() else None
    if settings is not None and settings.name == CONFIG_NAME and (settings.parent / RECORD_NAME).is_file():
        folder = settings.parent
    if folder is None:
        return read_settings(settings, flags, data, sets)
    own = folder / CONFIG_NAME
    if not own.is_file():
        raise ConfigError(f"{folder} is no run folder ({CONFIG_NAME} is missing there): nothing to --resume.")
    check_links(folder)
    if flags["output"] is not None and Path(flags["output"]).absolute() != folder.absolute():
        raise ConfigError(f"--resume goes on in {folder} itself: leave out --output {flags['output']}.")
    return read_settings(own, flags | {"output": str(folder)}, data, sets)


def gather(settings: Path | None, flags: dict[str, str | None], data: str | None, sets: list[str]) -> dict[str, Any]:
    """The settings file, then the flags over it, then each --set."""
    from siliang.config import RunConfig, assign
    from siliang.safe_yaml import read_yaml

    values = read_yaml(settings) if settings else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    if data is not None:
        section = values.setdefault("data", {})
        if isinstance(section, dict):  # otherwise the schema says what is wrong with it
            section["train"] = data
    for assignment in sets:
        assign(values, assignment, RunConfig)
    return values


def read_settings(settings: Path | None, flags: dict[str, str | None], data: str | None, sets: list[str]) -> RunConfig:
    """The settings of a run, gathered and checked."""
    from siliang.config import RunConfig

    values = with_adapter(gather(settings, flags, data, sets))
    return RunConfig.build(values, source=str(settings or "the flags"))


def with_adapter(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with what the adapter that the run starts from says; as they are where it starts from none."""
    if values.get("adapter") is None:
        return values
    from siliang.train.start_adapter import filled_in  # torch: only where there is an adapter

    return filled_in(values)
