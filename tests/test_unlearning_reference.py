"""The reference model's numbers: read once before the first step, gathered by role, recognized by a resumed run."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from unlearning_runs import run, same, weights

from pyunlearn.data import Tokens, encode, read_examples
from pyunlearn.errors import ModelError
from pyunlearn.methods import METHODS, npo
from pyunlearn.unlearning.reference import Reference

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = {"forget": [Tokens((0, 1, 2), 1), Tokens((0, 3), 1)], "winner": [Tokens((0, 5), 1), Tokens((0, 6, 7), 1)]}


class IdScorer:
    """Gives each token minus its id, under the likelihood that is passed."""

    def __init__(self):
        self.likelihoods = []

    def token_log_likelihood(self, tokens, likelihood):
        self.likelihoods.append(likelihood)
        return [-np.array(t.scored, dtype=float) for t in tokens]


def read(method, weights=None):
    """Return the numbers that a reference model gives the texts of a method."""
    reference, scorer = Reference(), IdScorer()
    reference.read_log_likelihoods(scorer, "the reference model", METHODS[method], TEXTS, weights)
    assert set(scorer.likelihoods) == {"the reference model"}
    return reference


def values(reference):
    """Return its log-likelihoods as lists."""
    return {role: [x.tolist() for x in each] for role, each in reference.log_likelihood.items()}


def test_a_method_on_whole_texts_reads_sums_and_one_on_tokens_each_of_them():
    """It scores those texts alone that the method reads."""
    assert values(read("npo")) == {"forget": [[-3.0], [-3.0]]}
    assert values(read("tnpo")) == {"forget": [[-1.0, -2.0], [-3.0]]}
    assert values(read("dpo")) == {"winner": [[-5.0], [-13.0]], "forget": [[-3.0], [-3.0]]}


def test_sums_are_weighted_for_the_forget_text_alone():
    """The values of single tokens are not: there the loss has the weights."""
    weights = [np.array([2.0, 0.5]), np.array([3.0])]
    assert values(read("dpo", weights)) == {"winner": [[-5.0], [-13.0]], "forget": [[-3.0], [-9.0]]}
    assert values(read("tnpo", weights)) == {"forget": [[-1.0, -2.0], [-3.0]]}


def test_numbers_are_gathered_text_by_text():
    """Their order is that of the (role, index) pairs, repeats included; None where a method needs no reference."""
    reference = read("dpo")
    assert reference.gather([("winner", 1), ("forget", 0), ("winner", 0), ("winner", 1)]).tolist() == [-13, -3, -5, -13]
    assert read("tnpo").gather([("forget", 1), ("forget", 0)]).tolist() == [-3.0, -1.0, -2.0]
    assert Reference().gather([("forget", 0)]) is None


def test_the_fingerprint_has_a_number_for_each_text():
    """Sums of log-likelihoods by role; of cached states their magnitudes, of the forget set before the retain set."""
    scores = read("tnpo").fingerprint(2, [0])
    assert {name: x.tolist() for name, x in scores.items()} == {"forgets": [-3.0, -3.0]}
    assert Reference().fingerprint(2, [0]) == {}
    forget, retain = (
        SimpleNamespace(states=torch.ones(1), magnitudes=lambda indices, name=name: (name, list(indices)))
        for name in ("forget", "retain")
    )
    reference = Reference()
    reference.retain = retain
    assert reference.fingerprint(3, [4, 1]) == {"reference_model": ("retain", [4, 1])}
    reference.forget = forget
    assert reference.fingerprint(3, [4, 1]) == {"reference_model": ("forget", [0, 1, 2])}
    empty = Reference()
    empty.retain = SimpleNamespace(states=None)  # of a run of no steps
    assert empty.fingerprint(3, [4, 1]) == {}


# ---------------------------------------------------------------- in a run


def test_npo_compares_with_the_reference_model(story):
    """The default is the model as it came; a reference model is not changed, and must have the same vocabulary."""
    default, explicit = run(story, method="npo"), run(story, method="npo", reference_model=story.fresh())
    assert same(default.model, explicit.model)
    torch.manual_seed(1)
    other = tiny.tiny_llama(len(story.tokenizer))
    start = weights(other)
    result = run(story, method="npo", method_options={"beta": 0.3}, reference_model=other, max_steps=1)
    assert same(other, start)
    tokens = encode(read_examples(story.forget, role="x"), story.tokenizer, role="x", max_length=None)
    lengths = np.array([len(t.scored) for t in tokens])
    sums = [
        torch.tensor(-tiny.negative_log_likelihoods(story, story.forget, m) * lengths) for m in (story.model, other)
    ]
    assert result.history[0]["forget_loss"] == pytest.approx(npo(*sums, beta=0.3).item(), rel=1e-4)
    with pytest.raises(ModelError, match="another vocabulary"):
        run(story, method="npo", reference_model=tiny.tiny_llama(77))
