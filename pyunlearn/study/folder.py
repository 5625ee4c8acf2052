"""The output folder: each file is written whole or not at all, so an interrupted study can resume."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn.errors import OutputError
from pyunlearn.output import check_output, packed_arrays, read_arrays, remove_partial, write_json, write_whole

Row = dict[str, Any]


class Folder:
    """The folder of a study. `Folder(path, settings)` starts one, or resumes one with the same settings.

    Raises OutputError where the folder holds something else, or a study with other settings.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        check_output(path, marker="config.json")
        for part in [self.path, *self.path.rglob("*")] if self.has("config.json") else ():
            if part.is_dir():
                remove_partial(part)
        if self.has("config.json"):
            saved = self.read_json("config.json")
            other = sorted(k for k in saved.keys() | settings.keys() if saved.get(k) != settings.get(k))
            if other:
                raise OutputError(
                    f"the output folder {path} holds a study with another {other[0]}: resume it with its own settings, "
                    "or choose another folder"
                )
        else:
            self.json("config.json", settings)

    def has(self, name: str) -> bool:
        """Return True where that file or folder is finished."""
        return (self.path / name).exists()

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Have `write` make a file or folder under a temporary name, then rename it."""
        write_whole(self.path / name, write)

    def text(self, name: str, content: str) -> None:
        """Write a text file."""
        self.write(name, lambda path: path.write_text(content, encoding="utf-8"))

    def json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        write_json(self.path / name, content)

    def read_json(self, name: str) -> Any:
        """Read a JSON file."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def arrays(self, name: str, **arrays: Any) -> None:
        """Write named arrays (.safetensors)."""
        self.write(name, lambda path: path.write_bytes(packed_arrays({k: np.asarray(v) for k, v in arrays.items()})))

    def read_arrays(self, name: str) -> dict[str, Any]:
        """Read named arrays (.safetensors)."""
        return read_arrays(self.path / name)

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Write NAME.csv, and NAME.parquet where pyarrow is installed."""
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
