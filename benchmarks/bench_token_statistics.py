"""token_statistics, forward only, against plain torch, torch.compile of it, and log-likelihoods alone."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import chosen, data, named, one_product, show, timed
from pyunlearn.ops import linear_log_likelihood, token_statistics


def likelihood(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """Compute the log-likelihood alone in plain PyTorch."""
    return (torch.log_softmax((h @ w.T).float(), -1).gather(1, t[:, None]).squeeze(1),)


def plain(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """Compute all four fields in plain PyTorch."""
    z = (h @ w.T).float()
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    variance = (p * log_p.square()).sum(-1) - entropy.square()
    return log_p.gather(1, t[:, None]).squeeze(1), (z > z.gather(1, t[:, None])).sum(-1), entropy, variance


def truth(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """Compute all four fields in float64, in chunks of rows."""
    parts = [
        plain64(h[rows].double(), w.double(), t[rows]) for rows in torch.arange(len(t), device=t.device).split(256)
    ]
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))


def plain64(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """Compute all four fields without rounding to float32."""
    z = h @ w.T
    log_p = torch.log_softmax(z, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * log_p.square()).sum(-1) - entropy.square()
    return log_p.gather(1, t[:, None]).squeeze(1), (z > z.gather(1, t[:, None])).sum(-1), entropy, variance


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    """Check, time, and print the environment, a table and one JSON line."""
    rows: list[dict[str, Any]] = []
    for n, d, v, dtype in chosen(options):
        h, w, t = (x.detach() for x in data(n, d, v, "0", dtype, options.device))
        exact = truth(h, w, t)
        compiled, compiled_likelihood = (torch.compile(f, dynamic=False) for f in (plain, likelihood))
        every: dict[str, Any] = {
            "pyunlearn, all four": lambda h=h, w=w, t=t: tuple(token_statistics(h, w, t)),
            "torch eager, all four": lambda h=h, w=w, t=t: plain(h, w, t),
            "torch.compile, all four": lambda h=h, w=w, t=t, f=compiled: f(h, w, t),
            "pyunlearn, log-likelihood": lambda h=h, w=w, t=t: (linear_log_likelihood(h, w, t),),
            "torch eager, log-likelihood": lambda h=h, w=w, t=t: likelihood(h, w, t),
            "torch.compile, log-likelihood": lambda h=h, w=w, t=t, f=compiled_likelihood: f(h, w, t),
        }
        wrong = {name: _errors(call(), exact) for name, call in every.items()}
        for kind, mine in wrong["pyunlearn, all four"].items():
            near_ties = 0.05 if kind == "rank" else 0.0  # a share of rows; which side of a tie is rounding's choice
            assert mine <= 2 * wrong["torch eager, all four"][kind] + 1e-5 + near_ties, f"{kind} is off by {mine}"
        times = timed(every, one_product(h, w, t), 1, 0.0, options)
        rows += [{"case": named(n, d, v, dtype), **row, "errors": wrong[row["name"]]} for row in times]
    show("token_statistics", "forward; floor: one matrix product", rows, options)


def _errors(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    """Return the largest error of each field; of the ranks, the share that differs."""
    names = ("log-likelihood", "rank", "entropy", "variance")
    wrong = {n: float((f.double() - x).abs().max()) for n, f, x in zip(names, actual, exact, strict=False)}
    if len(actual) > 1:
        wrong["rank"] = float((actual[1] != exact[1]).double().mean())
    return wrong
