"""Log-likelihood, rank, entropy and variance of each token, all from one product of hidden states and head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyunlearn.ops import _backend, hopper, reference
from pyunlearn.ops._check import check, check_bias, check_head, check_targets, ignored, in_one_dtype
from pyunlearn.ops._library import define, kernel_bias
from pyunlearn.ops._passes import Head, live_rows, real_of, select_rows
from pyunlearn.ops._plan import plan
from pyunlearn.ops._portable import to_float64, write_rows
from pyunlearn.ops._products import Logits
from pyunlearn.ops.log_likelihood import rows_contiguous


class TokenStatistics(NamedTuple):
    """Log-likelihood, rank (int64), entropy and variance of each token, shaped as the targets; see token_statistics."""

    log_likelihood: Tensor
    rank: Tensor
    entropy: Tensor
    variance: Tensor


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    workspace: int | None = None,
) -> TokenStatistics:
    """Compute each target token's log-likelihood and rank, and its distribution's entropy and variance. No gradient.

    With p = softmax(z), z as in linear_log_likelihood, and t the target:

        log_likelihood  log p[t]                                        nats
        rank            #{v : z[v] > z[t]}                              0: the model's first choice
        entropy         -sum over v of p[v] log p[v]                    nats
        variance        sum over v of p[v] (log p[v])^2 - entropy^2     nats^2

    Perplexity, memorization accuracy, extraction strength, exposure, min-k % and min-k %++ follow from these. It takes
    one matrix product and no (N, V) tensor. In `rank`, logits that float32 cannot distinguish from the target's count
    as equal to it: otherwise rounding would decide whether a duplicate of the target's row ranks above it.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64.
        weight: (V, D), on the same device; of different dtypes the wider is used for both.
        targets: (...), int64 token ids in [0, V), or ignore_index.
        bias, logit_scale, softcap: as in linear_log_likelihood.
        ignore_index: target value of the rows to ignore, which are not computed and are 0 in every field. None: no row
            is ignored, which saves a synchronization on a GPU.
        workspace: bytes for scratch (default: 256 MiB on the CPU, 2 GiB on a GPU, of which little is used).

    Returns:
        TokenStatistics(log_likelihood, rank, entropy, variance), (...) each. Where logits are NaN, and on a GPU for a
        target outside [0, V), the log-likelihood is NaN and the rank -1.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit; on the CPU a target outside [0, V).

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(1, 2), torch.eye(2)  # logits [0, 0]: the uniform distribution
        >>> token_statistics(hidden, weight, torch.tensor([1])).entropy
        tensor([0.6931])
    """
    check(hidden, targets, name="hidden", softcap=softcap, workspace=workspace)
    check_head(hidden, weight, bias)
    hidden, weight = in_one_dtype(hidden.detach(), weight.detach())
    flat, bias = hidden.reshape(-1, hidden.shape[-1]), None if bias is None else bias.detach()
    options = (logit_scale, softcap or 0.0, ignored(ignore_index), workspace)
    fields = torch.ops.pyunlearn.token_statistics(flat, weight, bias, targets.reshape(-1).long(), *options)
    return TokenStatistics(*(x.reshape(targets.shape) for x in fields))


def token_statistics_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenStatistics:
    """Compute token_statistics from logits, with one read of them and no float32 copy.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64.
        targets: (...), int64 token ids in [0, V), or ignore_index.
        bias, logit_scale, softcap, ignore_index: as in log_likelihood.

    Returns:
        TokenStatistics, (...) each, as token_statistics.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit; on the CPU a target outside [0, V).

    Example:
        >>> import torch
        >>> token_statistics_from_logits(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([1])).rank
        tensor([2])
    """
    check(logits, targets, name="logits", softcap=softcap, workspace=None)
    check_bias(bias, logits, logits.shape[-1], name="bias")
    flat = logits.detach().reshape(-1, logits.shape[-1])
    bias, options = None if bias is None else bias.detach(), (logit_scale, softcap or 0.0, ignore_index)
    fields = torch.ops.pyunlearn.token_statistics_from_logits(flat, bias, targets.reshape(-1).long(), *options)
    return TokenStatistics(*(x.reshape(targets.shape) for x in fields))


_OUT = " -> (Tensor, Tensor, Tensor, Tensor)"
Four = tuple[Tensor, Tensor, Tensor, Tensor]


class _Sums:
    """Running maximum, sums of exponentials and rank of n rows of logits, updated block by block of the vocabulary."""

    def __init__(self, x: Tensor, targets: Tensor, threshold: Tensor) -> None:
        real, n = real_of(x), x.shape[0]
        self.targets, self.threshold = targets, threshold
        self.maximum, self.total = x.new_full((n,), -torch.inf, dtype=real), x.new_zeros((n,), dtype=real)
        self.moments, self.target_logit = x.new_zeros((2, n), dtype=real), x.new_full((n,), torch.nan, dtype=real)
        self.rank = x.new_zeros((n,), dtype=torch.int64)

    def add(self, x: Tensor, first: int, bias: Tensor | None, logit_scale: float, softcap: float) -> None:
        """Update the statistics with the logits x (n, v) of the vocabulary's columns from `first` on."""
        _backend.token_statistics(
            x, first, bias, logit_scale, softcap, self.targets, self.threshold, self.maximum, self.total, self.moments,
            self.target_logit, self.rank,
        )  # fmt: skip

    def result(self, rows: Tensor | None, targets: Tensor, ignore_index: int) -> Four:
        """Return the four fields for all of `targets` (N,), of which `rows` were computed."""
        real = self.total.dtype
        first, second = to_float64(self.moments)
        total = self.total.to(first.device)
        log_total, mean = self.total.log(), first / total
        log_likelihood = (self.target_logit - self.maximum) - log_total
        variance = (second / total - mean**2).clamp(min=0)
        entropy = log_total.to(mean.device) - mean
        fields = (log_likelihood, self.rank, *(x.to(self.total.device, real) for x in (entropy, variance)))
        return _for_all(fields, rows, targets, ignore_index)


