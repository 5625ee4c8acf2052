"""Continuations of prompts, greedy or sampled, decoded in batches of like length."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pyunlearn.data import Tokens
from pyunlearn.models.generation import generate
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.options import Whole, require
from pyunlearn.probes.cache import RecordStore

FIELDS = ("ids",)


@torch.no_grad()
def greedy_continuations(
    model: Any,
    tokens: Sequence[Tokens],
    *,
    tokenizer: Any = None,
    longest: int = 64,
    beyond: bool = False,
    batch_size: int = 16,
    store: RecordStore | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[tuple[int, ...]]:
    """Decode greedily in the place of each text's scored tokens.

    The model reads the tokens before them and writes as many, `longest` at most; it may end earlier, and then the end
    of text is the last token. Prompts of like length are padded on the left and decoded together, as far as none is
    continued beyond the model's context with the others: how much is written for one depends on no other text. The
    model's own generation_config (sampling, penalties, lengths) is not used. With an encoder-decoder model the decoder
    starts with the true tokens before the scored ones, where there are any. Dropout is off meanwhile.

    Args:
        model: a transformers language model, or a LanguageModel.
        tokens: the texts; `Tokens.first` is the index of the first token to write.
        tokenizer: the model's, for the ids of padding and end of text. Default: where the model came from.
        longest: the most tokens written for one text.
        beyond: write up to `longest` tokens after each prompt, however many its text has, or as many as the context
            leaves.
        batch_size: prompts decoded together, at most.
        store: records to look up and to add to; default: in memory, for this call.
        advance: called with the number of texts of each finished batch.

    Returns:
        One tuple of 1 to `longest` token ids for each of `tokens`.

    Raises:
        ArgumentError: `longest` or `batch_size` below 1. ModelError: no language model, or no tokenizer for it.
    """
    require(Whole(1), longest=longest, batch_size=batch_size)
    lm = LanguageModel.of(model, tokenizer)
    store = RecordStore(None, FIELDS) if store is None else store
    keys = [store.key(t, longest, *([beyond] if beyond else [])) for t in tokens]
    once = dict(zip(keys, tokens, strict=True))
    order = sorted(once, key=lambda key: (-len(_prompt(once[key])), -len(once[key].scored)))
    counts = {k: room_after(lm, t, longest) if beyond else min(longest, len(t.scored)) for k, t in once.items()}
    try:
        with evaluation_mode(lm.module):
            for own in _groups(lm, [once[key] for key in order], [counts[key] for key in order], batch_size):
                group = order[own]
                if any(key not in store for key in group):  # then all of it: the same batches give the same bits
                    rows = _decode(lm, [once[key] for key in group], max(counts[key] for key in group))
                    for key, ids in zip(group, rows, strict=True):
                        store.add(key, (np.array(ids[: counts[key]], dtype=np.int64),))
                advance(len(group))
    finally:
        store.flush()
    return [tuple(store[key][0].tolist()) for key in keys]


@torch.no_grad()
def sampled_continuations(
    lm: LanguageModel,
    tokens: Sequence[Tokens],
    *,
    count: int,
    longest: int = 64,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda _: None,
) -> list[list[tuple[int, ...]]]:
    """Sample continuations at temperature 1 in the place of each text's scored tokens, as `greedy_continuations` reads.

    Args:
        lm: the model, with its tokenizer.
        tokens: the texts.
        count: continuations of each text.
        longest: the most tokens written for one text.
        batch_size: continuations written together; a text's own may be more.
        advance: called with the number of texts of each finished batch.

    Returns:
        For each of `tokens` a list of `count` tuples of token ids.
    """
    written: list[list[tuple[int, ...]]] = [[] for _ in tokens]
    order = sorted(range(len(tokens)), key=lambda i: (-len(_prompt(tokens[i])), -len(tokens[i].scored)))
    lengths = [min(longest, len(t.scored)) for t in tokens]
    size = max(1, batch_size // count)
    with evaluation_mode(lm.module):
        for own in _groups(lm, [tokens[i] for i in order], [lengths[i] for i in order], size):
            group = order[own]
            repeated, new = [tokens[i] for i in group for _ in range(count)], max(lengths[i] for i in group)
            rows = iter(_decode(lm, repeated, new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0))
            for i in group:
                written[i] = [tuple(next(rows)[: lengths[i]]) for _ in range(count)]
            advance(len(group))
    return written


def _groups(lm: LanguageModel, tokens: Sequence[Tokens], counts: Sequence[int], size: int) -> Iterator[slice]:
    """Yield slices of at most `size` texts that are decoded together: each gets as many tokens as the longest of them.

    So the context has room for these after the prompt of each.
    """
    first, end = 0, 0
    while first < len(tokens):
        most, room = 0, sys.maxsize
        while end < min(first + size, len(tokens)):
            most, room = max(most, counts[end]), min(room, room_after(lm, tokens[end]))
            if most > room and end > first:
                break
            end += 1
        yield slice(first, end)
        first = end


def room_after(lm: LanguageModel, t: Tokens, longest: int = sys.maxsize) -> int:
    """Return how many tokens the context leaves after a text's prompt, `longest` at most."""
    if lm.context_length is None:
        return longest
    return min(longest, lm.context_length - (len(_prompt(t)) if t.decoder is None else t.first))


def _decode(lm: LanguageModel, group: Sequence[Tokens], new: int, **options: Any) -> list[list[int]]:
    both, device = lm.is_encoder_decoder, lm.device
    ids, mask = _padded([_prompt(t) for t in group], lm.pad_id, device, left=not both)  # (B, T)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if both:
        begun = [(lm.decoder_start_id, *t.written[: t.first]) for t in group]
        inputs["decoder_input_ids"], inputs["decoder_attention_mask"] = _padded(begun, lm.pad_id, device, left=True)
    prompt_length = inputs["decoder_input_ids" if both else "input_ids"].shape[1]
    return generate(lm, inputs, prompt_length=prompt_length, max_new_tokens=new, **(options or {"do_sample": False}))


def _prompt(t: Tokens) -> tuple[int, ...]:
    """Return the prompt: a causal model's tokens before the scored ones, or the whole input of an encoder."""
    return t.ids[: t.first] if t.decoder is None else t.ids[:]


def _padded(
    rows: Sequence[Sequence[int | None]], pad: int, device: Any, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[b, at], mask[b, at] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)
