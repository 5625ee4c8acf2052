"""The Hugging Face hub: whether it can be reached, without half a minute of retries, and the upload of a folder."""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyunlearn.errors import OutputError, first_line
from pyunlearn.progress import logger

_SECONDS = 2.0  # to wait for an answer
_REMEMBERED = 30.0  # seconds
_PROXIES = ("https_proxy", "http_proxy", "all_proxy")


def hub_options(name: str) -> dict[str, Any]:
    """Return the keywords with which a model of that name is loaded: where there is no network, of downloads alone."""
    return {} if Path(name).exists() or reachable() else {"local_files_only": True}


def host() -> tuple[str, int]:
    """Return host name and port of the hub, or of the mirror that HF_ENDPOINT names."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    return address.hostname or "", address.port or (80 if address.scheme == "http" else 443)


def reachable() -> bool:
    """Return whether the hub's host answers within two seconds; True where that is not to be known.

    That is with a proxy, and with HF_HUB_OFFLINE, where nothing is looked up.
    """
    from huggingface_hub import constants

    proxied = any(os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXIES)
    return proxied or constants.HF_HUB_OFFLINE or _answers(*host(), int(time.monotonic() / _REMEMBERED))


@functools.lru_cache(maxsize=1)
def _answers(name: str, port: int, _: int) -> bool:
    """Return whether a host can be connected to; in a thread, since a look-up of its name cannot be stopped."""
    answers: list[bool] = []

    def connect() -> None:
        with suppress(OSError), socket.create_connection((name, port), timeout=_SECONDS):
            answers.append(True)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return bool(answers)


def is_repository_name(name: str) -> bool:
    """Return whether a repository on the hub can have that name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Upload a model's folder to a repository, which is made if it is missing; return the address of the commit.

    Raises OutputError where the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    if not reachable():
        raise OutputError(f"the hub ({host()[0]}) cannot be reached: save the result, and upload its folder later")
    api = HfApi(token=token)
    try:
        existed = api.repo_exists(repo_id)
        whole_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if existed:
            logger.warning(
                f"the repository {whole_id} was there before: its history can still hold the model with the texts; "
                "delete its old revisions, or choose a new name"
            )
        if revision is not None:
            api.create_branch(whole_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=whole_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    except Exception as error:  # huggingface_hub and its HTTP clients have no common one
        raise OutputError(f"the hub did not take the model as {repo_id}: {first_line(error)}") from error
    return str(commit.commit_url)
