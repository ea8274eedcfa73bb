"""Whether the Hugging Face hub can be asked at all: without a network its client tries again for most of a minute."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from siliang.language import Bilingual

ANSWER_S = 4.0  # in which the hub says anything at all
PATIENCE_S = 6.0  # with the search for its address, which no timeout of ours bounds
KEPT_S = 60.0  # for which an answer holds: a network comes and goes, and a command asks many times


def hub_is_off() -> str | None:
    """Why the hub cannot be asked; None where it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Bilingual("the hub is switched off by HF_HUB_OFFLINE", "HF_HUB_OFFLINE 已关闭对 Hub 的访问")
    return unreachable()


def unreachable() -> str | None:
    """Says that the hub does not answer; None where it does."""
    from huggingface_hub import constants

    place = constants.ENDPOINT
    return None if _answers(place) else Bilingual(f"the hub cannot be reached ({place})", f"无法连接 Hub（{place}）")


def only_cached(name: str) -> bool:
    """Whether a model has to come from the hub's cache: for the argument `local_files_only` of those that load it."""
    return not Path(name).is_dir() and hub_is_off() is not None


def cached_file(name: str, file: str, *, revision: str | None = None) -> Path | None:
    """A file of a model in the hub's cache; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:  # no name of the hub's
        return None
    return Path(found) if isinstance(found, str) else None


def find_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a model: of its folder, or of the hub, which is asked for it; None where there is none, or the hub does
    not give it, which loading the model says better."""
    from transformers.utils.hub import cached_file as fetched_file

    folder = Path(name)
    if folder.is_dir():
        return path if (path := folder / file).is_file() else None
    try:
        found = fetched_file(
            name,
            file,
            revision=revision,
            local_files_only=only_cached(name),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


_asked: dict[str, tuple[float, bool]] = {}  # by endpoint: when it was asked, and whether it answered


def _answers(endpoint: str) -> bool:
    when, answered = _asked.get(endpoint, (0.0, False))
    if when == 0.0 or time.monotonic() - when > KEPT_S:
        answered = _ask(endpoint)
        _asked[endpoint] = time.monotonic(), answered
    return answered


def _ask(endpoint: str) -> bool:
    """Whether anything answers there, through the proxy that the environment names."""
    from huggingface_hub.utils import get_session

    found: list[bool] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=ANSWER_S)
            found.append(True)
        except Exception:  # the client's own, of whichever package it is made with
            found.append(False)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    return bool(found and found[0])
