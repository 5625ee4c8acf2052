"""Greedy decoding after any number of true tokens, many texts and prefixes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.probes.decoding import greedy_continuations


def greedy_extractor(
    model: Any, tokenizer: Any, tokens: Sequence[Tokens], *, batch_size: int = 16
) -> Callable[[NDArray[np.int64]], NDArray[np.bool_]]:
    """Check by greedy decoding whether a model writes the rest of a text after k of its true tokens.

    Args:
        model: a transformers language model.
        tokenizer: the model's.
        tokens: B texts; their scored tokens are the completions.
        batch_size: prompts decoded together.

    Returns:
        A function from prefix lengths (B,), each from 0 to the text's number of scored tokens, to (B,) truths. A whole text needs no decoding.
    """

    def continue_from(prefixes: NDArray[np.int64]) -> NDArray[np.bool_]:
        found = np.array([k == len(t.scored) for k, t in zip(prefixes, tokens, strict=True)])
        open_ = np.flatnonzero(~found).tolist()
        asked = [_after(tokens[i], int(prefixes[i])) for i in open_]
        said = _written(model, tokenizer, asked, batch_size)
        found[open_] = [ids == t.scored for ids, t in zip(said, asked, strict=True)]
        return found

    return continue_from


def greedy_rests(
    model: Any, tokenizer: Any, tokens: Sequence[Tokens], *, n: int = 10, batch_size: int = 16
) -> list[list[tuple[int, ...]]]:
    """Write the greedy continuation after each of the first T - n tokens of every text.

    Args:
        model: a transformers language model.
        tokenizer: the model's.
        tokens: B texts of more than n scored tokens each.
        n: length of the n-grams that will be counted.
        batch_size: prompts decoded together, whichever text they are of.

    Returns:
        For each text its T - n continuations, T its scored tokens: pass `t.scored` and these. Together B (T - n) continuations of up to T tokens.

    Raises:
        ArgumentError: n below 1, or a text of n scored tokens or fewer.

    Source: Jang et al. 2022, arXiv 2210.01504.
    """
    short = [i for i, t in enumerate(tokens) if len(t.scored) <= n]
    if n < 1 or short:
        raise ArgumentError(
            f"n must be 1 or more, and every text longer than n = {n} scored tokens: not so text(s) {short[:5]}."
        )
    counts = [len(t.scored) - n for t in tokens]
    said = iter(
        _written(
            model, tokenizer, [_after(t, k) for t, c in zip(tokens, counts, strict=True) for k in range(c)], batch_size
        )
    )
    return [[next(said) for _ in range(count)] for count in counts]


def _after(t: Tokens, k: int) -> Tokens:
    """The same text, with k more of its tokens given."""
    return Tokens(t.ids, t.first + k, t.decoder)


def _written(model: Any, tokenizer: Any, asked: Sequence[Tokens], batch_size: int) -> list[tuple[int, ...]]:
    if not asked:
        return []
    longest = max(len(t.scored) for t in asked)
    return greedy_continuations(model, tokenizer, asked, longest=longest, batch_size=batch_size)
