"""Formats of the tensors in a GGUF file: which can be written, what stands for the others, and how far they round."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyunlearn.errors import ArgumentError, DependencyError, ModelError, missing_packages, nearest
from pyunlearn.models.config import GGUF_FORMATS

Floats = NDArray[np.float32]

WRITABLE = GGUF_FORMATS
"""Formats that the package gguf quantizes to and whose rounding is known here, from the smallest to the largest."""
OLDEST = "0.17"
"""First version of the package gguf whose writer keeps the element types of metadata."""

BLOCK = 32
"""Weights that share a scale in the formats of blocks."""
_HALF = 2.0**-11  # half a unit in the last place of a float16, relative
_TINY = 2.0**-25  # half the smallest float16
ABOUT_ZERO = {"Q4_0": (8, 1.0), "Q5_0": (16, 1.0), "Q8_0": (127, 0.5)}
"""Format -> (steps from 0 to the largest weight of a block, largest error in steps).

In Q4_0 and Q5_0 the largest weight takes the lowest level, and one of the opposite sign has one level less.
"""
FROM_MINIMUM = {"Q4_1": 15, "Q5_1": 31}
"""Format -> steps from the smallest to the largest weight of a block."""


def package() -> Any:
    """Return the package gguf. Raises DependencyError where it is missing or too old to write files."""
    try:
        import gguf
    except ImportError as error:
        raise missing_packages("a GGUF file", f"gguf>={OLDEST}") from error
    if "sub_type" not in gguf.GGUFWriter.add_key_value.__annotations__:
        raise DependencyError(
            f"a GGUF file needs gguf {OLDEST} or newer, and the one here is older: run `pip install --upgrade gguf`"
        )
    return gguf


def bits_per_weight(name: str) -> float:
    """Return the bits that a weight takes in a format, those of the scales included.

    >>> bits_per_weight("Q4_0"), bits_per_weight("Q6_K")
    (4.5, 6.5625)
    """
    gguf = package()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return 8 * size / block


def written_as(name: str, at_least: str | None = None) -> str:
    """Return the format in which a tensor of another file's format is written: the same, or the next larger.

    >>> [written_as(name) for name in ("F16", "Q4_0", "Q4_K", "Q6_K")]
    ['F16', 'Q4_0', 'Q4_1', 'Q8_0']
    >>> [written_as(name, "Q8_0") for name in ("F16", "Q4_0", "Q4_K", "Q6_K")]
    ['F16', 'Q8_0', 'Q8_0', 'Q8_0']

    `at_least`: a larger format for those that are smaller. Raises ModelError where no format is large enough.
    """
    if at_least is not None and bits_per_weight(name) < bits_per_weight(at_least):
        return at_least
    if name in WRITABLE:
        return name
    larger = [each for each in WRITABLE if bits_per_weight(each) > bits_per_weight(name)]
    if not larger:
        raise ModelError(f"weights in the GGUF format {name} cannot be written: give a file with weights of 32 bits")
    return larger[0]


def require_format(at_least: str | None) -> None:
    """Raise ArgumentError unless a format can be written, or is None."""
    if at_least is not None and at_least not in WRITABLE:
        mend = nearest(at_least, WRITABLE) if isinstance(at_least, str) else f"choose from {', '.join(WRITABLE)}."
        raise ArgumentError(f"at_least must be one of {', '.join(WRITABLE)}, got {at_least!r}: {mend}")


def packed(rows: Floats, name: str) -> NDArray[Any]:
    """Return rows (n, columns) in a format, as the package gguf rounds them: (n, bytes), or floats."""
    gguf = package()
    return gguf.quants.quantize(np.ascontiguousarray(rows, np.float32), gguf.GGMLQuantizationType[name])


def unpacked(rows: NDArray[Any], name: str) -> Floats:
    """Return rows that are stored in a format as float32 (n, columns). Raises ModelError for an unknown format."""
    gguf = package()
    try:
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])
    except NotImplementedError as error:
        raise ModelError(
            f"the installed package gguf cannot read weights in the format {name}: give a GGUF file of the model in "
            "another one, such as Q8_0"
        ) from error


def largest_error(rows: Floats, name: str) -> Floats:
    """Return by how much a format may change each weight of rows (n, columns), at most; the same shape.

    Scales and minima are float16, and their rounding counts too. All is 0 for F32.

    >>> f"{largest_error(np.float32([[1.0] * 32]), 'Q8_0')[0, 0]:.4f}"
    '0.0044'
    """
    if name == "F32":
        return np.zeros_like(rows)
    if name == "BF16":
        return np.abs(rows) * np.float32(2.0**-8) + np.float32(2.0**-133)
    if name == "F16":
        return np.abs(rows) * np.float32(_HALF) + np.float32(_TINY)
    blocks = rows.reshape(len(rows), -1, BLOCK)
    largest, low = np.abs(blocks).max(axis=2), blocks.min(axis=2)
    if name in ABOUT_ZERO:
        steps, error = ABOUT_ZERO[name]
        allowed = largest / steps * (error + steps * _HALF) + steps * _TINY
    else:
        steps = FROM_MINIMUM[name]
        allowed = (blocks.max(axis=2) - low) / steps * (0.5 + steps * _HALF) + np.abs(low) * _HALF
        allowed += (steps + 1) * _TINY
    allowed += largest * 1e-6  # of float32 on the way
    return np.repeat(allowed, BLOCK, axis=1).astype(np.float32).reshape(rows.shape)
