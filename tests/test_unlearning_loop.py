"""The loop's limits: steps, utility budget, learning rates far too high, steps that are not finite, memory."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from coverings import grid, in_full
from heads import Allocations
from unlearning_runs import apart, check_forgotten, run, same, weights

from pyunlearn.methods import METHODS
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT
from pyunlearn.unlearning import outcome
from pyunlearn.unlearning.adam import Adam

pytestmark = pytest.mark.usefixtures("one_thread")

LEAST = ["ga", "dpo", "tnpo", "ceu", "undial+kl", "pdu", "rmu"]  # one for each way through the ops


@grid(strength=1, steps=[0, 1, 3], batch_size=[8, 1])
def test_a_run_never_takes_more_than_max_steps(story, steps, batch_size):
    """Also where the limit falls into a round."""
    result = run(story, max_steps=steps, batch_size=batch_size, learning_rate=1e-6)
    assert result.stopped == "max_steps"
    assert len(result.history) == steps
    assert [record["step"] for record in result.history] == list(range(1, steps + 1))
    assert sum(len(record["examples"]) for record in result.history) == sum(e.steps for e in result.examples)
    assert {e.verdict for e in result.examples} == {"still exposed"}
    assert not result.forgotten


@pytest.mark.parametrize("budget", [0.0, *in_full(1e-4), 0.003])
def test_a_run_never_spends_more_than_its_utility_budget(story, budget):
    """It ends with the last state within the budget, measured from outside, and reports that text is still exposed.

    The upper end of the rise's interval is within it too.
    """
    result = run(story, retain=None, utility_budget=budget, learning_rate=1e-3)
    assert result.stopped == "utility budget"
    assert "still exposed" in {e.verdict for e in result.examples}
    assert not result.forgotten
    before, after = (
        tiny.negative_log_likelihoods(story, story.holdout, model).mean() for model in (story.model, result.model)
    )
    assert (after - before) / max(before, 1.0) <= budget + 1e-6
    assert result.utility.nll_after == pytest.approx(after, rel=1e-5)
    assert result.utility.interval[1] <= budget
    rejected = [record for record in result.history if record.get("rejection_reason")]
    assert len(rejected) >= 7
    assert all(record["utility_rise_upper"] > budget for record in rejected)
    for before, after in pairwise(result.history):  # of two texts, a round is a step
        if not before["accepted"]:
            assert after["learning_rate"] == before["learning_rate"] / 2
    if all(record.get("accepted") is not True for record in result.history):
        assert same(result.model, story.model)
        assert {e.steps for e in result.examples} == {0}


@grid(strength=1, learning_rate=[0.01, 0.5], method=["ga", "npo"])
def test_a_learning_rate_far_too_high_never_over_unlearns(story, learning_rate, method):
    """Rounds that go too far are rolled back: the run ends finite, within the budget, not below unseen text."""
    result = run(story, story.forget + story.unseen, learning_rate=learning_rate, method=method)
    assert any(record.get("rejection_reason") or record["restored"] for record in result.history)
    assert "over-unlearned" not in {e.verdict for e in result.examples}
    assert all(e.upper_exposure_after < SIGNIFICANT for e in result.examples)
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    assert result.utility.interval[1] <= 0.05
    assert result.utility.holdout_interval[1] <= 0.1
    assert tiny.negative_log_likelihoods(story, apart(story.corpus), result.model).mean() == pytest.approx(
        result.utility.nll_after, rel=1e-5
    )
    assert result.stopped in ("forgotten", "utility budget")


def test_a_step_that_is_not_finite_is_rolled_back(story, monkeypatch):
    """After seven rollbacks the weights are the first ones, bit for bit, and the history is still JSON."""
    poisoned = tiny.with_loss("ga", lambda forget, lengths, **_: forget * math.nan)
    monkeypatch.setitem(METHODS, "ga", poisoned)
    for model in (story.fresh(), story.fresh().bfloat16()):
        start = weights(model)
        result = run(story, model=model)
        assert result.stopped == "not finite"
        assert {record["rejection_reason"] for record in result.history} == {"not finite"}
        assert same(result.model, start)
        assert {(e.verdict, e.steps) for e in result.examples} == {("still exposed", 0)}
        json.dumps(result.to_dict(), allow_nan=False)


def test_a_run_continues_after_one_step_that_is_not_finite(story, monkeypatch):
    """It starts from the last accepted weights, at half the learning rate."""
    calls = []

    def loss(forget, lengths, **_):
        calls.append(1)
        return forget / lengths * (math.nan if len(calls) == 4 else 1.0)  # a round: the scale, then a step

    monkeypatch.setitem(METHODS, "ga", tiny.with_loss("ga", loss))
    result = run(story)
    check_forgotten(result, story)
    assert [record["rejection_reason"] for record in result.history][:3] == [None, "not finite", None]
    assert [record["learning_rate"] for record in result.history][:3] == [3e-4, 3e-4, 1.5e-4]


def test_every_step_is_taken_at_the_learning_rate_in_its_record(story, monkeypatch):
    """Each rollback halves it for the next step, in the optimizer itself."""
    rates, step = [], Adam.step

    def recorded(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Adam, "step", recorded)
    result = run(story, learning_rate=2e-2, max_steps=4)
    assert [record["accepted"] for record in result.history[:2]] == [False, False]
    assert rates == [record["learning_rate"] for record in result.history]
    assert rates[:3] == [2e-2, 1e-2, 5e-3]


@pytest.mark.parametrize("method", [*LEAST, *in_full(*sorted({*METHODS} - {*LEAST}))])
def test_no_buffer_of_logits_is_larger_than_the_workspace(story, answers, method):
    """No flat buffer and no tensor as wide as the vocabulary is, but the head and tensors of its shape."""
    trained = answers if method == "idk" else story  # idk refuses prompts
    width, vocabulary = trained.model.get_input_embeddings().weight.shape[::-1]
    workspace = 64 << 10
    with Allocations() as used:
        winners = {"winners": story.unseen} if method in METHODS and "winners" in METHODS[method].needs else {}
        result = run(
            trained, method=method, method_options=winners, retain_loss="auto", workspace=workspace, max_steps=3
        )
    assert len(result.history) == 3
    inner = (width, 3 * width, 4 * width)  # of activations, of which a batch may have as many rows as the vocabulary
    wide = {  # the ops write logits to flat buffers
        shape: size
        for shape, size in used.shapes.items()
        if len(shape) == 1 or (vocabulary in shape and shape[-1] not in inner)
    }
    assert 8 * 12 * vocabulary * 4 > 2 * workspace  # so that the logits of a batch of 8 texts would be seen
    assert not {shape: size for shape, size in wide.items() if size > workspace}
    # the largest tensor is an activation inside a block: of GPT-2, 4 times as wide as its hidden states
    assert used.largest <= 5 * max(p.nbytes for p in trained.model.parameters())


def test_a_text_that_the_model_still_recites_ends_the_run_as_still_extracted(story, monkeypatch):
    """Likelihood and first choices are those of unseen text, and its beginning is continued with its rest."""
    monkeypatch.setattr(outcome, "recitations", lambda lm, examples, *_: np.ones(len(examples), dtype=bool))
    result = run(story)
    assert result.stopped == "still extracted"
    assert {e.verdict for e in result.examples} == {"still exposed"}
    assert all(e.exposure_after <= NULL_MEAN and e.recited_after for e in result.examples)
    assert not result.passed
