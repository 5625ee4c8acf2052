"""Self-test of the Hopper kernels on a GPU: comparison with the definition, in a subprocess with a timeout."""

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
"""(N, D, V) of a quick test: every kernel once, partial tiles included."""
WIDE: Shapes = ((700, 576, 33001), (700, 2048, 33001))
"""(N, D, V) of a long test: each cluster's ring of stages wraps many times, in short steps and in long ones."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest gradient
SECONDS = 180  # a cold start of torch included
_TARGETS = 300  # the leading vocabulary entries that occur as targets


def run_trial(index: int) -> str | None:
    """Test the kernels on that GPU in a subprocess; return a sentence if they failed.

    They are tested once for each build, GPU, driver and torch; a pass is recorded on disk.
    """
    record = _pass_record(index)
    if record is not None and record.exists():
        return None
    problem = _run_in_subprocess(f"sys.exit(compare(torch.device('cuda', {index}), SMALL + WIDE, times=3))")
    if record is not None and not problem:
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.touch()
        except OSError:
            pass  # they are tested again next time
    return problem


def _run_in_subprocess(statement: str, seconds: float = SECONDS) -> str | None:
    """Run a statement that sees this module's names; return the last line of standard error if it fails."""
    code = f"import sys\nsys.path[:] = {sys.path!r}\nfrom pyunlearn.ops.hopper.selftest import *\n{statement}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"their self-test did not finish within {seconds:g} s (PYUNLEARN_HOPPER=0 skips it)"
    except OSError as error:
        return f"no process could be started to test them ({error})"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the process that tested them ended with {done.returncode}"


def _pass_record(index: int) -> Path | None:
    """Return the path of the file that records a pass, or None without a cache folder."""
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
    """The inputs of one call, and its results in float64."""

    h: Tensor  # (N, D)
    head: Head
    targets: Tensor  # (N,)
    coefficients: Tensor  # (N,)
    statistics: list[Tensor]  # log-likelihood, rank, entropy, variance, each (N,)
    gradients: list[Tensor]  # with respect to h, the weight and the bias
    tolerance: float


@torch.no_grad()
def compare(device: torch.device, shapes: Shapes = SMALL, times: int = 1) -> str | None:
    """Compare every kernel with the definition; return a sentence if one fails, is wrong, or is not repeatable."""
    report = "in a self-test on this GPU (please report it, with `pyunlearn info`)"
    for shape, dtype, capped in product(shapes, TOLERANCE, (True, False)):
        case = _case(shape, dtype, capped, device)
        try:
            first: list[Tensor] = []
            for _ in range(times):
                statistics, gradients = _kernel_outputs(case)
                if not all(map(_near, statistics, case.statistics)):
                    return f"they gave wrong numbers {report}"
                pairs = list(zip(gradients, case.gradients * 2, strict=True))
                # in two parts: entries that are no targets have much smaller gradients
                for part in (slice(_TARGETS), slice(_TARGETS, None)):
                    if not all(_close(ours[part], expected[part], case.tolerance) for ours, expected in pairs):
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
    shapes = ((n, width), (vocabulary, width), (vocabulary,))
    h, weight, bias = (torch.randn(*s, generator=generator).to(device, dtype) for s in shapes)
    weight *= width**-0.5
    # rows in two pairs of blocks whose exponentials leave the range of the first sweep's cache, on either side
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
    statistics = reference.token_statistics_of(z, targets)
    g = z.softmax(1).neg_()
    g[torch.arange(n, device=device), targets] += 1
    g *= coefficients[:, None] * head.logit_scale
    if capped:
        g *= 1 - (z / head.softcap) ** 2
    gradients = [g @ weight.double(), g.T @ h.double(), *([g.sum(0)] if capped else [])]
    return Case(h, head, targets, coefficients, list(statistics), gradients, TOLERANCE[dtype])


def _kernel_outputs(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Return the kernels' statistics and gradients, the latter from the cache and from recomputed logits."""
    h, head, targets, coefficients = case[:4]
    (n, _), vocabulary = h.shape, head.weight.shape[0]
    statistics = kernels.token_statistics(h, head, targets, None)
    gradients: list[Tensor] = []
    for workspace in (1 << 30, 0):
        p = plan(n, vocabulary, h.dtype, h.device.type, workspace, True, fused=True)
        cached = [h.new_empty((n * p.row_length(0, vocabulary),))] * p.cached
        factor = h.new_empty((p.blocks, n), dtype=torch.float32)
        buffers = [torch.zeros(d.shape, device=h.device) for d in case.gradients]
        into = Gradients(buffers[0], buffers[1], buffers[2] if head.bias is not None else None)
        scores = Statistics(*kernels.score(h, head, targets, cached, factor))
        kernels.differentiate(h, head, targets, p, scores, coefficients, [*cached], factor, into, release=False)
        gradients += buffers
    return list(statistics), gradients


def _near(actual: Tensor, expected: Tensor) -> bool:
    """Compare statistics to float32 accuracy; ranks may differ by nearly equal logits."""
    if actual.dtype is torch.int64:
        return bool((actual - expected).abs().max() <= 3)
    return torch.allclose(actual.double(), expected, rtol=1e-4, atol=1e-4)


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return not actual.numel() or bool((actual - expected).abs().max() <= tolerance * expected.abs().max())
