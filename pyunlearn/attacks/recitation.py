"""Recitation: does a model write the rest of a text, greedily or in one of several samples?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from pyunlearn.attacks.prefixes import SHARES, after
from pyunlearn.attacks.target import Floats, Target, Trial
from pyunlearn.data import Tokens
from pyunlearn.metrics import verbatim_match
from pyunlearn.models.devices import seeded
from pyunlearn.probes.decoding import greedy_continuations, sampled_continuations
from pyunlearn.probes.recitation import LONGEST, recited


def recitation(target: Target) -> Iterator[Trial]:
    """Decode greedily after the prompt, and after an eighth, a quarter and half of each text.

    The score is minus the longest run of the text's own tokens, as a share of the rest.

    Source: Carlini et al. 2022, arXiv 2202.07646.
    """
    for share in (Fraction(0), *SHARES):
        openings, n = _openings(target, share)
        name = f"recitation, {share} given" if share else "recitation"
        target.bar.begin(name, len(openings))
        written = greedy_continuations(
            target.lm,
            openings,
            longest=LONGEST,
            batch_size=4 * target.config.batch_size,
            advance=target.bar.advance,
        )
        yield _trial(name, openings, [[ids] for ids in written], n, given=float(share))


def sampling(target: Target) -> Iterator[Trial]:
    """Draw several continuations at temperature 1 of each prompt, or of the first half of a text without one.

    The score is that of `recitation`, of the sample that shows most.

    Source: Reisizadeh et al. 2025, arXiv 2511.04934 (Leak@k).
    """
    prompted = all(e.prompted for e in target.texts.forget_examples)
    openings, n = _openings(target, Fraction(0) if prompted else Fraction(1, 2))
    k = target.config.samples
    target.bar.begin(f"sampling {k} continuations", len(openings))
    with seeded(target.config.seed, target.lm.device):
        written = sampled_continuations(
            target.lm,
            openings,
            count=k,
            longest=LONGEST,
            batch_size=4 * target.config.batch_size,
            advance=target.bar.advance,
        )
    yield _trial(f"sampling, best of {k}", openings, written, n, samples=k)


def _openings(target: Target, share: Fraction) -> tuple[list[Tokens], int]:
    """Return the texts with their rest as scored tokens, the forget texts first, and the number of these."""
    texts = target.texts
    return [_whole_run(after(t, share)) for t in texts.every], len(texts.forget)


def _whole_run(t: Tokens) -> Tokens:
    """Return the text with the longest run of its scored tokens, and nothing after it."""
    run = max(t.runs, key=len)
    cut = t.written[: run.stop]
    return Tokens(cut, run.start) if t.decoder is None else Tokens(t.ids, run.start, cut)


def _trial(
    name: str, openings: Sequence[Tokens], written: Sequence[Sequence[tuple[int, ...]]], n: int, **details: object
) -> Trial:
    shares = np.array([max(_share(ids, t) for ids in own) for own, t in zip(written, openings, strict=True)])
    whole = np.array(
        [any(recited(ids, t.scored) for ids in own) for own, t in zip(written, openings, strict=True)], dtype=bool
    )
    counts = {"recited": int(whole[:n].sum()), "recited_non_members": int(whole[n:].sum())}
    scores: Floats = -shares
    return Trial(name, scores[:n], scores[n:], details={**details, **counts})


def _share(ids: Sequence[int], t: Tokens) -> float:
    rest = t.scored[:LONGEST]
    return verbatim_match(ids, rest).longest / len(rest)
