"""What a model writes after a prompt, greedily: texts of like length together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pyunlearn.data import Tokens, padding_id
from pyunlearn.models import decoder_start_id, is_encoder_decoder, unwrapped
from pyunlearn.models.generation import generate
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes.cache import Shelf

FIELDS = ("ids",)


@torch.no_grad()
def greedy_continuations(
    model: Any,
    tokenizer: Any,
    tokens: Sequence[Tokens],
    *,
    longest: int = 64,
    batch_size: int = 16,
    shelf: Shelf | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[tuple[int, ...]]:
    """What the model writes greedily in the place of each text's scored tokens, as token ids.

    It reads what stands before them, and writes as many tokens as they are, `longest` at most; it may end earlier, and then the end of text is the
    last token. Prompts of like length are padded on the left and decoded together. The model's own generation_config (sampling, penalties, lengths) is
    kept out of it. With an encoder-decoder model the decoder is given the true tokens before the scored ones, where there are any.

    Args:
        model: a transformers language model; in evaluation mode while this lasts.
        tokenizer: the model's, for the ids of padding and end of text.
        tokens: the texts; `Tokens.first` says where the model takes over.
        longest: the most tokens written for one text.
        batch_size: prompts decoded together.
        shelf: where answers are kept and looked up; default: in memory, for this call.
        advance: called with the number of texts of each batch that is done.

    Returns:
        One tuple of 1 to `longest` token ids for each of `tokens`.
    """
    shelf = Shelf(None, FIELDS) if shelf is None else shelf
    keys = [shelf.key(t, longest) for t in tokens]
    once = dict(zip(keys, tokens, strict=True))
    order = sorted(once.items(), key=lambda item: (-len(_read(item[1])), -len(item[1].scored)))
    training = model.training
    model.eval()
    try:
        for group in (order[at : at + batch_size] for at in range(0, len(order), batch_size)):
            if any(key not in shelf for key, _ in group):  # then all of it: the same batches give the same bits
                counts = [min(longest, len(t.scored)) for _, t in group]
                said = _decode(unwrapped(model), tokenizer, [t for _, t in group], max(counts))
                for (key, _), ids, count in zip(group, said, counts, strict=True):
                    shelf.add(key, (np.array(ids[:count], dtype=np.int64),))
            advance(len(group))
    finally:
        model.train(training)
        shelf.flush()
    return [tuple(shelf[key][0].tolist()) for key in keys]


def _decode(inner: Any, tokenizer: Any, group: Sequence[Tokens], new: int) -> list[list[int]]:
    both, pad = is_encoder_decoder(inner), padding_id(tokenizer)
    ids, mask = _padded([_read(t) for t in group], pad, inner.device, left=not both)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if both:
        start = decoder_start_id(inner)
        begun = [(start, *t.written[: t.first]) for t in group]
        inputs["decoder_input_ids"], inputs["decoder_attention_mask"] = _padded(begun, pad, inner.device, left=True)
    before = inputs["decoder_input_ids" if both else "input_ids"].shape[1]
    lm = LanguageModel.of(inner, tokenizer)
    return generate(lm, inputs, prompt_length=before, max_new_tokens=new, do_sample=False)


def _read(t: Tokens) -> tuple[int, ...]:
    """The prompt: what a causal model reads before the scored tokens, or an encoder at all."""
    return t.ids[: t.first] if t.decoder is None else t.ids


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
