"""Token ids in four bytes each, where a tuple of Python's numbers takes eight and more."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

__all__ = ["TokenIds"]


class TokenIds(Sequence[int]):
    """Token ids that compare, sort, hash and print as the tuple of them; a slice is a tuple.

    >>> ids = TokenIds((5, 6, 7))
    >>> ids == (5, 6, 7), ids < (6,), ids[1:], (4, *ids), {ids: "text"}[5, 6, 7], ids
    (True, True, (6, 7), (4, 5, 6, 7), 'text', (5, 6, 7))
    """

    __slots__ = ("_packed",)
    _packed: bytes

    def __init__(self, ids: Iterable[int]) -> None:
        self._packed = ids._packed if isinstance(ids, TokenIds) else array("i", ids).tobytes()

    @property
    def array(self) -> NDArray[np.int32]:
        """The ids as an array (T,), without a copy."""
        return np.frombuffer(self._packed, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._packed) // 4

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[int, ...]: ...
    def __getitem__(self, at: int | slice) -> int | tuple[int, ...]:
        values = memoryview(self._packed).cast("i")[at]
        return values if isinstance(values, int) else tuple(values)

    def __iter__(self) -> Iterator[int]:
        return iter(memoryview(self._packed).cast("i"))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TokenIds):
            return self._packed == other._packed
        return self[:] == other if isinstance(other, tuple) else NotImplemented

    def __lt__(self, other: Sequence[int]) -> bool:
        return self[:] < tuple(other)

    def __gt__(self, other: Sequence[int]) -> bool:
        return self[:] > tuple(other)

    def __hash__(self) -> int:
        return hash(self[:])

    def __repr__(self) -> str:
        return repr(self[:])
