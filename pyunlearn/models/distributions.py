"""The next-token distributions at some rows, as hidden states and a head: what methods of the whole vocabulary are made of.

Where a model's head cannot be read (see `models.head_problem`), its logits stand in for both: right, but as wide as the vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyunlearn.ops import reference as definition
from pyunlearn.ops.kl_divergence import kl_divergence
from pyunlearn.ops.logit_margin import logit_margin


class Head(NamedTuple):
    """The output head: logits = cap(logit_scale * (hidden @ weight.T + bias)), weight (V, D), bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


class Distributions(NamedTuple):
    """softmax(logits) at N rows."""

    states: Tensor  # (N, D), what the head reads; (N, V) logits where there is no head
    head: Head | None
    workspace: int | None = None  # bytes, see ops.linear_log_likelihood

    def kl_from(self, other: Distributions, targets: Tensor, target_shift: float = 0.0) -> Tensor:
        """(N,) KL(other || self), nats, differentiable in self; target_shift is first taken off the targets' (N,) logits of `other`."""
        mine, theirs = self.head, other.head
        if mine is None or theirs is None or mine[2:] != theirs[2:]:
            return definition.kl_divergence_of(
                self._logits(), _shifted(other._logits().detach(), targets, target_shift)
            )
        return kl_divergence(
            self.states, mine.weight, other.states, theirs.weight, targets, bias=mine.bias, reference_bias=theirs.bias,
            logit_scale=mine.logit_scale, softcap=mine.softcap, target_shift=target_shift, ignore_index=None, workspace=self.workspace,
        )  # fmt: skip

    @torch.no_grad()
    def entropy(self, targets: Tensor, target_shift: float = 0.0) -> Tensor:
        """(N,) entropy, nats, with target_shift taken off the targets' logits first. No gradient."""
        if self.head is None:
            log_p = torch.log_softmax(_shifted(self._logits(), targets, target_shift), dim=-1)
            return -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(dim=-1)
        # log V - KL(self || uniform): a model of one hidden state, all of whose logits are 0
        size = len(self.head.weight)
        uniform = Head(self.states.new_zeros((size, 1)), None, *self.head[2:])
        flat = Distributions(self.states.new_zeros((len(self.states), 1)), uniform, self.workspace)
        return math.log(size) - flat.kl_from(self, targets, target_shift)

    def margin(self) -> Tensor:
        """(N,) largest logit minus mean logit; differentiable."""
        if self.head is None:
            return definition.logit_margin_of(self._logits())
        weight, bias, scale, softcap = self.head
        return logit_margin(
            self.states, weight, bias=bias, logit_scale=scale, softcap=softcap, workspace=self.workspace
        )

    def detached(self) -> Distributions:
        """The same as constants."""
        return self._replace(states=self.states.detach())

    def _logits(self) -> Tensor:
        """(N, V) in whole, float32 or wider."""
        if self.head is None:
            return self.states if self.states.dtype.itemsize > 2 else self.states.float()
        weight, bias, scale, softcap = self.head
        wide = torch.promote_types(torch.promote_types(self.states.dtype, weight.dtype), torch.float32)
        return definition.logits_of(self.states.to(wide) @ weight.to(wide).T, bias, scale, softcap or 0.0)


def _shifted(logits: Tensor, targets: Tensor, shift: float) -> Tensor:
    """The logits (N, V) with so much taken off the targets' ones."""
    return logits.scatter_add(1, targets[:, None], logits.new_full((len(targets), 1), -shift)) if shift else logits
