"""Examples for a prompt, and exact deletions: the state is as if the deleted example had never existed."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError
from pyunlearn.unlearning.in_context import InContextSelection, break_even_inferences, holistic_cost, retrain_bound


def blobs(n, d, k, seed, spread=0.08):
    """Draw n points around k centres in the unit cube."""
    r = np.random.default_rng(seed)
    return r.random((k, d))[r.integers(k, size=n)] + spread * r.standard_normal((n, d))


def everything(selection):
    """Return a selection's whole state by id: choices, centroids, sums, sizes, clusters, seeds."""
    present = selection._present
    return (
        selection.chosen,
        selection._centroids.tolist(),
        selection._sums.tolist(),
        selection._sizes.tolist(),
        dict(zip(selection._ids[present].tolist(), selection._members[:, present].T.tolist(), strict=True)),
        sorted(int(selection._ids[row]) for row in selection._seeds),
    )


def fresh(x, gone, k, **options):
    """Cluster the examples from the start, without those in `gone`."""
    ids = [i for i in range(len(x)) if i not in gone]
    return InContextSelection(x[ids], k, ids=ids, **options)


@pytest.mark.parametrize(
    "options",
    [{"epsilon": 0.1}, {"epsilon": 0.5, "gamma": 0.9}, {"epsilon": 0.02, "gamma": 0.0, "iterations": 3}],
)
def test_every_deletion_is_exact(options):
    """After deleting each example in turn, the state is bit for bit that of a clustering without it, same seed."""
    x, kinds = blobs(60, 3, 4, 0), set()
    start = InContextSelection(x, 4, seed=5, **options)
    for i in range(60):
        selection = copy.deepcopy(start)
        kinds.add(selection.delete(i).reason)
        assert everything(selection) == everything(fresh(x, {i}, 4, seed=5, **options))
        assert len(selection) == 59
    assert kinds == {None, "seed", "centroid"}


@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([0.02, 0.1, 1.0]), st.sampled_from([0.0, 0.2, 1.0]))
def test_deletions_in_a_row_are_exact(seed, k, epsilon, gamma):
    """On random data, also with equal examples and clusters that end empty, and down to the last k."""
    r = np.random.default_rng(seed)
    x = blobs(24, 2, 3, seed)
    x[r.integers(24, size=6)] = x[0]
    options = {"epsilon": epsilon, "gamma": gamma, "iterations": 4, "seed": seed}
    selection, gone = InContextSelection(x, k, **options), set()
    for i in r.permutation(24)[: 24 - k]:
        selection.delete(i)
        gone.add(int(i))
        assert everything(selection) == everything(fresh(x, gone, k, **options))
    assert not gone & set(selection.chosen)


def test_few_deletions_recluster_and_no_more_than_the_bound():
    """With n large against d / epsilon nearly all deletions are certified; over seeds, at most the bound recluster."""
    x = blobs(4000, 2, 4, 1)
    options = {"epsilon": 0.5, "iterations": 3}
    bound = retrain_bound(4000, 2, 4, spread=float(np.ptp(x, axis=0).max()), **options)
    again = 0
    for seed in range(20):
        selection = InContextSelection(x, 4, seed=seed, **options)
        tried = np.random.default_rng(seed).choice(4000, 50, replace=False).tolist()
        again += sum(selection._moved_without(i) or i in selection._seeds for i in tried)
    assert 0 < bound < 0.6
    assert again / 1000 < bound
    assert again < 30


def test_a_deletion_s_work_does_not_grow_with_the_examples(monkeypatch):
    """A certified deletion reads no other example: their embeddings are overwritten here."""
    x = blobs(500, 2, 3, 2)
    selection = InContextSelection(x, 3, epsilon=0.5, iterations=3, seed=1)
    monkeypatch.setattr(InContextSelection, "_cluster", None)
    quiet = next(i for i in range(500) if i not in selection._seeds and not selection._moved_without(i))
    steps, selection._steps = selection._steps, np.full_like(selection._steps, -(2**40))
    selection._steps[quiet] = steps[quiet]
    assert selection.delete(quiet) == (False, None)
    selection._steps = steps
    clustering = type("Clustering", (InContextSelection,), {"_cluster": CLUSTER})
    ids = np.delete(np.arange(500), quiet)
    assert everything(selection) == everything(clustering(x[ids], 3, epsilon=0.5, iterations=3, seed=1, ids=ids))


CLUSTER = InContextSelection._cluster


