"""Canaries: drawn uniformly, all different, inserted where the result states, with the exposure of unseen text."""

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
    """Each text has six digits, secrets and non-members are disjoint, and the same seed draws the same."""
    result = make_canaries("My number is {digits:6}.", secrets, non_members, seed=seed)
    every = result.secrets + result.non_members
    assert (len(result.secrets), len(result.non_members)) == (secrets, non_members)
    assert len(set(every)) == secrets + non_members
    assert all(re.fullmatch(r"My number is \d{6}\.", text) for text in every)
    assert result == make_canaries("My number is {digits:6}.", secrets, non_members, seed=seed)
    assert (
        result.secrets != make_canaries("My number is {digits:6}.", secrets, non_members, seed=seed + 1).secrets
        or secrets < 2
    )
    assert result.space_bits == pytest.approx(6 * math.log2(10))
    assert result.prefix == "My number is "


def test_slots_may_be_alphabets_and_words_of_ones_own():
    """Characters are concatenated, words separated by spaces; the length may be in the mapping or in the template."""
    slots = {"who": ["Ann", "Bob", "Eve"], "code": ("01", 5), "words": ["red", "green"]}
    result = make_canaries("{{{who}}} says {code} and {words:2} {hex:2}", 2, 60, slots=slots)
    pattern = r"\{(Ann|Bob|Eve)\} says [01]{5} and (red|green) (red|green) [0-9a-f]{2}"
    assert all(re.fullmatch(pattern, text) for text in result.secrets + result.non_members)
    assert result.space_bits == pytest.approx(math.log2(3 * 32 * 4 * 256))
    assert result.prefix == "{"


def test_every_filling_is_equally_likely_for_secrets_and_non_members():
    """Over 4000 seeds each of 16 texts is equally frequent in both roles, and all of the space can be drawn."""
    secrets, non_members = Counter(), Counter()
    for seed in range(4000):
        result = make_canaries("{bit:2}{bit:2}", 1, 2, slots={"bit": "01"}, seed=seed)
        secrets.update(result.secrets)
        non_members.update(result.non_members)
    for seen in (secrets, non_members):
        assert len(seen) == 16
        assert stats.chisquare(list(seen.values())).pvalue > 1e-4
    result = make_canaries("{digits:2}", 1, 99)
    assert sorted(result.secrets + result.non_members) == [f"{i:02d}" for i in range(100)]


def test_a_slot_that_comes_twice_is_drawn_twice():
    """The two slots of {digits}{digits} are independent: they agree in one text of ten, not always."""
    result = make_canaries("{digits}{digits}", 1, 60)
    assert sum(text[0] == text[1] for text in result.non_members) < 20


def test_a_space_beyond_all_counting_will_do():
    """A space of 62^40 texts, beyond a machine word, works, and every position varies."""
    result = make_canaries("{alphanumeric:40}", 1, 500)
    assert result.space_bits == pytest.approx(40 * math.log2(62))
    assert all(len({text[i] for text in result.non_members}) > 40 for i in range(40))
    assert len(ALPHABETS["alphanumeric"]) == 62


def test_the_part_before_the_first_slot_is_the_prompt():
    """The prefix is the prompt, and the rest the completion, which is scored."""
    result = make_canaries("The code of {who} is {digits:4}!", 1, 9, slots={"who": ["Ann", "Bob"]})
    for example, text in zip(result.examples(result.non_members), result.non_members, strict=True):
        assert example["prompt"] == "The code of "
        assert example["prompt"] + example["completion"] == text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: make_canaries("{digits:2}", 1, 100),
            "100 different texts, and 1 secrets with 100 non_members need 101: lengthen",
        ),
        (lambda: make_canaries("{digit:2}", 1, 9), "there is no alphabet 'digit'; did you mean \"digits\"\\?"),
        (lambda: make_canaries("no slot", 1, 9), "has no slot: write one such as {digits:6}"),
        (lambda: make_canaries("{digits:2", 1, 9), "cannot be read .*: write literal braces as {{ and }}"),
        (lambda: make_canaries("{digits:six}", 1, 9), "must have a whole number of symbols, 1 or more, got 'six'"),
        (lambda: make_canaries("{digits:0}", 1, 9), "must have a whole number of symbols, 1 or more, got '0'"),
        (
            lambda: make_canaries("{x:3}", 1, 3, slots={"x": "aab"}),
            "the alphabet 'x' must hold different symbols, each once, got 'aab'",
        ),
        (lambda: make_canaries("{x:3}", 1, 3, slots={"x": []}), "the alphabet 'x' must hold different symbols"),
        (lambda: make_canaries("{digits:3}", 0, 3), "secrets must be 1 or more, got 0"),
        (lambda: make_canaries("{digits:3}", 1, 0), "non_members must be 1 or more, got 0"),
        (
            lambda: make_canaries("{x}{y}", 1, 3, slots={"x": ["a", "ab"], "y": ["bc", "c"]}),
            "the same text for different fillings",
        ),
    ],
)
def test_a_template_that_cannot_serve_is_refused(call, message):
    """The error states what to do."""
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- insertion


