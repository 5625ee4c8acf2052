"""linear_log_likelihood and weighted_log_likelihood, forward and backward, against plain torch, torch.compile of it, and the published kernels that
are installed."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import card, extra_mib, medians, save
from pyunlearn.ops import linear_log_likelihood, weighted_log_likelihood

CPU_SHAPES = [(1024, 576, 49152)]
CUDA_SHAPES = [
    (8192, 2304, 256000),
    (8192, 4096, 128256),
    (8192, 2048, 128256),
    (8192, 576, 49152),
    (1024, 2048, 128256),
]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """What everybody writes."""
    return F.cross_entropy((h @ w.T).float(), t, reduction="sum")


def one_pass(h: Tensor, w: Tensor, t: Tensor, workspace: int) -> Tensor:
    """The same sum where its coefficients are known beforehand."""
    return weighted_log_likelihood(h, w, t, -torch.ones(t.shape, device=t.device), workspace=workspace)


def contenders(workspace: int | None, quarter: int) -> dict[str, Loss]:
    """Every implementation at hand: summed negative log-likelihood of (h, w, t). `quarter`: bytes of a quarter of the logits."""
    found: dict[str, Loss] = {
        "pyunlearn": lambda h, w, t: -linear_log_likelihood(h, w, t, workspace=workspace).sum(),
        f"pyunlearn, one pass in {quarter >> 20} MiB": lambda h, w, t: one_pass(h, w, t, quarter),
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


def data(n: int, d: int, v: int, masked: float, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, head and targets, a share of them masked."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(n, d, generator=g).to(device, dtype)
    w = (torch.randn(v, d, generator=g) * d**-0.5).to(device, dtype)
    t = torch.randint(0, v, (n,), generator=g)
    t[torch.rand(n, generator=g) < masked] = -100
    return h.requires_grad_(), w.requires_grad_(), t.to(device)


def errors(loss: Loss, h: Tensor, w: Tensor, t: Tensor, truth: tuple[Tensor, ...]) -> tuple[float, float, float]:
    """Relative errors of the summed loss and of both gradients, against float64."""
    h.grad = w.grad = None
    total = loss(h, w, t)
    total.backward()
    assert h.grad is not None
    assert w.grad is not None
    found = (total.detach(), h.grad, w.grad)
    h_error, w_error = ((f.double().cpu() - x).norm() / x.norm() for f, x in zip(found[1:], truth[1:], strict=True))
    return float(abs(found[0].double().cpu() / truth[0] - 1)), float(h_error), float(w_error)


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
    device, console = options.device, Console(width=140)
    about = card(device)
    console.print(about, highlight=False)
    shapes = (
        [tuple(map(int, s.split(","))) for s in options.shapes]
        if options.shapes
        else (CUDA_SHAPES if device == "cuda" else CPU_SHAPES)
    )
    dtypes = options.dtypes or (["bfloat16"] if device == "cuda" else ["float32", "bfloat16"])
    rows: list[dict[str, Any]] = []
    for n, d, v in shapes:
        for name in dtypes:
            for masked in (0.0, 0.6):
                rows += _case(n, d, v, getattr(torch, name), masked, device, options)
    console.print(_table(rows))
    result = {"benchmark": "linear_log_likelihood forward + backward", "card": about, "rows": rows}
    print(json.dumps(result))
    if options.save:
        print(f"saved to {save('linear_log_likelihood', result)}")


def _case(
    n: int, d: int, v: int, dtype: torch.dtype, masked: float, device: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    h, w, t = data(n, d, v, masked, dtype, device)
    exact = truth(h, w, t)
    workspace = None if options.workspace is None else options.workspace << 20
    every, wrong = contenders(workspace, n * v * dtype.itemsize // 4), {}
    for name in list(every):
        try:
            wrong[name] = errors(every[name], h, w, t, exact)
        except Exception as error:  # a peer that cannot do this case is left out, aloud
            print(
                f"{name} left out at {n} x {d} x {v} {dtype}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            )
            del every[name]
    limit = 3 * max(wrong["torch eager"][1:]) + 1e-5
    for name in (name for name in every if name.startswith("pyunlearn")):
        assert max(wrong[name][1:]) <= limit, f"{name}: gradients are off, {wrong[name]} against {wrong['torch eager']}"
        assert wrong[name][0] <= 2 * wrong["torch eager"][0] + 1e-6, f"{name}: the loss is off by {wrong[name][0]}"

    def both(loss: Loss) -> Callable[[], None]:
        def call() -> None:
            h.grad = w.grad = None
            loss(h, w, t).backward()

        return call

    rounds = options.rounds or (15 if device == "cuda" else 7)
    found = medians(
        {"one product": _one_product(h, w, t)} | {name: both(loss) for name, loss in every.items()}, rounds, device
    )
    floor = 3 * found.pop("one product")
    grads = (h.numel() + w.numel()) * h.element_size() / 2**20
    rows = []
    for name, ms in found.items():
        h.grad = w.grad = None
        memory = extra_mib(lambda loss=every[name]: torch.autograd.grad(loss(h, w, t), (h, w)), device) - grads  # type: ignore[misc]
        rows.append({
            "shape": [n, d, v], "dtype": str(dtype).removeprefix("torch."), "masked": masked, "name": name, "ms": ms, "of_floor": ms / floor,
            "extra_mib": memory, "loss_error": wrong[name][0], "d_hidden_error": wrong[name][1], "d_weight_error": wrong[name][2],
        })  # fmt: skip
    mine = rows[0]
    for row in rows:
        row["times_pyunlearn"] = row["ms"] / mine["ms"]
        row["memory_times_pyunlearn"] = row["extra_mib"] / max(mine["extra_mib"], 1.0)
    return rows


def _one_product(h: Tensor, w: Tensor, t: Tensor) -> Callable[[], Tensor]:
    """The product of the live rows, into memory that stands already: a third of the floor."""
    live, transposed = h.detach()[t != -100], w.detach().T
    out = torch.empty(len(live), len(w), dtype=h.dtype, device=h.device)
    return lambda: torch.mm(live, transposed, out=out)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="forward + backward; floor: three matrix products of the live rows", title_justify="left")
    for name in (
        "shape",
        "dtype",
        "masked",
        "",
        "ms",
        "x floor",
        "x pyunlearn",
        "extra MiB",
        "loss error",
        "d_hidden",
        "d_weight",
    ):
        table.add_column(name, justify="left" if name in ("shape", "dtype", "") else "right", no_wrap=True)
    for r in rows:
        table.add_row(
            "x".join(map(str, r["shape"])), r["dtype"], f"{r['masked']:.0%}", r["name"], f"{r['ms']:.2f}", f"{r['of_floor']:.2f}",
            f"{r['times_pyunlearn']:.2f}", f"{r['extra_mib']:.0f}", f"{r['loss_error']:.0e}", f"{r['d_hidden_error']:.0e}", f"{r['d_weight_error']:.0e}",
            end_section=r is rows[-1] or r["name"] == rows[-1]["name"],
        )  # fmt: skip
    return table
