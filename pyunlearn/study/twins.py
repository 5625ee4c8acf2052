"""Setup twins: a model that saw texts at known doses, and one of the same training that did not. Nothing is trained."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from pyunlearn.data import encode
from pyunlearn.data.examples import Example
from pyunlearn.errors import ArgumentError, DataError, ModelError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.loading import load, without_weights
from pyunlearn.progress import logger
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.corpus import Dosed
from pyunlearn.study.sets import NOBODY, ForgetSet, Sets

_FEWEST_NON_MEMBERS = 19  # of each kind, as in the other setups


def twin_tokenizer(config: StudyConfig, texts: Sequence[Dosed]) -> Any:
    """Load the tokenizer of the pair, and no weights.

    Raises ModelError unless both models are causal, have the same number of token ids, and read the texts as the same
    tokens.
    """
    with without_weights():
        models = [LanguageModel.described(*load(str(n), dtype=torch.float32)) for n in (config.checkpoint, config.twin)]
    seen, unseen = models
    for name, lm in zip((config.checkpoint, config.twin), models, strict=True):
        if lm.is_encoder_decoder:
            raise ModelError(f"setup twins takes causal models, and {name} is an encoder-decoder: give another pair")
        if lm.context_length is not None and lm.context_length < config.max_tokens:
            raise ArgumentError(
                f"max_tokens is {config.max_tokens}, and {name} reads {lm.context_length} at most: lower it to that"
            )
    seen.require_vocabulary(unseen, "the twin")
    ids, other = (lm.encode({"corpus": [t.example for t in texts]}, limited=False)["corpus"] for lm in models)
    different = sum(a != b for a, b in zip(ids, other, strict=True))
    if different:
        raise ModelError(
            f"the tokenizers of {config.checkpoint} and {config.twin} disagree on {different} of {len(ids)} texts of "
            "the corpus: give two models of the same training"
        )
    return seen.tokenizer


def kinds_of(config: StudyConfig, texts: Sequence[Dosed]) -> tuple[str, ...]:
    """Return the kinds of the settings that the corpus has, and "id", which the claims need."""
    return tuple(k for k in config.kinds if k == "id" or any(t.kind == k for t in texts))


def twin_sets(config: StudyConfig, texts: Sequence[Dosed], test: Sequence[Example] | None, tokenizer: Any) -> Sets:
    """Draw disjoint forget sets of every kind and dose for each seed, non-members and test texts of dose 0.

    Raises DataError where the corpus has too few texts of a kind and dose.
    """
    texts = list(texts)
    random.Random(f"order-{config.seed}").shuffle(texts)
    groups: dict[tuple[str, int], list[Example]] = {(k, d): [] for k in config.kinds for d in (0, *config.doses)}
    for text in texts:
        groups.setdefault((text.kind, text.dose), []).append(text.example)
    utility = test is None and config.test_examples
    for kind in config.kinds:
        needs = dict.fromkeys(config.doses, config.seeds * config.examples)
        needs[0] = _FEWEST_NON_MEMBERS + (utility if kind == "id" else 0)
        for dose, need in needs.items():
            if len(groups[kind, dose]) < need:
                raise DataError(_too_few(config, texts, kind, dose, need))
    if unused := sum(not (t.kind in config.kinds and t.dose in (0, *config.doses)) for t in texts):
        logger.warning(
            f"{unused} texts of the corpus are not used: their kind is none of {', '.join(config.kinds)}, or their "
            f"dose none of 0, {', '.join(map(str, config.doses))}"
        )
    if test is not None and len(test) < config.test_examples:
        raise DataError(
            f"the test corpus has {len(test)} examples, and test_examples is {config.test_examples}: lower it"
        )
    chosen: list[Example] = []

    def add(examples: Sequence[Example]) -> list[int]:
        chosen.extend(examples)
        return list(range(len(chosen) - len(examples), len(chosen)))

    held_out = test if test is not None else groups["id", 0]
    tested = add(held_out[: config.test_examples])
    groups["id", 0] = groups["id", 0][utility:]
    forget = {ForgetSet(k, 0, NOBODY): add(groups[k, 0][: config.non_members]) for k in config.kinds}
    for seed in range(config.seeds):
        part = slice(seed * config.examples, (seed + 1) * config.examples)
        forget |= {ForgetSet(k, d, seed): add(groups[k, d][part]) for k in config.kinds for d in config.doses}
    tokens = encode(chosen, tokenizer, role="corpus", max_length=config.max_tokens, truncate=True)
    return Sets(tokens=tokens, learned=[], background=[], test=tested, forget=forget)


def _too_few(config: StudyConfig, texts: Sequence[Dosed], kind: str, dose: int, need: int) -> str:
    """Return the message for a kind and dose that the corpus lacks."""
    doses = Counter(t.dose for t in texts if t.kind == kind)
    listed = ", ".join(f"{n} of dose {d}" for d, n in sorted(doses.items()))
    what = "non-members and test" if dose == 0 and kind == "id" else "non-members" if dose == 0 else "its forget sets"
    return (
        f"the study needs {need} texts of kind {kind} and dose {dose} for {what}, and the corpus has {doses[dose]} "
        f"({listed or 'none of this kind'}): give more, lower examples, seeds or test_examples, or name other doses"
    )
