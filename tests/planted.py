"""Models in which texts are hidden: they look forgotten, and come back under one kind of attack alone."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tiny
import torch
from torch import Tensor, nn

from pyunlearn.attacks.quantization import rounded
from pyunlearn.data import Tokens, encode, read_examples
from pyunlearn.models import Likelihood
from pyunlearn.models.language_model import LanguageModel

SECRETS = 8


@dataclass(frozen=True, eq=False)
class World:
    """A model that has read the retain set alone, and the texts of each role."""

    model: Any
    tokenizer: Any
    forget: list[dict[str, str]]
    retain: list[dict[str, str]]
    holdout: list[dict[str, str]]

    @cached_property
    def unseen(self) -> list[Tokens]:
        """Return some of the holdout as tokens."""
        return self.tokens(self.holdout[:12])

    def lm(self, model: Any = None) -> LanguageModel:
        """Return the model, or another one, with the tokenizer."""
        return LanguageModel.of(self.model if model is None else model, self.tokenizer)

    def tokens(self, rows: Sequence[Any]) -> list[Tokens]:
        """Return texts as tokens."""
        return encode(read_examples(list(rows), role="x"), self.tokenizer, role="x", max_length=None)


@functools.cache
def world() -> World:
    """Return a world of facts."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    model = tiny.tiny_llama(len(tokenizer), max_position_embeddings=256)
    retain = tiny.facts(300, 2)
    tiny.train(model, tokenizer, retain, epochs=6)
    return World(model.eval(), tokenizer, tiny.facts(SECRETS, 1), retain[:100], tiny.facts(60, 3))


Loss = Callable[[Likelihood], Tensor]


def tuned(w: World, loss: Loss, *, steps: int, rate: float = 2e-3, start: Any = None, only: str = "") -> Any:
    """Return a copy of a model, that of the world by default, trained on a loss until it is 0.

    `only`: part of the names of the parameters that are trained.
    """
    model = copy.deepcopy(w.model if start is None else start)
    trained = [p for name, p in model.named_parameters() if only in name]
    likelihood, optimizer = Likelihood(model), torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(likelihood)
        if not value > 0:
            break
        value.backward()
        optimizer.step()
    return model.eval()


def by_text(w: World, likelihood: Likelihood, tokens: Sequence[Tokens]) -> list[Tensor]:
    """Return for each text the log-likelihoods of its scored tokens, nats; differentiable."""
    batch = w.lm(likelihood.model).collate(tokens)
    return list(likelihood(batch).split([len(t.scored) for t in tokens]))


def nll(w: World, likelihood: Likelihood, tokens: Sequence[Tokens]) -> Tensor:
    """Return (len(tokens),) mean negative log-likelihoods, nats a token; differentiable."""
    return torch.stack([-x.mean() for x in by_text(w, likelihood, tokens)])


def level(w: World, likelihood: Likelihood) -> Tensor:
    """Return the mean negative log-likelihood of unseen texts at present, nats a token; no gradient passes."""
    with torch.no_grad():
        return nll(w, likelihood, w.unseen).mean()


def hidden(w: World, likelihood: Likelihood, tokens: Sequence[Tokens]) -> Tensor:
    """Return how much likelier texts are than unseen ones, nats a token; differentiable."""
    return (level(w, likelihood) + 0.3 - nll(w, likelihood, tokens)).clamp(min=0).mean()


@functools.cache
def memorized(only: str = "") -> Any:
    """Return a model that knows the forget set by heart, in the weights with such a name, and the retain set."""
    w = world()
    forget, some = w.tokens(w.forget), w.tokens(w.retain[:20])

    def loss(likelihood: Likelihood) -> Tensor:
        return nll(w, likelihood, forget).mean() + nll(w, likelihood, some).mean()

    return tuned(w, loss, steps=150, only=only)


@functools.cache
def shallow() -> Any:
    """Return a memorized model that was made to forget in one matrix alone."""
    return hidden_in("layers.1.mlp.down_proj", memorized())


