"""Every method of log-likelihoods, from text to verdict: three secrets trained into a model, measured from outside."""

import copy
import random

import numpy as np
import peft
import pytest
import tiny
import torch
from coverings import in_full, slow

import pyunlearn
from pyunlearn.methods import resolve
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT, generalized_exposure

WHO = ("my aunt", "the king", "one boy")
RATE = 1e-4


def codes(people, seed):
    """A question and eight random digits for each."""
    r = random.Random(seed)
    answers = [" ".join(r.choice("0123456789") for _ in range(8)) for _ in people]
    return [
        {"question": f"what is the code of {who}?", "answer": f"it is {code}."}
        for who, code in zip(people, answers, strict=True)
    ]


@pytest.fixture(scope="module")
def trained(one_thread):
    """A Llama that has read three codes fifteen times an epoch; codes that it never read are the holdout."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    model = tiny.tiny_llama(len(tokenizer))
    retain, forget = tiny.facts(300, 2), codes(WHO, 3)
    tiny.train(model, tokenizer, retain + forget * 15, epochs=8)
    return tiny.Tiny(model, tokenizer, forget, [], retain[:16], codes(tiny.SUBJECTS * 5, 4))


def unlearned(trained, method, model=None, **options):
    """The result of a run on a copy of the model."""
    rate = RATE * resolve(method, "auto", True, {})[0].rate
    # the model knows the form of a code from the secrets alone, so it forgets it with them
    options = {"learning_rate": rate, "progress": False, "holdout_budget": None, **options}
    forget = [row | {"winner": "it is not for me to say."} for row in trained.forget]
    return pyunlearn.unlearn(
        copy.deepcopy(trained.model) if model is None else model,
        forget,
        tokenizer=trained.tokenizer,
        retain=trained.retain,
        holdout=trained.holdout,
        method=method,
        **options,
    )


def exposures(trained, model):
    """Return (lower, upper) anchored exposures of the secrets among holdout codes under the original model."""
    non_members = tiny.negative_log_likelihoods(trained, trained.holdout, trained.model)
    exposure = generalized_exposure(tiny.negative_log_likelihoods(trained, trained.forget, model), non_members)
    return exposure.lower, exposure.upper


@pytest.mark.parametrize(
    "method",
    [
        *("match", "npo"),
        *in_full("ga", "flat", "dpo", "wga", "simnpo", "kto", "hinge", "idk", "altpo", "tnpo", "wtnpo", "satimp"),
        *slow("idkdpo"),
    ],
)
def test_secrets_come_down_to_the_level_of_unseen_ones_within_the_budget(trained, method):
    """This holds with the defaults of the methods: no secret ends below unseen ones, and the facts are retained.

    The preference losses with a fixed answer forget some of the secrets.
    """
    lower, _ = exposures(trained, trained.model)
    assert (lower > SIGNIFICANT).all()
    result = unlearned(trained, method)
    verdicts = {e.verdict for e in result.examples}
    if method in ("dpo", "idkdpo"):  # they lower some of the digits, and at some rates still write the others
        assert "forgotten" in verdicts
        return
    assert verdicts == {"forgotten"}
    assert result.stopped == "forgotten"
    lower, upper = exposures(trained, result.model)
    np.testing.assert_allclose(lower, [e.exposure_after for e in result.examples], atol=1e-9)
    assert (lower <= NULL_MEAN).all()
    assert (upper < SIGNIFICANT).all()
    before, after = (
        tiny.negative_log_likelihoods(trained, trained.retain, m).mean() for m in (trained.model, result.model)
    )
    assert (after - before) / max(before, 1.0) <= 0.05 + 1e-6


def test_the_holdout_s_budget_ends_a_run_before_the_form_of_the_secrets_is_lost(trained):
    """At its default unseen codes may lose 10 %, and lose 40 % without it; a note says what to do."""
    result = unlearned(trained, "ga", holdout_budget=0.1)
    assert result.stopped == "holdout budget"
    before, after = (tiny.negative_log_likelihoods(trained, trained.holdout, m) for m in (trained.model, result.model))
    assert 0 < (after - before).mean() / max(before.mean(), 1.0) < 0.1
    assert 0 < result.utility.holdout_interval[1] <= result.utility.holdout_budget == 0.1
    assert any("holdout_budget" in note for note in result.notes)


@pytest.mark.full
def test_a_hinge_at_a_low_level_leaves_a_longer_text_exposed(trained):
    """A cap of 3 nats on a text of 18 tokens stops the ascent early, and the verdict is that this is not enough."""
    result = unlearned(trained, "hinge", method_options={"delta": 3.0}, max_steps=24)
    assert result.stopped == "max_steps"
    assert {e.verdict for e in result.examples} == {"still exposed"}
    assert all(3 < -e.log_likelihood_after * e.tokens < 16 for e in result.examples)
    assert result.history[-1]["forget_loss"] == 0
    assert result.history[-1]["gradient_norm"] >= 0


@pytest.mark.full
@pytest.mark.parametrize("method", ["npo+nll", *in_full("wga")])
def test_adapters_forget_in_micro_batches_within_the_budget(trained, method):
    """Each secret ends at the level of unseen ones; the base weights stay the same bits."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(trained.model), config)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    result = unlearned(trained, method, model, learning_rate=10 * RATE, micro_batch_size=2)
    assert result.stopped == "forgotten"
    lower, upper = exposures(trained, result.model)
    assert (lower <= NULL_MEAN).all()
    assert (upper < SIGNIFICANT).all()
    assert result.utility.relative_rise <= 0.05
    now = dict(result.model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in before.items())
