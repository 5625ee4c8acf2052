"""Options of every command that takes a model: how it is loaded, and where it runs."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import typer

_PANEL: dict[str, Any] = {"rich_help_panel": "Model", "show_default": False}

Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        help="Number format of the weights, in which they are loaded, trained and saved. Default: auto, the one in "
        "which they were saved (float32 for a .gguf file).",
        **_PANEL,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="Where the model runs: cpu, cuda, cuda:1, mps, xpu, ... Default: the GPU, if there is one.",
        **_PANEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="REVISION",
        help="Branch, tag or commit of MODEL on the hub; the same as MODEL@REVISION, which other models' names take "
        "too.",
        **_PANEL,
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attn-implementation",
        metavar="NAME",
        help="Implementation of attention in transformers: eager, sdpa, flash_attention_2, ... Default: transformers' "
        "choice.",
        **_PANEL,
    ),
]
RemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the model: only for a model whose author you trust. Without it none is run.",
        **_PANEL,
    ),
]
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "dtype": (Dtype, "auto"),
    "device": (Device, None),
    "revision": (Revision, None),
    "attn_implementation": (Attention, None),
    "trust_remote_code": (RemoteCode, False),
}


def model_options() -> list[inspect.Parameter]:
    """Return the parameters that the options add to a command."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(name, keyword, default=default, annotation=annotation)
        for name, (annotation, default) in _OPTIONS.items()
    ]


def loaded_with(given: dict[str, Any]) -> AbstractContextManager[None]:
    """Take the options out of a command's arguments; return the context in which they hold.

    Raises ArgumentError for a device that is not there.
    """
    from pyunlearn.models.devices import use_device
    from pyunlearn.models.loading import LoadOptions, load_options

    values = {name: given.pop(name) for name in _OPTIONS}
    if (device := values.pop("device")) is not None:
        use_device(device)
    if (revision := values.pop("revision")) is not None:
        given["model"] = f"{given['model']}@{revision}"
    return load_options(LoadOptions(**values))
