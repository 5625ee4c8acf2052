"""Tokenize examples, and decide which of their tokens are scored: Example -> Tokens.

`read_examples` (in examples.py) reads a user's texts as Examples, `encode` turns these into Tokens, `collate` and
`batches` (in batching.py) into tensors. Which positions are scored is decided here, on the CPU, from lengths alone:
never from `ids == pad`, so a pad token that is also the end of text does no harm, and no mask is searched on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

from pyunlearn.data.examples import Example, Span, occurrences
from pyunlearn.data.texts import ScoredText, rendered_text, shared_length
from pyunlearn.data.token_ids import TokenIds
from pyunlearn.errors import ArgumentError, DataError

__all__ = ["Tokens", "encode", "padding_id"]

Tokenizer: TypeAlias = Any  # a tokenizer of transformers
Ids = list[int]
Split = tuple[Ids, Ids, Ids | None]
"""(ids before the first scored token, ids from it on, indices of the scored among these or None for all)."""
_AT_ONCE = 1024  # texts that are tokenized at a time: what the tokenizer returns of each takes kilobytes


@dataclass(frozen=True, slots=True, init=False)
class Tokens:
    """One example as token ids. The scored tokens are all from `first` on, or those at the indices `chosen`.

    ids      the model's input; with an encoder-decoder model, the encoder's
    first    index of the first scored token; a causal model cannot score index 0, which nothing predicts
    decoder  the decoder's output in an encoder-decoder model, not shifted; None for a causal model
    chosen   indices of the scored tokens, from `first` on, where there are unscored ones between or after them

    >>> Tokens((5, 6, 7, 8), first=2).scored
    (7, 8)
    >>> Tokens.at((5, 6, 7, 8, 9), [1, 2, 4]).scored
    (6, 7, 9)
    """

    ids: TokenIds
    first: int
    decoder: TokenIds | None = None
    chosen: tuple[int, ...] | None = field(default=None, repr=False)

    def __init__(
        self,
        ids: Iterable[int],
        first: int,
        decoder: Iterable[int] | None = None,
        chosen: tuple[int, ...] | None = None,
    ) -> None:
        packed = {"ids": TokenIds(ids), "decoder": None if decoder is None else TokenIds(decoder)}
        for name, value in (packed | {"first": first, "chosen": chosen}).items():
            object.__setattr__(self, name, value)  # it is frozen
        lowest, length = int(self.decoder is None), len(self.written)
        if not self.ids or not lowest <= self.first < length:
            span = f"from {lowest} to {length - 1}"
            raise DataError(f"no token is scored: `first` must be {span} in {length} tokens, and is {self.first}")
        if self.chosen is not None:
            increasing = all(a < b for a, b in pairwise(self.chosen))
            if not (self.chosen and self.chosen[0] == self.first and self.chosen[-1] < length and increasing):
                raise DataError(f"`chosen` must be increasing indices from {self.first} to {length - 1}")

    @classmethod
    def at(cls, ids: Sequence[int], indices: Sequence[int], decoder: Sequence[int] | None = None) -> Tokens:
        """Return the tokens of which those at the indices are scored, one or more, in order."""
        first, length = indices[0] if len(indices) else -1, len(ids if decoder is None else decoder)
        chosen = None if tuple(indices) == tuple(range(first, length)) else tuple(indices)
        return cls(ids, first, decoder, chosen)

    @property
    def written(self) -> TokenIds:
        """Token ids that hold the scored tokens: the decoder's where there is one, else `ids`; `first` indexes them."""
        return self.ids if self.decoder is None else self.decoder

    @property
    def scored(self) -> tuple[int, ...]:
        """The tokens whose likelihood is measured, in order."""
        if self.chosen is not None:
            return tuple(self.written[i] for i in self.chosen)
        return self.written[self.first :]

    @property
    def indices(self) -> Sequence[int]:
        """Indices of the scored tokens in `written`."""
        return range(self.first, len(self.written)) if self.chosen is None else self.chosen

    @property
    def runs(self) -> list[range]:
        """The indices of the scored tokens as runs without gaps."""
        if self.chosen is None:
            return [range(self.first, len(self.written))]
        edges = [i for i, (a, b) in enumerate(pairwise(self.chosen), 1) if b != a + 1]
        ends = zip([0, *edges], [*edges, len(self.chosen)], strict=True)
        return [range(self.chosen[a], self.chosen[b - 1] + 1) for a, b in ends]

    def __len__(self) -> int:
        """Return the number of positions that the model computes."""
        return len(self.ids) + len(self.decoder or ())


