"""Files as a disk or an interrupted copy can damage them."""

from __future__ import annotations

import numpy as np


def damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """Return the bytes with one of four kinds of damage."""
    kind, at = int(rng.integers(4)), int(rng.integers(len(data)))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rng.bytes(20) + data[at + 20 :]
    return data + rng.bytes(1 + at % 9)
