"""Which models a study trains, and what each of them thinks of every watched example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyunlearn.data import Tokens, padding_id
from pyunlearn.metrics import bleu
from pyunlearn.models import Likelihood
from pyunlearn.probes import greedy_continuations, teacher_forced
from pyunlearn.study.folder import Folder
from pyunlearn.study.models import load_model
from pyunlearn.study.old_config import Config
from pyunlearn.study.sets import Sets
from pyunlearn.study.training import train

_AT_ONCE = 128  # texts scored together


def names(config: Config) -> list[str]:
    """main-D (with the forget sets of draw D), retrained (without any) and subset-K (with a random half of all)."""
    return [
        *(f"main-{d}" for d in range(config.draws)), "retrained", *(f"subset-{k}" for k in range(config.subset_models)),
    ]  # fmt: skip


def train_all(
    folder: Folder, config: Config, tokenizer: Any, sets: Sets, device: str, say: Callable[[str], None]
) -> None:
    """Trains what is not there yet. All models share `shared_epochs` on the background alone: no forget example is in them, so that the
    retrained model is exactly one that never saw a forget set."""
    ready: dict[str, Any] = {"device": device, "say": say}
    base = None
    if config.shared_epochs:
        base = "base"
        train(
            folder,
            base,
            config,
            tokenizer,
            sets.learned,
            [sets.background] * config.shared_epochs,
            base=None,
            keep_optimizer=True,
            **ready,
        )
    masks = sets.subsets(config)
    for name in names(config):
        kind, _, number = name.partition("-")
        if kind == "main":
            members = sets.members(int(number))
        elif kind == "subset":
            members = sets.members(None, {i for i, mask in masks.items() if mask[int(number)]})
        else:
            members = []
        epochs = []
        for e in range(config.epochs):
            rng = np.random.default_rng((config.seed, 7, e))
            size = len(sets.background) if config.background is None else min(config.background, len(sets.background))
            epochs.append([*rng.permutation(sets.background)[:size].tolist(), *members])
        train(folder, name, config, tokenizer, sets.learned, epochs, base=base, keep_optimizer=False, **ready)


def score_all(
    folder: Folder, config: Config, tokenizer: Any, sets: Sets, device: str, say: Callable[[str], None]
) -> None:
    """scores/NAME.npz: mean NLL (nats a token) and share of first choices of every watched example, test NLL and BLEU."""
    watched = sets.watched()
    for name in names(config):
        if folder.has(f"scores/{name}.npz"):
            continue
        say(f"scoring {name}")
        model = load_model(folder.path / "models" / name, device)
        found = score(Likelihood(model), [sets.tokens[i] for i in [*watched, *sets.test]], tokenizer)
        nll, accuracy = found
        n = len(watched)
        folder.arrays(
            f"scores/{name}.npz", nll=nll[:n], accuracy=accuracy[:n], test_nll=nll[n:].mean(),
            bleu=translate(model, tokenizer, sets, config),
        )  # fmt: skip


def score(likelihood: Likelihood, tokens: Sequence[Tokens], tokenizer: Any) -> tuple[Any, Any]:
    """(n,) mean negative log-likelihood a token, nats, and (n,) share of tokens that are the first choice."""
    found = teacher_forced(likelihood, tokens, pad_id=padding_id(tokenizer), batch_size=_AT_ONCE)
    return -found.mean_log_likelihood, found.greedy_match


def translate(model: Any, tokenizer: Any, sets: Sets, config: Config) -> float:
    """BLEU of greedy translations of the first test examples; NaN where the setup does not translate."""
    if config.setup != "translation":
        return float("nan")
    chosen = sets.test[: config.bleu_examples]
    room = [Tokens(sets.tokens[i].ids, 0, (padding_id(tokenizer),) * config.max_tokens) for i in chosen]
    said = greedy_continuations(model, tokenizer, room, longest=config.max_tokens, batch_size=_AT_ONCE)
    return bleu(tokenizer.batch_decode(said, skip_special_tokens=True), sets.test_texts[: config.bleu_examples])
