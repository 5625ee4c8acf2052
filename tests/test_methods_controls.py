"""Temperature, top_fraction and the cap of "Unlearning with Control", through a whole run against direct formulas."""

import math

import numpy as np
import pytest
import tiny
import torch

import pyunlearn
from pyunlearn.data import encode, read_examples
from pyunlearn.errors import TrainingError
from pyunlearn.methods import METHODS

SELECTED = [name for name, m in METHODS.items() if "top_fraction" in m.options]
HEATED = [name for name, m in METHODS.items() if "temperature" in m.options and m.kind in ("example", "token")]
FORMULAS = {  # of one example: (n,) log-likelihoods of the tokens that count
    "ga": lambda x: x.mean(),
    "simnpo": lambda x: 0.8 * np.log1p(np.exp(2.5 * x.mean())),
    "hinge": lambda x: max(0.0, 6 * len(x) + x.sum()),
    "wga": lambda x: (np.exp(x) * x).mean(),
    "satimp": lambda x: (np.exp(5 * x) * (1 - np.exp(x)) * x).mean(),
}


@pytest.fixture(scope="module")
def story(one_thread):
    return tiny.trained(tiny.tiny_llama, tiny.facts, count=60, repeats=16, epochs=5)


def run(story, method, max_steps=1, **options):
    return pyunlearn.unlearn(
        story.fresh(),
        story.forget,
        tokenizer=story.tokenizer,
        holdout=story.holdout[:20],
        method=method,
        method_options=options,
        learning_rate=1e-4,
        max_steps=max_steps,
        retain_loss=None,
        progress=False,
    )


def each(story, temperature=1.0, model=None):
    """Return (T,) log-likelihoods of each text's scored tokens, from logits / temperature."""
    out = []
    for t in encode(read_examples(story.forget, role="x"), story.tokenizer, role="x", max_length=None):
        with torch.no_grad():
            logits = (model or story.model)(torch.tensor([t.ids])).logits[0, t.first - 1 : -1].double()
        values = torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(t.scored)[:, None])[:, 0]
        out.append(values.numpy())
    return out


def test_each_control_is_checked_where_it_is_offered():
    """There is a formula here for every method that has one of the controls."""
    assert set(SELECTED) <= set(HEATED) == set(FORMULAS)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("method", HEATED)
def test_temperature_divides_the_logits(story, method, temperature):
    """The first loss is the formula on the heated log-likelihoods, and not on the plain ones."""
    loss = run(story, method, temperature=temperature).history[0]["forget_loss"]
    right, plain = (np.mean([FORMULAS[method](x) for x in each(story, t)]) for t in (temperature, 1.0))
    assert loss == pytest.approx(right, rel=1e-4)
    assert abs(right - plain) > 1e-2 * abs(plain)


@pytest.mark.parametrize("share", [0.25, 0.8])
@pytest.mark.parametrize("method", SELECTED)
def test_top_fraction_selects_the_tokens_of_the_smallest_loss(story, method, share):
    """The first loss is the formula on that share of each text's tokens, rounded down, at any temperature."""
    for temperature in (1.0, 2.0):
        loss = run(story, method, top_fraction=share, temperature=temperature).history[0]["forget_loss"]
        selected = [np.sort(x)[::-1][: max(1, math.floor(share * len(x)))] for x in each(story, temperature)]
        assert loss == pytest.approx(np.mean([FORMULAS[method](x) for x in selected]), rel=1e-4)


def test_the_cap_ends_the_ascent_of_a_text_that_has_reached_it(story):
    """Above the cap there is no gradient, so the run is refused; below it there is one."""
    sums = [-x.sum() for x in each(story)]
    with pytest.raises(TrainingError, match="a cap of the method is reached from the start"):
        run(story, "hinge", max_steps=2, delta=0.9 * min(sums))
    below = run(story, "hinge", delta=1.5 * max(sums))
    assert below.history[0]["gradient_norm"] > 0
    assert below.history[0]["forget_loss"] == pytest.approx(np.mean([1.5 * max(sums) - s for s in sums]), rel=1e-4)
