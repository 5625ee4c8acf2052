"""Inner layers: do they still predict a text that the last layer no longer writes? (logit lens)"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from pyunlearn.attacks.target import Target, Trial, Unsuited
from pyunlearn.models.hidden_states import Layer, blocks
from pyunlearn.models.likelihood import head_of, head_problem
from pyunlearn.models.scoring import by_example, evaluation_mode
from pyunlearn.ops._portable import to_float64
from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood

_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
_SHARES = (0.25, 0.5, 0.75)


def layers(target: Target) -> Iterator[Trial]:
    """Read each text's likelihood off the hidden states of three inner layers, by the model's own last norm and head.

    Source: nostalgebraist 2020, interpreting GPT: the logit lens; Patil et al. 2023, arXiv 2309.17410.
    """
    lm = target.lm
    if reason := head_problem(lm.inner):
        raise Unsuited(reason)
    norm, count = _last_norm(lm.inner), len(blocks(lm))
    for index in sorted({max(0, round(share * count) - 1) for share in _SHARES}):
        nll = _nll(target, Layer(lm, index), norm)
        n = len(target.texts.forget)
        yield Trial(f"layers, after {index + 1} of {count}", nll[:n], nll[n:], details={"layer": index + 1})


@torch.no_grad()
def _nll(target: Target, layer: Layer, norm: nn.Module) -> Any:
    """Return mean negative log-likelihoods of all texts by a layer's hidden states, nats a token."""
    lm, tokens = target.lm, target.texts.every
    out = np.zeros(len(tokens))
    head = head_of(lm.inner)
    options = lm.likelihood.head_options(head)
    with evaluation_mode(lm.module):
        for indices, batch in target.scorer.batches(tokens):
            values = linear_log_likelihood(norm(layer(batch)), head.weight, batch.targets, **options)
            out[indices] = [-float(to_float64(x).mean()) for x in by_example(values, tokens, indices)]
    return target.finite(out)


def _last_norm(inner: Any) -> nn.Module:
    """Return the norm before the head. Raises Unsuited where the model has none of a known name."""
    stack = (inner.get_decoder() if hasattr(inner, "get_decoder") else None) or inner.base_model
    for name in _NORMS:
        if isinstance(module := getattr(stack, name, None), nn.Module):
            return module
    raise Unsuited("its last norm is not known")
