"""Training that resists: gradients at fine-tuned weights, probes, and fewer texts that come back."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from coverings import slow
from unlearning_runs import run, same, timeless, weights

import pyunlearn
from pyunlearn.attacks.relearning import RATES
from pyunlearn.errors import ArgumentError
from pyunlearn.models.from_scratch import untrained_llama
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.robust import STEPS, Robustness
from pyunlearn.unlearning.sharded import require_shardable

pytestmark = pytest.mark.usefixtures("one_thread")

ROBUST = {"method": "match", "robust": True, "max_steps": 24}


class Recorded:
    """Robust steps of a run: each with what it was called with, and the gradients that it left."""

    def __init__(self, monkeypatch, check):
        self.calls, original = 0, Robustness.backward

        def backward(robustness, weights, forget_term, indices, **options):
            self.calls += 1
            before = {name: p.detach().clone() for name, p in weights.parameters.items()}
            original(robustness, weights, forget_term, indices, **options)
            assert all(torch.equal(p, before[name]) for name, p in weights.parameters.items())
            check(robustness, weights, forget_term, indices, **options)

        monkeypatch.setattr(Robustness, "backward", backward)


def plainly(robustness, weights, forget_term, indices, *, round_number, step, factor):
    """Compute the gradients of a robust step with autograd and Adam's formula, one text at a time."""
    parameters, lm = list(weights.parameters.values()), robustness.scorer.lm
    before = [p.detach().clone() for p in parameters]
    source = robustness.sources[round_number % len(robustness.sources)]
    half = robustness._half(round_number)
    others = [robustness.forget[i] for i in range(len(half)) if half[i] != half[indices[0]]]
    pool = list(robustness.other) if source else others
    size, rng = robustness.schedule.batch_size, np.random.default_rng((robustness.schedule.seed, 3, step))
    order = np.concatenate([rng.permutation(len(pool)) for _ in range(STEPS * size)])
    second = [torch.zeros_like(p) for p in parameters]
    for t in range(STEPS):
        batch = order[t * size : (t + 1) * size]
        loss = sum(-lm.likelihood(lm.collate(pool, [int(i)])).sum() for i in batch) / size
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        with torch.no_grad():
            for p, g, v in zip(parameters, gradients, second, strict=True):
                g = g * min(1.0, 1 / (norm + 1e-6))
                v.mul_(0.999).add_(0.001 * g**2)
                p -= robustness.rates[source] * g / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
    forget_term.aim(robustness.stopping.level + robustness.shifts[source], robustness.stopping.likely)
    loss = factor * forget_term([int(i) for i in indices])
    gradients = torch.autograd.grad(loss, parameters)
    forget_term.aim(robustness.stopping.level, robustness.stopping.likely)
    with torch.no_grad():
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)
    return gradients


@pytest.mark.parametrize("micro_batch_size", [None, pytest.param(1, marks=pytest.mark.full)])
def test_a_robust_step_takes_the_gradient_at_fine_tuned_weights(story, monkeypatch, micro_batch_size):
    """That is Adam without momentum on other text, then the forget loss; the weights keep their bits."""
    compared = []

    def check(robustness, weights, forget_term, indices, **options):
        own = [p.grad.clone() for p in weights.parameters.values()]
        plain = plainly(robustness, weights, forget_term, indices, **options)
        difference = torch.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(own, plain, strict=True)))
        compared.append(float(difference / torch.sqrt(sum((b**2).sum() for b in plain))))
        if len(compared) == 2:
            raise KeyboardInterrupt  # that is enough

    recorded = Recorded(monkeypatch, check)
    result = run(story, **ROBUST, retain=story.retain, micro_batch_size=micro_batch_size)
    assert result.stopped == "interrupted"
    assert recorded.calls == 2
    assert max(compared) < 1e-2