# ---------------------------------------------------------------- Example -> Tokens


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    role: str,
    max_length: int | None,
    encoder_decoder: bool = False,
    truncate: bool = False,
    chat_template: str | None = None,
) -> list[Tokens]:
    """Tokenize each example; scored is its completion, or what its `turns` and `spans` say.

    Causal: prompt + completion are tokenized as one text, and a token that reaches over the seam counts as completion,
    as does one that reaches into a span. Of the strings in `forget` the end of text is no part.
    The tokenizer's prefix of a text (BOS) comes first; a plain text without one is scored from its second token, since
    nothing predicts the first. After a prompt's completion comes the end of text, scored, since it is part of an
    answer; a plain text may be a fragment and gets none.

    Chat: the tokenizer's chat template, or the one passed in, renders `messages`, special tokens included. Scored are,
    by `turns`, the last turn up to its closing token, each of the assistant's turns up to its closing token, or all
    that the template writes from the first turn's content on.

    Encoder-decoder: the encoder reads the prompt as the tokenizer makes it (of a plain text, which has none, the end of
    text alone); the decoder writes completion and end of text. What the encoder reads is never scored.

    Args:
        examples: the texts.
        tokenizer: a tokenizer of transformers.
        role: "forget", "retain" or "holdout", for messages.
        max_length: the most tokens that the model takes, encoder and decoder each; None for no limit.
        encoder_decoder: True for an encoder-decoder model.
        truncate: cut a longer example instead of raising: the prompt loses its beginning, but not BOS, until half of
            max_length is left of it, and then the completion loses its end.
        chat_template: Jinja source in place of the tokenizer's chat template.

    Returns:
        Tokens of each example, in order.

    Raises:
        DataError: an example that is too long, has no token to score, or that the chat template refuses; its number
            is in the message. ArgumentError: a max_length below 2.
    """
    if max_length is not None and max_length < 2:
        raise ArgumentError(f"max_length must be at least 2, one token and what predicts it, and is {max_length}")
    if not examples:
        return []
    wheres = [f"{role} example {number}" for number in range(1, len(examples) + 1)]
    strings = [example.forget for example in examples]
    if encoder_decoder:
        examples = [replace(example, turns="last", spans=(), forget=()) for example in examples]
    usual, none = None, _Special([], [], [])
    assemble = _encoder_decoder if encoder_decoder else _causal
    special, tokens = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}, []
    for start in range(0, len(examples), _AT_ONCE):
        own, part = wheres[start : start + _AT_ONCE], examples[start : start + _AT_ONCE]
        texts = [rendered_text(e, tokenizer, where, chat_template) for e, where in zip(part, own, strict=True)]
        if encoder_decoder:
            splits = _apart(texts, strings[start : start + _AT_ONCE], own, tokenizer)
        else:
            splits = _jointly(texts, tokenizer)
        usual = usual or _special(tokenizer, texts[0].completion[:64])
        for text, split, where in zip(texts, splits, own, strict=True):
            if not split[1] or split[2] == []:
                raise DataError(f"{where} has no token to score: the tokenizer makes none of it; give another text")
            if special.issuperset(split[1] if split[2] is None else [split[1][i] for i in split[2]]):
                raise DataError(f"{where} has no token to score: it is made of special tokens alone; give another text")
            fit = _Fit(max_length, truncate, tokenizer.bos_token_id, where)
            tokens.append(assemble(split, none if text.templated else usual, fit, text, padding_id(tokenizer)))
    return tokens


def padding_id(tokenizer: Tokenizer) -> int:
    """Return the id of the pad token, or else of the end of text, or else 0: padding is never scored."""
    known = (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None)
    return int(next(known, 0))


class _Special(NamedTuple):
    before: list[int]  # special tokens before a text
    after: list[int]  # special tokens after it
    end: list[int]  # end of an answer: `after`, or else the end of text


def _apart(
    texts: list[ScoredText], strings: Sequence[tuple[str, ...]], wheres: Sequence[str], tokenizer: Tokenizer
) -> list[Split]:
    prompts = _tokenize(tokenizer, [text.prompt.strip() for text in texts])["input_ids"]
    completions = [text.completion.strip() for text in texts]
    whole = tuple(((0, len(completion)),) for completion in completions)
    spans = [occurrences(*each) if each[2] else None for each in zip(completions, whole, strings, wheres, strict=True)]
    written, offsets = _with_offsets(completions, tokenizer)
    return [
        (prompt, ids, None if own is None else _scored(own, ids, places, completion, tokenizer))
        for prompt, ids, own, places, completion in zip(prompts, written, spans, offsets, completions, strict=True)
    ]


