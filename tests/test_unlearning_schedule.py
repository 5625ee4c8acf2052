"""The schedule: which examples a step takes, in which order, in which micro-batches."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyunlearn
from pyunlearn.data import encode, read_examples
from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import ksd_difficulty
from pyunlearn.probes import representations
from pyunlearn.unlearning.schedule import STEPS_PER_ROUND, Schedule, check_difficulty, in_order


def schedule(batch_size=4, micro_batch_size=None, retain_examples=0, seed=0, **options):
    """Return a schedule."""
    return Schedule(
        batch_size=batch_size, micro_batch_size=micro_batch_size, retain_examples=retain_examples, seed=seed, **options
    )


# ---------------------------------------------------------------- forget examples


def test_a_round_takes_each_active_example_once():
    """Its steps are full batches and a rest; another round or seed has another order, the same one the same."""
    active = np.array([1, 3, 4, 8, 9, 12, 20, 21, 22])
    batches = schedule().round_batches(active, 0, 99)
    assert [len(b) for b in batches] == [4, 4, 1]
    assert sorted(np.concatenate(batches)) == active.tolist()
    assert np.concatenate(batches).tolist() != active.tolist()
    again, next_round = (np.concatenate(schedule().round_batches(active, n, 99)) for n in (0, 1))
    assert again.tolist() == np.concatenate(batches).tolist() != next_round.tolist()
    assert np.concatenate(schedule(seed=1).round_batches(active, 0, 99)).tolist() != again.tolist()
    assert schedule().round_batches(np.array([], dtype=np.int64), 0, 99) == []


@pytest.mark.parametrize(("steps_left", "steps"), [(99, 16), (16, 16), (5, 5), (0, 0)])
def test_a_round_has_sixteen_steps_at_most(steps_left, steps):
    """Fewer where the run has fewer left, or where the active examples do not fill them."""
    batches = schedule(batch_size=2).round_batches(np.arange(100), 0, steps_left)
    assert len(batches) == steps <= STEPS_PER_ROUND == 16
    assert len(schedule(batch_size=2).round_batches(np.arange(6), 0, steps_left)) == min(3, steps_left)


def test_examples_are_taken_by_difficulty():
    """From the easy or from the hard end, in every round; the seed has no say."""
    difficulty = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
    for order, wanted in (("easy_first", [1, 3, 4, 2, 0]), ("hard_first", [0, 2, 4, 3, 1])):
        for round_number in (0, 1):
            ranked = schedule(batch_size=2, order=order, difficulty=difficulty, seed=round_number)
            batches = ranked.round_batches(np.arange(5), round_number, 99)
            assert [b.tolist() for b in batches] == [wanted[:2], wanted[2:4], wanted[4:]]


def test_equal_difficulties_stay_in_order():
    """The sort is stable from both ends; without an order the examples are shuffled by the seed."""
    todo, difficulty = np.array([4, 0, 2, 3]), np.array([1.0, 9.0, 1.0, 0.5, 1.0])
    assert in_order(todo, "easy_first", difficulty, (0, 0)).tolist() == [3, 4, 0, 2]
    assert in_order(todo, "hard_first", difficulty, (0, 0)).tolist() == [4, 0, 2, 3]
    shuffled = np.random.default_rng((7, 3)).permutation(todo)
    assert in_order(todo, "random", None, (7, 3)).tolist() == shuffled.tolist()


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 2.0, float("nan")], [[1.0, 2.0, 3.0]], ["a", "b", "c"], 3.0])
def test_difficulties_that_do_not_fit_are_refused(values):
    """One finite number for each forget example is wanted, or one for each record."""
    records = np.arange(3)
    assert check_difficulty([1, 2, 3], records).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ArgumentError, match="difficulty must be 3 numbers, one for each forget example, got "):
        check_difficulty(values, records)


def test_parts_of_a_record_have_its_difficulty():
    """Of windows and other forms each can also have its own number."""
    records = np.array([0, 0, 1, 2, 2])
    assert check_difficulty([5, 1, 3], records).tolist() == [5, 5, 1, 3, 3]
    assert check_difficulty([5, 4, 1, 3, 2], records).tolist() == [5, 4, 1, 3, 2]
    with pytest.raises(ArgumentError, match=r"must be 3 numbers, .*, or 5, one for each window .*, got 4 numbers$"):
        check_difficulty([1, 2, 3, 4], records)


# ---------------------------------------------------------------- retain examples


@pytest.mark.parametrize(("batch_size", "examples"), [(4, 12), (1, 7), (5, 5), (8, 5)])
def test_an_epoch_takes_each_retain_example_once(batch_size, examples):
    """A batch larger than the retain set takes all of it."""
    plan, steps = schedule(batch_size, retain_examples=examples), examples // min(batch_size, examples)
    for epoch in range(4):
        batches = [plan.retain_indices(epoch * steps + i) for i in range(steps)]
        assert {len(b) for b in batches} == {min(batch_size, examples)}
        assert sorted(i for b in batches for i in b) == list(range(examples))


def test_each_epoch_shuffles_the_retain_set_again():
    """Its order differs from that of every other epoch and seed; the same epoch of the same seed is the same."""

    def epoch(number, seed=0):
        plan = schedule(4, retain_examples=12, seed=seed)
        return tuple(i for step in range(3) for i in plan.retain_indices(3 * number + step))

    assert len({epoch(number) for number in range(6)}) == 6
    assert len({epoch(number, seed) for number in range(2) for seed in range(3)}) == 6
    assert epoch(3) == epoch(3)
    batches = {frozenset(epoch(number)[:4]) for number in range(6)}
    assert len(batches) > 1  # other examples together, and not the same batches in another order


@given(st.integers(1, 9), st.integers(0, 23), st.integers(0, 12), st.integers(0, 3))
def test_the_examples_read_ahead_are_those_that_the_steps_take(batch_size, examples, max_steps, seed):
    """They are distinct and sorted, for any batch size, also one that does not divide the retain set."""
    plan = schedule(batch_size, retain_examples=examples, seed=seed)
    steps = [plan.retain_indices(step) for step in range(max_steps)] if examples else []
    assert plan.retain_ahead(max_steps) == sorted({i for batch in steps for i in batch})


# ---------------------------------------------------------------- micro-batches


@given(st.lists(st.integers(0, 99), max_size=20), st.one_of(st.none(), st.integers(1, 9)))
def test_micro_batches_split_a_step_in_order(indices, micro_batch_size):
    """Each has micro_batch_size examples but the last; by default a step's batch is one of them."""
    groups = schedule(7, micro_batch_size).micro_batches(np.array(indices, dtype=np.int64))
    assert [i for group in groups for i in group] == indices
    size = micro_batch_size or 7
    assert all(len(group) == size for group in groups[:-1])
    assert all(0 < len(group) <= size for group in groups)
    assert all(type(i) is int for group in groups for i in group)


