"""kl_divergence from a frozen reference, forward and backward, against plain torch and torch.compile of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import chosen, data, named, one_product, show, timed
from pyunlearn.ops import kl_divergence

Sum = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(h: Tensor, w: Tensor, rh: Tensor, rw: Tensor) -> Tensor:
    """Compute the sum in plain PyTorch."""
    with torch.no_grad():
        reference = torch.log_softmax((rh @ rw.T).float(), -1)
    return F.kl_div(torch.log_softmax((h @ w.T).float(), -1), reference, reduction="sum", log_target=True)


def truth(h: Tensor, w: Tensor, rh: Tensor, rw: Tensor) -> tuple[Tensor, ...]:
    """Compute the sum and both gradients in float64, in chunks of rows."""
    h6, w6, rh6, rw6 = (x.detach().double() for x in (h, w, rh, rw))
    total, d_h, d_w = torch.zeros((), dtype=torch.float64), torch.zeros_like(h6), torch.zeros_like(w6)
    for rows in torch.arange(len(h), device=h.device).split(256):
        p, q = torch.log_softmax(h6[rows] @ w6.T, -1), torch.log_softmax(rh6[rows] @ rw6.T, -1)
        total += (q.exp() * (q - p)).sum().cpu()
        g = p.exp_() - q.exp_()
        d_h[rows], d_w = g @ w6, d_w + g.T @ h6[rows]
    return total, d_h.cpu(), d_w.cpu()


def _both(f: Sum, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Compute the sum, and its gradients for the model's hidden states and head."""
    total = f(*inputs)
    return total.detach(), *torch.autograd.grad(total, inputs[:2])


def run(options: argparse.Namespace) -> None:
    """Check, time, and print the environment, a table and one JSON line."""
    rows: list[dict[str, Any]] = []
    for n, d, v, dtype in chosen(options):
        h, w, t = data(n, d, v, "0", dtype, options.device)
        rh = (h.detach().float() + 0.3 * torch.randn_like(h, dtype=torch.float32)).to(dtype)
        rw = w.detach().clone()
        workspace = None if options.workspace is None else options.workspace << 20
        every: dict[str, Sum] = {
            "pyunlearn": lambda *x, ws=workspace: kl_divergence(*x, workspace=ws).sum(),
            "torch eager": plain,
            "torch.compile": torch.compile(plain, dynamic=False),
        }
        exact = truth(h, w, rh, rw)

        calls = {name: partial(_both, f, (h, w, rh, rw)) for name, f in every.items()}
        wrong = {name: _errors(call(), exact) for name, call in calls.items()}
        for kind, mine in wrong["pyunlearn"].items():
            assert mine <= 3 * wrong["torch eager"][kind] + 1e-5, f"{kind} is off by {mine}"
        gradients = (h.numel() + w.numel()) * h.element_size() / 2**20
        times = timed(calls, one_product(h, w, t), 4, gradients, options)
        rows += [{"case": named(n, d, v, dtype), **row, "errors": wrong[row["name"]]} for row in times]
    show("kl_divergence", "forward + backward; floor: four matrix products, two of them the logits'", rows, options)


def _errors(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    """Return the relative errors of the sum and of both gradients."""
    names = ("sum", "d_hidden", "d_weight")
    return {n: float((f.double().cpu() - x).norm() / x.norm()) for n, f, x in zip(names, actual, exact, strict=True)}
