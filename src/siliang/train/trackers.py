"""Each experiment tracker, started by accelerate's class for it: where it writes, and what it may not collect.

tracking.py sends them the log.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, chdir
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from siliang.environment import changed_environment
from siliang.files import remove
from siliang.paths import is_link

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


@dataclass
class Opened:
    """A tracker that was started.

    Attributes:
        known: It continues a run that it already holds, outside of the run's folder.
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


def open_tracker(name: str, place: Path, project: str, run: str, own_id: str | None) -> Opened:
    """Starts a tracker, with the run's folder of it empty."""
    folder = place / name
    remove(folder)
    folder.mkdir()
    with chdir(folder):  # wandb and SwanLab read settings of the folder at hand, which others may have written
        return OPENERS[name](folder, project, run, own_id)


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
        # what wandb sends besides the metrics: the command line, the user, the machine, the source
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
        with changed_environment({"MLFLOW_TRACKING_URI": None}):  # which is not what the process has set
            before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        undo.enter_context(changed_environment({"MLFLOW_TRACKING_URI": elsewhere}))
        undo.callback(mlflow.set_tracking_uri, before)  # pyright: ignore[reportArgumentType]  # None: unset
        # a new name: MLflow keeps a connection to each file that the process has written
        mlflow.set_tracking_uri(elsewhere or f"sqlite:///{folder / f'mlflow-{uuid4().hex}.db'}")
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


OPENERS: dict[str, Callable[[Path, str, str, str | None], Opened]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "swanlab": _open_swanlab,
    "mlflow": _open_mlflow,
    "trackio": _open_trackio,
}