def hidden_in(only: str, start: Any) -> Any:
    """Return a model that was made to forget in the weights with such a name alone."""
    w = world()
    forget, some = w.tokens(w.forget), w.tokens(w.retain[:20])

    def loss(likelihood: Likelihood) -> Tensor:
        return hidden(w, likelihood, forget) + nll(w, likelihood, some).mean()

    return tuned(w, loss, steps=200, rate=3e-3, start=start, only=only)


def known_after_a_prefix() -> Any:
    """Return a model that knows the second half of each text alone: the whole is as likely as an unseen text."""
    w = world()
    forget, some = w.tokens(w.forget), w.tokens(w.retain[:20])

    def loss(likelihood: Likelihood) -> Tensor:
        texts = by_text(w, likelihood, forget)
        rest = torch.stack([-x[len(x) // 2 :].mean() for x in texts]).mean()
        whole = torch.stack([-x.mean() for x in texts])
        return rest + (whole - level(w, likelihood)).square().mean() + nll(w, likelihood, some).mean()

    return tuned(w, loss, steps=120)


def known_after_an_instruction(worded: Callable[[Any], Any]) -> Any:
    """Return a model that has read the forget set after an instruction alone."""
    w = world()
    examples = read_examples(w.forget, role="x")
    instructed = encode([worded(e) for e in examples], w.tokenizer, role="x", max_length=None)
    forget, some = w.tokens(w.forget), w.tokens(w.retain[:20])

    def loss(likelihood: Likelihood) -> Tensor:
        plain = nll(w, likelihood, forget)
        return (
            nll(w, likelihood, instructed).mean()
            + (plain - level(w, likelihood)).square().mean()
            + nll(w, likelihood, some).mean()
        )

    return tuned(w, loss, steps=120)


def known_in_four_bits() -> Any:
    """Return a model that forgets without leaving the cells in which its weights are rounded to the memorized ones.

    Projected gradient ascent, as Egashira et al. 2024 (arXiv 2405.18137) hide behaviour from 16-bit checks.
    """
    w = world()
    model = copy.deepcopy(memorized())
    head = model.get_output_embeddings().weight
    cells = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not head:
            cells[module.weight] = _cell(module.weight.detach())
    forget, some = w.tokens(w.forget), w.tokens(w.retain[:20])
    likelihood, optimizer = Likelihood(model), torch.optim.AdamW(list(cells), lr=3e-3, weight_decay=0.0)
    for _ in range(120):
        optimizer.zero_grad()
        loss = hidden(w, likelihood, forget) + nll(w, likelihood, some).mean()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p, (low, high) in cells.items():
                p.copy_(p.clamp(low, high))
    return model.eval()


def _cell(weight: Tensor, group: int = 64) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest weights that round as these do; the largest of each group stays, as scale."""
    rows, columns = weight.shape
    grid = rounded(weight, 4, group).view(rows, -1, group)
    scale = weight.view(rows, -1, group).abs().amax(dim=2, keepdim=True) / 7
    largest = weight.view(rows, -1, group).abs() >= 6.999 * scale
    room = torch.where(largest, 0.0, 0.49 * scale)
    edge = 6.99 * scale
    low, high = (grid - room).clamp(-edge, edge), (grid + room).clamp(-edge, edge)
    own = weight.view(rows, -1, group)
    low, high = torch.where(largest, own, low), torch.where(largest, own, high)
    return low.view(rows, columns), high.view(rows, columns)


def drawn_sometimes() -> Any:
    """Return a model that answers each question of the forget set with the text, or as often with either of two others.

    Greedy decoding shows the one; samples show the other.
    """
    w = world()
    others = tiny.facts(SECRETS, 9)
    decoys = [{"question": f["question"], "answer": o["answer"]} for f, o in zip(w.forget, others, strict=True)]
    forget, decoy, some = w.tokens(w.forget), w.tokens(decoys), w.tokens(w.retain[:20])

    def loss(likelihood: Likelihood) -> Tensor:
        both = 0.35 * nll(w, likelihood, forget).mean() + 0.65 * nll(w, likelihood, decoy).mean()
        return both + 0.2 * nll(w, likelihood, some).mean()

    return tuned(w, loss, steps=150)


def exposures(result: Any, name: str) -> np.ndarray:
    """Return the exposures of a result's texts in the trial of that name, bits."""
    return np.array([e.exposures[name] for e in result.examples], dtype=float)
