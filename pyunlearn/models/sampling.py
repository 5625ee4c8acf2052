"""Texts sampled from the model itself: non-members, text to hold in place of a retain set, and alternate answers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from pyunlearn.data import Tokens
from pyunlearn.data.comparison import FEWEST
from pyunlearn.errors import DataError
from pyunlearn.models.devices import seeded
from pyunlearn.models.generation import generate
from pyunlearn.models.language_model import LanguageModel

COUNT = 64
"""Number of sampled non-members, which limits the measured exposure to log2(65) = 6.02 bits."""

OWN_COUNT = 96
"""Number of texts sampled in place of a retain set."""

UNSEEN_COUNT = 400
"""Number of texts sampled after prompts that no record has."""

_PROMPTS = 4096  # of records that prompts are made of
_LONGEST_PROMPT = 512  # tokens; longer ones would take more time than the run
_LONGEST_BEGINNING = 48  # tokens of a text without a prompt
_AT_ONCE = 32  # texts that are sampled together

_RECITED = 10  # consecutive tokens that count as recited
_SHORTEST = 3  # tokens of the shortest text that can be recited
_ATTEMPTS = 4  # number of attempts to sample a text that does not recite the forget set


_OPENINGS = (  # cut to as many tokens as the shortest has, they are sampled in one batch
    "The", "In the", "It is", "How to", "What is", "There are", "We", "Dear", "Chapter 1", "For example,",
    "Once upon a time", "According to", "import", "Today", "To make", "1.",
)  # fmt: skip


def require_enough(non_members: Sequence[Tokens], *, holdout: bool) -> None:
    """Raise DataError where there are fewer than 19 non-members, so that no exposure can be significant."""
    if len(non_members) < FEWEST:
        role = "holdout" if holdout else "text the model writes that is not the forget set itself"
        raise DataError(
            f"to tell memorized from unseen takes {FEWEST} non-members or more, and the {role} has "
            f"{len(non_members)}: give a holdout of {FEWEST} texts that were never trained on"
        )


@torch.no_grad()
def sample_non_members(
    lm: LanguageModel, forget: Sequence[Tokens], *, count: int = COUNT, seed: int = 0
) -> list[Tokens]:
    """Sample completions at temperature 1 from the model, as long as the forget texts (8 to 48 tokens).

    For texts without a prompt, the samples start from the beginning-of-text token. For texts with a prompt, they
    continue that prompt with another first token, which is not scored: a model that has memorized the answer would
    otherwise recite it and be compared with itself. Samples that contain ten consecutive tokens of the forget set, or
    begin with all of a shorter text with that prompt, or are the beginning of one, are left out, and others drawn in
    their place, at a temperature of 1.5, then 2, then 2.5: the better a text is memorized, the fewer differ from it.

    Args:
        lm: the model, in evaluation mode.
        forget: the forget texts.
        count: number of samples.
        seed: seed of the sampling.

    Returns:
        At most `count` texts.
    """
    lengths = sorted(len(t.scored) for t in forget)
    length = max(8, min(48, lengths[len(lengths) // 2]))
    prompted = [t for t in forget if _prompt(lm, t)[1]]
    pool = prompted if len(prompted) * 2 > len(forget) else [t for t in forget if not _prompt(lm, t)[1]]
    texts: dict[tuple[int, ...], set[tuple[int, ...]]] = {}  # prompt -> the beginnings of the forget texts with it
    for t in forget:
        texts.setdefault(_prompt(lm, t)[0], set()).add(t.scored[:_RECITED])
    samples: list[Tokens] = []
    with seeded(seed, lm.device):
        for attempt in range(_ATTEMPTS):
            missing = count - len(samples)
            if missing <= 0:
                break
            per_prompt = -(-missing // len(pool)) if prompted and pool[0] in prompted else missing
            new: list[Tokens] = []
            drawn = 0
            for t in pool[: -(-missing // per_prompt)]:
                whole, departs = _prompt(lm, t)
                # cut a long prompt at its start
                prompt = whole if lm.context_length is None else whole[-max(1, lm.context_length - length) :]
                wanted, other = min(per_prompt, missing - drawn), t.scored[0] if departs else None
                drawn += wanted
                begin = 0 if lm.is_encoder_decoder else len(prompt)
                answers = _sample(lm, [prompt] * wanted, other, length, temperature=1 + attempt / 2)
                new += [x for x in answers if not _begins_as(x.written[begin:], texts[whole])]
            reciting = _reciting([t.scored for t in new], ((t.scored, _RECITED) for t in forget))
            samples += [t for i, t in enumerate(new) if i not in reciting]
    return samples


@torch.no_grad()
def sample_own_texts(
    lm: LanguageModel, forget: Sequence[Tokens], *, count: int = OWN_COUNT, seed: int = 0
) -> list[Tokens]:
    """Sample texts at temperature 1 that hold what the model knows, for a run without a retain set.

    In turn, one starts from the beginning-of-text token, one from the opening of an English text, if the tokenizer has
    its words, and one from the tokens with which all forget texts begin: the first, and what their prompts share. Each
    is as long as the forget texts are (8 to 48 tokens). Texts that recite a forget text are left out, if what it does
    not share with all others has three tokens or more.

    Args:
        lm: the model, in evaluation mode.
        forget: the forget texts.
        count: number of samples.
        seed: seed of the sampling.

    Returns:
        At most `count` texts; none from an encoder-decoder model, which writes only in answer to something.
    """
    if lm.is_encoder_decoder:
        return []
    lengths = sorted(len(t.ids) for t in forget)
    length = max(8, min(48, lengths[len(lengths) // 2]))
    shared = _shared_prefix([t.ids[: t.first] for t in forget])
    alone = len(set(forget)) == 1 or not shared
    records = forget[0].ids[:1] if alone else shared[-max(1, (lm.context_length or len(shared) + length) - length) :]
    encoded = [tuple(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in _OPENINGS]
    openings = [ids for ids in encoded if ids and lm.tokenizer.unk_token_id not in ids] or [_start(lm)]
    openings = [ids[: min(map(len, openings))] for ids in openings]
    starts = [(_start(lm), openings[i // 3 % len(openings)], records)[i % 3] for i in range(count)]
    samples: list[Tokens] = []
    with seeded(seed, lm.device):
        for size in sorted({len(start) for start in starts}):
            samples += _sample(lm, [start for start in starts if len(start) == size], None, length)
    template = 0 if alone or len(shared) == 1 else len(shared)  # a third of the samples begins with it
    reciting = _reciting([t.ids for t in samples], ((t.ids[template:], max(3, len(t.scored))) for t in forget))
    return [t for i, t in enumerate(samples) if i not in reciting]


@torch.no_grad()
def sample_unseen_answers(
    lm: LanguageModel, texts: Sequence[Tokens], forget: Sequence[Tokens], *, count: int = UNSEEN_COUNT, seed: int = 0
) -> list[Tokens]:
    """Sample answers at temperature 1 to prompts that no record has: what the model writes where it recites nothing.

    Each prompt is the first half of one text's and the second half of another's; what all begin or end with, such as a
    chat template, is not divided. The first half of a text, 48 tokens at most, is in the place of its prompt where it
    has none, or all have the same. Prompts of more than 512 tokens are left out. Answers have the median length of the
    texts' at most (8 to 48 tokens). Those that have ten consecutive tokens of a forget text's answer, or all of a
    shorter one, are left out.

    Args:
        lm: the model, in evaluation mode.
        texts: records of the forget set's kind, such as the retain set.
        forget: the forget texts.
        count: number of samples.
        seed: seed of the prompts and of the sampling.

    Returns:
        At most `count` texts of which the answers are scored; none where no two texts differ in their prompts.
    """
    sources = texts[:: -(-len(texts) // _PROMPTS) or 1]
    beginning = _beginning if len({_beginning(lm, t) for t in sources}) > 1 else _first_half
    prompts = _recombined(sorted({beginning(lm, t) for t in sources}), count, seed)
    for t in (*texts, *forget):
        prompts.pop(beginning(lm, t), None)
    lengths = sorted(len(t.scored) for t in texts)
    length = max(8, min(48, lengths[len(lengths) // 2]))
    room = lm.context_length or _LONGEST_PROMPT + length
    longest = min(_LONGEST_PROMPT, room if lm.is_encoder_decoder else room - length)
    samples: list[Tokens] = []
    with seeded(seed, lm.device):
        for size in sorted({len(prompt) for prompt in prompts if len(prompt) <= longest}):
            alike = [prompt for prompt in prompts if len(prompt) == size]
            for at in range(0, len(alike), _AT_ONCE):
                samples += _sample(lm, alike[at : at + _AT_ONCE], None, length, least=2)
    reciting = _reciting([t.scored for t in samples], ((t.scored, len(t.scored)) for t in forget))
    return [t for i, t in enumerate(samples) if i not in reciting]


@torch.no_grad()
def sample_alternates(lm: LanguageModel, forget: Sequence[Tokens], *, count: int, seed: int = 0) -> list[Tokens]:
    """Sample alternate answers for each forget text, at temperature 1.

    Each differs from the text in its first token, which is scored here, and none recites the forget set. Where too few
    of the attempts succeed, their answers are repeated.

    Args:
        lm: the model, in evaluation mode.
        forget: B texts.
        count: answers per text, 1 or more.
        seed: seed of the sampling.

    Returns:
        B * count texts, example by example.

    Raises:
        DataError: the model recites the forget set in every attempt.
    """
    known = {run for t in forget for run in _runs(t.scored)}
    alternates: list[Tokens] = []
    with seeded(seed, lm.device):
        for number, t in enumerate(forget, 1):
            prompt, departs = _prompt(lm, t)
            own: list[Tokens] = []
            for _ in range(_ATTEMPTS):
                length = max(2, len(t.scored))
                other = t.scored[0] if departs else None
                samples = _sample(lm, [prompt] * (count - len(own)), other, length)
                whole = [replace(x, first=0 if lm.is_encoder_decoder else len(prompt)) for x in samples]
                own += [x for x in whole if known.isdisjoint(_runs(x.scored))]
                if len(own) == count:
                    break
            if not own:
                raise DataError(
                    f"the model recites the forget set whenever it is to answer forget example {number} in other "
                    "words: give winners, with dpo"
                )
            alternates += [own[i % len(own)] for i in range(count)]
    return alternates


def _runs(ids: Sequence[int], length: int = _RECITED) -> set[tuple[int, ...]]:
    """Return every run of `length` consecutive tokens."""
    return {tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)}


def _begins_as(written: tuple[int, ...], texts: Iterable[tuple[int, ...]]) -> bool:
    """Return whether what was written begins with all of a text or is its beginning, at once or after one token.

    A tokenizer without a beginning-of-text token scores no text's first one.

    >>> [_begins_as(ids, [(5, 6, 7, 8)]) for ids in ((5, 6, 7, 8, 9), (1, 5, 6, 7), (5, 6, 7, 1), (5, 6))]
    [True, True, False, False]
    """
    for ids in (written, written[1:]):
        for text in texts:
            length = min(len(ids), len(text))
            if length >= _SHORTEST and ids[:length] == text[:length]:
                return True
    return False


def _reciting(samples: Sequence[Sequence[int]], forget: Iterable[tuple[Sequence[int], int]]) -> set[int]:
    """Return the indices of the samples that have a run of a forget text.

    The runs of the samples alone are in memory, and the forget texts are read once.

    Args:
        samples: token ids of each.
        forget: token ids of each text, and how many in a row a sample may not have; ten at most count.
    """
    owners: dict[int, dict[tuple[int, ...], list[int]]] = {}  # length -> run -> the samples that have it
    reciting: set[int] = set()
    for ids, most in forget:
        length = min(_RECITED, most)
        if length not in owners:
            owners[length] = {}
            for i, sample in enumerate(samples):
                for run in _runs(sample, length):
                    owners[length].setdefault(run, []).append(i)
        reciting.update(i for run in _runs(ids, length) & owners[length].keys() for i in owners[length][run])
    return reciting


def _shared_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the tokens with which all prompts begin."""
    differ = (i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)
    return prompts[0][: next(differ, min(map(len, prompts)))]


