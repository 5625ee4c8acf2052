"""Reachability of the Hugging Face hub: without a network every look-up there takes half a minute of retries."""

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