def _with_offsets(texts: list[str], tokenizer: Tokenizer) -> tuple[list[Ids], list[list[Span]]]:
    """Return the ids of texts, and the characters of each token; none where the tokenizer does not tell them."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    out = _tokenize(tokenizer, texts, **({"return_offsets_mapping": True} if fast else {}))
    offsets = out["offset_mapping"] if fast else [[] for _ in texts]
    broken = [
        max((end for _, end in each), default=0) < len(t.rstrip()) for each, t in zip(offsets, texts, strict=True)
    ]
    return out["input_ids"], [[] if bad else each for bad, each in zip(broken, offsets, strict=True)]


def _jointly(texts: list[ScoredText], tokenizer: Tokenizer) -> list[Split]:
    wholes = [text.prompt + text.completion for text in texts]
    splits: list[Split] = []
    for text, whole, ids, offsets in zip(texts, wholes, *_with_offsets(wholes, tokenizer), strict=True):
        scored = None if text.spans is None else _scored(text.spans, ids, offsets, whole, tokenizer)
        if scored:
            splits.append((ids[: scored[0]], ids[scored[0] :], [i - scored[0] for i in scored]))
            continue
        seam = _seam(text.prompt, ids, offsets, tokenizer)
        splits.append((ids[:seam], ids[seam:], scored))
    return splits


def _seam(prompt: str, ids: Ids, offsets: Sequence[Span], tokenizer: Tokenizer) -> int:
    """Return the index of the first token that reaches beyond the prompt."""
    if not prompt:
        return 0
    if offsets:
        return next((at for at, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
    return shared_length(_tokenize(tokenizer, [prompt])["input_ids"][0], ids)


def _scored(spans: Sequence[Span], ids: Ids, offsets: Sequence[Span], text: str, tokenizer: Tokenizer) -> Ids:
    """Return the indices of the tokens that reach into a span; without offsets, one or two more at its edges."""
    chosen: set[int] = set()
    for start, end in spans:
        first = _seam(text[:start], ids, offsets, tokenizer)
        if offsets:
            chosen |= {i for i in range(first, len(ids)) if offsets[i][0] < end}
        else:
            after = _tokenize(tokenizer, [text[end:]])["input_ids"][0] if text[end:] else []
            chosen |= set(range(first, len(ids) - shared_length(after[::-1], ids[::-1])))
    return sorted(chosen)


def _tokenize(tokenizer: Tokenizer, texts: list[str], **options: Any) -> Any:
    return tokenizer(texts, add_special_tokens=False, verbose=False, **options)  # quiet: lengths are checked here


def _special(tokenizer: Tokenizer, text: str) -> _Special:
    """Find the special tokens around a text by tokenizing one: no attribute tells them for all tokenizers."""
    inner, outer = _tokenize(tokenizer, [text])["input_ids"][0], list(tokenizer(text)["input_ids"])
    starts = range(len(outer) - len(inner) + 1)
    at = next((at for at in starts if outer[at : at + len(inner)] == inner), None)
    before, after = ([], []) if at is None else (outer[:at], outer[at + len(inner) :])
    eos = tokenizer.eos_token_id
    return _Special(before, after, after or ([] if eos is None else [eos]))


def _causal(split: Split, special: _Special, fit: _Fit, text: ScoredText, _: int) -> Tokens:
    prompt, completion, chosen = split
    head, tail = special.before + prompt, _closed(completion, special.end) if text.answers else completion
    if chosen is not None and text.answers and not text.partial and chosen[-1] == len(completion) - 1:
        chosen = [*chosen, *range(len(completion), len(tail))]
    if not head:
        head, tail, chosen = tail[:1], tail[1:], chosen and [i - 1 for i in chosen if i]
    if not tail or chosen == []:
        fault = "it is one token, with nothing before it that predicts it"
        raise DataError(f"{fit.where} has no token to score: {fault}; give a longer text, or a prompt")
    head, tail = fit(head, tail)
    if chosen is None:
        return Tokens((*head, *tail), len(head))
    ids = (*head, *tail)
    return Tokens.at(ids, _within([len(head) + i for i in chosen], len(ids), fit))


def _encoder_decoder(split: Split, special: _Special, fit: _Fit, _: ScoredText, pad_id: int) -> Tokens:
    prompt, completion, chosen = split
    read, end = fit(special.before + prompt, special.after)
    begun, written = fit(special.before, _closed(completion, special.end))
    ids, decoder = (*read, *end) or tuple(special.end) or (pad_id,), (*begun, *written)
    if chosen is None:
        return Tokens(ids, len(begun), decoder)
    return Tokens.at(ids, _within([len(begun) + i for i in chosen], len(decoder), fit), decoder)


def _within(indices: Ids, length: int, fit: _Fit) -> Ids:
    """Return the indices below the length of a text that was cut; raises DataError where there is none."""
    if indices[0] >= length:
        raise DataError(f"{fit.where} has no token to score before the end to which it is cut: shorten it")
    return [i for i in indices if i < length]


def _closed(completion: Ids, end: Ids) -> Ids:
    return completion if completion[len(completion) - len(end) :] == end else completion + end


class _Fit(NamedTuple):
    """Cuts (ids of the prompt, ids of the scored tokens) to the limit."""

    limit: int | None
    truncate: bool
    bos: int | None
    where: str

    def __call__(self, head: Ids, tail: Ids) -> tuple[Ids, Ids]:
        length = len(head) + len(tail)
        if self.limit is None or length <= self.limit:
            return head, tail
        if not self.truncate:
            mend = "shorten it, or have it cut with truncate=True (--truncate)"
            raise DataError(f"{self.where} has {length} tokens where the limit is {self.limit}: {mend}")
        room = min(len(head), max(self.limit - len(tail), self.limit // 2))
        bos = int(room > 1 and head[0] == self.bos)
        return head[:bos] + head[len(head) - (room - bos) :], tail[: self.limit - room]
