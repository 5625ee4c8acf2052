"""Versions and hardware on which the numbers of a study depend, of this call and of each seed."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from pyunlearn import __version__
from pyunlearn.study.folder import Folder


def environment(device: str) -> dict[str, Any]:
    """Return versions and hardware: the numbers may depend on them in addition to the settings."""
    return {
        "pyunlearn": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "threads": torch.get_num_threads(),
    }


def add_environment(folder: Folder, name: str, device: str) -> None:
    """Append the environment to the list environment/NAME.json, unless it is the last one there.

    Args:
        folder: of the study.
        name: of a seed, or of a model that is only scored.
        device: of the work that starts now.
    """
    file, now = f"environment/{name}.json", environment(device)
    before = folder.read_json(file) if folder.has(file) else []
    if before[-1:] != [now]:
        folder.json(file, [*before, now])
