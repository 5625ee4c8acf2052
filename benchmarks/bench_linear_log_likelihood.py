"""linear_log_likelihood and weighted_log_likelihood, forward and backward, against plain torch, torch.compile of it, and the published kernels that
are installed."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import chosen, data, named, one_product, show, timed
from pyunlearn.ops import linear_log_likelihood, weighted_log_likelihood

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """What everybody writes."""
    return F.cross_entropy((h @ w.T).float(), t, reduction="sum")


def known(h: Tensor, w: Tensor, t: Tensor, workspace: int) -> Tensor:
    """The same sum where its coefficients are known beforehand."""
    return weighted_log_likelihood(h, w, t, -torch.ones(t.shape, device=t.device), workspace=workspace)


def contenders(workspace: int | None, quarter: int) -> dict[str, Loss]:
    """Every implementation at hand: summed negative log-likelihood of (h, w, t). `quarter`: bytes of a quarter of the logits."""
    found: dict[str, Loss] = {
        "pyunlearn": lambda h, w, t: -linear_log_likelihood(h, w, t, workspace=workspace).sum(),
        f"pyunlearn, one pass in {quarter >> 20} MiB": lambda h, w, t: known(h, w, t, quarter),
        "torch eager": plain,
        "torch.compile": torch.compile(plain, dynamic=False),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda h, w, t: F.linear_cross_entropy(h, w, t, reduction="sum")
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        found[f"Liger {importlib.metadata.version('liger-kernel')}"] = lambda h, w, t: (
            Liger.apply(h, w, t)[0] * (t != -100).sum()
        )
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        found[f"CCE {importlib.metadata.version('cut-cross-entropy')}"] = lambda h, w, t: cce(
            h, w, t, impl="cce", reduction="sum"
        )
    except ImportError:
        pass
    return found


def truth(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """The summed loss and both gradients in float64, in chunks of rows."""
    h6, w6 = h.detach().double(), w.detach().double()
    total, d_h, d_w = torch.zeros((), dtype=torch.float64), torch.zeros_like(h6), torch.zeros_like(w6)
    for rows in torch.arange(len(t), device=t.device)[t != -100].split(256):
        p = torch.log_softmax(h6[rows] @ w6.T, -1)
        total -= p.gather(1, t[rows, None]).sum().cpu()
        p = p.exp_()
        p[torch.arange(len(rows), device=t.device), t[rows]] -= 1
        d_h[rows], d_w = p @ w6, d_w + p.T @ h6[rows]
    return total, d_h.cpu(), d_w.cpu()


def run(options: argparse.Namespace) -> None:
    """Checks, times, prints a card, a table and one JSON line."""
    rows: list[dict[str, Any]] = []
    for n, d, v, dtype in chosen(options):
        for masked in (0.0, 0.6):
            h, w, t = data(n, d, v, masked, dtype, options.device)
            exact = truth(h, w, t)
            for mode in options.modes:
                rows += _case(h, w, t, exact, mode, named(n, d, v, dtype, f"{masked:.0%} masked", mode), options)
    title = "floor: matrix products of the live rows, three for full (both gradients), two for frozen (no head gradient), one for forward"
    show("linear_log_likelihood", title, rows, options)


def _case(
    h: Tensor, w: Tensor, t: Tensor, exact: tuple[Tensor, ...], mode: str, case: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    wanted = {"full": (h, w), "frozen": (h,), "forward": ()}[mode]
    w.requires_grad_(mode == "full")

    logits = len(t) * len(w) * h.element_size()
    workspace = None if options.workspace is None else options.workspace << 20
    calls = {name: partial(_call, loss, h, w, t, wanted) for name, loss in contenders(workspace, logits // 4).items()}
    wrong = {}
    for name in list(calls):
        try:
            wrong[name] = _errors(calls[name](), exact)
        except Exception as error:  # a peer that cannot do this case is left out, aloud
            print(f"{name} left out at {case}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            del calls[name]
    for name in (name for name in calls if name.startswith("pyunlearn")):
        for kind, mine in wrong[name].items():
            theirs = wrong["torch eager"][kind]
            limit = 2 * theirs + 1e-6 if kind == "loss" else 3 * theirs + 1e-5
            assert mine <= limit, f"{name}: {kind} is off by {mine} where torch is by {theirs}"
    given = sum(x.nbytes for x in wanted) / 2**20
    products = 1 + len(wanted)
    return [
        {"case": case, **row, "errors": wrong[row["name"]]}
        for row in timed(calls, one_product(h, w, t), products, given, options)
    ]


def _call(loss: Loss, h: Tensor, w: Tensor, t: Tensor, wanted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The summed loss, and its gradients for what is wanted."""
    with torch.set_grad_enabled(bool(wanted)):
        total = loss(h, w, t)
    return total.detach(), *(torch.autograd.grad(total, wanted) if wanted else ())


def _errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative, of the summed loss and of the gradients that there are, against float64."""
    names = ("loss", "d_hidden", "d_weight")
    return {n: float((f.double().cpu() - x).norm() / x.norm()) for n, f, x in zip(names, found, exact, strict=False)}