def _beginning(lm: LanguageModel, t: Tokens) -> tuple[int, ...]:
    """Return the prompt of a text, or where it has none its first half."""
    prompt, own = _prompt(lm, t)
    return prompt if own else _first_half(lm, t)


def _first_half(lm: LanguageModel, t: Tokens) -> tuple[int, ...]:
    return t.ids[: max(1, min(_LONGEST_BEGINNING, len(t.ids) // 2))]


def _recombined(prompts: Sequence[tuple[int, ...]], count: int, seed: int) -> dict[tuple[int, ...], None]:
    """Return at most `count` prompts, each the first half of one and the second half of another.

    >>> sorted(_recombined([(0, 1, 2, 9), (0, 3, 4, 9)], 5, 0))
    [(0, 1, 4, 9), (0, 3, 2, 9)]
    """
    unseen = dict[tuple[int, ...], None]()
    if len(prompts) < 2:
        return unseen
    shortest = min(map(len, prompts))
    start = len(_shared_prefix(prompts))
    end = min(len(_shared_prefix([prompt[::-1] for prompt in prompts])), shortest - start)
    draw = random.Random(seed)
    for _ in range(4 * count):  # some are drawn twice
        first, second = draw.sample(prompts, 2)
        halves = [start + (len(prompt) - start - end) // 2 for prompt in (first, second)]
        unseen[first[: halves[0]] + second[halves[1] :]] = None
        if len(unseen) == count:
            break
    return unseen


def _start(lm: LanguageModel) -> tuple[int, ...]:
    """Return the token that begins a text."""
    known = (lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id, lm.tokenizer.pad_token_id, 0)
    return (next(i for i in known if i is not None),)


def _prompt(lm: LanguageModel, t: Tokens) -> tuple[tuple[int, ...], bool]:
    """Return the token ids to continue, and True where they are a prompt of the user's own."""
    if lm.is_encoder_decoder:
        return t.ids[:], len(t.ids) > 1
    prompt = t.ids[: t.first]
    if len(prompt) > 1:
        return prompt, True
    return _start(lm), False


def _sample(
    lm: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    not_first: int | None,
    length: int,
    *,
    temperature: float = 1.0,
    least: int | None = None,
) -> list[Tokens]:
    """Continue each of N prompts of T tokens; the first token is never `not_first`, and then is not scored.

    Without it a decoder writes `length` tokens, or `least` or more.
    """
    both = lm.is_encoder_decoder
    ids = torch.tensor(prompts, device=lm.device)  # (N, T)
    before = 1 if both else ids.shape[1]

    def depart(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == before:
            scores[:, not_first] = -torch.inf
        return scores

    continuations = generate(
        lm,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        prompt_length=before,
        max_new_tokens=length,
        score_hook=None if not_first is None else depart,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        min_new_tokens=least or (length if not_first is None and not both else 2),
    )
    samples = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        skip = 0 if not_first is None or len(continuation) < 2 else 1
        if both:
            samples.append(Tokens(tuple(prompt), skip, tuple(continuation)))
        else:
            samples.append(Tokens((*prompt, *continuation), len(prompt) + skip))
    return samples
