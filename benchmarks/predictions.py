"""What was predicted for an H100 before any kernel ran on one, next to what is measured.

The predictions follow from a prototype that ran, and from the instructions of the compiled kernels. A line outside its
prediction is a reason to look. Each shape's lines are printed and saved as soon as they are measured:
`python -m benchmarks.predictions`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import CUDA_SHAPES, data, named, one_product
from benchmarks.harness import environment, extra_mib, medians
from pyunlearn.ops import linear_log_likelihood

SLACK = 0.03
"""A measured multiple may be off by this share of the prediction: the spread between two runs of one kernel."""


class Measure(NamedTuple):
    """One line: what runs, as a multiple of how many products, and the (lowest, highest) prediction of each shape.

    The shapes are cases.CUDA_SHAPES. from_idle: the prediction is for a call that finds the GPU idle, as in a loop that
    waits for each result; otherwise for calls queued one behind the other.
    """

    products: int
    from_idle: bool
    predicted: tuple[tuple[float, float], ...]
    options: dict[str, Any]


MEASURES = {
    "forward, kernel": Measure(
        1, False, ((1.05, 1.05), (1.06, 1.06), (1.00, 1.00), (0.92, 0.92), (0.99, 0.99)), {"ignore_index": None}
    ),
    "forward, default": Measure(1, True, ((1.06, 1.06), (1.07, 1.07), (1.03, 1.03), (1.10, 1.18), (1.15, 1.25)), {}),
    "full, all logits cached": Measure(
        3, True, ((1.07, 1.07), (1.17, 1.17), (1.03, 1.03), (1.05, 1.09), (1.07, 1.11)), {"workspace": 1 << 40}
    ),
    "full, in 512 MiB": Measure(
        3, True, ((1.36, 1.36), (1.37, 1.37), (1.37, 1.37), (1.28, 1.28), (1.10, 1.10)), {"workspace": 512 << 20}
    ),
}


def verdict(measured: float, predicted: tuple[float, float] | None) -> str:
    """Say how a measured multiple stands to its prediction: as predicted, faster, slower; "" without one.

    >>> verdict(1.07, (1.05, 1.05)), verdict(1.30, (1.10, 1.18)), verdict(0.9, None)
    ('as predicted', 'slower', '')
    """
    if predicted is None:
        return ""
    low, high = predicted
    if measured > high * (1 + SLACK):
        return "slower"
    return "faster" if measured < low * (1 - SLACK) else "as predicted"


def measure(
    n: int, d: int, v: int, device: str, rounds: int, dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Any]]:
    """Check the log-likelihoods against float64, then time every measure at one shape; a row each."""
    h, w, t = data(n, d, v, "0", dtype, device)
    wrong = _error(h, w, t)
    limit = 1e-4
    if not wrong <= limit:
        raise SystemExit(f"{n} x {d} x {v}: a log-likelihood is off by {wrong:.1e}, more than {limit}: not timed")
    calls: dict[str, Callable[[], Any]] = {
        name: partial(_call, h, w, t, measure.products > 1, measure.options) for name, measure in MEASURES.items()
    }
    times = medians({"one product": one_product(h, w, t)} | calls, rounds, device)
    product = times.pop("one product")
    shape = (n, d, v)
    rows = []
    for name, took in times.items():
        about = MEASURES[name]
        queued = took.ms / product.ms / about.products
        idle = None
        if took.from_idle is not None and product.from_idle is not None:
            idle = took.from_idle / product.from_idle / about.products
        predicted = about.predicted[CUDA_SHAPES.index(shape)] if shape in CUDA_SHAPES else None
        measured = idle if about.from_idle and idle is not None else queued
        gradients = (h.nbytes + w.nbytes) / 2**20 if about.products > 1 else 0.0
        rows.append(
            {
                "case": named(*shape, dtype), "name": name, "ms": took.ms, "from_idle_ms": took.from_idle,
                "one_product_ms": product.ms, "of_products": queued, "from_idle_of_products": idle,
                "predicted": predicted, "prediction_is_from_idle": about.from_idle,
                "verdict": verdict(measured, predicted), "error": wrong,
                "extra_mib": extra_mib(calls[name], device) - gradients,
            }
        )  # fmt: skip
    return rows


def _call(h: Tensor, w: Tensor, t: Tensor, gradients: bool, options: dict[str, Any]) -> Any:
    with torch.set_grad_enabled(gradients):
        total = linear_log_likelihood(h, w, t, **options).sum()
    return torch.autograd.grad(total, (h, w)) if gradients else total


@torch.no_grad()
def _error(h: Tensor, w: Tensor, t: Tensor) -> float:
    """Return the largest error of a log-likelihood of the first and the last 32 rows, against float64."""
    rows = torch.cat([torch.arange(len(t))[:32], torch.arange(len(t))[-32:]]).unique().to(h.device)
    sums, at_target = [], torch.zeros(len(rows), dtype=torch.float64, device=h.device)
    for first in range(0, len(w), 16384):
        z = h[rows].double() @ w[first : first + 16384].double().T
        sums.append(z.logsumexp(1))
        inside = (t[rows] >= first) & (t[rows] < first + z.shape[1])
        at_target[inside] = z[inside].gather(1, (t[rows][inside] - first)[:, None]).squeeze(1)
    exact = at_target - torch.stack(sums).logsumexp(0)
    return float((linear_log_likelihood(h, w, t)[rows].double() - exact).abs().max())


def line(row: dict[str, Any]) -> str:
    """Return one row of the table."""
    low, high = row["predicted"] or (None, None)
    predicted = "" if low is None else f"{low:.2f}" if low == high else f"{low:.2f}-{high:.2f}"
    where = "idle" if row["prediction_is_from_idle"] else "queued"
    idle = "" if row["from_idle_ms"] is None else f"{row['from_idle_ms']:9.2f} x{row['from_idle_of_products']:.2f}"
    return (
        f"{row['case']:36}{row['name']:25}{row['ms']:9.2f} x{row['of_products']:.2f}  {idle:>16}  "
        f"{predicted and f'{where} x{predicted}':>17}  {row['verdict']:13}{row['extra_mib']:8.0f} {row['error']:.0e}"
    )


HEADER = (
    f"{'case':36}{'':25}{'ms, queued':>15}  {'ms, from idle':>16}  {'predicted':>17}  {'':13}{'MiB':>8} error\n"
    "x: multiples of the products, one for the forward pass and three for the full one"
)


def main() -> None:
    """Measure the requested shapes, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictions", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", default=None, help="N,D,V (default: those with a prediction)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds after warm-up; the median counts")
    parser.add_argument("--out", type=Path, default=None, help="a JSON-lines file; a line is added for each measure")
    options = parser.parse_args()
    shapes = [tuple(map(int, s.split(","))) for s in options.shapes] if options.shapes else CUDA_SHAPES
    about = environment(options.device)
    print(about, HEADER, sep="\n", flush=True)
    for n, d, v in shapes:
        for row in measure(n, d, v, options.device, options.rounds):
            print(line(row), flush=True)
            if options.out is not None:
                with options.out.open("a") as file:
                    file.write(json.dumps(row | {"environment": about}) + "\n")


if __name__ == "__main__":
    main()
