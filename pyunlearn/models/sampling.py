"""Texts that a run needs beside the user's: completions sampled from the model itself, and what it should say in place of the forget set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pyunlearn.data import Example, Tokens
from pyunlearn.errors import ArgumentError, DataError
from pyunlearn.models.generation import generate
from pyunlearn.models.inspection import context_length, is_encoder_decoder, unwrapped

COUNT = 64
"""How many are sampled: exposure is then measured up to log2(65) = 6.02 bits."""

_RECITED = 10
_ATTEMPTS = 4  # at an alternate that is not the forget text itself
_FEWEST = 19  # with fewer, no exposure can be significant: log2(20) = 4.32 bits


def require_enough(references: Sequence[Tokens], *, holdout: bool) -> None:
    """Raises DataError where there are too few references for any text to stand out among them."""
    if len(references) < _FEWEST:
        role = "holdout" if holdout else "text the model writes that is not the forget set itself"
        raise DataError(
            f"to tell memorized from unseen takes {_FEWEST} reference texts or more, and the {role} has {len(references)}: "
            f"give a holdout of {_FEWEST} texts that were never trained on"
        )


@torch.no_grad()
def sampled(model: Any, tokenizer: Any, forget: Sequence[Tokens], *, count: int = COUNT, seed: int = 0) -> list[Tokens]:
    """`count` completions sampled at temperature 1 from the model, as long as the forget texts (8 to 48 tokens).

    A text without a prompt is answered by samples from the beginning-of-text token. A text with a prompt is answered by samples for
    that prompt that differ from it in the first token, which is not scored: a model that has memorized the answer would otherwise recite it, and
    be compared with itself. Samples that recite ten tokens in a row of the forget set all the same are left out. So a
    text counts as forgotten when it is no likelier than what the model would typically say instead.
    """
    inner, both, limit = unwrapped(model), is_encoder_decoder(model), context_length(model)
    lengths = sorted(len(t.scored) for t in forget)
    length = max(8, min(48, lengths[len(lengths) // 2]))
    start = _start_of_text(tokenizer)
    prompted = [t for t in forget if _prompt(t, start, both)[1]]
    pool = prompted if len(prompted) * 2 > len(forget) else [t for t in forget if not _prompt(t, start, both)[1]]
    per_prompt = -(-count // len(pool)) if prompted and pool[0] in prompted else count
    found: list[Tokens] = []
    devices = [inner.device] if inner.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for t in pool:
            prompt, departs = _prompt(t, start, both)
            if limit is not None:  # a long prompt loses its beginning, so that the completion fits after it
                prompt = prompt[-max(1, limit - length) :]
            wanted = min(per_prompt, count - len(found))
            found += _sample(inner, tokenizer, prompt, t.scored[0] if departs else None, length, wanted)
            if len(found) >= count:
                break
    known = {run for t in forget for run in _runs(t)}
    return [t for t in found if known.isdisjoint(_runs(t))]


def refused(forget: Sequence[Example], texts: Sequence[str], seed: int, *, alone: bool) -> list[Example]:
    """Each forget example with one of the texts, drawn at random, in place of its completion. `alone`: nothing else will be trained on.

    Raises ArgumentError unless the texts are a list of some; DataError where, alone, an example has no prompt to refuse.
    """
    if not texts or not _are_texts(texts):
        raise ArgumentError(f"refusals must be a list of one text or more, got {texts!r}")
    for number, example in enumerate(forget, 1):
        if alone and not example.prompt:
            raise DataError(
                f"forget example {number} has no prompt that could be refused: give prompt and completion, or use idkdpo"
            )
    drawn = np.random.default_rng((seed, 2)).integers(len(texts), size=len(forget))
    return [_saying(example, texts[at]) for example, at in zip(forget, drawn, strict=True)]


def preferred(forget: Sequence[Example], winners: Sequence[str] | None) -> list[Example]:
    """Each forget example with its winner in place of its completion: of the list, or else the example's own.

    Raises ArgumentError unless there is one for each.
    """
    if winners is not None:
        given = _are_texts(winners)
        if not given or len(winners) != len(forget):
            got = f"{len(winners)} entries" if given else repr(winners)
            raise ArgumentError(
                f"winners must be a list of {len(forget)} texts, one for each forget example, got {got}"
            )
    texts = [example.winner for example in forget] if winners is None else winners
    for number, text in enumerate(texts, 1):
        if text is None:
            raise ArgumentError(
                f'dpo prefers another answer to each forget text, and forget example {number} has none: give each a "winner", '
                'pass method_options={"winners": [...]}, or let the model find some with altpo'
            )
    return [_saying(example, str(text)) for example, text in zip(forget, texts, strict=True)]


def _are_texts(values: Any) -> bool:
    """Whether it is a list of texts that say something."""
    return isinstance(values, (list, tuple)) and all(isinstance(x, str) and x.strip() for x in values)


def _saying(example: Example, text: str) -> Example:
    """The example with that text in place of its completion."""
    said = example.messages and (*example.messages[:-1], example.messages[-1]._replace(content=text))
    seam = example.completion[: len(example.completion) - len(example.completion.lstrip())]
    return Example(example.prompt, seam + text.lstrip(), said or None)


@torch.no_grad()
def alternates(model: Any, tokenizer: Any, forget: Sequence[Tokens], *, count: int, seed: int = 0) -> list[Tokens]:
    """`count` answers of the model's own in place of each forget text, at temperature 1, example by example: (B * count).

    As `sampled`, each departs from the text in its first token, which is scored here, and none recites the forget set; what is left over where the
    model recites it again and again comes round more than once.

    Raises ArgumentError unless count is a whole number, 1 or more; DataError where a model says nothing else.
    """
    if not isinstance(count, int) or count < 1:
        raise ArgumentError(f"alternates must be a whole number, 1 or more, got {count!r}")
    inner, both = unwrapped(model), is_encoder_decoder(model)
    start = _start_of_text(tokenizer)
    known = {run for t in forget for run in _runs(t)}
    found: list[Tokens] = []
    devices = [inner.device] if inner.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for number, t in enumerate(forget, 1):
            prompt, departs = _prompt(t, start, both)
            mine: list[Tokens] = []
            for _ in range(_ATTEMPTS):
                said = _sample(
                    inner, tokenizer, prompt, t.scored[0] if departs else None, max(2, len(t.scored)), count - len(mine)
                )
                whole = [replace(x, first=0 if both else len(prompt)) for x in said]
                mine += [x for x in whole if known.isdisjoint(_runs(x))]
                if len(mine) == count:
                    break
            if not mine:
                raise DataError(
                    f"the model recites the forget set whenever it is to answer forget example {number} in other words: give winners, with dpo"
                )
            found += [mine[i % len(mine)] for i in range(count)]
    return found


def _start_of_text(tokenizer: Any) -> int:
    """The token that a text without a prompt is sampled from."""
    return next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0) if i is not None)


def _runs(t: Tokens) -> set[tuple[int, ...]]:
    """Every run of _RECITED consecutive scored tokens."""
    return {tuple(t.scored[i : i + _RECITED]) for i in range(len(t.scored) - _RECITED + 1)}


def _prompt(t: Tokens, start: int, both: bool) -> tuple[tuple[int, ...], bool]:
    """The token ids to sample from, and whether they are a prompt of the user's own."""
    if both:
        return t.ids, len(t.ids) > 1
    prompt = t.ids[: t.first]
    return (prompt, True) if len(prompt) > 1 else ((start,), False)


def _sample(
    inner: Any, tokenizer: Any, prompt: tuple[int, ...], not_first: int | None, length: int, count: int
) -> list[Tokens]:
    both = is_encoder_decoder(inner)
    ids = torch.tensor([prompt] * count, device=inner.device)
    before = 1 if both else len(prompt)

    def depart(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == before:
            scores[:, not_first] = -torch.inf
        return scores

    eos = tokenizer.eos_token_id
    continuations = generate(
        inner,
        tokenizer,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        prompt_length=before,
        pad_id=next(i for i in (tokenizer.pad_token_id, eos, 0) if i is not None),
        max_new_tokens=length,
        score_hook=None if not_first is None else depart,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=length if not_first is None and not both else 2,
    )
    found = []
    for said in continuations:
        skip = 0 if not_first is None or len(said) < 2 else 1
        if both:
            found.append(Tokens(tuple(prompt), skip, tuple(said)))
        else:
            found.append(Tokens((*prompt, *said), len(prompt) + skip))
    return found
