"""Shared by the benchmarks of the ops: shapes, data, the floor, and one table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import ceilings, environment, extra_mib, medians, save

CPU_SHAPES = [(1024, 576, 49152)]
CUDA_SHAPES = [
    (8192, 2304, 256000),
    (8192, 4096, 128256),
    (8192, 2048, 128256),
    (8192, 576, 49152),
    (1024, 2048, 128256),
]


def chosen(options: argparse.Namespace) -> Iterator[tuple[int, int, int, torch.dtype]]:
    """Yield (N, D, V, dtype) of every requested case."""
    cuda = options.device == "cuda"
    shapes = (
        [tuple(map(int, s.split(","))) for s in options.shapes]
        if options.shapes
        else CUDA_SHAPES
        if cuda
        else CPU_SHAPES
    )
    for n, d, v in shapes:
        for name in options.dtypes or (["bfloat16"] if cuda else ["float32", "bfloat16"]):
            yield n, d, v, getattr(torch, name)


# (question, answer) lengths in SmolLM2's tokens of every thirteenth entry of TOFU's forget10 (arXiv 2401.06121)
TOFU = [
    (27, 40), (32, 52), (15, 35), (16, 45), (13, 35), (15, 33), (17, 25), (13, 29), (13, 48), (12, 34), (18, 49),
    (11, 35), (17, 52), (18, 35), (13, 20), (17, 42), (18, 27), (13, 13), (16, 43), (18, 40), (13, 22), (14, 43),
    (21, 49), (26, 62), (14, 31), (22, 29), (19, 52), (14, 33), (14, 26), (16, 33), (15, 33),
]  # fmt: skip


def data(n: int, d: int, v: int, masked: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw random hidden states, head and targets, some of which are masked: see `ignored`."""
    g, there = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(0)
    if device == "cpu":
        there = g
    h = torch.randn(n, d, generator=there, device=device).to(dtype)
    w = (torch.randn(v, d, generator=there, device=device) * d**-0.5).to(dtype)
    t = torch.randint(0, v, (n,), generator=g)
    t[ignored(n, masked, g)] = -100
    return h.requires_grad_(), w.requires_grad_(), t.to(device)


def ignored(n: int, masked: str, g: torch.Generator) -> Tensor:
    """Choose masked rows (n,): a percentage ("60"), or questions and padding of a batch of TOFU's lengths ("tofu")."""
    if masked != "tofu":
        return torch.rand(n, generator=g) < float(masked) / 100
    longest, rows = max(q + a for q, a in TOFU), torch.ones(n, dtype=torch.bool)
    for i, first in enumerate(range(0, n - longest + 1, longest)):
        question, answer = TOFU[i % len(TOFU)]
        rows[first + question : first + question + answer] = False
    return rows


def one_product(h: Tensor, w: Tensor, t: Tensor) -> Callable[[], Tensor]:
    """Return the product of the live rows into allocated memory: the unit of the floor."""
    live, transposed = h.detach()[t != -100], w.detach().T
    out = torch.empty(len(live), len(w), dtype=h.dtype, device=h.device)
    return lambda: torch.mm(live, transposed, out=out)


def timed(
    calls: dict[str, Callable[[], Any]],
    product: Callable[[], Any],
    products: int,
    gradients: float,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time each call, a row each: milliseconds, multiples of `products` products and of the first call, extra MiB.

    On a GPU "ms" is of queued calls, and "from_idle_ms" of one that finds the GPU idle (harness.medians). The extra
    memory does not count the gradients' own MiB.
    """
    rounds = options.rounds or (15 if options.device == "cuda" else 7)
    times = medians({"one product": product} | calls, rounds, options.device)
    floor = products * times.pop("one product").ms
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "ms": took.ms,
            "of_floor": took.ms / floor,
            "extra_mib": extra_mib(calls[name], options.device) - gradients,
        }
        | (
            {}
            if took.from_idle is None
            else {"from_idle_ms": took.from_idle, "from_idle_of_floor": took.from_idle / floor}
        )
        for name, took in times.items()
    ]
    for row in rows:
        row["times_pyunlearn"] = row["ms"] / rows[0]["ms"]
        row["memory_times_pyunlearn"] = row["extra_mib"] / max(rows[0]["extra_mib"], 1.0)
    return rows


def show(benchmark: str, title: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Print the environment, a table with a column per kind of error, and one JSON line; save it with --save.

    Returns the environment.
    """
    dtype = getattr(torch, rows[0]["case"].split(", ")[1])
    about = environment(options.device) | ceilings(options.device, dtype)
    console = Console(width=170)
    console.print(about, highlight=False)
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["errors"]))
    table = Table(title=title, title_justify="left")
    for name in ("case", ""):
        table.add_column(name, no_wrap=True)
    from_idle = ["from idle"] if "from_idle_ms" in rows[0] else []
    for name in ("ms", *from_idle, "x floor", "x pyunlearn", "extra MiB", *(f"error {kind}" for kind in kinds)):
        table.add_column(name, justify="right", no_wrap=name == "ms")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        wrong = (f"{row['errors'][kind]:.0e}" if kind in row["errors"] else "" for kind in kinds)
        table.add_row(
            row["case"], row["name"], *_times_of(row), f"{row['of_floor']:.2f}", f"{row['times_pyunlearn']:.2f}",
            f"{row['extra_mib']:.0f}", *wrong, end_section=following is None or following["case"] != row["case"],
        )  # fmt: skip
    console.print(table)
    result = {"benchmark": benchmark, "environment": about, "rows": rows}
    print(json.dumps(result))
    if options.save:
        print(f"saved to {save(benchmark, result, options.out)}")
    return about


def _times_of(row: dict[str, Any]) -> list[str]:
    """Return a row's milliseconds; on a GPU with a digit more, queued and from idle."""
    if "from_idle_ms" not in row:
        return [f"{row['ms']:.1f}"]
    return [f"{row['ms']:.2f}", f"{row['from_idle_ms']:.2f}"]


def named(n: int, d: int, v: int, dtype: torch.dtype, *more: str) -> str:
    """Return the name of a case in the table."""
    return ", ".join([f"{n} x {d} x {v}", str(dtype).removeprefix("torch."), *more])
