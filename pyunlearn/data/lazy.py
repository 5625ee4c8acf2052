"""Lists of many objects in little memory, and their JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

__all__ = ["LazyList", "json_parts"]

T = TypeVar("T")


class LazyList(Sequence[T]):
    """List whose items are made from their index when they are read; copied and pickled as a list.

    Args:
        length: the number of items.
        make: index, from 0 -> item.

    >>> squares = LazyList(4, lambda i: i * i)
    >>> squares, squares[-1], squares[1:3], squares == [0, 1, 4, 9]
    ([0, 1, 4, 9], 9, [1, 4], True)
    """

    def __init__(self, length: int, make: Callable[[int], T]) -> None:
        self._indices, self._make = range(length), make

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...
    def __getitem__(self, at: int | slice) -> T | list[T]:
        chosen = self._indices[at]
        return self._make(chosen) if isinstance(chosen, int) else [*map(self._make, chosen)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, LazyList)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __add__(self, other: Sequence[T]) -> list[T]:
        return [*self, *other]

    def __radd__(self, other: Sequence[T]) -> list[T]:
        return [*other, *self]

    def __repr__(self) -> str:
        return repr(self[:])

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self[:],)


def json_parts(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the text of an object as `json.dumps` writes it with indent=2, in parts: a LazyList item by item.

    >>> "".join(json_parts({"seed": 0, "squares": LazyList(2, lambda i: i * i)}))
    '{\\n  "seed": 0,\\n  "squares": [\\n    0,\\n    1\\n  ]\\n}\\n'
    """

    def text(value: Any, margin: str) -> str:
        return json.dumps(value, indent=2, ensure_ascii=False).replace("\n", margin)  # no string has a raw line end

    before = "{"
    for name, value in content.items():
        yield f"{before}\n  {text(name, '')}: "
        if isinstance(value, LazyList):
            for i, item in enumerate(value):
                yield ("," if i else "[") + "\n    " + text(item, "\n    ")
            yield "\n  ]" if len(value) else "[]"
        else:
            yield text(value, "\n  ")
        before = ","
    yield "\n}\n"
