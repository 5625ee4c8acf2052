"""What is left of memorized texts: what stands out, how often a retrained model is wrongly named, what is found."""

import math

import numpy as np
import pytest
from coverings import slow

from pyunlearn.metrics import Scores, left, verdict
from pyunlearn.metrics.left import newly_known

UNSEEN = np.arange(99.0)
LAWS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "Student's t, 3": lambda rng, n: rng.standard_t(3, n),
    "gamma": lambda rng, n: rng.gamma(2, size=n),
    "gamma to the left": lambda rng, n: -rng.gamma(0.5, size=n),
    "lognormal to the left": lambda rng, n: -np.exp(rng.standard_normal(n)),
}


def shares(rng, n, m):
    """Negative shares of 13 tokens that are first choices in unseen text, of n texts and m non-members."""
    texts, non_members = (-rng.binomial(13, 0.3, k) / 13 for k in (n, m))
    return Scores(texts, non_members)


def flat(n):
    """Extracted shares that say nothing."""
    return Scores(np.zeros(n), np.zeros(99))


def test_each_reason_to_stand_out():
    """Its likelihood, what is extracted of it, or that it has hardly moved; but only of a text that was memorized."""
    before = Scores(np.full(3, -40.0), UNSEEN)
    result = left(before, Scores(np.array([-9.0, 3.0, 50.0]), UNSEEN), flat(3))
    assert result.standing_out.tolist() == [True, False, False]  # 6.64 bits, and one of three needs 5.9
    assert left(before, Scores(np.array([-1.0] * 3), UNSEEN), flat(3)).standing_out.all()
    one_of_40 = Scores(np.array([-38.0, *range(20, 59)]), UNSEEN)
    result = left(Scores(np.full(40, -40.0), UNSEEN), one_of_40, flat(40))
    assert result.standing_out.tolist() == [True] + [False] * 39
    written = Scores(np.array([-0.9, -0.2, -0.2]), -np.linspace(0.0, 0.5, 99))
    assert left(before, Scores(np.array([50.0] * 3), UNSEEN), written).standing_out.tolist() == [True, False, False]
    seen_by_none = Scores(np.full(3, 50.0), UNSEEN)
    unknown = left(seen_by_none, seen_by_none, written)
    assert (unknown.standing_out.any(), unknown.pvalue) == (False, None)


def test_a_short_way_may_be_not_gone_by_chance():
    """A text 1.5 spreads below unseen text, then and now, shows nothing; one that lay four below does."""
    for depth, stands_out in ((1.5, False), (4.0, True)):
        before = 49.5 - depth * UNSEEN.std()
        now = Scores(np.array([before + 0.1 * depth * UNSEEN.std(), *range(20, 59)]), np.maximum(UNSEEN, before + 20))
        seen = left(Scores(np.full(40, before), UNSEEN), now, flat(40))
        assert seen.standing_out.any() == stands_out


@pytest.mark.parametrize("law", ["gamma", "lognormal to the right", "normal"])
@pytest.mark.parametrize("m", [19, 30, 99])
def test_an_untouched_text_beyond_all_non_members_stands_out(law, m):
    """However the non-members are spread, and though one of them is farther out to the other side."""
    rng = np.random.default_rng(m)
    for _ in range(10):
        unseen = 5 + (np.exp(rng.standard_normal(m)) if law == "lognormal to the right" else LAWS[law](rng, m))
        scores = Scores(np.array([unseen.min() - 0.3 * unseen.std()]), unseen)
        assert left(scores, scores, Scores(np.array([-0.5]), -np.linspace(0.3, 0.6, m))).standing_out.all()


def test_one_text_far_out_is_found_among_any_number():
    """Beyond all non-members by more than twice their range: exposed below, and above it may be over-unlearned."""
    before, others = Scores(np.full(20, -500.0), UNSEEN), np.linspace(10, 88, 19)
    for score, exposed, low in ((-220.0, True, False), (-150.0, False, False), (320.0, False, True)):
        result = left(before, Scores(np.array([score, *others]), UNSEEN), flat(20))
        assert (result.standing_out.tolist(), result.too_low.tolist()) == (
            [exposed] + [False] * 19,
            [low] + [False] * 19,
        )


def test_a_text_known_by_heart_has_hardly_moved_though_unseen_text_varies_much():
    """Scores are 0 or more, so that the way is short next to unlikely texts; their likelier half says how far."""
    rng, named = np.random.default_rng(0), 0
    for _ in range(10):
        unseen = 0.5 + rng.gamma(2.5, size=99)
        now = Scores(np.array([0.3, *(0.5 + rng.gamma(2.5, size=11))]), unseen)
        named += left(Scores(np.full(12, 0.0), unseen), now, flat(12)).standing_out[0]
    assert named >= 8


def test_three_comparisons_share_one_level():
    """One text farther out than 19 others has a p-value of 1/20, above them or below, for all that is compared."""
    unseen, same = np.linspace(-2, 2, 19), np.linspace(-0.9, -0.1, 19)
    for score, expected in ((-9.0, (0.05, 1.0)), (9.0, (1.0, 0.05)), (0.1, (1.0, 1.0))):
        result = left(
            Scores(np.array([-9.0]), unseen), Scores(np.array([score]), unseen), Scores(np.array([-0.5]), same)
        )
        assert (result.pvalue, result.unlikely_pvalue) == pytest.approx(expected, abs=0.06)


