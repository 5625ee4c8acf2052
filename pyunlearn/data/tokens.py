"""Tokenize examples, and decide which of their tokens are scored: Example -> Tokens.

`read_examples` (in examples.py) reads a user's texts as Examples, `encode` turns these into Tokens, `collate` and
`batches` (in batching.py) into tensors. Which positions are scored is decided here, on the CPU, from lengths alone:
never from `ids == pad`, so a pad token that is also the end of text does no harm, and no mask is searched on the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from pyunlearn.data.examples import Example, excerpt
from pyunlearn.errors import ArgumentError, DataError

__all__ = ["Tokens", "encode", "padding_id", "text_of"]

Tokenizer: TypeAlias = Any  # a tokenizer of transformers
Split = tuple[list[int], list[int]]  # (ids of the prompt, ids of the scored tokens)


@dataclass(frozen=True)
class Tokens:
    """One example as token ids. The scored tokens are one run up to the end of `decoder`, or else of `ids`.

    ids      the model's input; with an encoder-decoder model, the encoder's
    first    index of the first scored token; a causal model cannot score index 0, which nothing predicts
    decoder  the decoder's output in an encoder-decoder model, not shifted; None for a causal model

    >>> Tokens((5, 6, 7, 8), first=2).scored
    (7, 8)
    """

    ids: tuple[int, ...]
    first: int
    decoder: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        lowest, length = int(self.decoder is None), len(self.written)
        if not self.ids or not lowest <= self.first < length:
            span = f"from {lowest} to {length - 1}"
            raise DataError(f"no token is scored: `first` must be {span} in {length} tokens, and is {self.first}")

    @property
    def written(self) -> tuple[int, ...]:
        """Token ids that hold the scored tokens: the decoder's where there is one, else `ids`; `first` indexes them."""
        return self.ids if self.decoder is None else self.decoder

    @property
    def scored(self) -> tuple[int, ...]:
        """The tokens whose likelihood is measured, in order."""
        return self.written[self.first :]

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
    """Tokenize each example; only its completion is scored.

    Causal: prompt + completion are tokenized as one text, and a token that reaches over the seam counts as completion.
    The tokenizer's prefix of a text (BOS) comes first; a plain text without one is scored from its second token, since
    nothing predicts the first. After a prompt's completion comes the end of text, scored, since it is part of an
    answer; a plain text may be a fragment and gets none.

    Chat: the tokenizer's chat template, or the one passed in, renders `messages`, special tokens included, and the last
    turn is scored up to its closing token.

    Encoder-decoder: the encoder reads the prompt as the tokenizer makes it (of a plain text, which has none, the end of
    text alone); the decoder writes completion and end of text.

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
        DataError: an example that is too long, has no token to score, or that the chat template refuses; its number and
            beginning are in the message. ArgumentError: a max_length below 2.
    """
    if max_length is not None and max_length < 2:
        raise ArgumentError(f"max_length must be at least 2, one token and what predicts it, and is {max_length}")
    if not examples:
        return []
    wheres = [f"{role} example {number} ({excerpt(example)})" for number, example in enumerate(examples, 1)]
    texts = [_render(example, tokenizer, where, chat_template) for example, where in zip(examples, wheres, strict=True)]
    splits = _apart(texts, tokenizer) if encoder_decoder else _jointly(texts, tokenizer)
    usual, none = _special(tokenizer, texts[0].completion[:64]), _Special([], [], [])
    assemble = _encoder_decoder if encoder_decoder else _causal
    tokens = []
    for text, split, where in zip(texts, splits, wheres, strict=True):
        if not split[1]:
            raise DataError(f"{where} has no token to score: the tokenizer makes none of it; give another text")
        fit = _Fit(max_length, truncate, tokenizer.bos_token_id, where)
        tokens.append(assemble(split, none if text.templated else usual, fit, bool(text.prompt), padding_id(tokenizer)))
    return tokens


def text_of(example: Example, tokenizer: Tokenizer, chat_template: str | None = None) -> tuple[str, str]:
    """Return (prompt, completion) as the text that `encode` tokenizes; its errors name no example."""
    return _render(example, tokenizer, "the example", chat_template)[:2]


def padding_id(tokenizer: Tokenizer) -> int:
    """Return the id of the pad token, or else of the end of text, or else 0: padding is never scored."""
    known = (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None)
    return int(next(known, 0))


class _Text(NamedTuple):
    prompt: str
    completion: str
    templated: bool  # rendered by the chat template, which writes every special token itself


class _Special(NamedTuple):
    before: list[int]  # special tokens before a text
    after: list[int]  # special tokens after it
    end: list[int]  # end of an answer: `after`, or else the end of text