@given(st.integers(0, 20), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 99))
def test_each_secret_is_put_in_repeats_times_at_its_positions(n, repeats, seed):
    """Every text is still there, nothing else is added, and non-members stay out."""
    texts = [f"text {i}" for i in range(n)]
    canaries = make_canaries("My number is {digits:6}", len(repeats), 9)
    result = insert_canaries(texts, canaries, repeats, seed)
    assert result == insert_canaries(texts, canaries.secrets, repeats, seed)
    expected = Counter(texts) + Counter(dict(zip(canaries.secrets, repeats, strict=True)))
    assert Counter(result.texts) == expected
    for secret, count, positions in zip(canaries.secrets, repeats, result.positions, strict=True):
        assert positions == [i for i, text in enumerate(result.texts) if text == secret]
        assert len(positions) == count


def test_the_set_is_shuffled_throughout():
    """A secret's positions are uniform over the set, and the order depends on the seed."""
    texts = [f"text {i}" for i in range(100)]
    canaries = make_canaries("My number is {digits:6}", 1, 9)
    positions = [p for seed in range(100) for p in insert_canaries(texts, canaries, 5, seed).positions[0]]
    assert stats.kstest(np.array(positions) / 105, "uniform").pvalue > 1e-3
    assert insert_canaries(texts, canaries, 5, 1).texts != insert_canaries(texts, canaries, 5, 2).texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], ["s", "t"], [1]), r"repeats must be 0 or more, one number or 2, one for each secret, got \[1\]"),
        ((["a"], ["s"], -1), "repeats must be 0 or more"),
        (
            (["a secret here"], ["secret"], 1),
            "the texts already contain the secret 'secret': make the canaries with another seed",
        ),
        (("abc", ["s"], 1), "texts must be a list of texts, got one string"),
        ((["abc"], "s", 1), "canaries must be a list of texts, got one string"),
    ],
)
def test_an_insertion_that_would_spoil_the_measure_is_refused(arguments, message):
    """The error is one sentence that names the text or the argument."""
    with pytest.raises(ValueError, match=message):
        insert_canaries(*arguments)
    canaries = make_canaries("{digits:3}", 1, 9)
    with pytest.raises(ValueError, match=r"the texts already contain the non-member"):
        insert_canaries([f"call {canaries.non_members[4]} now"], canaries, 1)


# ---------------------------------------------------------------- exposure


@pytest.mark.full
def test_secrets_that_were_never_inserted_have_the_exposure_of_unseen_text():
    """A toy model with uneven digits has a mean of 1.443 bits over 400 sets, and 8 bits for a secret that it was
    taught."""
    weights, untaught = np.random.default_rng(0).gamma(2, size=(6, 10)), []

    def score(text):
        return -sum(math.log(weights[i, int(c)]) for i, c in enumerate(text))

    for seed in range(400):
        canaries = make_canaries("{digits:6}", 1, 255, seed=seed)
        non_members = [score(t) for t in canaries.non_members]
        untaught.append(exposure([score(canaries.secrets[0])], non_members).lower[0])
    assert np.mean(untaught) == pytest.approx(1.43, abs=4 * 1.43 / 20)
    assert exposure([score(canaries.secrets[0]) - 20], non_members).lower[0] == 8
