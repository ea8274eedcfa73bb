"""siliang train: one run, from a settings file, from flags, or from both."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from siliang.cli.console import command_line


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
    output: Annotated[str | None, typer.Option(help="The run's folder; must not hold anything yet.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting by name: --set train.learning_rate=1e-3")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run: siliang train RUN --resume")
    ] = False,
    devices: Annotated[
        int,
        typer.Option(min=1, help="Processes that train together: one a card, or shares of the CPU."),
    ] = 1,
) -> None:
    """Train: attach a method to a base model, tune it on your data, and keep the result in a run folder."""
    from siliang.cli.show import TrainingDisplay, duration, quiet_loading, size
    from siliang.config import RunConfig
    from siliang.run_folder import CONFIG_NAME, read_config
    from siliang.types import ConfigError

    flags = {"model": model, "task": task, "method": method, "output": output}
    if resume:
        if settings is None or data or set_ or any(flags.values()):
            raise ConfigError(
                "--resume goes on with the run's own settings: give it the run's folder and nothing else."
            )
        config = read_config(settings).model_copy(update={"output": str(settings)})
    elif settings is not None and settings.is_dir():
        raise ConfigError(f"{settings} is a folder: give a settings file, or --resume to go on with the run in it.")
    else:
        config = RunConfig.build(gather(settings, flags, data, set_ or []), source=str(settings or "the flags"))
    if devices > 1 and "LOCAL_RANK" not in os.environ:
        from siliang.distributed.launch import launch

        raise typer.Exit(launch(devices, sys.argv[1:], config.output))
    quiet_loading()
    from siliang.distributed.ranks import find_ranks
    from siliang.plan.before import Planner
    from siliang.train.run import Listener
    from siliang.train.run import train as run

    planner, ranks = Planner(), find_ranks()
    # torchrun began all processes anew after one was lost, of which it does not tell a node whose own lived
    if any(ranks.all(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)):
        resume = ranks.first_does(lambda: resume or (Path(config.output) / CONFIG_NAME).is_file())
    if not ranks.first:  # one speaks for all
        run(config, resume=resume, planner=planner)
        return
    with TrainingDisplay() as display:
        record = run(config, Listener(display.say, display.progress), resume=resume, planner=planner)
    planner.remember(record)
    folder = Path(config.output)
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in record.final.items())
    print(f"done       {metrics}")
    planned = f" ({size(record.memory.predicted_bytes)} planned)" if record.memory.predicted_bytes else ""
    peak = size(record.memory.peak_bytes) + planned
    print(f"           {duration(record.seconds.train)} of training, peak memory {peak}")
    what = "model" if (folder / "model").is_dir() else "adapter"
    print(f"saved      {folder / what} ({size(record.parameters.adapter_bytes)}), record in {folder / 'run.json'}")
    from siliang.next_steps import next_steps

    steps = next_steps(folder, config.task, config.method.name)
    for i, words in enumerate(words for what, words in steps.items() if what != "chat"):
        print(f"{'' if i else 'next':<11}{command_line(*words)}")


def gather(settings: Path | None, flags: dict[str, str | None], data: str | None, sets: list[str]) -> dict[str, Any]:
    """The settings file, then the flags over it, then each --set."""
    from siliang.config import assign, read_yaml

    values = read_yaml(settings) if settings else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    if data is not None:
        section = values.setdefault("data", {})
        if isinstance(section, dict):  # otherwise the schema says what is wrong with it
            section["train"] = data
    for assignment in sets:
        assign(values, assignment)
    return values
