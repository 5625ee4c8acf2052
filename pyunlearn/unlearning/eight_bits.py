"""Second moments of an optimizer in 8 bits: the first bits of a float32, rounded at random so that the mean is kept."""

from __future__ import annotations

import torch
from torch import Tensor

_CUT = 21  # bits of a float32 that are left out, of 23 of the mantissa


def encoded(moment: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """Return (..., uint8) codes of second moments: a number has four in each octave, of 64 octaves.

    Each is rounded up or down at random, so that the mean of what `decoded` returns is the moment. Rounded to nearest,
    a moment would stay what it was after the first steps: each later step changes it by less than half the distance of
    two codes.

    Args:
        moment: (...) numbers from 0 to `largest`^2; those below 2^-63 times that count as about as much.
        largest: bound on the gradients, above 0.
        generator: on the moments' device.

    >>> codes = encoded(torch.tensor([1.0, 0.5, 0.0]), 1.0, torch.Generator().manual_seed(0))
    >>> codes.tolist(), decoded(codes, 1.0, torch.float32)[:2].tolist()
    ([254, 250, 0], [1.0, 0.5])
    """
    draws = torch.empty(moment.shape, dtype=torch.int32, device=moment.device)
    bits = draws.random_(1 << _CUT, generator=generator).add_(moment.float().view(torch.int32))
    return bits.bitwise_right_shift_(_CUT).sub_(_first(largest)).clamp_(0, 255).to(torch.uint8)


def decoded(codes: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    """Return (...) second moments in `dtype` from their codes, see `encoded`."""
    bits = codes.to(torch.int32).add_(_first(largest)).bitwise_left_shift_(_CUT)
    return bits.view(torch.float32).to(dtype)


def _first(largest: float) -> int:
    """Return the first bits of the smallest moment; 254 codes after it is that of the largest, or the one below."""
    bits = torch.tensor(largest, dtype=torch.float64).square().float().view(torch.int32)
    return max(1, (int(bits) >> _CUT) - 254)
