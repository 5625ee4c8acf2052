"""Models and scores for scope="person": facts that a model knows in other words, and texts in several forms."""

import numpy as np
import tiny
import torch
from test_attacks_paraphrases import rewrites

from pyunlearn.metrics import generalized_exposure

FORMS = ["", "question", "statement", "turned", "cloze"]


def knows_other_words():
    """A Llama that knows eight answers after key words of their questions, and never read the questions themselves."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer(form="$A", pad=False)
    model = tiny.tiny_llama(len(tokenizer))
    forget, retain, holdout = tiny.facts(8, 3), tiny.distinct_facts(420, 2), tiny.facts(60, 6)
    keys = rewrites(forget, "question", [*holdout, *retain])
    known = [{"prompt": e.messages[0].content + "\n", "completion": e.completion} for e in keys]
    others = [fact | {"question": forget[i % 8]["question"]} for i, fact in enumerate(tiny.facts(320, 4))]
    tiny.train(model, tokenizer, retain + known * 30 + others, epochs=6)
    return tiny.Tiny(model, tokenizer, forget, tiny.facts(8, 14), retain[:60], holdout, retain)


def scores(rng, count, rho, forms=5):
    """(count * forms,) scores of texts in several forms, which depend on each other by rho, low = likely."""
    own, each = rng.normal(size=(count, 1)), rng.normal(size=(count, forms))
    return (np.sqrt(rho) * own + np.sqrt(1 - rho) * each + np.arange(forms)).ravel()


def numbers(count, forms=5):
    """(count * forms,) the number of the form of each of these scores."""
    return np.tile(np.arange(forms), count)


def exposures(rng, n, m, rho, known=0, forms=5):
    """(n * forms,) bits of unseen texts in several forms, which depend on each other, and the numbers of the forms.

    Of the first `known` texts each form is 4 standard deviations too likely.
    """
    texts, unseen = scores(rng, n, rho, forms), scores(rng, m, rho, forms)
    texts[: known * forms] -= 4
    groups = numbers(n, forms), numbers(m, forms)
    return generalized_exposure(texts, unseen, groups=groups).lower, groups