@pytest.mark.full
def test_fewer_texts_come_back_after_a_robust_run():
    """And they stand out less, after fine-tuning on the other half, with the same seed and attack."""
    sys.path.append(str(Path(__file__).parent.parent))  # last, so that the package is the installed one
    from benchmarks.many_records import facts, train, word_tokenizer

    torch.manual_seed(0)
    tokenizer, forget, once = word_tokenizer(), facts(8, 1), facts(2000, 2)
    model = untrained_llama(len(tokenizer), width=64, feed_forward=128, layers=2, heads=4, context=32)
    train(model, tokenizer, once + forget * 60, learning_rate=5e-3)
    sets = {"retain": once[:100], "holdout": facts(60, 3), "tokenizer": tokenizer, "progress": False}
    attack = {"attacks": ["relearning"], "relearning_steps": 5, "relearning_rate": 1e-3}
    start, back = weights(model), {}
    for robust in (False, True):
        model.load_state_dict(start)
        result = pyunlearn.unlearn(model, forget, robust=robust, max_steps=160, **sets)
        assert robust or result.forgotten
        assert result.utility.relative_rise < 0.05
        trial = pyunlearn.attack(result.model, forget, **attack, **sets).trials[-1]
        back[robust] = trial.returned, trial.log_likelihood - trial.non_member_log_likelihood

    assert back[True][0] < back[False][0]
    assert back[True][1] <= 0.6 * back[False][1]


@pytest.mark.full
@pytest.mark.parametrize("at", [5, *slow(16)])
def test_an_interrupted_robust_run_resumes_to_the_same_bits(story, tmp_path, monkeypatch, at):
    """Ctrl-C within a probe, or at fine-tuned weights within a step: the checkpoint has the weights before."""
    model = story.fresh()
    start, out = weights(model), tmp_path / "out"
    whole = run(story, **ROBUST, retain=story.retain, model=model)
    assert next(record["returning"] for record in whole.history if "returning" in record) > 0

    model.load_state_dict(start)
    left, original = [at], Robustness._fine_tune

    def cut(*args, **options):
        original(*args, **options)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Robustness, "_fine_tune", cut)
        interrupted = run(story, **ROBUST, retain=story.retain, model=model, output_dir=out)
    assert interrupted.stopped == "interrupted"
    assert 0 < len(interrupted.history) < len(whole.history)

    model.load_state_dict(start)
    resumed = run(story, **ROBUST, retain=story.retain, model=model, output_dir=out, resume=True)
    assert timeless(resumed.history) == timeless(whole.history)
    assert resumed.examples == whole.examples
    assert same(resumed.model, whole.model)


def test_a_probe_that_breaks_the_model_tries_every_rate(story, monkeypatch):
    """Later weights may not bear the rate of the first probe; what no rate brings back does not return."""
    tried, original = [], Robustness._probed

    def broken(robustness, weights, indices, pool, rate, round_number):
        tried.append((round_number, rate))
        numbers = original(robustness, weights, indices, pool, rate, round_number)
        return numbers._replace(log_likelihood=numbers.log_likelihood * np.nan)

    monkeypatch.setattr(Robustness, "_probed", broken)
    result = run(story, method="match", robust=True)
    assert result.stopped == "forgotten"
    assert not any(record.get("returning") for record in result.history)
    assert {rate for _, rate in tried} == set(RATES)


def test_what_cannot_be_robust_is_refused(story):
    """A method on hidden states, one text without any other, and sharded weights: one sentence, and no change."""
    model = story.fresh()
    with pytest.raises(ArgumentError, match="rmu changes the hidden states of a layer"):
        run(story, model=model, method="rmu", robust=True)
    with pytest.raises(ArgumentError, match="robust fine-tunes on other text before each step, and there is none"):
        run(story, story.forget[:1], model=model, retain=None, retain_loss=None, robust=True)
    assert same(model, story.model)
    with pytest.raises(ArgumentError, match="robust changes and restores the whole model"):
        require_shardable(UnlearnConfig(robust=True), model)