def _render(example: Example, tokenizer: Tokenizer, where: str, chat_template: str | None) -> _Text:
    if example.messages is None or not (chat_template or getattr(tokenizer, "chat_template", None)):
        return _Text(example.prompt, example.completion, False)
    messages = [message._asdict() for message in example.messages]
    name = "the given chat template" if chat_template else "the tokenizer's chat template"
    mend = "give it as prompt and completion, or set template='none' (--template none)"
    apply = functools.partial(tokenizer.apply_chat_template, tokenize=False, chat_template=chat_template)
    try:
        whole = str(apply(messages))
        prompt = str(apply(messages[:-1], add_generation_prompt=True))
    except Exception as error:  # a template is a program: it can raise anything
        fault = " ".join(str(error).split())
        raise DataError(f"{where} is refused by {name}: {fault}; {mend}") from error
    if not whole.startswith(prompt) or whole == prompt:
        fault = f"{name} does not write the prompt alone as it writes it before the answer"
        raise DataError(f"{where} cannot be split into prompt and answer, because {fault}; {mend}")
    if whole.rstrip().endswith(tuple(tokenizer.all_special_tokens)):  # "<|im_end|>\n": no model generates that newline
        whole = whole.rstrip()
    return _Text(prompt, whole[len(prompt) :], True)


def _apart(texts: list[_Text], tokenizer: Tokenizer) -> list[Split]:
    prompts = _tokenize(tokenizer, [text.prompt.strip() for text in texts])["input_ids"]
    completions = _tokenize(tokenizer, [text.completion.strip() for text in texts])["input_ids"]
    return list(zip(prompts, completions, strict=True))


def _jointly(texts: list[_Text], tokenizer: Tokenizer) -> list[Split]:
    wholes = [text.prompt + text.completion for text in texts]
    fast = bool(getattr(tokenizer, "is_fast", False))
    out = _tokenize(tokenizer, wholes, **({"return_offsets_mapping": True} if fast else {}))
    splits = []
    for number, ids in enumerate(out["input_ids"]):
        prompt, whole = texts[number].prompt, wholes[number]
        ends = [end for _, end in out["offset_mapping"][number]] if fast else []
        if not prompt:
            seam = 0
        elif ends and max(ends) >= len(whole.rstrip()):
            seam = next((at for at, end in enumerate(ends) if end > len(prompt)), len(ids))
        else:  # no offsets, or broken ones: as far as the prompt alone gives the same ids
            alone = _tokenize(tokenizer, [prompt])["input_ids"][0]
            shared = min(len(alone), len(ids))
            seam = next((at for at in range(shared) if alone[at] != ids[at]), shared)
        splits.append((ids[:seam], ids[seam:]))
    return splits


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


def _causal(split: Split, special: _Special, fit: _Fit, prompted: bool, _: int) -> Tokens:
    prompt, completion = split
    head, tail = special.before + prompt, _closed(completion, special.end) if prompted else completion
    if not head:
        head, tail = tail[:1], tail[1:]
    if not tail:
        fault = "it is one token, with nothing before it that predicts it"
        raise DataError(f"{fit.where} has no token to score: {fault}; give a longer text, or a prompt")
    head, tail = fit(head, tail)
    return Tokens((*head, *tail), len(head))


def _encoder_decoder(split: Split, special: _Special, fit: _Fit, _: bool, pad_id: int) -> Tokens:
    prompt, completion = split
    read, end = fit(special.before + prompt, special.after)
    begun, written = fit(special.before, _closed(completion, special.end))
    return Tokens((*read, *end) or tuple(special.end) or (pad_id,), len(begun), (*begun, *written))


def _closed(completion: list[int], end: list[int]) -> list[int]:
    return completion if completion[len(completion) - len(end) :] == end else completion + end


class _Fit(NamedTuple):
    """Cuts (ids of the prompt, ids of the scored tokens) to the limit."""

    limit: int | None
    truncate: bool
    bos: int | None
    where: str

    def __call__(self, head: list[int], tail: list[int]) -> Split:
        length = len(head) + len(tail)
        if self.limit is None or length <= self.limit:
            return head, tail
        if not self.truncate:
            mend = "shorten it, or have it cut with truncate=True (--truncate)"
            raise DataError(f"{self.where} has {length} tokens where the limit is {self.limit}: {mend}")
        room = min(len(head), max(self.limit - len(tail), self.limit // 2))
        bos = int(room > 1 and head[0] == self.bos)
        return head[:bos] + head[len(head) - (room - bos) :], tail[: self.limit - room]
