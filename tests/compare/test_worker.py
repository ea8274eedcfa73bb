"""The process that trains: its replies."""

from __future__ import annotations

from typing import Any

from siliang.compare.base import CachedBase
from siliang.compare.worker import serve
from siliang.plan.preflight import Planner


def test_a_request_that_is_none_is_a_failed_run() -> None:
    """And not the end of the process, with the base model of the runs that follow."""
    replies: list[dict[str, Any]] = []
    serve({"kind": "train", "config": {"model": 5}}, CachedBase(), Planner(), replies.append)
    assert [reply["kind"] for reply in replies] == ["failed"] and "model" in replies[0]["error"]
