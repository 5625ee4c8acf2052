"""What the attacks of an audit cost by default: tokens that the model reads, those of training times three."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch
from torch import nn

import pyunlearn
from pyunlearn.attacks import AttackConfig
from pyunlearn.attacks.config import BY_DEFAULT


class Reading:
    """Tokens that a model has read, padding included."""

    tokens = 0
    passes = 0
    steps = 0


@contextmanager
def counted(model: nn.Module) -> Iterator[Reading]:
    """Count what a model reads within the block; a pass with gradients counts three times, for the backward."""
    reading = Reading()

    def count(module, arguments, options):
        ids = options.get("input_ids", arguments[0] if arguments else None)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
        reading.tokens += ids.numel() * (3 if trains else 1)
        reading.passes += not trains
        reading.steps += trains

    hook = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield reading
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def world(one_thread):
    """An untrained model, and facts."""
    tokenizer = tiny.make_tokenizer()
    return tiny.tiny_llama(len(tokenizer), max_position_embeddings=256).eval(), tokenizer


def read_by(world, sizes, attacks=None):
    """What a model reads in an audit with and without attacks."""
    model, tokenizer = world
    roles = zip(("forget", "holdout", "retain"), sizes, strict=True)
    texts = {role: tiny.facts(count, seed) for seed, (role, count) in enumerate(roles, 1) if count}
    with counted(model) as reading:
        pyunlearn.audit(model, tokenizer=tokenizer, attacks=attacks, template="none", progress=False, **texts)
    return reading


@pytest.mark.parametrize("sizes", [(16, 200, 0), (16, 200, 400), pytest.param((100, 200, 400), marks=pytest.mark.full)])
def test_the_attacks_by_default_cost_at_most_twice_the_audit(world, sizes):
    """Of forget set, holdout and retain set."""
    audit, both = read_by(world, sizes), read_by(world, sizes, ["default"])
    print(sizes, audit.tokens, both.tokens, both.tokens / audit.tokens - 1)
    assert both.tokens - audit.tokens <= 2 * audit.tokens
