"""Windows of long texts: each scored token is scored in one of them, after tokens that it follows in the text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from pyunlearn.data.tokens import Tokens

__all__ = ["OVERLAP", "Window", "windows_of"]

OVERLAP = 8
"""One token in this many of a window, at least, is context from the window before, of 512 tokens 64. So no token is
scored without context, for an eighth more work; half of a window would double it."""

_REPEATS_START = 16  # positions from which a window begins with the beginning of text


class Window(NamedTuple):
    """A part of a text that the model reads at once."""

    tokens: Tokens
    source: Sequence[int]
    """Indices of its tokens in the text."""


def windows_of(t: Tokens, limit: int | None, start: int | None = None) -> list[Window]:
    """Return a text in windows of at most `limit` tokens; in one where it is no longer, or has a decoder.

    The scored tokens are shared out evenly, so that no window has few of them. Each window is filled up with the tokens
    before its scored ones: at least an eighth of it, and from half of it on where these do not follow those of another
    window. Tokens that are neither scored nor such context are in no window.

    Args:
        t: the text.
        limit: positions of the model, 2 or more; None for no limit.
        start: the token id of the beginning of text: each window of a text that begins with it does.

    >>> [w.tokens.ids for w in windows_of(Tokens(tuple(range(9)), first=1), limit=6)]
    [(0, 1, 2, 3, 4), (3, 4, 5, 6, 7, 8)]
    """
    if t.decoder is not None or limit is None or len(t.ids) <= limit:
        return [Window(t, range(len(t.written)))]
    head = int(start is not None and t.ids[0] == start and limit >= _REPEATS_START)
    room = limit - head
    windows = []
    for own in _shares(t.indices, room):
        end = own[-1] + 1
        begin = max(head, end - room)
        source = [*range(head), *range(begin, end)]
        indices = [i + head - begin for i in own]
        windows.append(Window(Tokens.at([t.ids[i] for i in source], indices), source))
    return windows


def _shares(indices: Sequence[int], room: int) -> list[Sequence[int]]:
    """Return the scored tokens of each window."""
    most = room - max(1, room // OVERLAP)
    if indices[-1] - indices[0] == len(indices) - 1:
        count = -(-len(indices) // most)
        edges = [len(indices) * i // count for i in range(count + 1)]
        return [indices[a:b] for a, b in pairwise(edges)]
    shares, first = [], 0
    for i, index in enumerate(indices):
        if index - indices[first] >= max(1, room // 2):
            shares.append(indices[first:i])
            first = i
    return [*shares, indices[first:]]
