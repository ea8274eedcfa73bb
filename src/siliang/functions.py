"""The commands as functions: what `siliang check, plan, train, eval, predict, generate, compare, merge` do, with typed
results (docs/python.md).

Settings are a `RunConfig`, a mapping with the content of run.yaml, or the path of a run.yaml. Changes are given by
name, each a value or a section: `train("run.yaml", output="b", train={"learning_rate": 1e-3})`. All errors are
`SiliangError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from siliang.argument_kinds import check_least
from siliang.config import RunConfig
from siliang.config.comparison import CompareConfig
from siliang.function_arguments import quietly
from siliang.function_settings import (
    CheckResult,
    ComparisonResult,
    Settings,
    TrainingResult,
    of_folder,
    run_config,
    source_of,
    values_of,
)
from siliang.language import Bilingual
from siliang.run_functions import evaluate, generate, merge, open_run, predict, predict_file
from siliang.types import ConfigError
from siliang.units import parse_bytes

if TYPE_CHECKING:  # slow to import
    from siliang.records import PlanRecord
    from siliang.train.log import Progress


# ---- before a run ----


@quietly
def check(settings: Settings | None = None, **changes: object) -> CheckResult:
    """Checks data, template and settings without training.

    Args:
        settings: Of the run.
        changes: As for `run_config`.

    Raises:
        DataError: The data cannot be read.
        ConfigError: A setting is wrong.

    Example:
        >>> found = check(model="./bert", task="seq_cls", data="reviews.csv")  # doctest: +SKIP
        >>> [(f.code, str(f.headline)) for f in found.findings]  # doctest: +SKIP
    """
    from siliang.check import find, gather_input
    from siliang.check.counts import count
    from siliang.hardware import machine

    changes = {"output": "siliang-run"} | changes if _lacks_output(settings) else changes
    subject = gather_input(run_config(settings, **changes), machine())
    findings = find(subject)
    return CheckResult(findings, dict(count(subject)))


@quietly
def plan(
    settings: Settings | None = None,
    *,
    methods: Sequence[str] = (),
    device: Literal["cpu", "cuda"] | None = None,
    memory: int | str | None = None,
    devices: int = 1,
    **changes: object,
) -> PlanRecord:
    """Predicts the memory and time of a run, without loading weights.

    Args:
        settings: Of the run, with its data.
        methods: To plan; empty: the run's own.
        device: None: this machine's.
        memory: That the run may take: bytes, or a text such as "8GB". None: what is free.
        devices: Processes that train together.
        changes: As for `run_config`.

    Returns:
        `methods` has a plan for each: `peak_bytes`, its parts, `fits`, and the changes with which it fits.

    Raises:
        ModelError: There is no such model.
        DataError: The data cannot be read.
        ConfigError: A setting is wrong.
    """
    from siliang.distributed.sharding import fake_mesh
    from siliang.methods import canonical_name, find_method
    from siliang.plan import plan as make
    from siliang.plan import target_device
    from siliang.plan.device import share_memory

    names = [canonical_name(name) for name in methods]
    for name in names:
        find_method(name)
    memory_bytes = parse_bytes(memory) if isinstance(memory, str) else memory
    check_least(memory=memory_bytes, devices=devices)
    changes = {"output": "siliang-run"} | changes if _lacks_output(settings) else changes
    config = run_config(settings, **changes)
    target = target_device(config, device, memory_bytes=memory_bytes)
    with fake_mesh(devices) as mesh:
        return make(config, share_memory(target, devices), methods=names, mesh=mesh)


def _lacks_output(settings: Settings | None) -> bool:
    """Whether the settings may be without the output that a run needs, and what is only looked at does not."""
    return not isinstance(settings, RunConfig) and "output" not in values_of(settings, {})


# ---- a run ----


@quietly
def train(
    settings: Settings | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[Progress], None] = lambda progress: None,
    **changes: object,
) -> TrainingResult:
    """Fine-tunes a base model, and leaves a run folder.

    Args:
        settings: Of the run. With `resume`, also the run's folder.
        resume: Continue the run in the folder `output` from its last checkpoint.
        force: With `resume` or an adapter: continue even if the base model or the data have changed.
        say: Called with each line of the log.
        progress: Called after each step.
        changes: As for `run_config`.

    Raises:
        SiliangError: Something that can be corrected. If no step was made, no files are left.
        InterruptedRunError: Ctrl-C, SIGTERM, or train.max_time; a checkpoint was saved.

    Example:
        >>> run = train(model="./bert", task="seq_cls", data="reviews.csv", output="run")  # doctest: +SKIP
        >>> run.metrics["accuracy"]  # doctest: +SKIP
    """
    from siliang.plan.preflight import Planner
    from siliang.train.run import train as run
    from siliang.train.types import Listener
    from siliang.use.learned import what_is_wrong

    settings, changes = of_folder(settings, changes, resume=resume)
    config, planner, verdicts = run_config(settings, **changes), Planner(), list[str | None]()
    listener = Listener(say, progress, lambda trained: verdicts.append(what_is_wrong(trained)))
    record = run(config, listener, resume=resume, force=force, planner=planner)
    planner.calibrate(record)
    return TrainingResult(Path(config.output), record, next(iter(verdicts), None))


@quietly
def compare(
    settings: CompareConfig | Settings | None = None,
    *,
    jobs: int = 1,
    ray: str | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
    lang: Literal["en", "zh"] = "en",
    **changes: object,
) -> ComparisonResult:
    """Trains several methods with several seeds on the same rows, and writes a page.

    Args:
        settings: Those of compare.yaml: of a run without `method`, with `methods` and `seeds`. A comparison in the
            folder `output` is resumed.
        jobs: Runs at the same time.
        ray: The address of a Ray cluster, or "local". None: processes of this machine.
        force: Resume even if the base model or the data have changed.
        say: Called with each line of the log.
        lang: The language of the page.
        changes: As for `run_config`, `methods` and `seeds` among them.

    Raises:
        SiliangError: Something that can be corrected.
        InterruptedRunError: Ctrl-C or SIGTERM; the same call resumes.
    """
    check_least(jobs=jobs)
    from siliang.compare.run import CompareListener
    from siliang.compare.run import compare as run_all
    from siliang.report.gather import gather
    from siliang.report.page import write_page
    from siliang.report.summary import recommend, summarize

    if isinstance(settings, CompareConfig):
        if changes:
            names = ", ".join(changes)
            raise ConfigError(
                Bilingual(
                    f"compare: {names} beside a CompareConfig: give the settings as a mapping or a file.",
                    f"compare：{names} 不能与 CompareConfig 同时给出：请用映射或文件给出配置。",
                )
            )
        config = settings
    else:
        config = CompareConfig.build(values_of(settings, changes), source=source_of(settings))
    record = run_all(config, CompareListener(say=say), jobs=jobs, ray=ray, force=force)
    folder = Path(config.run.output)
    data = gather([folder])
    page = folder / "report.html"
    write_page(data, page, language=lang)
    methods = summarize(data)
    return ComparisonResult(folder, record, methods, recommend(methods, data), page)


__all__ = [
    "CheckResult",
    "ComparisonResult",
    "Settings",
    "TrainingResult",
    "check",
    "compare",
    "evaluate",
    "generate",
    "merge",
    "open_run",
    "plan",
    "predict",
    "predict_file",
    "run_config",
    "train",
]
