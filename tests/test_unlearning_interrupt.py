"""Ctrl-C takes effect at step boundaries, where weights, optimizer and history agree."""

import os
import signal
import time

import pytest
import tiny
from coverings import in_full
from unlearning_runs import Interrupted, run, same, timeless, weights

from pyunlearn.methods import METHODS
from pyunlearn.unlearning.adam import Adam
from pyunlearn.unlearning.interrupt import DeferredInterrupt
from pyunlearn.unlearning.optimizer import TrainedWeights
from pyunlearn.unlearning.stopping import StoppingRule

pytestmark = pytest.mark.usefixtures("one_thread")


OPTIONS = {"max_steps": 6, "batch_size": 1, "learning_rate": 2e-4}


@pytest.fixture(scope="module")
def whole(story):
    """The run that no signal interrupts."""
    return run(story, **OPTIONS)


@pytest.mark.parametrize("within", ["step", *in_full("accept", "measure")])
def test_a_signal_waits_until_the_step_is_complete(story, whole, tmp_path, monkeypatch, within):
    """Sent while weights are copied, scored or updated, it leaves a state that resumes to the same numbers."""
    model = story.fresh()
    start = weights(model)
    owner, name = {
        "accept": (TrainedWeights, "_copy_moments"),
        "measure": (StoppingRule, "rejection_reason"),
        "step": (Adam, "step"),
    }[within]
    original, calls = getattr(owner, name), []

    def interrupted(self, *args, **kwargs):
        calls.append(name)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the handler runs here
        return original(self, *args, **kwargs)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        cut_short = run(story, **OPTIONS, model=model, output_dir=tmp_path / "out")
    assert cut_short.stopped == "interrupted"
    assert signal.getsignal(signal.SIGINT) is handler
    model.load_state_dict(start)
    resumed = run(story, **OPTIONS, model=model, output_dir=tmp_path / "out", resume=True)
    assert timeless(resumed.history) == timeless(whole.history)
    assert same(resumed.model, whole.model)


def test_a_second_signal_interrupts_at_once():
    """It raises KeyboardInterrupt in the handler."""
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt() as interrupt:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert interrupt.pending
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        pytest.fail("the second signal did not raise")


def test_an_interrupted_run_leaves_the_last_accepted_weights_in_the_model(story, tmp_path, monkeypatch):
    """The steps since the last evaluation are rolled back, and their counts with them."""
    cut = tiny.with_loss("ga", Interrupted("ga", 1))
    monkeypatch.setitem(METHODS, "ga", cut)
    cut_short = run(story, batch_size=1, output_dir=tmp_path / "out")
    assert cut_short.stopped == "interrupted"
    assert cut_short.history == []
    assert [e.steps for e in cut_short.examples] == [0, 0]
    assert same(cut_short.model, story.model)


def test_the_numbers_of_an_interrupted_run_are_those_of_its_weights(story, monkeypatch):
    """Also where Ctrl-C comes twice between the scores of a round and its weights: both count, or neither."""
    original = StoppingRule.accept

    def accept(*arguments):
        taken = original(*arguments)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the handler runs here
        return taken

    monkeypatch.setattr(StoppingRule, "accept", accept)
    result = run(story, **OPTIONS)
    assert result.stopped == "interrupted"
    after = [-e.log_likelihood_after for e in result.examples]
    assert after == pytest.approx(tiny.negative_log_likelihoods(story, story.forget, result.model), rel=1e-5)
