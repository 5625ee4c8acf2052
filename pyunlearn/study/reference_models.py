"""The models that a study trains, and the scores that each gives to the examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyunlearn.data import Tokens
from pyunlearn.metrics import bleu
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes import greedy_continuations, teacher_forced
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.folder import Folder
from pyunlearn.study.models import load_model
from pyunlearn.study.sets import Sets
from pyunlearn.study.training import train

_BATCH_SIZE = 128  # texts scored together


def names(config: StudyConfig) -> list[str]:
    """Return main-D (with the forget sets of draw D), retrained (without any), subset-K (with a random half of all)."""
    mains = [f"main-{d}" for d in range(config.draws)]
    return [*mains, "retrained", *(f"subset-{k}" for k in range(config.subset_models))]


def train_all(
    folder: Folder, config: StudyConfig, tokenizer: Any, sets: Sets, device: str, say: Callable[[str], None]
) -> None:
    """Train the models that are not finished.

    All share `shared_epochs` on the background alone, without forget examples, so that the retrained model is exactly
    one that never saw a forget set.
    """

    def fit(name: str, epochs: list[list[int]], base: str | None, keep_optimizer: bool) -> None:
        train(
            folder,
            name,
            config,
            tokenizer,
            sets.learned,
            epochs,
            base=base,
            keep_optimizer=keep_optimizer,
            device=device,
            say=say,
        )

    base = None
    if config.shared_epochs:
        base = "base"
        fit(base, [sets.background] * config.shared_epochs, None, True)
    masks = sets.subsets(config)
    for name in names(config):
        kind, _, number = name.partition("-")
        if kind == "main":
            members = sets.members(int(number))
        elif kind == "subset":
            members = sets.members(None, {i for i, mask in masks.items() if mask[int(number)]})
        else:
            members = []
        fit(name, [[*_background(config, sets, epoch), *members] for epoch in range(config.epochs)], base, False)


def _background(config: StudyConfig, sets: Sets, epoch: int) -> list[int]:
    """Draw the ordinary examples of an epoch, the same for every model."""
    rng = np.random.default_rng((config.seed, 7, epoch))
    size = len(sets.background) if config.background is None else min(config.background, len(sets.background))
    chosen: list[int] = rng.permutation(sets.background)[:size].tolist()
    return chosen


def score_all(
    folder: Folder, config: StudyConfig, tokenizer: Any, sets: Sets, device: str, say: Callable[[str], None]
) -> None:
    """Write scores/NAME.safetensors of every model.

    nll, accuracy (N,): mean NLL, nats per token, and share of tokens that are the first choice, of every example in
    `sets.scored()`; test_nll and bleu of the test examples.
    """
    scored = sets.scored()
    for name in names(config):
        if folder.has(f"scores/{name}.safetensors"):
            continue
        say(f"scoring {name}")
        lm = load_model(folder.path / "models" / name, tokenizer, device)
        nll, accuracy = score(lm, [sets.tokens[i] for i in [*scored, *sets.test]])
        n = len(scored)
        folder.arrays(
            f"scores/{name}.safetensors",
            nll=nll[:n],
            accuracy=accuracy[:n],
            test_nll=nll[n:].mean(),
            bleu=translation_bleu(lm, sets, config),
        )


def score(lm: LanguageModel, tokens: Sequence[Tokens]) -> tuple[Any, Any]:
    """Return (n,) mean NLL, nats per token, and (n,) share of tokens that are the first choice."""
    scores = teacher_forced(lm, tokens, batch_size=_BATCH_SIZE)
    return -scores.mean_log_likelihood, scores.greedy_match


def translation_bleu(lm: LanguageModel, sets: Sets, config: StudyConfig) -> float:
    """Return BLEU of greedy translations of the first test examples; NaN where the setup does not translate."""
    if config.setup != "translation":
        return float("nan")
    sources = [sets.tokens[i].ids for i in sets.test[: config.bleu_examples]]
    prompts = [Tokens(source, 0, (lm.pad_id,) * config.max_tokens) for source in sources]
    written = greedy_continuations(lm, prompts, longest=config.max_tokens, batch_size=_BATCH_SIZE)
    texts = lm.tokenizer.batch_decode(written, skip_special_tokens=True)
    return bleu(texts, sets.test_texts[: config.bleu_examples])
