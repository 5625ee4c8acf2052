"""Self-test of the Hopper kernels: every one of them compared with the definition on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyunlearn.ops import reference
from pyunlearn.ops._plan import plan
from pyunlearn.ops._types import Gradients, Head, Statistics
from pyunlearn.ops.hopper import kernels

Shapes = tuple[tuple[int, int, int], ...]
Outputs = Callable[[], list[Tensor]]
Right = Callable[[list[Tensor]], bool]
SMALL: Shapes = ((300, 72, 1003), (300, 1544, 515), (1700, 584, 1003))
"""(N, D, V) of a quick test: partial tiles, short and long k-steps, a ring that wraps, two groups of row pairs."""
WIDE: Shapes = ((2100, 64, 5003), (700, 576, 16411), (700, 2048, 8201))
"""(N, D, V) of a long test: each cluster has several tiles. All of it takes less than 300 MB."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest gradient
_TARGETS = 300  # the leading vocabulary entries that occur as targets
_COLUMNS = 1024  # vocabulary entries whose definition is computed at a time


class Case(NamedTuple):
    """The inputs of one call."""

    h: Tensor  # (N, D)
    head: Head
    targets: Tensor  # (N,)
    coefficients: Tensor  # (N,)
    far: Tensor  # (N,) True for rows with large logits


@torch.no_grad()
def compare(device: torch.device, shapes: Shapes = SMALL, times: int = 1) -> str | None:
    """Compare every kernel with the definition; return a sentence if one fails, is wrong, or is not repeatable.

    Raises RuntimeError where the GPU has no room for the test: `is_full`.
    """
    report = "in a self-test on this GPU (please report it, with `pyunlearn info`)"
    for shape, dtype, capped in product(shapes, TOLERANCE, (True, False)):
        case = _case(shape, dtype, capped, device)
        try:
            expected = _definition(case)
            for outputs, are_right in _calls(case, expected, TOLERANCE[dtype]):
                first = outputs()
                if not are_right(first):
                    return f"they gave wrong numbers {report}"
                for _ in range(times - 1):
                    if not all(map(torch.equal, first, outputs())):
                        return f"they gave other numbers when they ran again {report}"
        except RuntimeError as error:
            if is_full(error):
                raise
            return f"they failed on this GPU: {str(error).splitlines()[0]}"
    return None


def is_full(error: RuntimeError) -> bool:
    """Return whether an error says that the GPU's memory is full, which CUDA's libraries have their own words for."""
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "ALLOC_FAILED" in words


def _case(shape: tuple[int, int, int], dtype: torch.dtype, capped: bool, device: torch.device) -> Case:
    n, width, vocabulary = shape
    cpu: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}
    shapes = ((n, width), (vocabulary, width), (vocabulary,))
    h, weight, bias = (torch.randn(*s, **cpu, dtype=torch.float32).to(device, dtype) for s in shapes)
    weight *= width**-0.5
    # rows in two pairs of blocks whose exponentials leave the range of the first sweep's cache, on either side
    far = torch.zeros(n, dtype=torch.bool, device=device)
    far[[7, n - 7]] = True
    if not capped:
        h[far] *= torch.tensor([[200.0], [-100.0]], dtype=dtype, device=device)
    targets = torch.randint(_TARGETS, (n,), **cpu).to(device)
    coefficients = torch.linspace(-1, 1, n, device=device, dtype=torch.float32)
    coefficients[far] /= 100  # so that they do not outweigh all others in the weight's gradient
    head = Head(weight, bias.float(), 0.5, 4.0) if capped else Head(weight, None, 1.0, 0.0)
    return Case(h, head, targets, coefficients, far)


# ---------------------------------------------------------------- the definition, in float64, in parts


class Definition(NamedTuple):
    """The statistics of a case by their definition, (N,) each."""

    log_likelihood: Tensor
    rank: Tensor
    entropy: Tensor
    variance: Tensor
    positive: Tensor  # rank among logits above 0
    log_sum: Tensor
    largest: Tensor  # the largest logit's magnitude


def _logits(case: Case, rows: slice, columns: slice) -> Tensor:
    """Return the logits of some rows and vocabulary entries."""
    bias = None if case.head.bias is None else case.head.bias[columns].double()
    z = case.h[rows].double() @ case.head.weight[columns].double().T
    return reference.logits_of(z, bias, case.head.logit_scale, case.head.softcap)


def _slices(length: int, step: int) -> Iterator[slice]:
    yield from (slice(i, min(i + step, length)) for i in range(0, length, step))


def _definition(case: Case) -> Definition:
    n, vocabulary = case.h.shape[0], case.head.weight.shape[0]
    parts = []
    for rows in _slices(n, 128):
        z = torch.cat([_logits(case, rows, columns) for columns in _slices(vocabulary, _COLUMNS)], dim=1)
        targets = case.targets[rows]
        own = z.gather(1, targets[:, None]) > 0
        positive = (z > 0).sum(1) - own.squeeze(1).long()
        statistics = reference.token_statistics_of(z, targets)
        parts.append((*statistics, positive, z.logsumexp(1), z.abs().amax(1)))
    return Definition(*map(torch.cat, zip(*parts, strict=True)))


