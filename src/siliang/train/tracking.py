"""Experiment trackers: the lines of the log, sent as they come to TensorBoard, wandb, SwanLab, MLflow and trackio, by
accelerate's own classes.

    trackers/
        tensorboard/ wandb/ swanlab/ mlflow/ trackio/    what each writes
        ids.json                                         the run's id in each tracker that has one

A tracker writes here, unless the user's environment names another place (WANDB_MODE, SWANLAB_MODE,
MLFLOW_TRACKING_URI): no setting of a run can. A run that is resumed writes what is here anew, from the log of its
checkpoint: nothing stands there twice, and nothing that others put there is read.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from siliang.environment import changed_environment, quieten_trackers
from siliang.files import remove, sweep, write_text
from siliang.language import both
from siliang.paths import is_link
from siliang.records import StepMetrics
from siliang.run_folder import TRACKERS
from siliang.safety.safe_json import dump_json, read_values
from siliang.secrets import HIDDEN, redacted, shortened, without_secrets
from siliang.types import ConfigError, RecordError, first_line

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

IDS = "ids.json"
ID = re.compile(r"[a-z0-9]{8,64}")
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "swanlab": "swanlab", "mlflow": "mlflow-skinny",
            "trackio": "trackio"}  # fmt: skip


def check_trackers(names: Sequence[str]) -> None:
    """The trackers that are asked for are installed.

    Raises:
        ConfigError: One is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"train.trackers: {name} is not installed. Install it by pip install 'siliang[{name}]', or leave it "
                "out of train.trackers."
            )


@dataclass
class Opened:
    """A tracker that was started.

    Attributes:
        known: It goes on in a run that it holds already, outside of the run's folder: what was sent is there.
        last_step: The last step that it holds of a metric; None where it cannot say.
        close: Ends its run.
    """

    tracker: GeneralTracker
    close: Callable[[], None]
    id: str | None = None
    known: bool = False
    last_step: Callable[[str], int] | None = None
    sent: dict[str, int] = field(default_factory=dict)

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends the values of a step, but those that it has."""
        if self.last_step is not None:
            for name in values.keys() - self.sent.keys():
                self.sent[name] = self.last_step(name)
            values = {name: value for name, value in values.items() if step > self.sent[name]}
        if values:
            self.tracker.log(values, step=step)


class Trackers:
    """The trackers of a run. One that fails is left out from then on, with a warning: the training goes on.

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
        settings: dict[str, Any] | None = None,
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
        sweep(place, rf"{re.escape(IDS)}|{'|'.join(PACKAGES)}")
        ids = _read_ids(place / IDS) if lines else {}
        for name in self._names:
            with self._guarded(name):
                opened = _open(name, place, self._project, self._run_name, ids.get(name))
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
            if memory_bytes and line.loss is not None:
                values["train/memory_bytes"] = float(memory_bytes)
            self._send(values, line.step)

    def finish(self, final: dict[str, float]) -> None:
        """Sends the run's final figures."""
        self._send({f"final/{name}": value for name, value in final.items()}, self._last_step)

    def close(self) -> None:
        """Ends the run in each tracker."""
        for name, opened in list(self._opened.items()):
            with self._guarded(name):
                opened.close()
        self._opened.clear()

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
        it is left out."""
        numbers = random.getstate(), np.random.get_state()
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            self._opened.pop(name, None)
            reason = shortened(first_line(error, kind=True), 200)
            self._say(
                both(
                    f"warning    {name} is left out from here on, the training goes on: {reason}",
                    f"警告       {name} 从此不再记录，训练继续：{reason}",
                )
            )
        finally:
            random.setstate(numbers[0])
            np.random.set_state(numbers[1])


def values_of(line: StepMetrics) -> dict[str, float]:
    """What trackers get of a line of the log, by the names that they show."""
    found: dict[str, float | None] = {f"eval/{name}": value for name, value in line.metrics.items()}
    found["eval/loss"] = line.eval_loss
    if line.loss is not None:
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_s", "epoch"):
            found[f"train/{name}"] = getattr(line, name)
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def flat_settings(settings: dict[str, Any]) -> dict[str, str | int | float | bool]:
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


def _without_places(value: Any) -> Any:
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
    return {k: v for k, v in found.items() if k in PACKAGES and isinstance(v, str) and ID.fullmatch(v)}


# ---- each tracker ----


def _open(name: str, place: Path, project: str, run: str, own_id: str | None) -> Opened:
    """Starts a tracker, with the run's folder of it empty."""
    folder = place / name
    remove(folder)
    folder.mkdir()
    with chdir(folder):  # wandb and SwanLab read settings of the folder at hand, which others may have written
        return {
            "tensorboard": _open_tensorboard,
            "wandb": _open_wandb,
            "swanlab": _open_swanlab,
            "mlflow": _open_mlflow,
            "trackio": _open_trackio,
        }[name](folder, project, run, own_id)


def _open_tensorboard(folder: Path, project: str, run: str, own_id: str | None) -> Opened:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker(".", logging_dir=str(folder))
    tracker.start()
    return Opened(tracker, tracker.finish)


