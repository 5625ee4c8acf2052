"""Log-likelihoods under noisy weights, for MRD."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyunlearn import models
from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.models.scoring import batches_on, by_example, evaluation_mode

Floats = NDArray[np.float64]


@torch.no_grad()
def noisy_log_likelihoods(
    model: nn.Module, tokens: Sequence[Tokens], *, sigma: float = 1e-5, draws: int = 8, seed: int = 0,
    batch_size: int = 8, workspace: int | None = None,
) -> tuple[list[Floats], list[Floats]]:  # fmt: skip
    """Each token's log-likelihood under the model, and under draws of Gaussian noise on all its weights.

    The weights are changed in place and come back bit for bit, whatever happens in between: from a copy in main memory, since adding noise
    and subtracting it again does not. The same seed gives the same noise on every device.

    Args:
        model: a transformers language model.
        tokens: B examples.
        sigma: standard deviation of the noise, in the unit of the weights; the source's code has 1e-5.
        draws: S, 1 or more.
        seed: of the noise.
        batch_size, workspace: examples in one pass; bytes for logits.

    Returns:
        For each example (T_i,), nats, and for each (S, T_i).

    Raises:
        ArgumentError: no example, no draw, sigma not above 0, or noise so small that rounding swallows it: bfloat16 weights of 0.02
            are 1e-4 apart, and 1e-5 would leave most of them as they are.

    Source: arXiv 2504.06658.
    """
    if draws < 1 or not sigma > 0:
        raise ArgumentError(f"draws must be at least 1 and sigma above 0, and they are {draws} and {sigma}.")
    likelihood = models.Likelihood(model, workspace=workspace)

    def score() -> list[Floats]:
        found: list[Floats] = [np.empty(0)] * len(tokens)
        for places, batch in batches_on(model, tokens, batch_size):
            for i, part in zip(places, by_example(likelihood(batch), tokens, places), strict=True):
                found[i] = part.double().cpu().numpy()
        return found

    with evaluation_mode(model):
        plain, noisy = score(), []
        for draw in range(draws):
            with perturbed(model, sigma=sigma, seed=seed, draw=draw):
                noisy.append(score())
    return plain, [np.stack([scores[i] for scores in noisy]) for i in range(len(tokens))]


@contextmanager
def perturbed(model: nn.Module, *, sigma: float, seed: int, draw: int = 0) -> Iterator[None]:
    """While it lasts, every floating-point parameter has N(0, sigma^2) added; afterwards it is what it was, bit for bit."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]  # one that is tied is there once
    kept = [p.detach().to("cpu", copy=True) for p in parameters]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
    try:
        wanted = moved = 0.0
        with torch.no_grad():
            for p, before in zip(parameters, kept, strict=True):
                noise = torch.randn(p.shape, generator=generator) * sigma
                p.copy_((before.float() + noise).to(p.dtype) if p.dtype != torch.float64 else before + noise)
                wanted += float(noise.square().sum())
                moved += float((_wide(p).cpu() - _wide(before)).square().sum())
        if not 0.5 * wanted <= moved <= 2 * wanted:
            raise ArgumentError(
                f"sigma must be large enough for weights in {parameters[0].dtype} to hold the noise, and {sigma:g} comes out as "
                f"{sigma * (moved / wanted) ** 0.5:.2g}: load the model in float32, or take a larger sigma."
            )
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(parameters, kept, strict=True):
                p.copy_(before)


def _wide(x: Tensor) -> Tensor:
    return x.detach().double() if x.dtype == torch.float64 else x.detach().float()
