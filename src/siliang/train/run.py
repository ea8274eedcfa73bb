"""One run, from config to record: prepare, train, finish; and which files are removed after a failure."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from siliang.config import RunConfig
from siliang.disk_errors import translate_disk_errors
from siliang.distributed.ranks import find_ranks, translate_rank_errors
from siliang.files import remove_tree
from siliang.language import Bilingual, both
from siliang.memory.peak import PeakMemory
from siliang.records import Record
from siliang.run_folder import CHECKPOINTS, create_output, load_base, write_config
from siliang.terminal import shell_command
from siliang.train.errors import bad_step_error, interrupted_error
from siliang.train.finish import measure, save, write_peak
from siliang.train.log import Log
from siliang.train.loop import Training
from siliang.train.prepare import prepare
from siliang.train.resume import Resumed, check_resumed
from siliang.train.saving import checkpoints
from siliang.train.stopping import Timer, stopping_on_signal
from siliang.train.tracking import Trackers
from siliang.train.types import Base, Listener, Planner, Run
from siliang.types import InterruptedRunError, SiliangError, first_line

SLOW_DISK_BYTES_PER_S = 50e6  # for a checkpoint before the first one was timed


def train(
    config: RunConfig,
    listener: Listener | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    base: Base = load_base,
    planner: Planner | None = None,
) -> Record:
    """Trains as `config` says and leaves a run folder.

    Args:
        resume: Continue from the last checkpoint in the output folder. A finished run is not changed.
        force: Continue also if the base model or the data have changed since the run started.
        base: Gives the base model; called as `load_base` is. For callers that have it loaded already.
        planner: Plans the run before the model is loaded; None for no plan.

    Raises:
        SiliangError: Something that the user can correct. If no step was made, no files are left.
        InterruptedRunError: Ctrl-C or SIGTERM came, or train.max_time is over; a checkpoint was saved.
    """
    started = time.monotonic()
    ranks = find_ranks()
    listener = listener or Listener()
    if not ranks.is_main:
        listener = Listener()
    folder = Path(config.output)
    resumed: Resumed | None = None
    if resume:
        resumed = ranks.from_main(lambda: check_resumed(config, folder, listener.say, force=force))
        if resumed.finished:
            assert resumed.record is not None
            made = _steps_made(resumed.record)
            listener.say(
                both(
                    f"finished   {folder} was finished before: {made}, nothing is left to do",
                    f"已完成     {folder} 此前已经训练完：{made.zh}，无需继续",
                )
            )
            return resumed.record
        config = resumed.config
    new = not resume and ranks.from_main(lambda: create_output(folder, for_run=True))
    try:
        run = prepare(config, listener, folder, base=base, planner=planner, resumed=resumed, force=force)
        run.record.changed += resumed.changed if resumed else []
    except BaseException:
        if new and ranks.is_main:
            remove_tree(folder)
        raise
    try:
        with (
            translate_disk_errors(folder),
            translate_rank_errors(
                Bilingual(
                    f"What was saved is whole: {shell_command('siliang', 'train', '--resume', folder)}",
                    f"已保存的内容是完整的：{shell_command('siliang', 'train', '--resume', folder)}",
                )
            ),
        ):
            return _train(run, started, checkpoint=resumed.checkpoint if resumed else None)
    except InterruptedRunError:
        raise
    except BaseException as error:
        if not ranks.is_main:
            raise
        run.record.status, run.record.error = "failed", first_line(error, kind=True)
        _try_to_write(run.record, folder)
        if new and not checkpoints(folder / CHECKPOINTS) and isinstance(error, OSError | SiliangError):
            remove_tree(folder)
        raise


def _train(run: Run, started: float, *, checkpoint: Path | None) -> Record:
    """Trains a prepared run, measures and saves it.

    Args:
        started: When the run began, by time.monotonic(): loading counts for train.max_time.
    """
    t, record = run.config.train, run.record
    if run.ranks.is_main:
        write_config(run.folder, run.config.resolved())
    run.write_record()
    timer = Timer(
        save_every_s=t.save_every_minutes * 60 if t.save_every_minutes else None,
        stop_at=started + t.max_time if t.max_time else None,
        save_s=12 * record.parameters.trained / SLOW_DISK_BYTES_PER_S,
    )
    planned = sum(record.memory.predicted_parts.values())
    with (
        stopping_on_signal(launched=run.ranks.size > 1) as stop,
        PeakMemory(run.device, planned) as memory,
        Trackers(
            t.trackers if run.ranks.is_main else [],
            folder=run.folder,
            project=t.tracker_project,
            settings=record.config,
            say=run.listener.say,
        ) as trackers,
    ):
        training = Training(run, log=Log(run.listener.progress, memory, trackers), timer=timer, stop=stop)
        training.run(checkpoint)
        _record_steps(training, memory)
        if training.stopped:
            record.status = "interrupted"
            run.write_record()
            raise interrupted_error(run, training.stopped, training.step, run.steps)
        if (bad := training.guard.check_end()) is not None:
            raise bad_step_error(run, bad)
        measure(training, memory)
        trackers.finish(record.final)
    training.engine.close()
    save(run)
    run.listener.trained(run)
    record.status = "completed"
    run.write_record()
    return record


def _record_steps(training: Training, memory: PeakMemory) -> None:
    """Writes the steps into the record."""
    record = training.prepared.record
    record.seconds.train, record.seconds.steps = round(training.log.train_s, 3), round(training.log.steps_s, 3)
    record.steps, record.tokens_trained = training.log.lines, training.tokens_trained
    record.passed_over = training.guard.skipped
    if (stream := training.prepared.stream) is not None:
        record.rows.skipped = [*dict.fromkeys([*record.rows.skipped, *stream.skipped])]
    record.memory.loaded_bytes = memory.start_bytes
    write_peak(record, memory)
    record.memory.recomputed_layers = training.engine.recompute.most


def _steps_made(record: Record) -> Bilingual:
    made = record.steps[-1].step if record.steps else 0
    return Bilingual(f"{made:,} steps", f"共 {made:,} 步")


def _try_to_write(record: Record, folder: Path) -> None:
    with suppress(OSError):  # OutputError is one too: the disk that failed the run
        record.write(folder)
