"""The output folder: each part is written beside and renamed, so what is there is whole, and an interrupted study goes on."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn.errors import OutputError

Row = dict[str, Any]


class Folder:
    """Where a study lies. `Folder(path, settings)` begins it, or goes on with one of the same settings.

    Raises OutputError where the folder holds something else, or a study of other settings.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        config = self.path / "config.json"
        if self.path.exists() and (not self.path.is_dir() or (any(self.path.iterdir()) and not config.exists())):
            raise OutputError(
                f"the output folder {path} holds something that is no study: choose another, or empty it first"
            )
        if config.exists():
            was = json.loads(config.read_text(encoding="utf-8"))
            other = sorted(k for k in was.keys() | settings.keys() if was.get(k) != settings.get(k))
            if other:
                raise OutputError(
                    f"the output folder {path} holds a study with another {other[0]}: go on with its own settings, or choose another folder"
                )
        else:
            self.text("config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def has(self, name: str) -> bool:
        """Whether that part is done."""
        return (self.path / name).exists()

    def write(self, name: str, write: Callable[[Path], Any]) -> Path:
        """Has `write` make a file or folder beside, and puts it in place."""
        target = self.path / name
        beside = target.with_name(f".partial-{target.name}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(beside, ignore_errors=True)
            write(beside)
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(beside, target)
        except OSError as error:
            raise OutputError(f"the study could not be written to {target}: {error}") from error
        return target

    def text(self, name: str, content: str) -> None:
        """A text file."""
        self.write(name, lambda path: path.write_text(content, encoding="utf-8"))

    def json(self, name: str, content: Any) -> None:
        """A JSON file."""
        self.text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """What a JSON file holds."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def arrays(self, name: str, **arrays: Any) -> None:
        """Arrays under their names (.npz)."""

        def save(path: Path) -> None:
            with open(path, "wb") as file:
                np.savez(file, **arrays)

        self.write(name, save)

    def read_arrays(self, name: str) -> dict[str, Any]:
        """The same, back."""
        with np.load(self.path / name) as found:
            return {key: found[key] for key in found.files}

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """NAME.csv, and NAME.parquet where pyarrow is installed."""
        columns = list(dict.fromkeys(key for row in rows for key in row))

        def as_csv(path: Path) -> None:
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)

        self.write(f"{name}.csv", as_csv)
        if importlib.util.find_spec("pyarrow") is not None:
            import pyarrow
            import pyarrow.parquet

            whole = pyarrow.table({c: [row.get(c) for row in rows] for c in columns})
            self.write(f"{name}.parquet", lambda path: pyarrow.parquet.write_table(whole, path))