# ---------------------------------------------------------------- the kernels' outputs, and whether they are right


def _calls(case: Case, expected: Definition, tolerance: float) -> Iterator[tuple[Outputs, Right]]:
    """Yield (what runs kernels, whether its outputs are right), for each way in which the ops call them."""
    for threshold in (None, torch.zeros_like(case.coefficients)):
        rank = expected.rank if threshold is None else expected.positive
        right = partial(_statistics_right, case=case, expected=expected._replace(rank=rank))
        yield partial(_statistics, case, threshold), right
    for workspace in (1 << 30, 0):  # from the cache, and from recomputed logits
        yield (
            partial(_gradients, case, workspace),
            partial(_gradients_right, case=case, expected=expected, tolerance=tolerance),
        )


def _statistics(case: Case, threshold: Tensor | None) -> list[Tensor]:
    return list(kernels.token_statistics(case.h, case.head, case.targets, threshold))


def _gradients(case: Case, workspace: int) -> list[Tensor]:
    """Return the log-likelihoods and the gradients with respect to h, the weight and the bias."""
    h, head = case.h, case.head
    (n, _), vocabulary = h.shape, head.weight.shape[0]
    p = plan(n, vocabulary, h.dtype, h.device, workspace, True, fused=True)
    cached = [h.new_empty((n * p.row_length(0, vocabulary),))] * p.cached
    factor = h.new_empty((p.blocks, n), dtype=torch.float32)
    into = Gradients(
        True,
        torch.zeros_like(head.weight, dtype=torch.float32),
        None if head.bias is None else torch.zeros_like(head.bias, dtype=torch.float32),
    )
    scores = Statistics(*kernels.score(h, head, case.targets, cached, factor))
    d_h = kernels.differentiate(
        h, head, case.targets, p, scores, case.coefficients, [*cached], factor, into, release=False
    )
    return [x for x in (scores.log_likelihood, d_h, into.weight, into.bias) if x is not None]


def _likelihoods_right(log_likelihood: Tensor, case: Case, expected: Definition) -> bool:
    """Compare to the accuracy of the products, so that one lost column of 16,411 is seen.

    Far rows may be off by a hundred-thousandth of their largest logit: tensor cores cut the sums of these (a D of 2048
    costs up to 4e-6 of it).
    """
    error = (log_likelihood.double() - expected.log_likelihood).abs()
    return bool((error <= 2e-5 + 1e-5 * expected.largest * case.far).all())


def _statistics_right(outputs: list[Tensor], *, case: Case, expected: Definition) -> bool:
    """Ranks may differ by nearly equal logits. Entropy and variance of far rows hang on the last bits of a logit."""
    log_likelihood, rank, *moments = outputs
    near = [
        torch.allclose(x[~case.far].double(), y[~case.far], rtol=1e-4, atol=1e-4)
        for x, y in zip(moments, (expected.entropy, expected.variance), strict=True)
    ]
    ranks = bool((rank - expected.rank).abs().max() <= 3)
    return ranks and all(near) and _likelihoods_right(log_likelihood, case, expected)


def _gradients_right(outputs: list[Tensor], *, case: Case, expected: Definition, tolerance: float) -> bool:
    """Compare with the definition, in two parts: vocabulary entries that are no targets have smaller gradients."""
    log_likelihood, d_h, d_weight, *d_bias = outputs
    h, head = case.h.double(), case.head
    worst, largest = d_weight.new_zeros((2, 4), dtype=torch.float64)  # of the weight and the bias, each in two parts
    d_hidden = torch.zeros_like(h)
    columns_in_parts = [
        slice(0, _TARGETS),
        *(slice(_TARGETS + s.start, _TARGETS + s.stop) for s in _slices(len(d_weight) - _TARGETS, _COLUMNS)),
    ]
    for columns in columns_in_parts:
        z = _logits(case, slice(None), columns)
        g = (z - expected.log_sum[:, None]).exp_().neg_()
        if columns.start == 0:
            g[torch.arange(len(h), device=h.device), case.targets] += 1
        g *= case.coefficients[:, None] * head.logit_scale
        if head.softcap:
            g *= 1 - (z / head.softcap) ** 2
        d_hidden += g @ head.weight[columns].double()
        pairs = [(d_weight, g.T @ h), *((x, g.sum(0)) for x in d_bias)]
        for i, (ours, truth) in enumerate(pairs):
            part = 2 * i + (columns.start > 0)
            worst[part] = torch.maximum(worst[part], (ours[columns] - truth).abs().max())
            largest[part] = torch.maximum(largest[part], truth.abs().max())
    of_rows = [(d_h[case.far], d_hidden[case.far]), (d_h[~case.far], d_hidden[~case.far])]
    close = bool((worst <= tolerance * largest).all())
    close &= all(bool((x - y).abs().max() <= tolerance * y.abs().max()) for x, y in of_rows)
    return close and _likelihoods_right(log_likelihood, case, expected)
