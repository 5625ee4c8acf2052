"""Partition of the vocabulary into blocks, and how many of the logits are cached for the backward pass.

The vocabulary is cut, not the rows: each slice of the weight's gradient is then written once, complete, instead of
being read, added to and written for every chunk of rows, and only the small hidden gradient (N, D) is accumulated. A
*block* is the input of one row kernel: narrow enough that its float32 logits (N, block) stay in cache between the
product and the kernel. A *group* is a few neighbouring blocks, the unit of the backward pass's products and of the
cache, which holds exp(logit - block maximum) in the input's dtype, so that rounding costs the same relative error
everywhere.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from pyunlearn.ops._library import host_may_wait

MIB = 1 << 20
_GRAIN = 64  # columns: keeps every block 16-byte aligned in every dtype


class Plan(NamedTuple):
    """Sizes of one call: columns per block and per group, and the number of leading groups that are cached."""

    vocabulary: int
    block: int
    group: int
    cached: int
    fused: bool = False  # run by hopper/kernels.py, without blocks of logits in memory

    def row_length(self, first: int, end: int) -> int:
        """Return the row length of a buffer for this group; the fused kernels write multiples of 16 bytes."""
        return _padded(end - first) if self.fused else end - first

    @property
    def blocks(self) -> int:
        """Number of blocks in the vocabulary."""
        return -(-self.vocabulary // self.block)

    def groups(self) -> list[tuple[int, int]]:
        """Return the (first, end) columns of each group."""
        return [(g, min(g + self.group, self.vocabulary)) for g in range(0, self.vocabulary, self.group)]

    def blocks_of(self, first: int, end: int) -> list[tuple[int, int, int]]:
        """Return (index, first, end) of each block within a group."""
        return [(b // self.block, b, min(b + self.block, end)) for b in range(first, end, self.block)]


def plan(
    rows: int, vocabulary: int, dtype: torch.dtype, device: str | torch.device, workspace: int | None, keep: bool,
    fused: bool = False,
) -> Plan:  # fmt: skip
    """Return the plan for `rows` rows; `workspace` bytes (None: `default_workspace`) bound scratch and cache together.

    Blocks and groups are the same for every workspace that fits full-sized ones (128 MiB on the CPU, at most 1 GiB on a
    GPU), so the results are too, bit for bit; below that they shrink, down to 64 columns, and results may differ in the
    last digit. fused: see `_fused_plan`.
    """
    device = torch.device(device)
    size = dtype.itemsize
    real = 8 if dtype is torch.float64 else 4
    workspace = default_workspace(device.type) if workspace is None else workspace
    if fused:
        return _fused_plan(max(1, rows), vocabulary, dtype, workspace, keep)
    block_bytes, group_blocks = (8 * MIB, 4) if device.type == "cpu" else (_block_bytes(device.index), 8)
    per_column = max(1, rows) * real
    block = _columns(min(block_bytes, workspace // 4) // per_column, 8192, vocabulary)
    group = block * (group_blocks if workspace >= 4 * group_blocks * block_bytes else 1)
    if not keep:
        return Plan(vocabulary, block, group, 0)
    count, columns = -(-vocabulary // group), max(1, rows) * size
    if vocabulary * columns + (per_column * block if size != real else 0) <= workspace:
        return Plan(vocabulary, block, group, count)
    scratch = per_column * block + group * columns
    return Plan(vocabulary, block, group, max(0, min((workspace - scratch) // (group * columns), count - 1)))


@cache
def _block_bytes(gpu: int | None) -> int:
    """Return the bytes of float32 logits that stay in a GPU's L2 cache until they are read: 32 MiB of an H100's 50."""
    if gpu is None or not torch.cuda.is_available():
        return 32 * MIB
    cache_size = getattr(torch.cuda.get_device_properties(gpu), "L2_cache_size", 50 * MIB)
    return min(32 * MIB, max(4 * MIB, cache_size * 16 // 25 // MIB * MIB))


_FUSED_SCRATCH = 1600  # bytes a row that the clusters of an H100 exchange (csrc/hopper.h)
_FUSED_COLUMNS = 66 * 256  # of the gradient at a time: a whole number of tiles for each of an H100's 66 clusters


def _fused_plan(rows: int, vocabulary: int, dtype: torch.dtype, workspace: int, keep: bool) -> Plan:
    """Return the plan of the fused kernels, which cache all exponentials, in one group, or none.

    Without a cache the gradient is computed in slices of the vocabulary that fit the workspace. float16 lacks the range
    to cache exponentials.
    """
    available = workspace - rows * _FUSED_SCRATCH
    if not keep or (dtype is torch.bfloat16 and rows * _padded(vocabulary) * dtype.itemsize <= available):
        return Plan(vocabulary, vocabulary, vocabulary, int(keep), fused=True)
    columns = max(256, min(workspace // (rows * dtype.itemsize) // 256 * 256, _FUSED_COLUMNS))
    return Plan(vocabulary, min(columns, vocabulary), min(columns, vocabulary), 0, fused=True)


def balance(device: str, dtype: torch.dtype) -> int:
    """Return the arithmetic operations of a product in the time of one byte of memory traffic.

    Measured: 5 and 13 (float32 and bfloat16, two cores of an AMD EPYC, Zen 4), 240 (bfloat16, H100).
    """
    if device == "cpu":
        return 16 if dtype.itemsize == 2 else 8
    return 200


def rows_at_a_time(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, device: str | torch.device, workspace: int,
    train_weight: bool, fused: bool = False,
) -> int:  # fmt: skip
    """Return how many rows to finish, forward and backward, before the next ones, when coefficients are known.

    Either all at once, and logits that do not fit are recomputed; or as many as fit whole. The second saves the fourth
    product, and pays by reading the weight and adding to its gradient once for each chunk of rows, and by
    `bytes_of_sum`.
    """
    size, real = dtype.itemsize, 8 if dtype is torch.float64 else 4
    whole = plan(rows, vocabulary, dtype, device, workspace, True, fused)
    again = 1 - whole.cached / len(whole.groups())
    per_row = vocabulary * size + (0 if size == real else real * 8192)
    if fused:
        per_row = _padded(vocabulary) * size + _FUSED_SCRATCH
    fit = (workspace - (bytes_of_sum(vocabulary, width, dtype) if train_weight else 0)) // per_row
    if not again or fit < 1:
        return rows
    chunks = -(-rows // fit)
    traffic = (chunks - 1) * (2 * size + (2 * real if train_weight else 0)) * balance(torch.device(device).type, dtype)
    return rows if traffic >= 2 * rows * again else -(-rows // chunks)


def bytes_of_sum(vocabulary: int, width: int, dtype: torch.dtype) -> int:
    """Return the extra bytes of a weight gradient summed over chunks of rows: 16-bit numbers are summed in float32."""
    return vocabulary * width * 4 if dtype.itemsize == 2 else 0


def default_workspace(device: str) -> int:
    """Return the default workspace: fits a batch of a few hundred tokens, and is small next to any language model."""
    return 256 * MIB if device == "cpu" else 2048 * MIB


def allowance(workspace: int | None, x: torch.Tensor, rows: int, vocabulary: int) -> int:
    """Return the bytes that a call may use: `workspace`, by default `default_workspace`.

    On a GPU the default is at most half of the free memory, which is queried only where more than 256 MiB could be
    used, and not while torch.compile traces or a CUDA graph is captured.
    """
    if workspace is not None:
        return workspace
    usual = default_workspace(x.device.type)
    if not x.is_cuda or rows * vocabulary * x.element_size() <= 256 * MIB or not host_may_wait(x):
        return usual
    free = torch.cuda.mem_get_info(x.device)[0]
    # one nested dictionary: memory_reserved and memory_allocated would each flatten and sort it
    stats = torch.cuda.memory_stats_as_nested_dict(x.device)
    unused = stats["reserved_bytes"]["all"]["current"] - stats["allocated_bytes"]["all"]["current"]
    return min(usual, (free + unused) // 2)


def _padded(columns: int) -> int:
    return -(-columns // 8) * 8


def _columns(wanted: int, most: int, vocabulary: int) -> int:
    whole = -(-vocabulary // _GRAIN) * _GRAIN
    return max(_GRAIN, min(wanted // _GRAIN * _GRAIN, most, whole))
