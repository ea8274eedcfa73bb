"""Experiment trackers: TensorBoard, wandb, SwanLab, MLflow and trackio get each line of the log, by accelerate's own
classes.

    trackers/
        tensorboard/ wandb/ swanlab/ mlflow/ trackio/    what each writes
        ids.json                                         the run's id in each tracker that has one

A tracker writes here, unless the user's environment names another place (WANDB_MODE, SWANLAB_MODE,
MLFLOW_TRACKING_URI): no setting of a run can. A resumed run writes this folder again, from the log of its checkpoint:
nothing is in it twice, and files that others put there are not read.
"""

from __future__ import annotations

import json
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import numpy as np

from siliang.environment import quieten_trackers
from siliang.files import remove_stale, write_text
from siliang.language import Bilingual, both
from siliang.paths import is_link
from siliang.records import StepMetrics
from siliang.run_folder import TRACKERS
from siliang.safety.safe_json import dump_json, read_values
from siliang.secrets import HIDDEN, redacted, shortened, without_secrets
from siliang.train.trackers import OPENERS, Opened, open_tracker
from siliang.types import ConfigError, RecordError, first_line

IDS = "ids.json"
ID = re.compile(r"[a-z0-9]{8,64}")


def check_trackers(names: Sequence[str]) -> None:
    """The trackers that are asked for are installed.

    Raises:
        ConfigError: One is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                Bilingual(
                    f"train.trackers: {name} is not installed. Install it by pip install 'siliang[{name}]', "
                    "or leave it "
                    "out of train.trackers.",
                    f"train.trackers：{name} 没有安装。请运行 pip install 'siliang[{name}]'，"
                    "或从 train.trackers 中去掉。",
                )
            )


class Trackers:
    """The trackers of a run. A tracker that fails is switched off with a warning, and training continues.

    Args:
        names: Of config.TrackerName. On a rank that is not the first, none.
        folder: The run's.
        project: Under which runs are gathered; MLflow calls it an experiment.
        settings: Of the run, as the record has them.
        say: Gets a line for the user.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        *,
        folder: Path = Path(),
        project: str = "",
        settings: Mapping[str, object] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._names = list(dict.fromkeys(names))
        self._folder, self._project, self._settings, self._say = folder.absolute(), project, settings or {}, say
        self._run_name = without_secrets(self._folder.name).replace(HIDDEN, "hidden")
        self._opened: dict[str, Opened] = {}
        self._last_step = 0

    def start(self, lines: Sequence[StepMetrics]) -> None:
        """Starts each tracker, and gives it the lines of the log so far: those of a run that is resumed."""
        if not self._names:
            return
        quieten_trackers()
        place = self._folder / TRACKERS
        if is_link(place):
            self._say(
                both(
                    f"warning    {place} is a link: nothing is tracked",
                    f"警告       {place} 是链接：不记录到任何跟踪工具",
                )
            )
            return
        place.mkdir(exist_ok=True)
        remove_stale(place, rf"{re.escape(IDS)}|{'|'.join(OPENERS)}")
        ids = _read_ids(place / IDS) if lines else {}
        for name in self._names:
            with self._guarded(name):
                opened = open_tracker(name, place, self._project, self._run_name, ids.get(name))
                self._opened[name] = opened
                if not opened.known:
                    opened.tracker.store_init_configuration(flat_settings(self._settings))
                if not opened.known or opened.last_step is not None:
                    for line in lines:
                        opened.log(values_of(line), line.step)
        ids |= {name: opened.id for name, opened in self._opened.items() if opened.id is not None}
        if ids:
            try:
                write_text(place / IDS, dump_json(ids))
            except OSError as error:
                reason = error.strerror or error
                self._say(
                    both(
                        f"warning    {place / IDS} cannot be written: {reason}",
                        f"警告       无法写入 {place / IDS}：{reason}",
                    )
                )
        if self._opened:
            names = ", ".join(self._opened)
            self._say(both(f"trackers   {names}, in {place}", f"实验跟踪   {names}，位于 {place}"))

    def log(self, line: StepMetrics, memory_bytes: int = 0) -> None:
        """Sends a line of the log.

        Args:
            memory_bytes: The peak so far; 0 where it is not known.
        """
        if self._opened:
            values = values_of(line)
            if memory_bytes and line.learning_rate is not None:
                values["train/memory_bytes"] = float(memory_bytes)
            self._send(values, line.step)

    def finish(self, final: dict[str, float]) -> None:
        """Sends the run's final metrics."""
        self._send({f"final/{name}": value for name, value in final.items()}, self._last_step)

    def close(self) -> None:
        """Ends the run in each tracker."""
        while self._opened:
            name, opened = self._opened.popitem()
            with self._guarded(name):
                opened.close()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _send(self, values: dict[str, float], step: int) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._last_step = step
        for name, opened in list(self._opened.items()):
            with self._guarded(name):
                opened.log(values, step)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Around what a tracker does: it prints nothing, draws no random number of the training's, and where it fails
        it is left out. Its run is ended: MLflow starts no other in this process while one is active."""
        numbers = random.getstate(), np.random.get_state()
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    yield
                except Exception:
                    if (failed := self._opened.pop(name, None)) is not None:
                        with suppress(Exception):
                            failed.close()
                    raise
        except Exception as error:
            reason = shortened(first_line(error, kind=True), 200)
            self._say(
                both(
                    f"warning    {name} is switched off, and training continues: {reason}",
                    f"警告       {name} 已停用，训练继续：{reason}",
                )
            )
        finally:
            random.setstate(numbers[0])
            np.random.set_state(numbers[1])


def values_of(line: StepMetrics) -> dict[str, float]:
    """What trackers get of a line of the log, by the names that they show."""
    found: dict[str, float | None] = {f"eval/{name}": value for name, value in line.metrics.items()}
    found["eval/loss"] = line.eval_loss
    if line.learning_rate is not None:  # not a line of an evaluation
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_s", "epoch"):
            found[f"train/{name}"] = getattr(line, name)
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def flat_settings(settings: Mapping[str, object]) -> dict[str, str | int | float | bool]:
    """Settings by their dotted names, as trackers take them: without secrets, lists as texts, those that are not set
    left out. Of a whole path, the name: where things lie on this machine is nobody's business."""
    found: dict[str, str | int | float | bool] = {}
    for name, value in redacted(settings).items():
        value = _without_places(value)
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": v for inner, v in flat_settings(value).items()}
        elif isinstance(value, str | int | float | bool):
            found[name] = value
        elif value is not None:
            found[name] = json.dumps(value, ensure_ascii=False, default=str)
    return found


def _without_places(value: object) -> object:
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _read_ids(path: Path) -> dict[str, str]:
    """The ids of a run that is resumed; none of those that no tracker makes."""
    try:
        found = read_values(path, RecordError) if path.is_file() else {}
    except RecordError:
        return {}
    return {k: v for k, v in found.items() if k in OPENERS and isinstance(v, str) and ID.fullmatch(v)}
