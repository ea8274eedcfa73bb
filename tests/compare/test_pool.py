"""Requests that several workers share."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from siliang.compare.pool import Worker, distribute, stop_all


class Echo:
    """A worker that does what a request says, and notes what it is told to do."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.rested = threading.Event()

    def run(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if request["say"] == "break":
            raise ValueError("broken")
        yield {"kind": "began"}
        yield {"kind": request["say"], "error": "", "found": request}

    def stop(self) -> None:
        self.calls.append("stop")

    def wait(self) -> None:
        self.calls.append("wait")
        if "impatient" in self.calls:
            raise KeyboardInterrupt

    def release(self) -> None:
        self.rested.set()

    def close(self) -> None:
        self.calls.append("close")


def test_each_request_is_done_once() -> None:
    workers = [Echo(), Echo(), Echo()]
    requests = [{"say": kind} for kind in ("done", "failed", "died", "done", "done")]
    events = list(distribute(requests, workers))
    assert sorted(e.number for e in events if e.kind == "began") == [0, 1, 2, 3, 4]
    assert {e.number: e.kind for e in events if e.kind != "began"} == {
        number: request["say"] for number, request in enumerate(requests)
    }
    assert all(worker.rested.wait(10) for worker in workers)
    assert list(distribute([], workers)) == []


def test_an_error_in_a_workers_thread_is_raised() -> None:
    """Nobody would end the wait for a thread that is gone."""
    with pytest.raises(ValueError, match="broken"):
        list(distribute([{"say": "done"}, {"say": "break"}], [Echo()]))


def test_all_workers_end_also_when_the_user_does_not_wait() -> None:
    workers = [Echo(), Echo()]
    workers[0].calls.append("impatient")
    with pytest.raises(KeyboardInterrupt):
        stop_all(workers)
    assert workers[0].calls == ["impatient", "stop", "wait", "close"]
    assert workers[1].calls == ["stop", "close"]


def test_a_worker_that_dies_before_it_has_a_log(tmp_path: Path) -> None:
    """It is started before the comparison has been checked, and so before its folder is made."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    worker = Worker(log := tmp_path / "comparison" / "logs" / "worker.log", lambda: {"PYTHONPATH": paths})
    worker.start()
    assert not (tmp_path / "comparison").exists()
    *_, died = worker.run({"kind": "train"})
    worker.close()
    assert died["kind"] == "died" and "no torch here" in died["error"]
    assert "no torch here" in log.read_text()
