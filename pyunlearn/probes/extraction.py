"""Greedy decoding after any number of true tokens, many texts and prefixes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.options import Whole, require
from pyunlearn.probes.decoding import greedy_continuations


def greedy_extractor(
    model: Any, tokens: Sequence[Tokens], *, tokenizer: Any = None, batch_size: int = 16
) -> Callable[[NDArray[np.int64]], NDArray[np.bool_]]:
    """Make a function that checks by greedy decoding if the model writes the rest of a text after k true tokens.

    Args:
        model: a transformers language model, or a LanguageModel.
        tokens: B texts; their scored tokens are the completions.
        tokenizer: the model's. Default: where the model came from.
        batch_size: prompts decoded together.

    Returns:
        A function from prefix lengths (B,), each from 0 to the text's number of scored tokens, to (B,) bool. A whole
        text needs no decoding.

    Raises:
        ArgumentError: a batch size below 1. ModelError: no language model, or no tokenizer for it.
    """
    require(Whole(1), batch_size=batch_size)
    lm = LanguageModel.of(model, tokenizer)

    def continue_from(prefixes: NDArray[np.int64]) -> NDArray[np.bool_]:
        extracted = np.array([k == len(t.scored) for k, t in zip(prefixes, tokens, strict=True)])
        rest = np.flatnonzero(~extracted).tolist()
        queries = [_after(tokens[i], int(prefixes[i])) for i in rest]
        decoded = _decoded(lm, queries, batch_size)
        extracted[rest] = [ids == t.scored for ids, t in zip(decoded, queries, strict=True)]
        return extracted

    return continue_from


def greedy_rests(
    model: Any, tokens: Sequence[Tokens], *, tokenizer: Any = None, n: int = 10, batch_size: int = 16
) -> list[list[tuple[int, ...]]]:
    """Decode the greedy continuation after each of the first T - n scored tokens of every text.

    Args:
        model: a transformers language model, or a LanguageModel.
        tokens: B texts of more than n scored tokens each.
        tokenizer: the model's. Default: where the model came from.
        n: length of the n-grams to be counted in them.
        batch_size: prompts decoded together, of all texts.

    Returns:
        T - n tuples of token ids for each text, with T its scored tokens. Together B (T - n) continuations of up to T
        tokens.

    Raises:
        ArgumentError: n or the batch size below 1, or a text of n scored tokens or fewer. ModelError: no language
            model, or no tokenizer for it.

    Source: Jang et al. 2022, arXiv 2210.01504 (extraction likelihood).
    """
    require(Whole(1), n=n, batch_size=batch_size)
    short = [i for i, t in enumerate(tokens) if len(t.scored) <= n]
    if short:
        raise ArgumentError(f"tokens must be longer than n = {n} scored tokens: not so text(s) {short[:5]}")
    counts = [len(t.scored) - n for t in tokens]
    queries = [_after(t, k) for t, count in zip(tokens, counts, strict=True) for k in range(count)]
    decoded = iter(_decoded(LanguageModel.of(model, tokenizer), queries, batch_size))
    return [[next(decoded) for _ in range(count)] for count in counts]


def _after(t: Tokens, k: int) -> Tokens:
    """Return the text with its first k scored tokens moved to the prompt."""
    return Tokens(t.ids, t.first + k, t.decoder)


def _decoded(lm: LanguageModel, queries: Sequence[Tokens], batch_size: int) -> list[tuple[int, ...]]:
    if not queries:
        return []
    longest = max(len(t.scored) for t in queries)
    return greedy_continuations(lm, queries, longest=longest, batch_size=batch_size)
