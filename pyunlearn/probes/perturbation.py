"""Log-likelihoods under noisy weights, for the mean relative difference (MRD)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer, evaluation_mode
from pyunlearn.options import Number, Whole, require

Floats = NDArray[np.float64]


@torch.no_grad()
def noisy_log_likelihoods(
    model: Any,
    tokens: Sequence[Tokens],
    *,
    sigma: float = 1e-5,
    draws: int = 8,
    seed: int = 0,
    batch_size: int = 8,
    workspace: int | None = None,
) -> tuple[list[Floats], list[Floats]]:
    """Compute each token's log-likelihood under the model, and under draws of Gaussian noise on all its weights.

    The weights are changed in place and restored bit for bit, also after an error: from a copy in main memory, since
    adding noise and subtracting it again does not restore them. The same seed gives the same noise on every device.

    Args:
        model: a transformers language model, or a LanguageModel.
        tokens: B examples.
        sigma: standard deviation of the noise, in the unit of the weights; the source's code has 1e-5.
        draws: S, 1 or more.
        seed: seed of the noise.
        batch_size: examples in one pass.
        workspace: bytes for logits; a LanguageModel has its own.

    Returns:
        For each example (T_i,), nats, and for each (S, T_i).

    Raises:
        ArgumentError: no example, no draw, sigma not above 0, or noise so small that rounding swallows it: bfloat16
            weights of 0.02 are 1e-4 apart, and 1e-5 would leave most of them as they are.
        ModelError: no language model.

    Source: arXiv 2504.06658.
    """
    require(Whole(1), draws=draws, batch_size=batch_size)
    require(Number(above=0), sigma=sigma)
    require(Whole(0), seed=seed)
    if not tokens:
        raise ArgumentError("tokens must hold at least one example, and are empty")
    lm = LanguageModel.of(model, workspace=workspace, needs_tokenizer=False)
    scorer = Scorer(lm, batch_size)
    with evaluation_mode(lm.module):
        plain, noisy = scorer.token_log_likelihood(tokens), []
        for draw in range(draws):
            with perturbed(lm.module, sigma=sigma, seed=seed, draw=draw):
                noisy.append(scorer.token_log_likelihood(tokens))
    return plain, [np.stack([scores[i] for scores in noisy]) for i in range(len(tokens))]


@contextmanager
def perturbed(model: nn.Module, *, sigma: float, seed: int, draw: int = 0) -> Iterator[None]:
    """Add N(0, sigma^2) to every floating-point parameter for a while; afterwards all are restored bit for bit.

    Args:
        model: any module.
        sigma: standard deviation of the noise, in the unit of the weights.
        seed: seed of the noise.
        draw: number of the draw under this seed.

    Raises:
        ArgumentError: noise so small that the dtype of the weights does not hold it.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]  # a tied one is listed once
    originals = [p.detach().to("cpu", copy=True) for p in parameters]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
    try:
        wanted = moved = 0.0
        with torch.no_grad():
            for p, before in zip(parameters, originals, strict=True):
                noise = torch.randn(p.shape, generator=generator) * sigma
                p.copy_((before.float() + noise).to(p.dtype) if p.dtype != torch.float64 else before + noise)
                wanted += float(noise.square().sum())
                moved += float((_wide(p).cpu() - _wide(before)).square().sum())
        if not 0.5 * wanted <= moved <= 2 * wanted:
            raise ArgumentError(
                f"sigma must be large enough for weights in {parameters[0].dtype} to hold the noise, and {sigma:g} "
                f"comes out as {sigma * (moved / wanted) ** 0.5:.2g}: load the model in float32, or take a larger sigma"
            )
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(parameters, originals, strict=True):
                p.copy_(before)


def _wide(x: Tensor) -> Tensor:
    return x.detach().double() if x.dtype == torch.float64 else x.detach().float()
