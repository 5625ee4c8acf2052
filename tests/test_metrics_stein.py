"""Stein kernel: it agrees with autograd and with Stein's identity, and is positive."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import ksd_difficulty
from pyunlearn.metrics.stein import stein_kernel


@given(st.integers(0, 1000), st.integers(1, 4), st.floats(0.3, 5))
def test_the_kernel_is_the_stein_operator_applied_on_both_sides(seed, width, sigma):
    """kappa = k s.s' + s.grad_z' k + s'.grad_z k + trace(grad_z grad_z' k), with derivatives by autograd."""
    rng = np.random.default_rng(seed)
    z, s, y, t = rng.normal(size=(4, width))

    def k(pair):
        return torch.exp(-((pair[:width] - pair[width:]) ** 2).sum() / (2 * sigma))

    both = torch.tensor(np.concatenate([z, y]), requires_grad=True)
    (first,) = torch.autograd.grad(k(both), both)
    mixed = torch.autograd.functional.hessian(k, both)[:width, width:]
    own, other = torch.tensor(s), torch.tensor(t)
    expected = k(both) * (own @ other) + own @ first[width:] + other @ first[:width] + mixed.trace()
    assert stein_kernel([z], [s], [y], [t], bandwidth=sigma)[0, 0] == pytest.approx(expected.item(), abs=1e-9)


def test_its_mean_under_the_model_s_own_density_is_zero():
    """For a standard normal with score -z the mean is 0 (Stein's identity); for points of another density it is not."""
    rng = np.random.default_rng(0)
    z, fixed = rng.normal(size=(40_000, 2)), np.array([[0.3, -1.0]])
    own = stein_kernel(z, -z, fixed, -fixed, bandwidth=2.0)
    assert abs(own.mean()) < 4 * own.std() / 200
    shifted = stein_kernel(z + 1.5, -(z + 1.5), z[:1] + 1.5, -(z[:1] + 1.5), bandwidth=2.0)
    assert abs(shifted.mean()) > 20 * shifted.std() / 200


def test_the_kernel_matrix_is_symmetric_and_positive():
    """The matrix is symmetric with eigenvalues of at least 0, and its diagonal is ||s||^2 + p / sigma."""
    z, s = np.random.default_rng(1).normal(size=(2, 12, 3))
    matrix = stein_kernel(z, s, z, s, bandwidth=1.3)
    np.testing.assert_allclose(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > -1e-9
    np.testing.assert_allclose(np.diag(matrix), (s**2).sum(axis=1) + 3 / 1.3)


def test_difficulty_is_the_mean_over_the_corpus_in_any_chunks_and_at_any_scale(monkeypatch):
    """The default bandwidth grows with the square of the scale, so doubling hidden states and halving scores keeps the
    order."""
    rng = np.random.default_rng(3)
    z, s, y, t = (rng.normal(size=(n, 3)) for n in (7, 7, 5, 5))
    sigma = 3 * y.var(axis=0).mean()
    result = ksd_difficulty(z, s, y, t)
    np.testing.assert_allclose(result, stein_kernel(z, s, y, t, bandwidth=sigma).mean(axis=1))
    np.testing.assert_allclose(ksd_difficulty(2 * z, s / 2, 2 * y, t / 2), result / 4)


def test_what_lies_among_the_corpus_is_supported_and_what_lies_apart_is_not():
    """With one score for all points, a near point is supported and a far one is not."""
    rng = np.random.default_rng(4)
    corpus, ones = rng.normal(size=(50, 2)), np.ones((50, 2))
    result = ksd_difficulty([[0.0, 0.0], [30.0, 0.0]], np.ones((2, 2)), corpus, ones)
    assert result[0] > result[1]
    assert result[1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: stein_kernel(o, o[:1], o, o, bandwidth=1), "one shape"),
        (lambda o: stein_kernel(o, o, o[:, :1], o[:, :1], bandwidth=1), "one width"),
        (lambda o: stein_kernel(o, o, o, o, bandwidth=0), "above 0"),
        (lambda o: ksd_difficulty(o, o, o, o), "above 0"),
    ],
)
def test_shapes_and_bandwidths_that_do_not_fit_are_refused(call, message):
    """Different shapes are refused, and a corpus of one point, which has no variance to take a bandwidth from."""
    with pytest.raises(ArgumentError, match=message):
        call(np.ones((2, 3)))
