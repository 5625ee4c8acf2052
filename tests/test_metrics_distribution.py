"""In or out of distribution: distances by hand, a bound against the exact Gaussian process, and the split's error rate."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import density_bound, distribution, knn_radius, out_of_distribution, zlib_ratio


def points(n, m, seed, width=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)), rng.normal(size=(m, width))


@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 1000), st.data())
def test_knn_radius_is_the_distance_to_the_nth_nearest(n, m, seed, data):
    """Sorted by hand, whatever the chunks; of the corpus's own rows, without themselves."""
    x, y = points(n, m, seed)
    k = data.draw(st.integers(1, m))
    expected = [sorted(np.linalg.norm(a - b) for b in y)[k - 1] for a in x]
    np.testing.assert_allclose(knn_radius(x, y, neighbours=k), expected)
    if k < m:
        own = [sorted(np.linalg.norm(a - b) for j, b in enumerate(y) if j != i)[k - 1] for i, a in enumerate(y)]
        np.testing.assert_allclose(knn_radius(y, y, neighbours=k, among_corpus=True), own)


def test_chunks_change_nothing(monkeypatch):
    """Two rows at a time."""
    x, y = points(11, 5, 0)
    whole = knn_radius(x, y, neighbours=2), density_bound(x, y, radius=1, length_scale=1)
    monkeypatch.setattr(distribution, "_CHUNK", 10)
    np.testing.assert_array_equal(knn_radius(x, y, neighbours=2), whole[0])
    np.testing.assert_array_equal(density_bound(x, y, radius=1, length_scale=1), whole[1])


def test_near_vectors_of_large_norm_keep_their_distance():
    """From ||a||^2 + ||b||^2 - 2 a.b nothing would be left of it."""
    far = np.full((1, 4), 1e8)
    assert knn_radius(far + np.array([1e-3, 0, 0, 0]), far, neighbours=1)[0] == pytest.approx(1e-3, rel=1e-4)


@given(st.integers(0, 3000), st.floats(0.2, 3), st.floats(0.3, 3), st.floats(0.05, 2))
def test_density_bounds_the_posterior_variance(seed, radius, length_scale, noise):
    """Of the exact Gaussian process with that kernel, noise and corpus; and lies in 0 to 1."""
    x, y = points(5, 12, seed)
    kernel = lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * length_scale**2))  # noqa: E731
    k = kernel(x, y)
    variance = 1 - (k * np.linalg.solve(kernel(y, y) + noise**2 * np.eye(12), k.T).T).sum(axis=1)
    bound = density_bound(x, y, radius=radius, length_scale=length_scale, noise=noise)
    assert (variance <= bound + 1e-9).all()
    assert ((bound >= 0) & (bound <= 1)).all()


def test_the_density_bound_is_its_formula_and_1_where_nobody_is_near():
    """Two neighbours, and none."""
    corpus = np.array([[0.0], [0.5], [9.0]])
    found = density_bound([[0.2], [5.0]], corpus, radius=0.4, length_scale=2, noise=0.3)
    assert found[0] == pytest.approx(1 - np.exp(-(0.4**2) / 8) ** 2 / (1 + 0.09 / 2))
    assert found[1] == 1


def test_zlib_ratio_tells_random_from_repetitive():
    """Bytes of UTF-8, so that an accent counts as what it is."""
    rng = np.random.default_rng(0)
    noise = "".join(chr(c) for c in rng.integers(33, 126, 400))
    dense, prose, loop = zlib_ratio([noise, "the king hides a lamp and a dog sees the sea. " * 3, "na " * 200])
    assert loop < prose < dense
    assert loop < 0.1
    assert zlib_ratio(["é" * 30])[0] == pytest.approx(len(zlib.compress(("é" * 30).encode())) / 60)
    assert zlib_ratio(["hi"])[0] > 1
    with pytest.raises(ArgumentError, match="none of them empty"):
        zlib_ratio(["a", ""])


@pytest.mark.parametrize("quantile", [0.8, 0.95])
def test_the_split_calls_few_of_its_own_kind_out(quantile):
    """At most 1 - quantile of exchangeable text, within what 20 splits of 400 can tell; and all of what is far away."""
    rng = np.random.default_rng(0)
    shares = [
        out_of_distribution(rng.normal(size=400), rng.normal(size=400), quantile=quantile).mean() for _ in range(20)
    ]
    assert np.mean(shares) == pytest.approx(1 - quantile, abs=0.02)
    assert out_of_distribution([9.0, -9.0], rng.normal(size=400), quantile=quantile).tolist() == [True, False]


def test_the_split_is_strict():
    """What lies exactly where held-out text does is in."""
    assert out_of_distribution([3.0, 4.0, 4.1], [1, 2, 3, 4], quantile=0.7).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: knn_radius(np.ones((2, 3)), np.ones((4, 2))), "3 and 2"),
        (lambda: knn_radius(np.ones((2, 3)), np.ones((4, 3)), neighbours=5), "1 to 4"),
        (lambda: knn_radius(np.ones((4, 3)), np.ones((4, 3)), neighbours=4, among_corpus=True), "1 to 3"),
        (lambda: knn_radius(np.ones(3), np.ones((4, 3))), "2 dimension"),
        (lambda: density_bound(np.ones((2, 3)), np.ones((4, 3)), radius=0, length_scale=1), "above 0"),
        (lambda: out_of_distribution([1.0], np.ones(19)), "at least 20"),
        (lambda: out_of_distribution([1.0], np.ones(19), quantile=1.0), "between 0 and 1"),
        (lambda: out_of_distribution([np.nan], np.ones(20)), "finite"),
    ],
)
def test_what_has_no_answer_is_refused(call, message):
    """Widths, ranks beyond the corpus, too little held-out text."""
    with pytest.raises(ArgumentError, match=message):
        call()
