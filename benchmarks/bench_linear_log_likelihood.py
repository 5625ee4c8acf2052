"""linear_log_likelihood, forward and backward, against plain torch, torch.compile and the installed fused kernels."""

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
from benchmarks.plot import time_against_memory
from pyunlearn.ops import linear_log_likelihood, weighted_log_likelihood

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
UNLIMITED = 1 << 40
ALLOWANCES = {"64 MiB": 64 << 20, "512 MiB": 512 << 20, "unlimited": UNLIMITED}


def plain(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """Compute the sum in plain PyTorch."""
    return F.cross_entropy((h @ w.T).float(), t, reduction="sum")


def known(h: Tensor, w: Tensor, t: Tensor, workspace: int) -> Tensor:
    """Compute the sum in one pass, with coefficients known before the backward pass."""
    return weighted_log_likelihood(h, w, t, -torch.ones(t.shape, device=t.device), workspace=workspace)


def ours(workspace: int | None, label: str = "") -> dict[str, Loss]:
    """Return linear_log_likelihood, whose coefficients are known in the backward pass only."""
    return {f"pyunlearn{label}": lambda h, w, t: -linear_log_likelihood(h, w, t, workspace=workspace).sum()}


def one_pass(workspace: int, label: str) -> dict[str, Loss]:
    """Return weighted_log_likelihood, whose coefficients are known."""
    return {f"pyunlearn, one pass{label}": lambda h, w, t: known(h, w, t, workspace)}


def on_selected_rows(loss: Loss) -> Loss:
    """Return a loss that first selects the rows that are not masked, as a user of plain torch can."""

    def selected(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        live = t != -100
        return loss(h[live], w, t[live])

    return selected


def peers(masked: bool) -> dict[str, Loss]:
    """Return all other installed implementations: the summed negative log-likelihood of (h, w, t).

    Where rows are masked, plain torch and torch.compile on the other rows too.
    """
    losses: dict[str, Loss] = {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}
    if masked:
        losses |= {f"{name}, rows selected first": on_selected_rows(loss) for name, loss in losses.items()}
    if hasattr(F, "linear_cross_entropy"):
        losses["F.linear_cross_entropy"] = lambda h, w, t: F.linear_cross_entropy(h, w, t, reduction="sum")
    for package, add in (("liger-kernel", _liger), ("cut-cross-entropy", _cce), ("quack-kernels", _quack)):
        try:
            version = importlib.metadata.version(package)
            losses[f"{package} {version}"] = add()
        except (ImportError, importlib.metadata.PackageNotFoundError):
            continue
    return losses


def _liger() -> Loss:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    return lambda h, w, t: Liger.apply(h, w, t)[0] * (t != -100).sum()


def _cce() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w, t: linear_cross_entropy(h, w, t, impl="cce", filter_eps=None, reduction="sum")


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda h, w, t: chunked_linear_cross_entropy(h, w, t, chunk_size=4096, ignore_index=-100, reduction="sum")


def truth(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """Compute the summed loss and both gradients in float64, in chunks of rows."""
    h6, w6 = h.detach().double(), w.detach().double()
    total, d_h, d_w = h6.new_zeros(()), torch.zeros_like(h6), torch.zeros_like(w6)
    for rows in (t != -100).nonzero().squeeze(1).split(512):
        z = h6[rows] @ w6.T
        total += F.cross_entropy(z, t[rows], reduction="sum")
        p = torch.softmax(z, 1)
        p[torch.arange(len(rows)), t[rows]] -= 1
        d_h[rows] = p @ w6
        d_w.addmm_(p.T, h6[rows])
    return total, d_h, d_w


def run(options: argparse.Namespace) -> None:
    """Check, time, and print the environment, a table and one JSON line."""
    rows: list[dict[str, Any]] = []
    workspace = None if options.workspace is None else options.workspace << 20
    for n, d, v, dtype in chosen(options):
        quarter = n * v * dtype.itemsize // 4
        for masked in options.masked:
            h, w, t = data(n, d, v, masked, dtype, options.device)
            exact = truth(h, w, t)
            share = masked if masked == "tofu" else f"{masked}% masked"
            for mode in options.modes:
                calls = ours(workspace) | one_pass(quarter, f" in {quarter >> 20} MiB") | peers(masked != "0")
                if mode == "workspace":
                    if masked != "0":  # masking is a matter of its own
                        continue
                    calls = {}
                    for label, allowed in ALLOWANCES.items():
                        calls |= ours(allowed, f" in {label}") | one_pass(allowed, f" in {label}")
                    calls |= {"torch eager": plain}
                rows += _case(h, w, t, exact, calls, mode, named(n, d, v, dtype, share, mode), options)
    title = "floor: matrix products of the live rows, three for both gradients, two for a frozen head, one for forward"
    about = show("linear_log_likelihood", title, rows, options)
    if options.save and (plot := time_against_memory(rows, about, options.out)):
        print(f"saved {plot}")


def _case(
    h: Tensor, w: Tensor, t: Tensor, exact: tuple[Tensor, ...], every: dict[str, Loss], mode: str, case: str,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:  # fmt: skip
    wanted = {"full": (h, w), "frozen": (h,), "forward": (), "workspace": (h, w)}[mode]
    w.requires_grad_(mode in ("full", "workspace"))
    calls = {name: partial(_call, loss, h, w, t, wanted) for name, loss in every.items()}
    wrong = {}
    for name in list(calls):
        try:
            wrong[name] = _errors(calls[name](), exact)
        except Exception as error:  # a peer that cannot run this case is reported and left out
            print(f"{name} left out at {case}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            del calls[name]
    for name in (name for name in calls if name.startswith("pyunlearn")):
        for kind, mine in wrong[name].items():
            theirs = wrong["torch eager"][kind]
            limit = 2 * theirs + 1e-6 if kind == "loss" else 3 * theirs + 1e-5
            assert mine <= limit, f"{name}: {kind} is off by {mine} where torch is by {theirs}"
    gradients = sum(x.nbytes for x in wanted) / 2**20
    products = 1 + len(wanted)
    return [
        {"case": case, **row, "errors": wrong[row["name"]]}
        for row in timed(calls, one_product(h, w, t), products, gradients, options)
    ]


def _call(loss: Loss, h: Tensor, w: Tensor, t: Tensor, wanted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Compute the summed loss, and its gradients for `wanted`."""
    with torch.set_grad_enabled(bool(wanted)):
        total = loss(h, w, t)
    return total.detach(), *(torch.autograd.grad(total, wanted) if wanted else ())


def _errors(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    """Return the relative errors of the summed loss and of the computed gradients, against float64."""
    names = ("loss", "d_hidden", "d_weight")
    return {n: float((f.double() - x).norm() / x.norm()) for n, f, x in zip(names, actual, exact, strict=False)}
