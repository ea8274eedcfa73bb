"""Runs a comparison, from its settings to its records. Finished runs are kept; the others are run or resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from siliang.check import find, gather_input, stop_on_errors
from siliang.compare.pool import Event, Pool, too_many
from siliang.compare.received import Message
from siliang.compare.resume import can_resume, changed_files, open_comparison, recorded_trial
from siliang.compare.trials import MAX_ATTEMPTS, TIMED_STEPS, run_config, search_trials, test_trials
from siliang.config import MethodConfig, RunConfig
from siliang.config.comparison import CompareConfig
from siliang.files import remove_tree, write_text
from siliang.hardware import machine
from siliang.language import Bilingual, both, local
from siliang.records import COMPARISON_NAME, Comparison, Record, Trial, metrics_of
from siliang.run_folder import ADAPTER, CHECKPOINTS, MODEL, hashes
from siliang.tasks import settled, task_of
from siliang.tasks.prepare import prepare_data
from siliang.tasks.record import read_record
from siliang.terminal import shell_command
from siliang.types import ClusterError, ConfigError, InterruptedRunError

if TYPE_CHECKING:
    from siliang.compare.cluster import Cluster

CONFIG_NAME = "compare.yaml"
BASE = "base"  # folder of the base model's metrics and answers
RATE_RULE = "SL042"  # the learning rate is far from the method's default
METHOD_RULES = ("SL024", "SL025", "SL039", "SL042", "SL043")  # findings about one method: the other methods still run


@dataclass
class CompareListener:
    """Callbacks during a comparison. Only the command prints.

    Attributes:
        say: Called with one line of text for the user.
        began: Called with a trial, its number from 1, and the number of trials.
        progress: Called after every step of a trial, with the step, the steps, the loss and the remaining seconds.
        ended: Called with a trial, and its record if the trial was completed.
    """

    say: Callable[[str], None] = lambda line: None
    began: Callable[[Trial, int, int], None] = lambda trial, number, of: None
    progress: Callable[[Trial, Message], None] = lambda trial, progress: None
    ended: Callable[[Trial, Record | None], None] = lambda trial, record: None


def compare(
    config: CompareConfig,
    listener: CompareListener | None = None,
    *,
    jobs: int = 1,
    ray: str | None = None,
    force: bool = False,
    pool: Pool | None = None,
) -> Comparison:
    """Runs every method with every seed in worker processes, and writes a folder of records.

    A comparison that exists in the output folder is resumed: completed runs are kept, and interrupted runs resume
    exactly from their last checkpoint. Methods, seeds and searched settings may be added.

    Args:
        jobs: Runs at the same time, each with its own copy of the base model; with `ray`, on each machine.
        force: Resume even if the base model or the data have changed since the comparison was started.
        ray: The address of a Ray cluster, or `local`. None: worker processes of this machine.
        pool: These processes, which may have been started.

    Raises:
        ClusterError: Ray is not installed, or no cluster responds at the address.
        ConfigError: The folder holds a comparison with other settings.
        ModelError, DataError: The base model or the data have changed, and `force` is False.
        OutputError: The folder holds something else.
        DataError: `siliang check` finds an error in the data.
        InterruptedRunError: Ctrl-C or SIGTERM stopped the comparison.
    """
    if (record := Path(config.run.output) / COMPARISON_NAME).is_file():
        Comparison.open(record)  # a damaged one is refused before the data is read
    run, why = settled(config.run)
    config = replace(config, run=run)
    return _ComparisonRun(config, why, listener or CompareListener(), jobs, ray, force).run(pool)


class _ComparisonRun:
    def __init__(
        self, config: CompareConfig, why: str, listener: CompareListener, jobs: int, ray: str | None, force: bool
    ) -> None:
        self.why, self.force = why, force
        self.config, self.listener, self.jobs, self.ray = config, listener, jobs, ray
        self.folder = Path(config.run.output)
        self.task = task_of(config.run)
        self.shown: set[str] = set()
        self.record = open_comparison(config, self.folder)
        self.pool: Pool | Cluster | None = None

    def run(self, given: Pool | None) -> Comparison:
        pool = self._workers() if given is None else given
        self._check()
        self._check_files()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / CONFIG_NAME, self.config.to_yaml())
        self._save()
        try:
            with _sigterm_interrupts(), pool as self.pool:
                self._measure_steps()
                self._search()
                if self.task.writes and not self.record.base:
                    self._measure_base()
                self._run_trials(test_trials(self.config, self.record.chosen))
        except KeyboardInterrupt:
            for trial in self.record.trials:
                if trial.status == "running":  # stopped by the user: not a failed attempt
                    trial.status, trial.attempts = "waiting", trial.attempts - 1
            self._save()
            done = sum(t.status == "completed" for t in self.record.trials)
            of, command = len(self.record.trials), shell_command("siliang", "compare", self.folder / CONFIG_NAME)
            raise InterruptedRunError(
                Bilingual(
                    f"Stopped; {done} of {of} runs are done and saved.\nResume with the same command, or: {command}",
                    f"已停止；{of} 次运行中已完成并保存 {done} 次。\n用同一命令继续，或运行：{command}",
                )
            ) from None
        self.record.status = "completed"
        self._save()
        return self.record

    def _workers(self) -> Pool | Cluster:
        if self.ray is None:
            return Pool(self.jobs, self.folder / "logs")
        if find_spec("ray") is None:
            raise ClusterError(
                Bilingual(
                    "--ray needs Ray, which is not installed: pip install 'siliang[cluster]'.",
                    "--ray 需要 Ray，但没有安装：pip install 'siliang[cluster]'。",
                )
            )
        from siliang.compare.cluster import Cluster  # imports Ray

        return Cluster(self.ray, self.jobs, self.folder / "logs", self.listener.say)

    # ---- checks, before anything is written ----

    def _check(self) -> None:
        """Raises the errors that every run would raise."""
        if self.ray is None and (warning := too_many(self.jobs)) is not None:
            self._warn_once(both("warning    ", "警告       ") + local(warning))
        trial = test_trials(self.config, {})[0]
        config = run_config(self.config, trial, self.folder, {})
        subject = gather_input(config, machine(), prepare_data(config, self.why))
        findings = [f for f in find(subject, stop_early=True) if f.code not in METHOD_RULES]
        stop_on_errors(findings)
        for finding in findings:
            self._warn_once(both("warning    ", "警告       ") + f"{finding.code} {finding.headline}")
        if not len(subject.eval):
            raise ConfigError(
                Bilingual(
                    "a comparison needs held-out rows: give data.eval, or a data.test_size above 0.",
                    "比较需要验证集：请给出 data.eval，或把 data.test_size 设为大于 0。",
                )
            )
        rows, held_out, columns = len(subject.train), len(subject.eval), subject.examples.says_columns
        self.listener.say(
            both(
                f"data       {rows:,} training rows, {held_out:,} held-out rows, the same for all runs",
                f"数据       {rows:,} 条训练样本，{held_out:,} 条验证样本，所有运行都相同",
            )
        )
        self.listener.say(both(f"columns    {columns}", f"列         {columns.zh}"))
        if (template := subject.prepared.template_in_words) is not None:
            self.listener.say(both(f"template   {template}", f"模板       {template.zh}"))
        for line in subject.examples.notes:
            self.listener.say(f"           {local(line)}")
        not_pairs = [prompt for prompt in self.config.settings.prompts if len(prompt.split("\t")) != 2]
        if not_pairs and subject.examples.layout == "sentence-pair":
            raise ConfigError(
                Bilingual(
                    f"prompts: {not_pairs[0]!r} must be two texts separated by a tab, because the data has pairs.",
                    f"prompts：{not_pairs[0]!r} 必须是用制表符隔开的两段文本，与数据一致。",
                )
            )

    def _check_files(self) -> None:
        for kind, problem in changed_files(self.config, self.folder, self.record):
            if not self.force:
                raise kind(
                    Bilingual(
                        f"{problem[0].upper()}{problem[1:]}. New runs could not be compared with the finished ones.\n"
                        "Restore it, choose another folder with --output, or continue anyway with --force.",
                        f"{local(problem, 'zh')}。新的运行无法与已有的比较。\n"
                        "请恢复原样、用 --output 换一个文件夹，或加 --force 继续。",
                    )
                )
            self.listener.say(both("warning    ", "警告       ") + local(problem))
        self.record.model_files, self.record.data_files = hashes(self.config.run)

    def _warn_once(self, line: str) -> None:
        """Shows a warning once: every run repeats it."""
        if line.startswith(("warning", "警告")) and line not in self.shown:
            self.shown.add(line)
            self.listener.say(line)

    def _save(self) -> None:
        self.record.save(self.folder / COMPARISON_NAME)

    # ---- the phases ----

    def _measure_steps(self) -> None:
        """With a budget in minutes: measures how many steps of each method fit into it."""
        minutes = self.config.settings.minutes
        if minutes is None:
            return
        labels = [e.label for e in self.config.settings.methods if e.label not in self.record.steps]
        requests = []
        for label in labels:
            trial = Trial(method=label, seed=self.config.seeds[0], purpose="test", folder=f"timing/{len(requests)}")
            values = run_config(self.config, trial, self.folder, {label: TIMED_STEPS})
            requests.append(self._request("base", values) | {"kind": "steps", "minutes": minutes})
        for event in self._run_requests(requests):
            if event.kind == "done":
                self.record.steps[labels[event.number]] = event.message["found"]["steps"]
                label = labels[event.number]
                steps = self.record.steps[label]
                self.listener.say(both(f"budget     {label}: {steps:,} steps", f"时间预算   {label}：{steps:,} 步"))
        remove_tree(self.folder / "timing")
        self._save()

    def _search(self) -> None:
        """Runs the trials of the search, and chooses the settings of each method."""
        trials = search_trials(self.config)
        if not trials:
            self.record.chosen = {}
            return
        self._run_trials(trials)
        self.record.chosen = {}
        best: dict[str, float] = {}
        measured = ""
        for trial in (t for t in self.record.trials if t.purpose == "search" and t.status == "completed"):
            record = read_record(self.folder / trial.folder)
            quality = self.task.on(record.layout).quality
            found = record.final[quality.name]
            if trial.method not in best or quality.better(found, best[trial.method]):
                best[trial.method], self.record.chosen[trial.method] = found, trial.settings
            measured = quality.name
        for label, settings in self.record.chosen.items():
            shown = ", ".join(f"{key} {value}" for key, value in settings.items())
            self.listener.say(
                both(
                    f"chosen     {label}: {shown} ({measured} {best[label]:.4f} on validation rows)",
                    f"选定       {label}：{shown}（验证集上 {measured} {best[label]:.4f}）",
                )
            )
        self._save()

    def _measure_base(self) -> None:
        values = untuned_config(self.config.run, self.folder / BASE)
        for event in self._run_requests([self._request("base", values)]):
            if event.kind == "done":
                self.record.base = event.message["found"]
                loss = self.record.base["eval_loss"]
                self.listener.say(
                    both(
                        f"base       held-out loss {loss:.4f} before training",
                        f"基座       训练前的验证损失 {loss:.4f}",
                    )
                )
            elif event.kind in ("failed", "died"):
                error = event.message["error"]
                self.listener.say(
                    both(
                        f"warning    the base model was not measured: {error}", f"警告       基座模型测量失败：{error}"
                    )
                )
        remove_tree(self.folder / BASE / CHECKPOINTS)
        self._save()

    def _run_trials(self, trials: list[Trial]) -> None:
        """Runs the trials that are not completed."""
        trials = [recorded_trial(trial, self.config, self.folder, self.record) for trial in trials]
        purpose = trials[0].purpose
        old = [t for t in self.record.trials if t.purpose != purpose]
        self.record.trials = [*old, *trials] if purpose == "test" else [*trials, *old]
        todo = [t for t in trials if t.status != "completed"]
        if len(todo) < len(trials):
            done, of = len(trials) - len(todo), len(trials)
            self.listener.say(
                both(f"resumed    {done} of {of} runs are completed", f"继续       {of} 次运行中已有 {done} 次完成")
            )
        requests, requested = [], []
        for trial in todo:
            if trial.attempts >= MAX_ATTEMPTS and trial.status == "running":
                trial.status = "failed"
                trial.error = Bilingual(
                    f"started {trial.attempts} times, and the process was killed each time: out of memory?",
                    f"启动了 {trial.attempts} 次，每次进程都被杀死：是否内存不足？",
                )
                self.listener.ended(trial, None)
                continue
            trial.status, trial.error = "waiting", None
            values = run_config(self.config, trial, self.folder, self.record.steps)
            requests.append(self._request("train", values) | {"resume": can_resume(values)})
            requested.append(trial)
        self._save()
        started: dict[int, int] = {}  # request to trial number, in the order of starting
        for event in self._run_requests(requests):
            trial = requested[event.number]
            match event.kind:
                case "began":
                    number = started.setdefault(event.number, len(trials) - len(requested) + len(started) + 1)
                    trial.status, trial.attempts = "running", trial.attempts + 1
                    self._save()
                    self.listener.began(trial, number, len(trials))
                case "say":
                    line = event.message["line"]
                    # the search chose this learning rate, not the user
                    if RATE_RULE not in line or "learning_rate" not in trial.settings:
                        self._warn_once(line)
                case "progress":
                    self.listener.progress(trial, event.message["progress"])
                case "lost":
                    error = event.message["error"]
                    self.listener.say(
                        both(
                            f"lost       {trial.method}, seed {trial.seed}: {error}; it is run again",
                            f"中断       {trial.method}，种子 {trial.seed}：{local(error, 'zh')}；重新运行",
                        )
                    )
                case "done":
                    trial.status = "completed"
                    self._finished(trial)
                case _:
                    trial.status, trial.error = "failed", event.message["error"]
                    self._save()
                    self.listener.ended(trial, None)

    def _finished(self, trial: Trial) -> None:
        folder = self.folder / trial.folder
        for name in (CHECKPOINTS, *((ADAPTER, MODEL) if trial.purpose == "search" else ())):
            remove_tree(folder / name)
        record = read_record(folder)
        trial.metrics = metrics_of(record)
        self._save()
        self.listener.ended(trial, record)

    def _request(self, kind: str, config: RunConfig) -> Message:
        settings = self.config.settings
        config = config if self.ray is None else config.resolved()  # Ray's processes have another current folder
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        if kind == "base":
            Path(config.output).mkdir(parents=True, exist_ok=True)
        return {
            "kind": kind,
            "config": config.model_dump(mode="json"),
            "force": self.force,
            "prompts": settings.prompts,
            "max_new_tokens": settings.max_new_tokens,
        }

    def _run_requests(self, requests: list[Message]) -> Iterator[Event]:
        assert self.pool is not None
        return self.pool.run(requests)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Within the block, SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def untuned_config(run: RunConfig, output: Path) -> RunConfig:
    """A config whose model has the outputs of the base model: LoRA starts at zero. `all-linear` exists in every
    model."""
    method = MethodConfig.model_validate({"name": "lora", "r": 1, "target_modules": "all-linear"})
    return run.model_copy(update={"output": str(output), "method": method})