# ---------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def story(one_thread):
    return tiny.trained(tiny.tiny_llama, tiny.facts, count=120, repeats=16, epochs=6)


def mean_log_likelihoods(model, tokens):
    """Return (n,) means over the scored tokens, from the model's own logits."""
    means = []
    for t in tokens:
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([t.ids])).logits[0, t.first - 1 : -1].double(), -1)
        means.append(rows.gather(1, torch.tensor(t.scored)[:, None]).mean().item())
    return np.array(means)


def taken(result):
    """Return the examples of the first round in the order in which its steps take them."""
    return [i for record in result.history if record["round"] == 0 for i in record["examples"]]


@pytest.mark.full
def test_the_order_is_that_of_the_difficulties(story):
    """They are the caller's numbers, NLLs under a reference model, or Stein discrepancies to the retain set."""
    forget = story.forget + story.retain[:3]
    torch.manual_seed(1)
    other = tiny.tiny_llama(len(story.tokenizer)).eval()  # has read no text
    tokens, corpus = (
        encode(read_examples(rows, role="x"), story.tokenizer, role="x", max_length=None)
        for rows in (forget, story.retain[3:40])
    )
    options = {
        "retain": story.retain[3:40],
        "holdout": story.holdout,
        "reference_model": other,
        "progress": False,
        "batch_size": 1,
        "max_steps": 5,
        "learning_rate": 1e-7,
        "tokenizer": story.tokenizer,
        "method": "npo",
    }
    own = [3.0, 1.0, 2.0, 5.0, 4.0]
    nll = -mean_log_likelihoods(other, tokens)
    sets = (representations(story.model, x, batch_size=4) for x in (tokens, corpus))
    (h, s), (corpus_h, corpus_s) = sets
    ksd = ksd_difficulty(h, s, corpus_h, corpus_s)
    for order, difficulty, values in (
        ("hard_first", own, own),
        ("easy_first", "nll", nll),
        ("easy_first", "ksd", ksd),
    ):
        result = pyunlearn.unlearn(story.fresh(), forget, order=order, difficulty=difficulty, **options)
        memorized = [e.index for e in result.examples if e.steps]
        assert len(memorized) >= 2
        ranked = sorted(memorized, key=lambda i, values=values: values[i])
        assert taken(result) == (ranked if order == "easy_first" else ranked[::-1])
