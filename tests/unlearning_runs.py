"""Runs of pyunlearn.unlearn on the models of tiny.py, and comparisons of their weights and histories."""

import torch

import pyunlearn
from pyunlearn.methods import METHODS
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT
from pyunlearn.unlearning.optimizer import TrainedWeights


def run(trained, forget=None, *, model=None, **options):
    """Unlearn on a copy of the trained model, by default with its holdout and all text that it has to retain.

    A fifth of the retain texts is set apart, and the interval of 40 texts is narrow enough for the budgets.
    """
    options = {
        "method": "ga",
        "retain": trained.corpus,
        "holdout": trained.holdout,
        "learning_rate": 3e-4,
        "progress": False,
        **options,
    }
    model = trained.fresh() if model is None else model
    return pyunlearn.unlearn(
        model, trained.forget if forget is None else forget, tokenizer=trained.tokenizer, **options
    )


def apart(retain):
    """Return the texts of a short retain set that are set apart for the utility budget: every fifth."""
    return retain[::5]


def weights(model):
    """Return a copy of a model's state dict."""
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same(a, b):
    """Return whether two models or state dicts are equal bit for bit; NaN equals NaN."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name].nan_to_num(7.5), b[name].nan_to_num(7.5)) for name in a)


def timeless(history):
    """Return a history without the seconds that its steps took."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


def check_forgotten(result, trained, *, memorized=2):
    """Check that the first examples are forgotten, the others untouched, and utility within its budget."""
    assert result.stopped == "forgotten"
    assert result.forgotten
    for e in result.examples[:memorized]:
        assert e.verdict == "forgotten"
        assert e.forgotten
        assert e.exposure_before > SIGNIFICANT
        assert e.exposure_after <= NULL_MEAN
        assert e.upper_exposure_after < SIGNIFICANT
        assert e.log_likelihood_after < e.log_likelihood_before
        assert e.greedy_match_after < e.greedy_match_before
        assert e.steps > 0
    for e in result.examples[memorized:]:
        assert e.verdict == "not memorized"
        assert not e.forgotten
        assert e.exposure_before < SIGNIFICANT
        assert e.upper_exposure_after < SIGNIFICANT
        assert e.steps == 0
    assert result.utility.relative_rise <= result.utility.interval[1] <= result.utility.budget == 0.05
    if result.utility.holdout_budget is not None:
        assert result.utility.holdout_rise <= result.utility.holdout_interval[1] <= result.utility.holdout_budget == 0.1


class Interrupted:
    """The loss of a method, which raises KeyboardInterrupt at its call number `at` as Ctrl-C does."""

    def __init__(self, method, at):
        self.loss, self.left = METHODS[method].function, at

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.loss(*args, **options)


def recorded_gradients(monkeypatch):
    """Return a dict that holds the gradients of a run's last step, by name: a run leaves none in the model."""
    gradients, original = {}, TrainedWeights.mask_gradients

    def record(self):
        original(self)
        gradients.clear()
        gradients.update((name, p.grad.clone()) for name, p in self.parameters.items() if p.grad is not None)

    monkeypatch.setattr(TrainedWeights, "mask_gradients", record)
    return gradients