@pytest.mark.full
@pytest.mark.parametrize(
    ("law", "n", "m"),
    [
        ("gamma", 12, 40),
        ("normal", 1, 64),
        *slow(*((law, 12, 40) for law in LAWS if law != "gamma"), ("normal", 20, 19), ("normal", 60, 64)),
    ],
)
def test_a_retrained_model_s_texts_hardly_ever_stand_out(law, n, m):
    """Its scores are draws of the law of unseen text, though all was memorized before: any of the three comparisons
    rejects 5 % of sets at most. The aim of 1.44 bits for each text would pass hardly any set of many."""
    rng, draws, named, rejected, aimed = np.random.default_rng(n + m), 120, 0, 0, 0
    for _ in range(draws):
        before, now = Scores(np.full(n, -99.0), LAWS[law](rng, m)), Scores(LAWS[law](rng, n), LAWS[law](rng, m))
        result = left(before, now, shares(rng, n, m))
        named += result.standing_out.any()
        rejected += min(result.pvalue, result.unlikely_pvalue) <= 0.05
        aimed += "still exposed" in verdict(before.texts, now.texts, now.non_members).verdict
    assert named <= rejected + 0.02 * draws
    assert rejected <= draws * (0.05 + 3 * math.sqrt(0.05 * 0.95 / draws))
    assert aimed / draws >= (0.25 if n == 1 else 0.95)


@pytest.mark.full
@pytest.mark.parametrize(("n", "m"), [(1, 19), (20, 19), (40, 105), (100, 99)])
@pytest.mark.parametrize("count", [1, 3])
def test_texts_that_are_left_are_found(n, m, count):
    """One or three of n texts, three to eight spreads below unseen text, untouched, the others as under retraining."""
    rng, hits = np.random.default_rng(0), 0
    for draw in range(40):
        depth = 3 + draw % 6
        before, texts = np.full(n, -float(depth)), rng.standard_normal(n)
        texts[:count] = before[:count] + 0.1 * rng.standard_normal(min(n, count))
        unseen = rng.standard_normal(m)
        result = left(Scores(before, unseen), Scores(texts, unseen), shares(rng, n, m))
        hits += result.standing_out[:count].any()
    assert hits >= 36


@pytest.mark.full
def test_few_of_the_texts_that_are_named_are_like_unseen_ones():
    """Where 4 of 20 are left, at most twice the rate of those named: likelihoods and shares are two selections."""
    rng, draws, left_over, shares_of_others = np.random.default_rng(0), 60, np.arange(20) < 4, []
    for _ in range(draws):
        texts, extracted = rng.standard_normal(20) - 4 * left_over, np.where(left_over, -1.0, -rng.random(20))
        now, written = Scores(texts, rng.standard_normal(199)), Scores(extracted, -rng.random(199))
        named = left(Scores(np.full(20, -99.0), rng.standard_normal(199)), now, written).standing_out
        assert named[left_over].all()
        shares_of_others.append(named[~left_over].sum() / named.sum())
    assert np.mean(shares_of_others) <= 0.1 + 2 * np.std(shares_of_others) / math.sqrt(draws)


@pytest.mark.full
def test_a_set_that_lies_high_is_seen_though_no_text_stands_out():
    """By its likelihoods, all one spread too likely, or by its extracted shares, in the top tenth of unseen ones."""
    rng, by_likelihood, by_share, alone = np.random.default_rng(0), 0, 0, 0
    for _ in range(60):
        unseen, before = rng.standard_normal(99), np.full(20, -9.0)
        high, usual = Scores(rng.standard_normal(20) - 1, unseen), Scores(rng.standard_normal(20), unseen)
        share = Scores(-0.75 + 0.01 * rng.standard_normal(20), -0.5 - 0.19 * rng.standard_normal(99))
        by_likelihood += left(Scores(before, unseen), high, shares(rng, 20, 99)).pvalue <= 0.05
        by_share += left(Scores(before, unseen), usual, share).pvalue <= 0.05
        alone += left(Scores(before, unseen), usual, shares(rng, 20, 99)).pvalue <= 0.05
    assert by_likelihood >= 45
    assert by_share >= 45
    assert alone <= 8


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("n", "memorized"), [(1, 0), (12, 0), (12, 6), (40, 10)])
def test_texts_that_neither_model_knows_are_rarely_called_newly_known(law, n, memorized):
    """At most 2.5 % of sets have one: the memorized texts have tests of their own."""
    rng, wrong, known = np.random.default_rng(n), 0, np.arange(n) < memorized
    alike = np.zeros(n, dtype=np.int64), np.zeros(99, dtype=np.int64)
    for _ in range(400):
        now = Scores(*(LAWS[law](rng, k) for k in (n, 99)))
        wrong += newly_known(now, alike, known, rate=0.05).any()
    assert wrong / 400 <= 0.025 + 0.016  # two standard errors


def test_texts_that_only_the_later_model_knows_stand_out():
    """They were not memorized, and are still exposed: an audit whose original is another model must not pass."""
    scores = np.array([-5.0, -5.0, 40.0])
    forms = np.zeros(3, dtype=np.int64), np.zeros(99, dtype=np.int64)
    newly = newly_known(Scores(scores, UNSEEN), forms, np.zeros(3, dtype=bool), rate=0.05)
    assert newly.tolist() == [True, True, False]
    judged = verdict([50.0] * 3, scores, UNSEEN, standing_out=newly)
    assert judged.verdict.tolist() == ["still exposed", "still exposed", "not memorized"]
    assert judged.certain[:2].tolist() == [True, True]
