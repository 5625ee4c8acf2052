"""Canaries: of one law, all different, where they were put, and exposed as much as they are."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyunlearn.metrics import exposure, insert_canaries, make_canaries
from pyunlearn.metrics.canaries import ALPHABETS


@given(st.integers(1, 5), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_canaries_follow_the_template_and_are_all_different(secrets, non_members, seed):
    """Six digits each; secrets and non_members disjoint; the same again for the same seed."""
    found = make_canaries("My number is {digits:6}.", secrets, non_members, seed=seed)
    every = found.secrets + found.non_members
    assert (len(found.secrets), len(found.non_members)) == (secrets, non_members)
    assert len(set(every)) == secrets + non_members
    assert all(re.fullmatch(r"My number is \d{6}\.", text) for text in every)
    assert found == make_canaries("My number is {digits:6}.", secrets, non_members, seed=seed)
    assert (
        found.secrets != make_canaries("My number is {digits:6}.", secrets, non_members, seed=seed + 1).secrets
        or secrets < 2
    )
    assert found.space_bits == pytest.approx(6 * math.log2(10))
    assert found.prefix == "My number is "


def test_slots_may_be_alphabets_and_words_of_ones_own():
    """Characters side by side, words parted by spaces, a length in the mapping or in the template."""
    slots = {"who": ["Ann", "Bob", "Eve"], "code": ("01", 5), "words": ["red", "green"]}
    found = make_canaries("{{{who}}} says {code} and {words:2} {hex:2}", 2, 60, slots=slots)
    pattern = r"\{(Ann|Bob|Eve)\} says [01]{5} and (red|green) (red|green) [0-9a-f]{2}"
    assert all(re.fullmatch(pattern, text) for text in found.secrets + found.non_members)
    assert found.space_bits == pytest.approx(math.log2(3 * 32 * 4 * 256))
    assert found.prefix == "{"


def test_every_filling_is_equally_likely_for_secrets_and_references():
    """Each of 16 texts, over 4000 seeds, in both roles; and the whole space when all of it is asked for."""
    secrets, non_members = Counter(), Counter()
    for seed in range(4000):
        found = make_canaries("{bit:2}{bit:2}", 1, 2, slots={"bit": "01"}, seed=seed)
        secrets.update(found.secrets)
        non_members.update(found.non_members)
    for seen in (secrets, non_members):
        assert len(seen) == 16
        assert stats.chisquare(list(seen.values())).pvalue > 1e-4
    found = make_canaries("{digits:2}", 1, 99)
    assert sorted(found.secrets + found.non_members) == [f"{i:02d}" for i in range(100)]


def test_a_slot_that_comes_twice_is_drawn_twice():
    """Independent draws: {digits}{digits} is one in ten the same, not always."""
    found = make_canaries("{digits}{digits}", 1, 60)
    assert sum(text[0] == text[1] for text in found.non_members) < 20


def test_a_space_beyond_all_counting_will_do():
    """62^40 texts: more than a machine word counts; every position varies."""
    found = make_canaries("{alphanumeric:40}", 1, 500)
    assert found.space_bits == pytest.approx(40 * math.log2(62))
    assert all(len({text[i] for text in found.non_members}) > 40 for i in range(40))
    assert len(ALPHABETS["alphanumeric"]) == 62


def test_the_part_before_the_first_slot_is_the_prompt():
    """What follows is scored."""
    found = make_canaries("The code of {who} is {digits:4}!", 1, 9, slots={"who": ["Ann", "Bob"]})
    for example, text in zip(found.examples(found.non_members), found.non_members, strict=True):
        assert example["prompt"] == "The code of "
        assert example["prompt"] + example["completion"] == text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_canaries("{digits:2}", 1, 100), "has 100 different texts, and 1 secrets with 100 non_members need 101: lengthen a slot"),
        (lambda: make_canaries("{digit:2}", 1, 9), "there is no alphabet 'digit'; did you mean \"digits\"\\?"),
        (lambda: make_canaries("no slot", 1, 9), "has no slot: write one such as {digits:6}"),
        (lambda: make_canaries("{digits:2", 1, 9), "cannot be read .*: write literal braces as {{ and }}"),
        (lambda: make_canaries("{digits:six}", 1, 9), "must have a whole number of symbols, 1 or more, got 'six'"),
        (lambda: make_canaries("{digits:0}", 1, 9), "must have a whole number of symbols, 1 or more, got '0'"),
        (lambda: make_canaries("{x:3}", 1, 3, slots={"x": "aab"}), "the alphabet 'x' must hold different symbols, each once, got 'aab'"),
        (lambda: make_canaries("{x:3}", 1, 3, slots={"x": []}), "the alphabet 'x' must hold different symbols"),
        (lambda: make_canaries("{digits:3}", 0, 3), "secrets must be 1 or more, got 0"),
        (lambda: make_canaries("{digits:3}", 1, 0), "non_members must be 1 or more, got 0"),
        (lambda: make_canaries("{x}{y}", 1, 3, slots={"x": ["a", "ab"], "y": ["bc", "c"]}), "the same text for different fillings"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_serve_is_refused(call, message):
    """With what to do."""
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- insertion


@given(st.integers(0, 20), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 99))
def test_each_secret_is_put_in_as_often_as_asked_and_stands_where_it_says(n, repeats, seed):
    """Nothing is lost, nothing else is added, non_members stay out."""
    texts = [f"text {i}" for i in range(n)]
    canaries = make_canaries("My number is {digits:6}", len(repeats), 9)
    found = insert_canaries(texts, canaries, repeats, seed)
    assert found == insert_canaries(texts, canaries.secrets, repeats, seed)
    expected = Counter(texts) + Counter(dict(zip(canaries.secrets, repeats, strict=True)))
    assert Counter(found.texts) == expected
    for secret, count, places in zip(canaries.secrets, repeats, found.positions, strict=True):
        assert places == [i for i, text in enumerate(found.texts) if text == secret]
        assert len(places) == count


def test_the_set_is_shuffled_throughout():
    """A secret stands in every part of it, and the texts change places; the same for the same seed only."""
    texts = [f"text {i}" for i in range(100)]
    canaries = make_canaries("My number is {digits:6}", 1, 9)
    places = [p for seed in range(100) for p in insert_canaries(texts, canaries, 5, seed).positions[0]]
    assert stats.kstest(np.array(places) / 105, "uniform").pvalue > 1e-3
    assert insert_canaries(texts, canaries, 5, 1).texts != insert_canaries(texts, canaries, 5, 2).texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], ["s", "t"], [1]), r"repeats must be 0 or more, one number or 2, one for each secret, got \[1\]"),
        ((["a"], ["s"], -1), "repeats must be 0 or more"),
        ((["a secret here"], ["secret"], 1), "the texts already contain the secret 'secret': make the canaries with another seed"),
        (("abc", ["s"], 1), "lists of strings, got one string"),
        ((["abc"], "s", 1), "lists of strings, got one string"),
    ],
)  # fmt: skip
def test_an_insertion_that_would_spoil_the_measure_is_refused(arguments, message):
    """In one sentence."""
    with pytest.raises(ValueError, match=message):
        insert_canaries(*arguments)
    canaries = make_canaries("{digits:3}", 1, 9)
    with pytest.raises(ValueError, match=r"the texts already contain the non-member"):
        insert_canaries([f"call {canaries.non_members[4]} now"], canaries, 1)


# ---------------------------------------------------------------- exposure


def test_secrets_that_were_never_inserted_have_the_exposure_of_unseen_text():
    """A toy model that likes some digits better than others: mean 1.443 bits over 400 sets, and 8 bits for a secret that it was taught."""
    weights, untaught = np.random.default_rng(0).gamma(2, size=(6, 10)), []

    def score(text):
        return -sum(math.log(weights[i, int(c)]) for i, c in enumerate(text))

    for seed in range(400):
        canaries = make_canaries("{digits:6}", 1, 255, seed=seed)
        non_members = [score(t) for t in canaries.non_members]
        untaught.append(exposure([score(canaries.secrets[0])], non_members).lower[0])
    assert np.mean(untaught) == pytest.approx(1.43, abs=4 * 1.43 / 20)
    assert exposure([score(canaries.secrets[0]) - 20], non_members).lower[0] == 8
