"""Examples for a prompt, and their exact deletion: the same as if the example had never been there."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError
from pyunlearn.unlearning.in_context import InContextSelection, break_even_inferences, holistic_cost, retrain_bound


def blobs(n, d, k, seed, spread=0.08):
    """n points around k centres in the unit cube."""
    r = np.random.default_rng(seed)
    return r.random((k, d))[r.integers(k, size=n)] + spread * r.standard_normal((n, d))


def everything(selection):
    """All that a selection knows of the examples that are there, by id: choices, centroids, sums, sizes, clusters, seeds."""
    here = selection._there
    return (
        selection.chosen, selection._centroids.tolist(), selection._sums.tolist(), selection._sizes.tolist(),
        dict(zip(selection._ids[here].tolist(), selection._members[:, here].T.tolist(), strict=True)),
        sorted(int(selection._ids[row]) for row in selection._seeds),
    )  # fmt: skip


def fresh(x, gone, k, **options):
    """Clustered from the start without those."""
    ids = [i for i in range(len(x)) if i not in gone]
    return InContextSelection(x[ids], k, ids=ids, **options)


@pytest.mark.parametrize("options", [{"epsilon": 0.1}, {"epsilon": 0.5, "gamma": 0.9}, {"epsilon": 0.02, "gamma": 0.0, "iterations": 3}])  # fmt: skip
def test_every_deletion_is_exact(options):
    """Of each example in turn: choice and whole state are, bit for bit, those of a clustering without it and with the same seed."""
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
    """Whatever the data, also with examples that coincide and clusters that end empty, and down to the last k."""
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


def test_most_deletions_need_no_clustering_and_few_enough():
    """With n large against d / epsilon nearly all are certified, never touching the others; over seeds no more recluster than the bound says."""
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
    """A certified one looks at no other example: their embeddings could be anything."""
    x = blobs(500, 2, 3, 2)
    selection = InContextSelection(x, 3, epsilon=0.5, iterations=3, seed=1)
    monkeypatch.setattr(InContextSelection, "_cluster", None)
    quiet = next(i for i in range(500) if i not in selection._seeds and not selection._moved_without(i))
    kept, selection._steps = selection._steps, np.full_like(selection._steps, -(2**40))
    selection._steps[quiet] = kept[quiet]
    assert selection.delete(quiet) == (False, None)
    selection._steps = kept
    assert everything(selection) == everything(type("Fresh", (InContextSelection,), {"_cluster": CLUSTER})(
        np.delete(x, quiet, 0), 3, epsilon=0.5, iterations=3, seed=1, ids=np.delete(np.arange(500), quiet)
    ))  # fmt: skip


CLUSTER = InContextSelection._cluster


def test_the_choice_stands_for_the_data():
    """One example of each well-parted group, the one nearest to its middle but for the quantization; another seed, the same groups."""
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    x = np.repeat(centres, 25, 0) + 0.1 * np.random.default_rng(0).standard_normal((100, 2))
    for seed in range(5):
        chosen = InContextSelection(x, 4, epsilon=0.01, seed=seed).chosen
        assert sorted(i // 25 for i in chosen) == [0, 1, 2, 3]
        middle = x.reshape(4, 25, 2).mean(1)
        for i in chosen:
            mine = np.linalg.norm(x[i // 25 * 25 :][:25] - middle[i // 25], axis=1)
            assert np.linalg.norm(x[i] - middle[i // 25]) <= mine.min() + 2 * 0.01


def test_the_seeds_are_those_of_k_means_plus_plus():
    """The first uniformly, the second in proportion to its squared distance from the first: the race draws by its weights."""
    x = np.array([[0.0], [1.0], [3.0]])
    pairs = np.zeros((3, 3))
    for seed in range(1500):
        first, second = InContextSelection(x, 2, epsilon=0.1, iterations=1, seed=seed)._seed_rows(x, np.arange(3))
        pairs[first, second] += 1 / 1500
    wanted = np.array([[0, 1, 9], [1, 0, 4], [9, 4, 0]]) / np.array([[10], [5], [13]]) / 3
    np.testing.assert_allclose(pairs, wanted, atol=4 * np.sqrt(0.25 / 1500))


def test_a_quantized_centroid_is_no_further_than_half_a_cell_and_uniform_there():
    """Q(m) - m is uniform on [-epsilon / 2, epsilon / 2] over the phases, so a wall parts two points with probability |distance| / epsilon."""
    selection = InContextSelection(np.zeros((2, 2000)), 1, epsilon=0.4, iterations=1)
    sums = np.full((1, 2000), int(0.3 * 2**36))
    off = selection._quantized(0, sums, np.array([1]), np.zeros((1, 2000)), 1)[0] - 0.3
    assert np.abs(off).max() <= 0.2 + 1e-9
    assert np.histogram(off, 4, (-0.2, 0.2))[0] == pytest.approx(500, abs=100)
    near = selection._quantized(0, sums + int(0.1 * 2**36), np.array([1]), np.zeros((1, 2000)), 1)[0] - 0.3
    assert (np.abs(near - off) > 1e-9).mean() == pytest.approx(0.25, abs=0.05)


def test_costs_break_even_where_they_are_equal():
    """At the break-even number of inferences both ways cost the same; one nowhere dearer wins for ever, one nowhere cheaper never."""
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": [1.0, 2.0]}, "must be"), ({"embeddings": [[np.nan]]}, "finite"), ({"embeddings": [[1e9]]}, "scale them down"),
        ({"k": 0}, "from 1 to 3"), ({"k": 4}, "from 1 to 3"), ({"k": 1.5}, "whole number"), ({"epsilon": 0}, "above 0"), ({"gamma": 2}, "between 0 and 1"),
        ({"iterations": 0}, "iterations"), ({"ids": [1, 1, 2]}, "different whole number"), ({"ids": [0.5, 1, 2]}, "different whole number"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_from_is_refused(options, message):
    """One sentence, that names the argument."""
    with pytest.raises(ArgumentError, match=message):
        InContextSelection(**{"embeddings": [[0.0], [1.0], [2.0]], "k": 2, "epsilon": 0.1, **options})


def test_what_is_not_there_cannot_be_deleted():
    """Nor twice, nor below k; nothing has changed then. The bound says what it needs."""
    selection = InContextSelection([[0.0], [1.0], [2.0]], 2, epsilon=0.1)
    with pytest.raises(ArgumentError, match="no example 7"):
        selection.delete(7)
    selection.delete(1)
    with pytest.raises(ArgumentError, match="no example 1"):
        selection.delete(1)
    with pytest.raises(ArgumentError, match="cannot lose one"):
        selection.delete(0)
    assert sorted(selection.chosen) == [0, 2]
    with pytest.raises(ArgumentError, match="above 0"):
        retrain_bound(10, 2, 2, epsilon=0.1, spread=0)