def test_the_choice_represents_the_data():
    """One example of each well-separated group is chosen, nearest to its mean up to quantization, with any seed."""
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    x = np.repeat(centres, 25, 0) + 0.1 * np.random.default_rng(0).standard_normal((100, 2))
    for seed in range(5):
        chosen = InContextSelection(x, 4, epsilon=0.01, seed=seed).chosen
        assert sorted(i // 25 for i in chosen) == [0, 1, 2, 3]
        middle = x.reshape(4, 25, 2).mean(1)
        for i in chosen:
            mine = np.linalg.norm(x[i // 25 * 25 :][:25] - middle[i // 25], axis=1)
            assert np.linalg.norm(x[i] - middle[i // 25]) <= mine.min() + 2 * 0.01


@pytest.mark.full
def test_the_seeds_are_those_of_k_means_plus_plus():
    """The first seed is uniform, the second has probability proportional to its squared distance from the first."""
    x = np.array([[0.0], [1.0], [3.0]])
    pairs = np.zeros((3, 3))
    for seed in range(1500):
        first, second = InContextSelection(x, 2, epsilon=0.1, iterations=1, seed=seed)._seed_rows(x, np.arange(3))
        pairs[first, second] += 1 / 1500
    wanted = np.array([[0, 1, 9], [1, 0, 4], [9, 4, 0]]) / np.array([[10], [5], [13]]) / 3
    np.testing.assert_allclose(pairs, wanted, atol=4 * np.sqrt(0.25 / 1500))


def test_a_quantized_centroid_is_no_further_than_half_a_cell_and_uniform_present():
    """Q(m) - m is uniform on [-epsilon / 2, epsilon / 2]: a border separates points with rate distance / epsilon."""
    selection = InContextSelection(np.zeros((2, 2000)), 1, epsilon=0.4, iterations=1)
    sums = np.full((1, 2000), int(0.3 * 2**36))
    off = selection._quantized(0, sums, np.array([1]), np.zeros((1, 2000)), 1)[0] - 0.3
    assert np.abs(off).max() <= 0.2 + 1e-9
    assert np.histogram(off, 4, (-0.2, 0.2))[0] == pytest.approx(500, abs=100)
    near = selection._quantized(0, sums + int(0.1 * 2**36), np.array([1]), np.zeros((1, 2000)), 1)[0] - 0.3
    assert (np.abs(near - off) > 1e-9).mean() == pytest.approx(0.25, abs=0.05)


def test_costs_break_even_where_they_are_equal():
    """At the break-even number both ways cost the same; a way that always or never wins gives infinity or 0."""
    q = break_even_inferences(10, 3, 1000, 2)
    assert q == 990
    assert holistic_cost(10, 3, q) == holistic_cost(1000, 2, q)
    assert holistic_cost(10, 3, q - 1) < holistic_cost(1000, 2, q - 1)
    assert break_even_inferences(1, 1, 5, 1) == float("inf")
    assert break_even_inferences(5, 2, 1, 1) == 0
    with pytest.raises(ArgumentError, match="swap the two"):
        break_even_inferences(5, 1, 1, 2)
    with pytest.raises(ArgumentError, match="0 or more"):
        holistic_cost(-1, 1, 1)


NO_NUMBERS = [True, "3", [3], np.inf, np.nan, -1, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": [1.0, 2.0]}, "embeddings must be"),
        ({"embeddings": "text"}, "embeddings must be"),
        ({"embeddings": [[0.0], [1.0, 2.0]]}, "embeddings must be"),
        ({"embeddings": None}, "embeddings must be"),
        ({"embeddings": [[np.nan]]}, "finite"),
        ({"embeddings": [[1e9]]}, "scale them down"),
        ({"k": 4}, "k must be a whole number from 1 to 3"),
        *(({"k": value}, "k must be a whole number") for value in (*NO_NUMBERS, 0, 1.5)),
        *(({"epsilon": value}, "epsilon must be a number, above 0") for value in (*NO_NUMBERS, 0)),
        *(({"gamma": value}, "gamma must be a number, 0 or more and at most 1") for value in (*NO_NUMBERS, 2)),
        *(({"iterations": value}, "iterations must be a whole number") for value in (*NO_NUMBERS, 0, 1.5)),
        *(({"seed": value}, "seed must be a whole number") for value in (*NO_NUMBERS, 1.5)),
        *(({"ids": value}, "ids must be a different whole number") for value in ([1, 1, 2], [0.5, 1, 2], 3, "abc")),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(options, message):
    """One sentence, that names the argument."""
    with pytest.raises(ArgumentError, match=message):
        InContextSelection(**{"embeddings": [[0.0], [1.0], [2.0]], "k": 2, "epsilon": 0.1, **options})


@pytest.mark.parametrize("name", ["n", "d", "k", "epsilon", "spread", "gamma", "iterations"])
@pytest.mark.parametrize("value", [*NO_NUMBERS, 0])
def test_a_bound_of_what_is_no_number_is_refused(name, value):
    """One sentence, that names the argument."""
    with pytest.raises(ArgumentError, match=f"{name} must be a "):
        retrain_bound(**{"n": 10, "d": 2, "k": 2, "epsilon": 0.1, "spread": 1.0, **{name: value}})


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("value", NO_NUMBERS)
def test_costs_that_are_no_numbers_are_refused(at, value):
    """One sentence, that names the argument."""
    names = ["unlearning", "inference", "other_unlearning", "other_inference"]
    with pytest.raises(ArgumentError, match=f"{names[at]} must be a number, 0 or more"):
        break_even_inferences(**{name: value if name == names[at] else 1 for name in names})
    names = ["unlearning", "inference", "inferences"]
    with pytest.raises(ArgumentError, match=f"{names[at % 3]} must be a number, 0 or more"):
        holistic_cost(**{name: value if name == names[at % 3] else 1 for name in names})


def test_an_absent_example_cannot_be_deleted():
    """An unknown id, a second deletion and one below k are refused, and nothing has changed then."""
    selection = InContextSelection([[0.0], [1.0], [2.0]], 2, epsilon=0.1)
    with pytest.raises(ArgumentError, match="no example 7"):
        selection.delete(7)
    selection.delete(1)
    with pytest.raises(ArgumentError, match="no example 1"):
        selection.delete(1)
    with pytest.raises(ArgumentError, match="cannot lose one"):
        selection.delete(0)
    assert sorted(selection.chosen) == [0, 2]
    for wrong in (True, 1.0, "1", None, -1):
        with pytest.raises(ArgumentError, match="identity must be a whole number"):
            selection.delete(wrong)
    assert sorted(selection.chosen) == [0, 2]
