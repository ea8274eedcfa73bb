"""Environment variables that must be set before torch and other libraries read them; imports nothing slow."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

CACHED_KERNELS = 32
SLOWEST = "transformers.modeling_utils"  # the slowest import


def bound_kernel_caches() -> None:
    """Limits oneDNN's caches of kernels. Call it before the process's first matrix product.

    oneDNN, which multiplies in bf16 on CPUs, compiles a kernel for each shape, and two caches keep 1,024 each. Steps
    with different numbers of tokens have different shapes. After 3,000 of them a process had grown by 1.4 GB; with this
    limit it grew by 0.2 GB, and was not slower (docs/log.md). Variables that the user has set are not changed.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(CACHED_KERNELS))


def quieten_libraries() -> None:
    """Turns off the libraries' progress bars, notices and telemetry, unless the user has turned them on."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def quieten_trackers() -> None:
    """Turns off trackers' telemetry, error reports and long waits for a server. Call it before importing a tracker."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("TRACKIO_LOGBOOK_AUTONOTE", "0")


@contextmanager
def changed_environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Sets these variables, or removes them (None), within the block; restores them after it."""
    previous = {name: os.environ.get(name) for name in values}
    try:
        _set_environment(values)
        yield
    finally:
        _set_environment(previous)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def prepare_ray() -> None:
    """Sets Ray's environment. Call it before importing Ray.

    Turns off Ray's telemetry and its paragraph for each lost worker, and turns on the user's token for clusters that
    require one. By itself, Ray uses the token only for the address `auto`.
    """
    has_token = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if has_token or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # a cluster without tokens ignores it
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns that this will become the default


@contextmanager
def importing() -> Iterator[None]:
    """Turns off garbage collection while a command imports libraries, and excludes their objects from it afterwards.

    The imports make a million objects, none of them garbage; collection took a fifth of their time. Does nothing if
    transformers is imported already.
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
