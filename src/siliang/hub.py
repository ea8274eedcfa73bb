"""Whether the Hugging Face hub can be asked at all: without a network its client tries again for most of a minute."""

from __future__ import annotations

import functools
import threading

ANSWER_S = 4.0  # in which the hub says anything at all
PATIENCE_S = 6.0  # with the search for its address, which no timeout of ours bounds


def hub_is_off() -> str | None:
    """Why the hub cannot be asked; None where it can.

    Where it does not answer, the process is told to use what the hub's cache holds, at once and without asking again.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off by HF_HUB_OFFLINE" if not _found_silent else _silent(constants.ENDPOINT)
    if _answers(constants.ENDPOINT):
        return None
    _found_silent.append(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = True
    return _silent(constants.ENDPOINT)


def is_cached(name: str, file: str, *, revision: str | None = None) -> bool:
    """Whether the hub's cache holds a file of a model."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, file, revision=revision), str)
    except ValueError:  # no name of the hub's
        return False


_found_silent: list[str] = []


def _silent(endpoint: str) -> str:
    return f"the hub cannot be reached ({endpoint})"


@functools.cache
def _answers(endpoint: str) -> bool:
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
