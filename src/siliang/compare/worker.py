"""The worker process: it reads one request per line, writes one reply per line, and caches the base model.

It is a separate process, so that a run that is killed for memory does not end the comparison. Requests and replies are
JSON; the output of libraries goes to the log.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import queue
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import IO, Any

from siliang.environment import importing
from siliang.import_index import keep_index

keep_index()
with importing():
    import torch
    from transformers.utils.logging import disable_progress_bar

    from siliang.compare.base import CachedBase
    from siliang.compare.pool import threads_each
    from siliang.compare.received import Message
    from siliang.config import RunConfig
    from siliang.files import append
    from siliang.memory.free import free_memory
    from siliang.plan.preflight import Planner
    from siliang.records import ANSWERS_NAME
    from siliang.tasks import task_of
    from siliang.terminal import clean_standard_streams
    from siliang.train.log import Progress
    from siliang.train.loop import Training
    from siliang.train.prepare import prepare
    from siliang.train.run import train
    from siliang.train.types import Listener, Run
    from siliang.types import SiliangError
    from siliang.use.answers import collect

Reply = Callable[[Message], None]


def main(jobs: int) -> None:
    """Executes requests until the parent process ends.

    Args:
        jobs: How many workers share the CPU's threads.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    clean_standard_streams()  # the log
    disable_progress_bar()
    gc.freeze()  # no garbage among the modules: each collection would look through a million objects
    warnings.simplefilter("ignore", FutureWarning)
    requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin, requests), daemon=True).start()

    def reply(message: Message) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    if jobs > 1 and not torch.cuda.is_available():
        torch.set_num_threads(threads_each(jobs))
    base, planner = CachedBase(), Planner()
    while True:
        request = requests.get()
        _log_to(Path(request["log"]))
        serve(request, base, planner, reply)


@cache
def _log_to(path: Path) -> None:
    """What this process writes from now on goes to this file."""
    with append(path) as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())


def serve(request: Message, base: CachedBase, planner: Planner, reply: Reply) -> None:
    """Executes one request, and replies with its results or the error."""
    try:
        config = RunConfig.model_validate(request["config"])
        match request["kind"]:
            case "train":
                found = _train(config, request, base, planner, reply)
            case "base":
                found = _measure_base(config, request, base)
            case _:
                found = _measure_steps(config, request, base)
        reply({"kind": "done", "found": found})
    except BaseException as error:
        base.drop()
        if not isinstance(error, SiliangError):
            traceback.print_exc()
        reply({"kind": "failed", "error": _error_text(error)})
        if isinstance(error, KeyboardInterrupt):
            raise


def _train(config: RunConfig, request: Message, base: CachedBase, planner: Planner, reply: Reply) -> Message:
    models: list[Any] = []

    def trained(run: Run) -> None:
        collect(run, request["prompts"], request["max_new_tokens"]).save(run.folder / ANSWERS_NAME)
        models.append(run.model)

    for name in task_of(config).libraries:  # otherwise their memory would count as this run's
        importlib.import_module(name)
    free_memory()
    record = train(
        config,
        _listener(reply, trained),
        resume=request["resume"],
        force=request.get("force", False),
        base=base,
        planner=planner,
    )
    base.store(models.pop(), config)
    memory = record.memory  # loading counts for each run, even if the model was cached
    memory.loading_bytes = max(memory.loading_bytes, base.loading_bytes)
    memory.peak_bytes = max(memory.loading_bytes, memory.steps_bytes)
    record.write(Path(config.output))
    return {"loads": base.loads, **record.final}


def _measure_base(config: RunConfig, request: Message, base: CachedBase) -> Message:
    """The loss of the untuned model on the held-out rows, and its answers. `config` is from `untuned_config`."""
    run = prepare(config, Listener(), Path(config.output), base=base)
    training = Training(run)
    loss = training.measure()["loss"]
    training.engine.close()
    found = collect(run, request["prompts"], request["max_new_tokens"], base=True)
    found.save(run.folder / ANSWERS_NAME)
    base.store(run.model, config)
    return {"eval_loss": loss, **run.task.of_loss(loss, run.eval_rows), **found.metrics}


def _measure_steps(config: RunConfig, request: Message, base: CachedBase) -> Message:
    """The number of steps that fit into `minutes`, by the speed of a few steps."""
    run = prepare(config, Listener(), Path(config.output), base=base)
    ends: list[float] = []  # the time at the end of each step
    training = Training(run, on_step=lambda _: ends.append(time.perf_counter()))
    training.run()
    training.engine.close()
    base.store(run.model, config)
    times = ends[len(ends) // 2 :]
    step_s = (times[-1] - times[0]) / (len(times) - 1)
    return {"steps": max(1, int(request["minutes"] * 60 / step_s))}


def _listener(reply: Reply, trained: Callable[[Run], None]) -> Listener:
    def progress(p: Progress) -> None:
        reply({"kind": "progress", "progress": asdict(p)})

    return Listener(lambda line: reply({"kind": "say", "line": line}), progress, trained)


def _error_text(error: BaseException) -> str:
    """The text of an error in one line."""
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error):
        return "out of memory: use a smaller train.batch_size, or train.gradient_checkpointing"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else ""
    return text if isinstance(error, SiliangError) else f"{type(error).__name__}: {text}".rstrip(": ")


def _read(stdin: IO[str], requests: queue.SimpleQueue[Message]) -> None:
    for line in stdin:
        requests.put(json.loads(line))
    os._exit(1)  # the parent process has ended


if __name__ == "__main__":
    main(int(sys.argv[1]))
