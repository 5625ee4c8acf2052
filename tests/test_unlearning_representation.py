"""The layer that a method on hidden states trains: what is measured before the first step."""

import numpy as np
import pytest
import tiny
import torch

from pyunlearn.data import Tokens
from pyunlearn.methods import METHODS
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer
from pyunlearn.unlearning.representation import RepresentationTarget

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_norms_and_retained_states_are_those_of_their_texts(batch_size):
    """In the order of the texts, though texts of like length are read together; prompts do not count."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    lm = LanguageModel.of(tiny.tiny_llama(len(tokenizer)), tokenizer)
    texts = [Tokens(tuple(range(10, 10 + n)), first) for n, first in ((3, 1), (9, 4), (2, 1), (6, 2))]
    target = RepresentationTarget(
        Scorer(lm, batch_size),
        METHODS["adaptive_rmu"],
        {"layer": 0},
        texts,
        texts,
        retain_indices=[1, 3, 0],
        keeps_retain=True,
        batch_size=batch_size,
        seed=0,
    )
    states = []
    lm.module.model.layers[0].register_forward_hook(lambda *arguments: states.append(arguments[2]))
    with torch.no_grad():
        for t in texts:
            lm.module(torch.tensor([t.ids]))
    alone = [hidden[0, t.first - 1 : -1] for hidden, t in zip(states, texts, strict=True)]
    norms = [hidden.norm(dim=-1).mean().item() for hidden in alone]
    assert len({round(norm, 4) for norm in norms}) == 4
    np.testing.assert_allclose(target.norms, norms, rtol=1e-5)
    assert target.retained.keys() == {0, 1, 3}
    for i, hidden in target.retained.items():
        torch.testing.assert_close(hidden, alone[i])
