"""Next-token distributions as hidden states and a head, for methods that use the whole vocabulary.

Where the fast path cannot use a model's head (see `pyunlearn.models.head_problem`), the logits take the place of hidden
states and head: correct, but as wide as the vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyunlearn.ops import reference as definition
from pyunlearn.ops.kl_divergence import kl_divergence
from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood
from pyunlearn.ops.log_likelihood import log_likelihood
from pyunlearn.ops.logit_margin import logit_margin


class Head(NamedTuple):
    """Output head: logits = cap(logit_scale * (hidden @ weight.T + bias)), weight (V, D), bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


class Distributions(NamedTuple):
    """Next-token distributions softmax(logits) at N rows.

    >>> Distributions(torch.zeros(1, 4), None).entropy(torch.tensor([0])).exp()
    tensor([4.])
    """

    states: Tensor  # (N, D) input of the head; (N, V) logits where head is None
    head: Head | None
    workspace: int | None = None  # bytes, see ops.linear_log_likelihood

    def kl_from(self, other: Distributions, targets: Tensor, target_shift: float = 0.0) -> Tensor:
        """Return (N,) KL(other || self), nats, differentiable with respect to self.

        Args:
            other: distributions at the same N rows.
            targets: (N,) token ids.
            target_shift: subtracted from the targets' logits of `other`.
        """
        head, other_head = self.head, other.head
        if head is None or other_head is None or head[2:] != other_head[2:]:
            return definition.kl_divergence_of(
                self._logits(), _shifted(other._logits().detach(), targets, target_shift)
            )
        return kl_divergence(
            self.states,
            head.weight,
            other.states,
            other_head.weight,
            targets,
            bias=head.bias,
            reference_bias=other_head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            target_shift=target_shift,
            ignore_index=None,
            workspace=self.workspace,
        )

    @torch.no_grad()
    def log_likelihood(self, targets: Tensor) -> Tensor:
        """Return (N,) log-likelihoods of the targets (N,), nats. No gradient."""
        if self.head is None:
            return log_likelihood(self._logits(), targets)
        weight, bias, scale, softcap = self.head
        return linear_log_likelihood(
            self.states,
            weight,
            targets,
            bias=bias,
            logit_scale=scale,
            softcap=softcap,
            ignore_index=None,
            workspace=self.workspace,
        )

    @torch.no_grad()
    def entropy(self, targets: Tensor, target_shift: float = 0.0) -> Tensor:
        """Return (N,) the entropy, nats, after target_shift is subtracted from the targets' logits. No gradient."""
        if self.head is None:
            log_p = torch.log_softmax(_shifted(self._logits(), targets, target_shift), dim=-1)
            return -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(dim=-1)
        # log V - KL(self || uniform); uniform is a head of zeros on one hidden state
        size = len(self.head.weight)
        uniform = Head(self.states.new_zeros((size, 1)), None, *self.head[2:])
        flat = Distributions(self.states.new_zeros((len(self.states), 1)), uniform, self.workspace)
        return math.log(size) - flat.kl_from(self, targets, target_shift)

    def margin(self) -> Tensor:
        """Return (N,) the largest logit minus the mean logit; differentiable."""
        if self.head is None:
            return definition.logit_margin_of(self._logits())
        weight, bias, scale, softcap = self.head
        return logit_margin(
            self.states, weight, bias=bias, logit_scale=scale, softcap=softcap, workspace=self.workspace
        )

    def detached(self) -> Distributions:
        """Return the distributions as constants, without a gradient."""
        return self._replace(states=self.states.detach())

    def _logits(self) -> Tensor:
        """Return (N, V) materialized logits, float32 or wider."""
        if self.head is None:
            return self.states if self.states.dtype.itemsize > 2 else self.states.float()
        weight, bias, scale, softcap = self.head
        wide = torch.promote_types(torch.promote_types(self.states.dtype, weight.dtype), torch.float32)
        return definition.logits_of(self.states.to(wide) @ weight.to(wide).T, bias, scale, softcap or 0.0)


def _shifted(logits: Tensor, targets: Tensor, shift: float) -> Tensor:
    """Return the logits (N, V) with `shift` subtracted from those of the targets."""
    return logits.scatter_add(1, targets[:, None], logits.new_full((len(targets), 1), -shift)) if shift else logits