def _open_wandb(folder: Path, project: str, run: str, own_id: str | None) -> Opened:
    """Into offline files, which `wandb sync` sends; to the server of the user's environment where that says so."""
    import wandb  # pyright: ignore[reportMissingImports]
    from accelerate.tracking import WandBTracker

    mode = os.environ.get("WANDB_MODE", "offline")
    settings = wandb.Settings(
        root_dir=str(folder),
        symlink=False,
        silent=True,
        console="off",
        login_timeout=30,
        init_timeout=30,
        finish_timeout=60,
        # what wandb sends beside the figures: the command line, the user, the machine, the source
        host="",
        username="",
        email="",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    run_id = own_id or uuid4().hex
    own = {"name": run, "id": run_id, "resume": "allow", "reinit": "finish_previous", "dir": str(folder), "mode": mode}
    tracker = WandBTracker(project, settings=settings, **own)
    tracker.start()
    _remove_links(folder)

    def close() -> None:
        tracker.finish()
        _remove_links(folder)

    return Opened(tracker, close, id=run_id, known=mode == "online" and own_id is not None)


def _remove_links(folder: Path) -> None:
    """wandb links to a log in its cache: a run's folder with a link that leads out of it is not opened again."""
    for path in folder.rglob("*"):
        if is_link(path):
            path.unlink()


def _open_swanlab(folder: Path, project: str, run: str, own_id: str | None) -> Opened:
    """Into local files, for `swanlab watch` where its dashboard is installed, and else for `swanlab sync`; to the
    server of the user's environment where that says so."""
    import swanlab  # pyright: ignore[reportMissingImports]
    from accelerate.tracking import SwanLabTracker

    mode = os.environ.get("SWANLAB_MODE") or ("local" if find_spec("swanboard") else "offline")
    online = mode in ("online", "cloud")
    settings = swanlab.Settings(
        interactive=False,
        probe=dict.fromkeys(("hardware", "runtime", "requirements", "conda", "git", "swanlab", "monitor"), False),
        terminal={"proxy_type": "none"},
    )
    run_id = own_id or uuid4().hex
    named = {"id": run_id, "resume": "allow"} if online else {}
    tracker = SwanLabTracker(project, name=run, mode=mode, log_dir=str(folder), settings=settings, **named)
    tracker.start()
    return Opened(tracker, tracker.finish, id=run_id if online else None, known=online and own_id is not None)


def _open_mlflow(folder: Path, project: str, run: str, own_id: str | None) -> Opened:
    """Into a SQLite file; to MLFLOW_TRACKING_URI where the user's environment has it."""
    import mlflow
    from accelerate.tracking import MLflowTracker

    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    elsewhere = os.environ.get("MLFLOW_TRACKING_URI")
    # MLflow's own tags name the user, the program's path and the source
    tags = {"mlflow.user": "", "mlflow.source.name": "siliang", "mlflow.source.type": "LOCAL"}
    own = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_NESTED_RUN", "MLFLOW_TAGS")
    with ExitStack() as undo:
        # mlflow keeps the place for the whole process, and in the environment
        undo.enter_context(changed_environment({"MLFLOW_TRACKING_URI": elsewhere}))
        before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        undo.callback(mlflow.set_tracking_uri, before)
        # a name of its own: MLflow keeps a connection to each file that the process has written
        mlflow.set_tracking_uri(elsewhere or f"sqlite:///{folder / f'mlflow-{uuid4().hex[:8]}.db'}")
        artifacts = None if elsewhere else (folder / "artifacts").as_uri()
        run_id = own_id if elsewhere else None
        with changed_environment({} if elsewhere else dict.fromkeys(own)):
            tracker = MLflowTracker(project, logging_dir=artifacts, run_id=run_id, run_name=run, tags=tags)
        tracker.start()
        tracker_id = str(tracker.tracker.info.run_id)
        at_end = undo.pop_all()

    def close() -> None:
        with at_end:
            tracker.finish()

    def last_step(name: str) -> int:
        history = mlflow.MlflowClient().get_metric_history(tracker_id, name)
        return max((metric.step for metric in history), default=-1)

    known = run_id is not None
    return Opened(
        tracker, close, id=tracker_id if elsewhere else None, known=known, last_step=last_step if known else None
    )


def _open_trackio(folder: Path, project: str, run: str, own_id: str | None) -> Opened:
    """Into a SQLite file; `trackio sync` sends it."""
    for name in [m for m in sys.modules if m == "trackio" or m.startswith("trackio.")]:
        del sys.modules[name]  # it reads its folder when it is imported: another run's, by now
    remote = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID")
    with changed_environment({"TRACKIO_DIR": str(folder)} | dict.fromkeys(remote)):
        import trackio
        from accelerate.tracking import TrackioTracker

        tracker = TrackioTracker(project, name=run, embed=False, auto_log_gpu=False, auto_log_cpu=False)
        tracker.start()
    return Opened(tracker, trackio.finish)
