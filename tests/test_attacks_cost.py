"""What the attacks of an audit cost by default: tokens that the model reads, those of training times three."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import planted
import pytest
import tiny
import torch

import pyunlearn
from pyunlearn.attacks import AttackConfig
from pyunlearn.attacks.config import BY_DEFAULT


class Reading:
    """Tokens that a model has read, padding included."""

    tokens = 0
    passes = 0
    steps = 0


@contextmanager
def counted(model: Any) -> Iterator[Reading]:
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
    """What a model reads in an audit with or without attacks, and the result."""
    model, tokenizer = world
    rows = list({row["question"]: row for row in tiny.facts(2 * sum(sizes), 1)}.values())
    forget, holdout = sizes[0], sum(sizes[:2])
    texts = {"forget": rows[:forget], "holdout": rows[forget:holdout], "retain": rows[holdout : sum(sizes)] or None}
    with counted(model) as reading:
        result = pyunlearn.audit(model, tokenizer=tokenizer, attacks=attacks, progress=False, **texts)
    return reading, result


SIZES = [(16, 200, 0), (16, 200, 400), (100, 200, 400)]


@pytest.mark.full
@pytest.mark.parametrize("sizes", SIZES)
def test_the_attacks_by_default_cost_at_most_twice_the_audit(world, sizes):
    """Of forget set, holdout and retain set; what fine-tuning and rounding score is most of it."""
    (audit, _), (both, _) = read_by(world, sizes), read_by(world, sizes, ["default"])
    assert both.tokens - audit.tokens <= 2 * audit.tokens


def test_the_attacks_by_default_are_quick(world):
    """One rounding, five steps on each half and on retain text, of a gradient more the rate; the texts read no more."""
    (audit, _), (both, result) = read_by(world, (4, 90, 8)), read_by(world, (4, 90, 8), ["default"])
    tried = {t.attack: t.details for t in result.attack.trials if t.details}
    assert tried["quantization"] == {"format": "4 bits", "non_members": 80}
    assert (tried["relearning"]["steps"], tried["relearning-retain"]["steps"]) == (5, 5)
    assert tried["relearning"]["learning_rate"] == tried["relearning-retain"]["learning_rate"]
    assert both.steps == 3 * 5 + 1
    assert both.passes - audit.passes <= 3 * 4 + 6  # 84 texts three times, in batches of 32, and the six rates
    assert any("in a quick form, compared with 80 of 90 non-members" in note for note in result.attack.notes)


def test_an_attack_by_its_name_is_thorough():
    """Also next to default, and all attacks are."""
    quick = AttackConfig()
    assert all(quick.is_quick(name) for name in BY_DEFAULT)
    assert quick.chosen == BY_DEFAULT
    named = AttackConfig(attacks=["default", "quantization"])
    assert [named.is_quick(name) for name in BY_DEFAULT] == [name != "quantization" for name in BY_DEFAULT]
    assert not AttackConfig(attacks=["all"]).is_quick("relearning")


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "name"),
    [
        (planted.known_after_a_prefix, "prefix, 1/2"),
        (planted.known_in_four_bits, "quantization, 4 bits"),
        (planted.shallow, "relearning"),
    ],
)
def test_the_quick_forms_catch_what_is_planted(one_thread, model, name):
    """Most of the texts come back, all attacks by default together; the learning rate is theirs."""
    w = planted.world()
    texts = {"retain": w.retain, "holdout": w.holdout, "tokenizer": w.tokenizer, "template": "none", "progress": False}
    result = pyunlearn.attack(model(), w.forget, **texts)
    back = [e for e in result.examples if e.verdict == "comes back" and e.attacks[0].startswith(name)]
    assert len(back) > planted.SECRETS / 2, result.headline
