"""What the process's environment has to say before torch computes for the first time; imports nothing slow."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

KEPT_KERNELS = 32
SLOWEST = "transformers.modeling_utils"  # of all that is imported


def bound_kernel_caches() -> None:
    """To be called before a process multiplies for the first time.

    oneDNN, which multiplies in bf16 on CPUs, compiles a kernel for each shape, and two caches keep 1,024 each. Steps of
    unlike tokens have shapes of their own: after 3,000 of them a process had grown by 1.4 GB, with this by 0.2, and
    was not slower (docs/log.md). What the user has set stays.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_KERNELS))


def quieten_libraries() -> None:
    """Libraries' progress bars and notices off, unless the user turned them on. And no telemetry."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def quieten_trackers() -> None:
    """To be called before a tracker is imported: no telemetry, no error reports, and no long wait for a server."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("TRACKIO_LOGBOOK_AUTONOTE", "0")


@contextmanager
def changed_environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Within the block these variables have these values, or are not there (None). Behind it they are as they were."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set_environment(values)
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def prepare_ray() -> None:
    """To be called before Ray is imported: no telemetry, no paragraph of Ray's for each worker that is lost, and the
    user's token for clusters that ask for one. Ray shows the token by itself for the address `auto` alone."""
    named = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if named or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # a cluster without tokens does not mind
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns that this will become the default


@contextmanager
def importing() -> Iterator[None]:
    """Around what a command imports. A million objects come to be, none of them garbage: to look for it among them, now
    and in the command's work, took a fifth of the time of imports. Does nothing where transformers is imported already.
    """
    if SLOWEST in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
