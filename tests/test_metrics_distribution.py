"""In or out of distribution: distances agree with sorting, and the split has its nominal error rate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import distribution, knn_radius, out_of_distribution


def points(n, m, seed, width=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)), rng.normal(size=(m, width))


@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 1000), st.data())
def test_knn_radius_is_the_distance_to_the_nth_nearest(n, m, seed, data):
    """The distance agrees with sorting all distances; the corpus's own rows do not count themselves."""
    x, y = points(n, m, seed)
    k = data.draw(st.integers(1, m))
    expected = [sorted(np.linalg.norm(a - b) for b in y)[k - 1] for a in x]
    np.testing.assert_allclose(knn_radius(x, y, neighbours=k), expected)
    if k < m:
        own = [sorted(np.linalg.norm(a - b) for j, b in enumerate(y) if j != i)[k - 1] for i, a in enumerate(y)]
        np.testing.assert_allclose(knn_radius(y, y, neighbours=k, among_corpus=True), own)


def test_chunks_change_nothing(monkeypatch):
    """Two rows per chunk return the same distances."""
    x, y = points(11, 5, 0)
    whole = knn_radius(x, y, neighbours=2)
    monkeypatch.setattr(distribution, "_CHUNK", 10)
    np.testing.assert_array_equal(knn_radius(x, y, neighbours=2), whole)


def test_near_vectors_of_large_norm_keep_their_distance():
    """Near vectors of norm 1e8 keep their distance, which ||a||^2 + ||b||^2 - 2 a.b would lose."""
    far = np.full((1, 4), 1e8)
    assert knn_radius(far + np.array([1e-3, 0, 0, 0]), far, neighbours=1)[0] == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("quantile", [0.8, 0.95])
@pytest.mark.parametrize("m", [19, 21, 41, 400])
def test_the_split_calls_few_of_its_own_kind_out(quantile, m):
    """At most 1 - quantile of exchangeable text counts as out for any number of held-out texts; distant text does."""
    rng = np.random.default_rng(0)
    shares = [
        out_of_distribution(rng.normal(size=400), rng.normal(size=m), quantile=quantile).mean() for _ in range(500)
    ]
    assert 0.8 * (1 - quantile) - 1 / m < np.mean(shares) < 1 - quantile + 0.008
    assert out_of_distribution([9.0, -9.0], rng.normal(size=400), quantile=quantile).tolist() == [True, False]


def test_the_split_is_strict():
    """A score equal to the quantile of held-out text counts as in."""
    assert out_of_distribution([3.0, 4.0, 4.1], [1, 2, 3, 4], quantile=0.7).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: knn_radius(np.ones((2, 3)), np.ones((4, 2))), "3 and 2"),
        (lambda: knn_radius(np.ones((2, 3)), np.ones((4, 3)), neighbours=5), "1 to 4"),
        (lambda: knn_radius(np.ones((4, 3)), np.ones((4, 3)), neighbours=4, among_corpus=True), "1 to 3"),
        (lambda: knn_radius(np.ones(3), np.ones((4, 3))), "2 dimension"),
        (lambda: out_of_distribution([1.0], np.ones(18)), "at least 19"),
        (lambda: out_of_distribution([1.0], np.ones(19), quantile=1.0), "between 0 and 1"),
        (lambda: out_of_distribution([np.nan], np.ones(20)), "finite"),
    ],
)
def test_what_has_no_answer_is_refused(call, message):
    """Different widths, a rank beyond the corpus and too little held-out text are refused."""
    with pytest.raises(ArgumentError, match=message):
        call()
