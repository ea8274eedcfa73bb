"""A run's model measured by the tasks of lm-eval, EleutherAI's evaluation harness.

The harness gets the model as it is, with its adapter, and the run's tokenizer; all else is its own. A task's files are
code: they may name functions (`!function`) and templates that run. So only tasks that the caller names are loaded.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from siliang.engine.written import positions_of
from siliang.language import Bilingual, local
from siliang.records import HarnessTask, Record
from siliang.run_folder import OpenedRun, served_tokenizer
from siliang.tasks import task_of
from siliang.types import ConfigError, first_line, nearest

EXTRA = "harness"  # of pyproject.toml, with lm-eval
NO_VERSIONS = ("Yaml", "N/A", None)  # what lm-eval says of tasks and groups without one


@dataclass(frozen=True)
class HarnessResult:
    """What lm-eval measured.

    Attributes:
        metrics: By the task's name and the metric's, `TASK/acc`, and `TASK/acc_stderr` for its standard error.
        rows: The rows of each task.
        versions: The version of each task that has one, and of lm-eval.
        less_is_better: Those of the metrics.
    """

    metrics: dict[str, float]
    rows: dict[str, int]
    versions: dict[str, str] = field(default_factory=dict[str, str])
    less_is_better: frozenset[str] = frozenset()


def run_harness(
    run: OpenedRun,
    tasks: Sequence[str],
    *,
    rows: int | None = None,
    few_shot: int | None = None,
    chat: bool = False,
    batch_size: int | None = None,
) -> HarnessResult:
    """Runs lm-eval's tasks on a run that writes.

    Args:
        tasks: Names of lm-eval's own tasks; .yaml files of tasks, or folders of such files. Their code runs.
        rows: The first so many rows of each task. None: all.
        few_shot: Examples in front of each question. None: the task's own number.
        chat: Ask in the run's template, with its arguments, as in training.
        batch_size: Rows that go through the model at once. None: train.batch_size.

    Raises:
        ConfigError: lm-eval is not installed, the run does not write, there is no such task, or it cannot be run.
    """
    if not task_of(run.config).prompt or not task_of(run.config).question:
        raise ConfigError(
            Bilingual(
                f"{run.folder}: lm-eval measures models that write text (causal_lm, seq_2_seq_lm), and the task is "
                f"{task_of(run.config).title}: use `siliang eval` without --harness.",
                f"{run.folder}：lm-eval 评估生成文本的模型（causal_lm、seq_2_seq_lm），"
                f"而任务是 {task_of(run.config).title}：请用不带 --harness 的 `siliang eval`。",
            )
        )
    if find_spec("lm_eval") is None:
        raise ConfigError(
            Bilingual(
                f"--harness needs lm-eval, which is not installed: pip install 'siliang[{EXTRA}]'.",
                f"--harness 需要 lm-eval，而它没有安装：pip install 'siliang[{EXTRA}]'。",
            )
        )
    run.check_task()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):  # what the harness prints is no result
            return _run(run, tasks, rows=rows, few_shot=few_shot, chat=chat, batch_size=batch_size)
    except ConfigError:
        raise
    except Exception as error:  # of a task's own code, or its data
        names = ", ".join(tasks)
        raise ConfigError(
            Bilingual(
                f"--harness {names}: lm-eval cannot run it: {type(error).__name__}: {first_line(error)}",
                f"--harness {names}：lm-eval 无法运行：{type(error).__name__}：{local(first_line(error), 'zh')}",
            )
        ) from error


def _run(
    run: OpenedRun,
    tasks: Sequence[str],
    *,
    rows: int | None,
    few_shot: int | None,
    chat: bool,
    batch_size: int | None,
) -> HarnessResult:
    from lm_eval import evaluator
    from lm_eval.models import huggingface

    evaluating: Any = evaluator.simple_evaluate  # their types do not say all that they take
    make_model: Any = huggingface.HFLM
    manager, names = _find_tasks(tasks)
    task, tokenizer = task_of(run.config), run.tokenizer
    if chat:
        tokenizer, template = served_tokenizer(run)
        if run.record.layouts and not template:
            raise ConfigError(
                Bilingual(
                    f"--chat asks in the template of the training, and {run.folder} was trained without one: leave "
                    "--chat out.",
                    f"--chat 使用训练时的模板提问，而 {run.folder} 训练时没有模板：请去掉 --chat。",
                )
            )
    model = make_model(
        pretrained=run.model,
        tokenizer=tokenizer,
        backend="seq2seq" if task.has_encoder else "causal",
        batch_size=batch_size or run.config.train.batch_size,
        max_length=positions_of(run.model).reads,
    )
    with run.computing(), _without_git():
        found: Any = evaluating(
            model,
            tasks=names,
            task_manager=manager,
            num_fewshot=few_shot,
            limit=rows,
            log_samples=False,
            apply_chat_template=chat,
        )
    metrics: dict[str, float] = {}
    less: set[str] = set()
    for name, values in found["results"].items():
        for key, value in values.items():
            metric, _, chosen = str(key).partition(",")  # acc,none: with the filter of the answers
            if isinstance(value, int | float) and not isinstance(value, bool) and chosen:
                own = f"{name}/{metric}" if chosen == "none" else f"{name}/{metric},{chosen}"
                metrics[own] = float(value)
                if found["higher_is_better"].get(name, {}).get(metric) is False:
                    less.add(own)
    counts = {name: int(n["effective"]) for name, n in found["n-samples"].items()}
    versions = {name: str(number) for name, number in found["versions"].items() if number not in NO_VERSIONS}
    return HarnessResult(metrics, counts, versions | {"lm-eval": version("lm-eval")}, frozenset(less))


@contextmanager
def _without_git() -> Iterator[None]:
    """lm-eval asks git for the folder it is called in, which git calls a fatal error where there is no repository."""
    from lm_eval import evaluator

    module: Any = evaluator
    before = module.get_git_commit_hash
    module.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        module.get_git_commit_hash = before


def keep_in_record(
    run: OpenedRun, result: HarnessResult, *, few_shot: int | None = None, chat: bool = False
) -> str | None:
    """Writes what was measured into the run's record, each task in the place of its last measurement.

    Returns:
        Why it is not kept; None where it is.
    """
    trained = run.trained
    if trained is None or trained.folder.resolve() != trained.run.resolve():
        return Bilingual("not kept: these are not the final weights of a run", "没有保存：这不是一次运行的最终权重")
    record = Record.read(trained.run)
    for task in dict.fromkeys(name.partition("/")[0] for name in result.metrics):
        own = {name.partition("/")[2]: value for name, value in result.metrics.items() if name.startswith(f"{task}/")}
        record.harness[task] = HarnessTask(
            metrics=own,
            less_is_better=sorted(name for name in own if f"{task}/{name}" in result.less_is_better),
            rows=result.rows.get(task),
            version=result.versions.get(task, ""),
            lm_eval=result.versions["lm-eval"],
            few_shot=few_shot,
            chat=chat,
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
    try:
        record.write(trained.run)
    except OSError as error:  # a folder that is only read
        return Bilingual(f"not kept: {first_line(error)}", f"没有保存：{local(first_line(error), 'zh')}")
    return None


def _find_tasks(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """lm-eval's manager of tasks, and the names of those that are meant.

    Raises:
        ConfigError: There is none of a name.
    """
    from lm_eval import tasks as of_harness

    make_manager: Any = of_harness.TaskManager
    paths = [name for name in tasks if Path(name).suffix in (".yaml", ".yml") or Path(name).is_dir()]
    if missing := [name for name in paths if not Path(name).exists()]:
        raise ConfigError(
            Bilingual(f"--harness {missing[0]}: no such file.", f"--harness {missing[0]}：没有这个文件。")
        )
    folders = [Path(name) for name in paths if Path(name).is_dir()]
    own = make_manager(include_path=list(folders), include_defaults=False) if folders else None
    of_folders: list[str] = list(own.all_subtasks) if own is not None else []
    if folders and not of_folders:
        raise ConfigError(
            Bilingual(
                f"--harness {folders[0]}: the folder has no task: lm-eval reads .yaml files with `task: NAME`.",
                f"--harness {folders[0]}：文件夹中没有任务：lm-eval 读取含有 `task: NAME` 的 .yaml 文件。",
            )
        )
    named = [name for name in tasks if name not in paths]
    manager = make_manager(include_path=list(folders) or None, include_defaults=bool(named))
    for name in named:
        if name not in manager.all_tasks:
            hint = nearest(name, manager.all_tasks)
            raise ConfigError(
                Bilingual(
                    f"--harness {name}: lm-eval has no such task.{hint} `lm-eval ls tasks` lists them; your own are "
                    "named by their .yaml file.",
                    f"--harness {name}：lm-eval 没有这个任务。{hint.zh}`lm-eval ls tasks` 列出全部任务；"
                    "自己的任务请写它的 .yaml 文件。",
                )
            )
    return manager, [*named, *(name for name in paths if not Path(name).is_dir()), *of_folders]