def _for_all(computed: Four, rows: Tensor | None, targets: Tensor, ignore_index: int) -> Four:
    """Expand the four statistics from the live rows to all N targets; ignored rows get their fill values."""
    log_likelihood, rank, *rest = computed
    fields = [log_likelihood, rank.masked_fill(log_likelihood.isnan(), -1), *rest]
    if rows is not None:
        fields = [write_rows(x.new_zeros(targets.shape), rows, x) for x in fields]
    masked = targets == ignore_index
    a, b, c, d = (x.masked_fill(masked, 0) for x in fields)
    return a, b, c, d


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logit_scale: float, softcap: float,
    ignore_index: int, workspace: int | None,
) -> Four:  # fmt: skip
    check_targets(targets, weight.shape[0], ignore_index)
    rows = live_rows(targets, ignore_index)
    h, t = select_rows(rows, hidden, targets)
    head, real, n = Head(weight, kernel_bias(h, bias), logit_scale, softcap), real_of(h), h.shape[0]
    fused = hopper.serves(hidden, weight)
    threshold = _threshold(h, head, t)
    if fused:
        return _for_all(hopper.token_statistics(h, head, t, threshold), rows, targets, ignore_index)
    sums = _Sums(h, t, threshold)
    p = plan(n, weight.shape[0], h.dtype, h.device, workspace, False)
    logits, scratch = Logits(h, real), h.new_empty((n * p.block,), dtype=real)
    for first, end in p.groups() if n else []:
        for _, b, e in p.blocks_of(first, end):
            x = scratch[: n * (e - b)].view(n, e - b)
            logits.into(x, weight[b:e])
            sums.add(x, b, None if head.bias is None else head.bias[b:e], logit_scale, softcap)
    return sums.result(rows, targets, ignore_index)


def _threshold(h: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Compute (n,) the logit above which a token ranks before the target.

    It is the target's exact logit plus what rounding may add to that of a copy. A float32 product errs by up to 8 last
    places of the sum of its terms' magnitudes, where tensor cores truncate it, and of its own size by twice as many,
    where one term is far larger than the others and each addition is rounded to that. The threshold is needed before
    the sweep over the vocabulary, since the target's block may come last.
    """
    real = real_of(h)
    product, size = _backend.target_products(h, head.weight, targets)
    size = 8 * (size + 2 * product.abs())
    bias = None if head.bias is None else to_float64(head.bias[targets.clamp(0, len(head.bias) - 1)])
    z = reference.logits_of(product, bias, head.logit_scale, head.softcap)
    size = size if bias is None else size + bias.abs()
    threshold = _above(z, torch.finfo(real).eps * (abs(head.logit_scale) * size + 2 * z.abs()))
    return threshold.to(h.device, real)


def _above(z: Tensor, by: Tensor) -> Tensor:
    return torch.where(by == torch.inf, z, z + by)  # every possible token ranks before a target with a bias of -inf


def _forward_from_logits(
    logits: Tensor, bias: Tensor | None, targets: Tensor, logit_scale: float, softcap: float, ignore_index: int
) -> Four:
    check_targets(targets, logits.shape[1], ignore_index)
    real, bias, targets = real_of(logits), kernel_bias(logits, bias), targets.contiguous()
    at = targets.clamp(0, logits.shape[1] - 1)
    target_logits = logits.gather(1, at[:, None]).squeeze(1).to(real)
    z = reference.logits_of(target_logits, None if bias is None else bias[at].to(real), logit_scale, softcap)
    plain = bias is None and logit_scale == 1.0 and not softcap
    # transformed logits are rounded differently here and in the kernel; unchanged ones compare exactly
    sums = _Sums(logits, targets, z if plain else _above(z, 4 * torch.finfo(real).eps * z.abs()))
    if logits.shape[0]:
        sums.add(rows_contiguous(logits), 0, bias, logit_scale, softcap)
    return sums.result(None, targets, ignore_index)


def _fake(x: Tensor, targets: Tensor) -> Four:
    a, c, d = (x.new_empty(targets.shape, dtype=real_of(x)) for _ in range(3))
    return a, x.new_empty(targets.shape, dtype=torch.int64), c, d


def _fake_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logit_scale: float, softcap: float,
    ignore_index: int, workspace: int | None,
) -> Four:  # fmt: skip
    return _fake(hidden, targets)


def _fake_from_logits(
    logits: Tensor, bias: Tensor | None, targets: Tensor, logit_scale: float, softcap: float, ignore_index: int
) -> Four:
    return _fake(logits, targets)


define(
    "token_statistics(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float logit_scale, float softcap, "
    "int ignore_index, int? workspace)" + _OUT,
    _forward,
    _fake_forward,
)
define(
    "token_statistics_from_logits(Tensor logits, Tensor? bias, Tensor targets, float logit_scale, float softcap, "
    "int ignore_index)" + _OUT,
    _forward_from_logits,
    _fake_from_logits,
)
