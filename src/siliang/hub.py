"""Whether the Hugging Face hub can be reached. Without a network, its client would retry for most of a minute."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from siliang.language import Bilingual, local
from siliang.paths import check_links
from siliang.types import AdapterError, first_line

# what a download from the hub may be asked with, under the names of huggingface_hub
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies", "user_agent")
ANSWER_S = 4.0  # timeout of a request
PATIENCE_S = 6.0  # timeout with the look-up of the address, which the request's timeout does not cover
CACHE_S = 60.0  # lifetime of a cached answer: a network comes and goes, and a command asks many times


def hub_is_off() -> str | None:
    """Why the hub cannot be used; None if it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Bilingual("the hub is switched off by HF_HUB_OFFLINE", "HF_HUB_OFFLINE 已关闭对 Hub 的访问")
    return unreachable()


def unreachable() -> str | None:
    """Why the hub cannot be reached; None if it can."""
    from huggingface_hub import constants

    url = constants.ENDPOINT
    return None if _answers(url) else Bilingual(f"the hub cannot be reached ({url})", f"无法连接 Hub（{url}）")


def only_cached(name: str) -> bool:
    """Whether a model can only come from the hub's cache; for the argument `local_files_only`."""
    return not Path(name).is_dir() and hub_is_off() is not None


def cached_file(name: str, file: str, *, revision: str | None = None) -> Path | None:
    """A model's file in the hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:  # not a name of the hub
        return None
    return Path(path) if isinstance(path, str) else None


def find_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A model's file, from its folder or from the hub.

    None if there is no such file, or if the hub does not return it; the error of loading the model then says why.
    """
    from transformers.utils.hub import cached_file as fetched_file

    folder = Path(name)
    if folder.is_dir():
        return path if (path := folder / file).is_file() else None
    try:
        fetched = fetched_file(
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
    return Path(fetched) if fetched else None


def adapter_folder(model_id: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """The local folder of an adapter; a name that is no folder is looked up on the hub.

    Args:
        subfolder: The adapter is in this folder there.
        hub: What the hub is asked with: one or more of `HUB_ARGUMENTS`.

    Raises:
        AdapterError: It is neither, or `subfolder` leads out of it.
    """
    if subfolder is not None and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise AdapterError(
            Bilingual(
                f"subfolder = {subfolder!r}: must be a folder inside {model_id}.",
                f"subfolder = {subfolder!r}：必须是 {model_id} 之内的文件夹。",
            )
        )
    path = Path(model_id) / (subfolder or "")
    if path.is_dir():
        check_links(path, AdapterError)
        return path
    if path.is_absolute() or str(model_id).startswith(".") or str(model_id).count("/") != 1:
        raise AdapterError(Bilingual(f"There is no adapter folder {model_id}.", f"找不到适配器文件夹 {model_id}。"))
    from huggingface_hub import snapshot_download

    off = hub_is_off()
    try:
        inside = f"{subfolder}/" if subfolder else ""
        wanted = [f"{inside}{name}" for name in ("adapter_config.json", "adapter_model.*")]
        hub["local_files_only"] = bool(hub.get("local_files_only")) or off is not None
        return Path(snapshot_download(str(model_id), allow_patterns=wanted, **hub)) / (subfolder or "")
    except (OSError, ValueError) as error:
        if off is not None:
            raise AdapterError(
                Bilingual(
                    f"{model_id} is neither a folder here nor in the hub's cache; {off}.",
                    f"{model_id} 既不是本机的文件夹，也不在 Hub 的缓存中；{local(off, 'zh')}。",
                )
            ) from None
        raise AdapterError(
            Bilingual(
                f"{model_id} is not a folder here, and the hub did not give it: {first_line(error)}",
                f"{model_id} 不是本机的文件夹，也无法从 Hub 取得：{local(first_line(error), 'zh')}",
            )
        ) from error


_asked: dict[str, tuple[float, bool]] = {}  # by endpoint: the time of the request, and whether it was answered


def _answers(endpoint: str) -> bool:
    when, answered = _asked.get(endpoint, (0.0, False))
    if when == 0.0 or time.monotonic() - when > CACHE_S:
        answered = _ask(endpoint)
        _asked[endpoint] = time.monotonic(), answered
    return answered


def _ask(endpoint: str) -> bool:
    """Whether the endpoint answers, through the proxy of the environment."""
    from huggingface_hub.utils import get_session

    answers: list[bool] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=ANSWER_S)
            answers.append(True)
        except Exception:  # the errors depend on the package that the client uses
            answers.append(False)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    return bool(answers and answers[0])
