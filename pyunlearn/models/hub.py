"""The Hugging Face hub: whether it can be reached, without half a minute of retries, and the upload of a folder."""

from __future__ import annotations

import functools
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyunlearn.errors import DataError, OutputError, first_line
from pyunlearn.progress import logger

_SECONDS = 2.0  # to wait for an answer
_REMEMBERED = 30.0  # seconds
_PROXIES = ("https_proxy", "http_proxy", "all_proxy")
_NAMES = ("_name_or_path", "name_or_path", "base_model_name_or_path")  # in a model's, tokenizer's and adapter's config


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


def download(name: str, revision: str | None, files: Sequence[str]) -> tuple[Path, str]:
    """Return a folder with some files of a data set on the hub, and the commit that they are from.

    They are downloaded where they are not among the downloads; without a network these alone are looked through.

    Args:
        name: OWNER/NAME of the data set.
        revision: branch, tag or commit; None: main.
        files: names of the files; those that the data set does not have are passed over.

    Raises DataError where the hub refuses or cannot be reached, or has no data set of that name or no such revision.
    """
    from huggingface_hub import snapshot_download

    away = not reachable() or _is_offline()
    try:
        folder = snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=list(files), **hub_options(name)
        )
    except Exception as error:  # huggingface_hub and its HTTP clients have no common one
        wanted = name if revision is None else f"{name}@{revision}"
        reason = f"the hub ({host()[0]}) cannot be reached" if away else first_line(error).rstrip(".: ")
        raise DataError(
            f"the data set {wanted} is neither a folder here nor among the downloads, and {reason}: give a folder, or "
            "the name of a data set on the hub"
        ) from error
    return Path(folder), Path(folder).name


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
    replace: bool,
) -> str:
    """Upload a model's folder to a new repository, or in place of all files of one; return the address of the commit.

    Raises OutputError where the hub refuses or cannot be reached, where the repository is there and not to be replaced,
    or where it is public and should not be.
    """
    from huggingface_hub import HfApi

    if not reachable():
        raise OutputError(f"the hub ({host()[0]}) cannot be reached: save the result, and upload its folder later")
    _without_paths(folder)
    api = HfApi(token=token)
    try:
        whole_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        if api.repo_exists(whole_id):
            _require_replaceable(api, whole_id, private=private, replace=replace)
        api.create_repo(whole_id, private=private, exist_ok=replace)
        if revision is not None:
            api.create_branch(whole_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=whole_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns="*" if replace else None,
        )
    except OutputError:
        raise
    except Exception as error:  # huggingface_hub and its HTTP clients have no common one
        raise OutputError(f"the hub did not take the model as {repo_id}: {first_line(error)}") from error
    return str(commit.commit_url)


def _require_replaceable(api: Any, repo_id: str, *, private: bool | None, replace: bool) -> None:
    """Raise OutputError unless the files of a repository may be replaced; warn of its history."""
    if not replace:
        raise OutputError(
            f"the repository {repo_id} is there already, and its files and history can hold the model with the texts: "
            "choose a new name, or pass replace=True to replace its files"
        )
    if private and not api.repo_info(repo_id).private:
        raise OutputError(f"the repository {repo_id} is public: make it private first, or choose a new name")
    logger.warning(
        f"the history of the repository {repo_id}, its other branches and its tags can still hold the model with the "
        "texts: delete them, or choose a new name"
    )


def _without_paths(folder: Path) -> None:
    """Name models without their folders on this machine in the configurations of a model's folder."""
    for file in folder.glob("*config.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        paths = [key for key in _NAMES if Path(str(content.get(key) or "")).is_absolute()]
        if paths:
            content |= {key: Path(content[key]).name for key in paths}
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
