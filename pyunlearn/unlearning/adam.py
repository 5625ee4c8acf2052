"""Adam whose 16-bit parameters are updated in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.models.gguf_rounding import rounded_as, spread
from pyunlearn.models.sharding import part
from pyunlearn.unlearning.eight_bits import decoded, encoded

_BETA2, _EPSILON = 0.999, 1e-8
_CHUNK = 1 << 22  # numbers updated at once, so that temporary tensors stay small


class Adam(torch.optim.Optimizer):
    """AdamW without weight decay; the numbers of `torch.optim.AdamW`, in less memory.

    At unlearning's learning rates an update is smaller than half the gap between two 16-bit numbers, so that most would
    round to zero. Each 16-bit parameter therefore has a second tensor, its *rest*: of bfloat16 the 16 bits that
    rounding cuts off, so that both together are a float32 number; of float16 the float32 number itself.

    A parameter with one of the `formats` is rounded to it after each step, and its rest is the float32 number that was
    rounded: gradients are taken at rounded weights and applied to the unrounded ones (straight-through, Bengio et al.
    2013, arXiv 1308.3432). At first that number is drawn among all that are rounded to the weight, see `spread`.

    Of a parameter that is sharded over processes, each updates its part.

    Bytes a parameter besides the weight and its gradient: 4 for the second moment or 1 in 8 bits, 4 for the first where
    there is momentum, and for the rest 2 (bfloat16) or 4 (float16, and all with a format).

    Args:
        parameters: those that require a gradient are trained.
        lr: the learning rate.
        momentum: beta1; 0 stores no first moment.
        offload: True holds moments and rests in the main memory, and brings a chunk at a time to the parameter's
            device.
        formats: parameter -> format of a GGUF file, for parameters that are rounded already.
        seed: of the first unrounded numbers, and of the rounding of moments.
        clipped_to: bound on the gradients; second moments are then held in 8 bits, see `eight_bits`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.0,
        *,
        offload: bool = False,
        formats: Mapping[nn.Parameter, str] | None = None,
        seed: int = 0,
        clipped_to: float | None = None,
    ) -> None:
        trained = [p for p in parameters if p.requires_grad]
        super().__init__(trained, {"lr": lr})
        self.momentum, self.offload, self.formats = momentum, offload, formats or {}
        self.seed, self.clipped_to = seed, clipped_to
        self.rests: dict[nn.Parameter, Tensor] = {}
        self._numbers = {p: number for number, p in enumerate(trained)}
        generator = torch.Generator().manual_seed(seed)
        for p in trained:
            if (name := self.formats.get(p)) is not None:
                self.rests[p] = self.room(p, torch.float32).copy_(spread(p, name, generator))
            elif p.dtype == torch.bfloat16:
                self.rests[p] = self.room(p, torch.int16)
            elif p.dtype == torch.float16:
                self.rests[p] = self.room(p, torch.float32).copy_(part(p).detach())

    def room(self, p: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """Return zeros of the shape of this process's part of a parameter, where its moments and its rest are."""
        if not self.offload:
            return torch.zeros_like(part(p), dtype=dtype, requires_grad=False)
        pinned = p.device.type == "cuda"
        return torch.zeros_like(part(p), dtype=dtype, device="cpu", requires_grad=False, pin_memory=pinned)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step on each parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group["lr"])

    def _update(self, p: nn.Parameter, grad: Tensor, lr: float) -> None:
        state, precise = self.state[p], torch.promote_types(p.dtype, torch.float32)
        if not state:
            state["second"] = self.room(p, precise if self.clipped_to is None else torch.uint8)
            state |= {"first": self.room(p, precise)} if self.momentum else {}
        state["step"] = step = state.get("step", 0) + 1
        correction = (1 - _BETA2**step) ** 0.5
        rate = lr / (1 - self.momentum**step)
        eight_bits = self._eight_bits(p, step)
        tensors = [part(p).detach(), part(grad), state["second"], state.get("first"), self.rests.get(p)]
        for weight, gradient, *stored in _chunks(tensors):
            moved: list[Any] = [_near(t, p.device) for t in stored] if self.offload else stored
            moment, first, rest = moved
            gradient = gradient.to(precise)
            second = moment if eight_bits is None else decoded(moment, eight_bits[0], precise)
            second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            direction = gradient if first is None else first.lerp_(gradient, 1 - self.momentum)
            denominator = (second.sqrt() / correction).add_(_EPSILON)
            value = exact(weight, rest).addcdiv_(direction, denominator, value=-rate)
            assign(weight, rest, value, self.formats.get(p))
            if eight_bits is not None:
                moment.copy_(encoded(second, *eight_bits))
            if self.offload:
                for far, near in zip(stored, moved, strict=True):
                    if far is not None:
                        far.copy_(near)

    def _eight_bits(self, p: nn.Parameter, step: int) -> tuple[float, torch.Generator] | None:
        """Return the bound on the gradients, and random numbers of this parameter and step; None for 32 bits."""
        if self.clipped_to is None:
            return None
        draws = torch.Generator(p.device)
        return self.clipped_to, draws.manual_seed(self.seed + step * len(self._numbers) + self._numbers[p])


def _near(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """Return a tensor on the device; one that is there is not copied."""
    return None if tensor is None else tensor.to(device, non_blocking=True)


def exact(weight: Tensor, rest: Tensor | None) -> Tensor:
    """Return a weight and its rest, int16 or float32 of the same shape or None, as one tensor of that shape.

    It has 32 bits a number or more, and is the weight itself, or the rest, where that holds the number.
    """
    if rest is None:
        return weight.detach()
    rest = rest.to(weight.device)
    if rest.dtype == torch.float32:
        return rest
    return ((weight.detach().view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)


def assign(weight: Tensor, rest: Tensor | None, value: Tensor, name: str | None = None) -> None:
    """Store the value, of the weight's shape, in a weight, rounded to nearest (to a format `name`), and in its rest.

    >>> weight, rest = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int16)
    >>> assign(weight, rest, torch.tensor([0.1]))
    >>> weight.item(), exact(weight, rest).item() == torch.tensor(0.1).item()
    (0.10009765625, True)
    """
    if rest is None or rest.dtype == torch.float32:
        weight.copy_(value if name is None else rounded_as(value, name))
        if rest is not None and rest is not value:
            rest.copy_(value)
        return
    bits = value.masked_fill(value.isnan(), float("nan")).view(torch.int32)  # other NaN would overflow
    upper = (bits + 0x8000) >> 16  # half a unit of the last place is rounded away from zero
    weight.copy_(upper.to(torch.int16).view(torch.bfloat16))
    rest.copy_(bits - (upper << 16))


def _chunks(tensors: list[Any]) -> Iterator[list[Any]]:
    """Yield the tensors in chunks of the same numbers; whole where one is not contiguous; None stays None."""
    present = [t for t in tensors if t is not None]
    if present[0].numel() <= _CHUNK or not all(t.is_contiguous() for t in present):
        yield tensors
        return
    flat = [None if t is None else t.view(-1) for t in tensors]
    for start in range(0, present[0].numel(), _CHUNK):
        yield [None if t is None else t[start : start + _CHUNK] for t in flat]
