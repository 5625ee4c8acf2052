"""Setup twins: a model that saw texts at known doses, and one of the same training that did not. Nothing is trained."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from pyunlearn.data import Tokens, encode
from pyunlearn.data.examples import Example
from pyunlearn.errors import ArgumentError, DataError, ModelError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.loading import load, without_weights
from pyunlearn.progress import logger
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.corpus import Dosed
from pyunlearn.study.sets import NOBODY, ForgetSet, Sets

_Read = tuple[Dosed, Tokens]
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

    Raises DataError where the corpus has too few texts of a kind and dose, or the test corpus too few.
    """
    read = _different(config, texts, tokenizer)
    random.Random(f"order-{config.seed}").shuffle(read)
    texts = [text for text, _ in read]
    groups: dict[tuple[str, int], list[_Read]] = {(k, d): [] for k in config.kinds for d in (0, *config.doses)}
    for text, tokens in read:
        groups.setdefault((text.kind, text.dose), []).append((text, tokens))
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
    parts = {ForgetSet(k, 0, NOBODY): groups[k, 0][utility if k == "id" else 0 :] for k in config.kinds}
    parts = {which: part[: config.non_members] for which, part in parts.items()}
    for seed in range(config.seeds):
        part = slice(seed * config.examples, (seed + 1) * config.examples)
        parts |= {ForgetSet(k, d, seed): groups[k, d][part] for k in config.kinds for d in config.doses}
    if test is None:
        chosen = [t for _, t in groups["id", 0][:utility]]
    else:
        chosen = _held_out(config, test, [x for part in parts.values() for x in part], tokenizer)
    tested, forget = list(range(len(chosen))), {}
    for which, members in parts.items():
        forget[which] = list(range(len(chosen), len(chosen) + len(members)))
        chosen += [t for _, t in members]
    return Sets(tokens=chosen, learned=[], background=[], test=tested, forget=forget)


def _different(config: StudyConfig, texts: Sequence[Dosed], tokenizer: Any) -> list[_Read]:
    """Return the texts with their tokens, cut to max_tokens, but none that reads as another one does.

    Such a beginning was inserted as often as all its texts together, so that the dose of none of them is its own.
    """
    examples = [text.example for text in texts]
    tokens = encode(examples, tokenizer, role="corpus", max_length=config.max_tokens, truncate=True)
    times = Counter(t.ids for t in tokens)
    different = [(text, t) for text, t in zip(texts, tokens, strict=True) if times[t.ids] == 1]
    if same := len(texts) - len(different):
        logger.warning(
            f"{same} texts of the corpus have the same tokens as another one, cut to max_tokens {config.max_tokens}: "
            "they are left out, since the dose of what they share is not that of one text"
        )
    return different


def _held_out(config: StudyConfig, test: Sequence[Example], forget: Sequence[_Read], tokenizer: Any) -> list[Tokens]:
    """Return the test texts with their tokens, but none that is a text of the sets, or a passage of one.

    Raises DataError where too few are left.
    """
    tokens = encode(test, tokenizer, role="test corpus", max_length=config.max_tokens, truncate=True)
    ids, whole = {t.ids for _, t in forget}, "\0".join(_words(text.example) for text, _ in forget)
    apart = [t for e, t in zip(test, tokens, strict=True) if t.ids not in ids and _words(e) not in whole]
    both = len(test) - len(apart)
    if both:
        logger.warning(
            f"{both} examples of the test corpus are in the forget sets or among the non-members too: they are left "
            "out of the test"
        )
    if len(apart) < config.test_examples:
        raise DataError(
            f"the test corpus has {len(apart)} examples{' that are in no forget set' if both else ''}, and "
            f"test_examples is {config.test_examples}: lower it"
        )
    return apart[: config.test_examples]


def _words(example: Example) -> str:
    """Return the words of a text, each between spaces: a passage of it has them in a row."""
    return f" {' '.join((example.prompt + example.completion).split())} "


def _too_few(config: StudyConfig, texts: Sequence[Dosed], kind: str, dose: int, need: int) -> str:
    """Return the message for a kind and dose that the corpus lacks."""
    doses = Counter(t.dose for t in texts if t.kind == kind)
    listed = ", ".join(f"{n} of dose {d}" for d, n in sorted(doses.items()))
    what = "non-members and test" if dose == 0 and kind == "id" else "non-members" if dose == 0 else "its forget sets"
    return (
        f"the study needs {need} texts of kind {kind} and dose {dose} for {what}, and the corpus has {doses[dose]} "
        f"({listed or 'none of this kind'}): give more, lower examples, seeds or test_examples, or name other doses"
    )
