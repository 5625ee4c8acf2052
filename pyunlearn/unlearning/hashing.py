"""SHA-256 of files while they are written, and when they are read again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO


class Hashing:
    """File that is only written, with the SHA-256 of what was."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write some bytes, and return how many."""
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


def sha256(path: Path, size: int) -> str:
    """Return the SHA-256 of the first `size` bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (read := file.read(min(size, 1 << 20))):
            digest.update(read)
            size -= len(read)
    return digest.hexdigest()
