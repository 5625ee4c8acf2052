"""The reference model's numbers: read once before the first step, gathered by role, recognized by a resumed run."""

import numpy as np
import pytest
import tiny
import torch
from unlearning_runs import run, same, weights

from pyunlearn.data import encode, read_examples
from pyunlearn.errors import ModelError
from pyunlearn.methods import npo

pytestmark = pytest.mark.usefixtures("one_thread")


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
