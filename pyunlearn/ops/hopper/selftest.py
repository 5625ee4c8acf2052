"""Whether the kernels of kernels.py are right on the GPU at hand: their numbers against the definition, in a process that can be ended if they hang."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyunlearn.ops import _backend, reference
from pyunlearn.ops._plan import plan
from pyunlearn.ops._types import Gradients, Head, Statistics
from pyunlearn.ops.hopper import kernels

Shapes = tuple[tuple[int, int, int], ...]
SMALL: Shapes = ((300, 72, 1003),)
"""(N, D, V) that take no time: every kernel once, tiles that are not full."""
WIDE: Shapes = ((700, 576, 33001), (700, 2048, 33001))
"""Each cluster's ring of stages goes round many times, in short steps and in long ones."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest gradient
SECONDS = 180  # a cold start of torch included
_TARGETS = 300  # the entries of the vocabulary that are targets


def failed(index: int) -> str | None:
    """A sentence if the kernels did not pass on that GPU. They are tried once for each build, GPU, driver and torch; a pass is remembered on disk."""
    mark = _mark(index)
    if mark is not None and mark.exists():
        return None
    problem = _in_a_process(f"sys.exit(wrong(torch.device('cuda', {index}), SMALL + WIDE, times=3))")
    if mark is not None and not problem:
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError:
            pass  # they are tried again next time
    return problem


def _in_a_process(statement: str, seconds: float = SECONDS) -> str | None:
    """Runs a statement that sees this module's names; what it or Python says in the end, if it does not end well."""
    code = f"import sys\nsys.path[:] = {sys.path!r}\nfrom pyunlearn.ops.hopper.selftest import *\n{statement}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"their trial did not come to an end within {seconds:g} s (PYUNLEARN_HOPPER=0 leaves it out)"
    except OSError as error:
        return f"no process could be started to try them out ({error})"
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()
    return said[-1] if said else f"the process that tried them out ended with {done.returncode}"


def _mark(index: int) -> Path | None:
    """The file that says that they passed; None where there is no home for it."""
    built = Path(_backend.extension().__file__)
    about = (hashlib.sha256(built.read_bytes()).hexdigest(), torch.cuda.get_device_name(index), torch.__version__)
    driver = _backend.build_info().get("cuda_driver")
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return caches / "pyunlearn" / f"hopper-{hashlib.sha256(repr((*about, driver)).encode()).hexdigest()[:24]}"


# ---------------------------------------------------------------- the comparison


class Case(NamedTuple):
    """One call, and what float64 makes of it."""

    h: Tensor  # (N, D)
    head: Head
    targets: Tensor  # (N,)
    coefficients: Tensor  # (N,)
    statistics: list[Tensor]  # log-likelihood, rank, entropy, variance, each (N,)
    gradients: list[Tensor]  # with respect to h, the weight and the bias
    tolerance: float


@torch.no_grad()
def wrong(device: torch.device, shapes: Shapes = SMALL, times: int = 1) -> str | None:
    """Compares every kernel with the definition, so many times; a sentence if one fails, gives a wrong number, or another one the next time."""
    report = "in a self-test on this GPU (please report it, with `pyunlearn info`)"
    for shape, dtype, capped in product(shapes, TOLERANCE, (True, False)):
        case = _case(shape, dtype, capped, device)
        try:
            first: list[Tensor] = []
            for _ in range(times):
                statistics, gradients = _found(case)
                if not all(map(_near, statistics, case.statistics)):
                    return f"they gave wrong numbers {report}"
                pairs = list(zip(gradients, case.gradients * 2, strict=True))
                for part in (
                    slice(_TARGETS),
                    slice(_TARGETS, None),
                ):  # the others get their gradient by p alone, which is less
                    if not all(_close(made[part], right[part], case.tolerance) for made, right in pairs):
                        return f"they gave wrong gradients {report}"
                first = first or [*statistics, *gradients]
                if not all(map(torch.equal, first, [*statistics, *gradients])):
                    return f"they gave other numbers when they ran again {report}"
        except RuntimeError as error:
            return f"they failed on this GPU: {str(error).splitlines()[0]}"
    return None


def _case(shape: tuple[int, int, int], dtype: torch.dtype, capped: bool, device: torch.device) -> Case:
    n, width, vocabulary = shape
    generator = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(*s, generator=generator).to(device, dtype) for s in ((n, width), (vocabulary, width), (vocabulary,)))  # fmt: skip
    weight *= width**-0.5
    # rows of two pairs of blocks whose exponentials leave the range of what the first sweep keeps, on either side
    far = torch.tensor([7, n - 7])
    if not capped:
        h[far] *= torch.tensor([[200.0], [-100.0]], dtype=dtype, device=device)
    targets = torch.randint(_TARGETS, (n,), generator=generator).to(device)
    coefficients = torch.linspace(-1, 1, n, device=device)
    coefficients[far] /= 100  # so that they do not outweigh all others in the weight's gradient
    head = Head(weight, bias.float(), 0.5, 4.0) if capped else Head(weight, None, 1.0, 0.0)
    z = reference.logits_of(
        h.double() @ weight.double().T, bias.double() if capped else None, head.logit_scale, head.softcap
    )
    wanted = reference.token_statistics_of(z, targets)
    g = z.softmax(1).neg_()
    g[torch.arange(n, device=device), targets] += 1
    g *= coefficients[:, None] * head.logit_scale
    if capped:
        g *= 1 - (z / head.softcap) ** 2
    gradients = [g @ weight.double(), g.T @ h.double(), *([g.sum(0)] if capped else [])]
    return Case(h, head, targets, coefficients, list(wanted), gradients, TOLERANCE[dtype])


def _found(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernels make of it: the statistics, then the gradients, from what was kept and from logits that are made again."""
    h, head, targets, coefficients = case[:4]
    (n, _), vocabulary = h.shape, head.weight.shape[0]
    found = kernels.token_statistics(h, head, targets, None)
    gradients: list[Tensor] = []
    for workspace in (1 << 30, 0):
        how = plan(n, vocabulary, h.dtype, h.device.type, workspace, True, fused=True)
        kept = [h.new_empty((n * how.room(0, vocabulary),))] * how.kept
        factor = h.new_empty((how.blocks, n), dtype=torch.float32)
        made = [torch.zeros(d.shape, device=h.device) for d in case.gradients]
        into = Gradients(made[0], made[1], made[2] if head.bias is not None else None)
        statistics = Statistics(*kernels.score(h, head, targets, kept, factor))
        kernels.differentiate(h, head, targets, how, statistics, coefficients, [*kept], factor, into, release=False)
        gradients += made
    return list(found), gradients


def _near(found: Tensor, wanted: Tensor) -> bool:
    """Numbers to what float32 holds; ranks but for logits that are as good as equal."""
    if found.dtype is torch.int64:
        return bool((found - wanted).abs().max() <= 3)
    return torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4)


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return not found.numel() or bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())
