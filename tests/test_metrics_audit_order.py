"""Order of an audit: the regression agrees with its formula, and finds exposed examples earlier than chance."""

import random
import zlib

import numpy as np
import pytest
import tiny
import torch

from pyunlearn.data import collate, encode, read_examples
from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import audit_within, extraction_strength
from pyunlearn.metrics.audit_order import audit_order
from pyunlearn.models import Likelihood


def half_unlearned(seed, count=96):
    """Train a model on facts, some of them often, and unlearn by gradient ascent until three in ten can be extracted.

    Returns each fact's extraction strength, and its cheap features: NLL now, NLL before, zlib ratio, length.
    """
    r = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer, rows = tiny.make_tokenizer(), tiny.facts(count, 100 + seed)
    model = tiny.tiny_llama(len(tokenizer))
    tiny.train(model, tokenizer, [row for row in rows for _ in range(r.choice([1, 1, 2, 4, 8]))], epochs=14)
    tokens = encode(read_examples(rows, role="forget"), tokenizer, role="forget", max_length=None)
    whole, likelihood = collate(tokens, pad_id=2), Likelihood(model)

    def look():
        result, sizes = likelihood.statistics(whole), [len(t.scored) for t in tokens]
        strength = [extraction_strength(part.numpy()) for part in (result.rank == 0).split(sizes)]
        return np.array(strength), np.array([-part.mean().item() for part in result.log_likelihood.split(sizes)])

    _, before = look()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    for step in range(60):
        if step % 2 == 0 and (look()[0] >= 0.5).mean() <= 0.3:
            break
        batch = collate([tokens[i] for i in r.sample(range(count), 16)], pad_id=2)
        optimizer.zero_grad()
        likelihood(batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    strength, now = look()
    texts = [row["question"] + row["answer"] for row in rows]
    ratio = [len(zlib.compress(text.encode())) / len(text.encode()) for text in texts]
    return strength, np.column_stack([now, before, ratio, [len(t.scored) for t in tokens]])


def found_curve(exposed, order):
    """Count the exposed examples among the first 0, 1, 2, ... of an order, (k + 1,)."""
    return np.concatenate([[0], np.cumsum(np.asarray(exposed)[order])])


def area(exposed, order):
    """Compute the mean of found_curve as a share of the best order's."""
    best = np.minimum(np.arange(1, len(exposed) + 1), exposed.sum())
    return found_curve(exposed, order)[1:].mean() / best.mean()


@pytest.mark.slow
@pytest.mark.full
def test_it_finds_more_than_chance_in_a_model_that_was_partly_unlearned():
    """Each of three runs is well above chance (0.55; the best order is 1), and a quarter of the audits finds half of
    the exposed."""
    result, early = [], []
    for seed in range(3):
        strength, features = half_unlearned(seed)
        exposed = strength >= 0.5
        audited = audit_within(lambda indices, s=strength: s[indices], features, len(strength))
        rng = np.random.default_rng(seed)
        chance = np.mean([area(exposed, rng.permutation(len(exposed))) for _ in range(200)])
        result.append(area(exposed, audited.indices))
        early.append(found_curve(exposed, audited.indices)[len(exposed) // 4] / exposed.sum())
        assert result[-1] > chance + 0.1
    assert np.mean(result) > 0.75
    assert np.mean(early) > 0.5


def test_it_learns_what_the_prior_has_wrong():
    """The regression outruns an order by NLL where the third feature decides and the NLL does not."""
    areas = []
    for seed in range(5):
        features = np.random.default_rng(seed).normal(size=(200, 4))
        values = features[:, 2] + 0.3 * np.random.default_rng(seed + 50).normal(size=200)
        exposed = values > np.quantile(values, 0.8)
        audited = audit_within(lambda indices, v=values: v[indices], features, 200)
        areas.append((area(exposed, audited.indices), area(exposed, np.argsort(features[:, 0]))))
    learned, prior = np.mean(areas, axis=0)
    assert learned > 0.85
    assert prior < 0.65


def test_it_is_ridge_regression_about_its_prior():
    """The order agrees with a numerical minimiser of the loss."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    features, audited = rng.normal(size=(30, 3)) * [1, 10, 0.1] + 5, [3, 7, 11, 20, 28]
    values = rng.normal(size=5)
    z = (features - features.mean(0)) / features.std(0)
    x, v, prior = z[audited] - z[audited].mean(0), values - values.mean(), np.array([-values.std(), 0, 0])

    def loss(w):
        return ((v - x @ w) ** 2).sum() + 2.5 * ((w - prior) ** 2).sum()

    w = minimize(loss, np.zeros(3), tol=1e-12).x
    rest = [i for i in range(30) if i not in audited]
    expected = sorted(rest, key=lambda i: -(z[i] @ w))
    assert audit_order(features, audited, values, ridge=2.5).tolist() == expected


def test_before_any_audit_the_most_likely_text_comes_first():
    """The prior decides also while all measured values are equal; a constant feature does no harm."""
    features = np.column_stack([[3.0, 1.0, 2.0, 1.0], np.full(4, 7.0)])
    assert audit_order(features, [], []).tolist() == [1, 3, 2, 0]
    assert audit_order(features, [3], [0.5]).tolist() == [1, 2, 0]


def test_the_units_of_the_features_do_not_matter():
    """Shifting and scaling the features does not change the order."""
    rng = np.random.default_rng(1)
    features, values = rng.normal(size=(20, 3)), rng.normal(size=6)
    order = audit_order(features, range(6), values).tolist()
    assert audit_order(features * [100, 0.01, 7] + [5, 0, -3], range(6), values).tolist() == order


@pytest.mark.parametrize(("budget", "batch", "calls"), [(10, 4, [4, 4, 2]), (99, 8, [8, 4]), (1, 8, [1])])
def test_a_budget_is_spent_and_nothing_is_audited_twice(budget, batch, calls):
    """Batches add up to the budget; a budget beyond the set audits the whole set."""
    sizes = []

    def measure(indices):
        sizes.append(len(indices))
        return np.sin(indices)

    result = audit_within(measure, np.random.default_rng(2).normal(size=(12, 2)), budget, batch=batch)
    assert sizes == calls
    assert len(set(result.indices.tolist())) == len(result.indices) == min(budget, 12)
    np.testing.assert_allclose(result.values, np.sin(result.indices))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: audit_order(x, [0, 0], [1.0, 2.0]), "different indices from 0 to 4"),
        (lambda x: audit_order(x, [5], [1.0]), "different indices from 0 to 4"),
        (lambda x: audit_order(x, [1], [1.0, 2.0]), "1 and 2"),
        (lambda x: audit_order(x, [1], [np.nan]), "finite"),
        (lambda x: audit_order(x, [1], [1.0], ridge=0), "above 0"),
        (lambda x: audit_within(lambda p: [1.0], x, 0), "budget must be 1 or more, got 0"),
        (lambda x: audit_within(lambda p: [1.0], x, 3), "3 and 1"),
    ],
)
def test_indices_and_values_that_do_not_fit_are_refused(call, message):
    """A short result would silently shift every value to another example."""
    with pytest.raises(ArgumentError, match=message):
        call(np.arange(10.0).reshape(5, 2))
