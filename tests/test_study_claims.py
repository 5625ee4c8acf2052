"""The study's exposures, statistics and verdicts, on numbers made by hand."""

import math

import numpy as np
import pytest
from study_settings import TINY

from pyunlearn.metrics import StepsToForget, generalized_exposure
from pyunlearn.study import claims, outcomes, statistics
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.folder import Folder
from pyunlearn.study.sets import ForgetSet, Sets

# ---------------------------------------------------------------- exposures


def test_the_four_criteria_are_what_they_say(tmp_path):
    """Anchored non-members are those of step 0; calibrated scores lose the difficulty. All four differ here."""
    rng = np.random.default_rng(3)
    config = StudyConfig(**{**TINY, "unlearning_rates": (0.1,)})
    which = ForgetSet("id", 1, 0)
    sets = Sets([], [], [], [], [], {"id": list(range(3, 23))}, {which: [0, 1, 2]})
    nll, unseen, ease = rng.normal(2, 0.5, (2, 3)), rng.normal(2, 0.5, (2, 20)), rng.normal(2, 0.5, 23)
    unseen[1] += 0.6
    folder = Folder(tmp_path / "out", {})
    rest = {name: np.zeros(2) for name in ("test_nll", "bleu", "moved")}
    run = {"steps": np.arange(2), "nll": nll, "accuracy": nll, "non_member_nll": unseen}
    folder.arrays(f"runs/{which}-lr0.1.safetensors", **run, **rest)
    names = ("memorization", "memorization_accuracy", "difficulty", "retrained", "tokens")
    known = outcomes.Examples(indices=list(range(23)), **dict.fromkeys(names, ease))
    (outcome,) = outcomes.outcomes_of(folder, config, sets, known)
    wanted = {}
    for where, scores in (("anchored", unseen[0]), ("current", unseen[1])):
        wanted[f"{where} raw"] = generalized_exposure(nll[1], scores)
        wanted[f"{where} calibrated"] = generalized_exposure(nll[1] - ease[:3], scores - ease[3:])
    assert len({tuple(w.lower) for w in wanted.values()}) == 4
    for criterion, w in wanted.items():
        np.testing.assert_allclose(outcome.lower[criterion][1], w.lower)
        np.testing.assert_allclose(outcome.upper[criterion][1], w.upper)
    np.testing.assert_allclose(outcome.drift, [0, (unseen[1] - unseen[0]).mean()])
    np.testing.assert_allclose(outcome.from_retrained, np.abs(nll - ease[:3]).mean(1))


def test_lowest_exposure_ends_where_the_budget_does_and_price_where_the_threshold_is():
    """Steps after the budget is spent do not count, even if the test NLL falls again; inf for what is never reached."""
    exposures = np.array([[6.0, 4.0], [4.0, 2.0], [1.0, 1.0], [0.5, 0.5]])
    rise = np.array([2.0, 2.05, 2.5, 2.02])
    rest = ("steps", "nll", "accuracy", "bleu", "drift", "from_retrained", "non_members_from_retrained", "moved")
    o = outcomes.Outcome(
        which=None,
        rate=0.1,
        indices=[0, 1],
        lower={"y": exposures},
        upper={"y": exposures},
        test_nll=rise,
        **dict.fromkeys(rest),
    )
    assert o.lowest("y", 0.1) == 3.0
    assert o.price("y", 1.443) == pytest.approx(0.5)
    assert o.price("y", 0.1) == math.inf


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("effect", "low", "high", "p", "n", "expected"),
    [
        (0.7, 0.6, 0.8, 0.01, 40, "supported"),
        (0.7, 0.6, 0.8, 0.2, 40, "undecided"),
        (0.7, 0.45, 0.8, 0.01, 40, "undecided"),
        (0.3, 0.2, 0.4, 0.01, 40, "not supported"),
        (0.5, 0.46, 0.54, 0.9, 400, "not supported"),
        (0.5, 0.3, 0.7, 0.9, 40, "undecided"),
        (0.9, 0.8, 1.0, 0.001, 10, "undecided"),
        (math.nan, math.nan, math.nan, 1.0, 0, "undecided"),
    ],
)
def test_a_verdict_needs_interval_test_and_numbers(effect, low, high, p, n, expected):
    """A null result is one where every effect that would matter is ruled out; few examples decide nothing."""
    verdict = claims._verdict(statistics.Effect(effect, low, high, p, n), "share", 0.5, "stratified log-rank")
    assert verdict == expected


def test_a_claim_is_decided_only_where_comparisons_agree():
    """One comparison against the claim makes it undecided, and the reason names what it depends on."""
    effects = {True: statistics.Effect(0.8, 0.7, 0.9, 0.01, 40), False: statistics.Effect(0.2, 0.1, 0.3, 0.01, 40)}

    def judge(*supports):
        rows = [
            claims.Comparison("same", "canary", 0.1, f"criterion {i}", "share", 0.5, "log-rank", effects[s])
            for i, s in enumerate(supports)
        ]
        return claims.judged(claims._adjusted("steps", rows))[0]

    assert judge(True, True, True).verdict == "supported"
    assert judge(False, False, False).verdict == "not supported"
    mixed = judge(True, True, False)
    assert mixed.verdict == "undecided"
    assert "depends on the criterion" in mixed.why


# ---------------------------------------------------------------- statistics


def taken(*steps, cut=()):
    return StepsToForget(np.array(steps, dtype=float), np.isin(np.arange(len(steps)), cut))


def test_censored_steps_are_compared_where_they_can_be():
    """An example forgotten at a step is shorter than one still exposed there; two censored ones are a tie."""
    assert statistics.longer(taken(1, 2), taken(3, 4)) == 1
    assert statistics.longer(taken(5), taken(5, cut=[0])) == 1
    assert statistics.longer(taken(5, cut=[0]), taken(5, cut=[0])) == 0.5
    assert statistics.longer(taken(5, cut=[0]), taken(9)) == 0.5
    a, b = taken(1, 4, 9, 9, cut=[3]), taken(2, 4, 8)
    assert statistics.longer(a, b) == pytest.approx(1 - statistics.longer(b, a))


def test_steps_effect_finds_a_difference_and_no_other():
    """Longer steps give a share near 1 and a small p; equal ones an interval around one half (in 5 of 5 draws)."""
    rng = np.random.default_rng(0)

    def draw(mean):
        x = rng.geometric(1 / mean, 30).astype(float)
        return StepsToForget(np.minimum(x, 20), x > 20)

    effect = statistics.steps_effect([(draw(3), draw(12)) for _ in range(3)])
    assert effect.low > 0.6
    assert effect.pvalue < 1e-3
    for _ in range(5):
        null = statistics.steps_effect([(draw(6), draw(6)) for _ in range(3)])
        assert null.low < 0.5 < null.high
        assert null.pvalue > 0.01


def test_rank_correlation_is_within_sets_and_counts_censored_ones_highest():
    """Two sets that differ as wholes but not within have none; the sign is that of the relation."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 40))
    apart = [(x[0], taken(*rng.integers(1, 9, 40))), (x[1] + 10, taken(*(20 + rng.integers(1, 9, 40))))]
    assert abs(statistics.rank_correlation(apart).effect) < 0.3
    steps = np.argsort(np.argsort(x[0])).astype(float)
    for sign in (1, -1):
        result = statistics.rank_correlation([(sign * x[0], StepsToForget(np.minimum(steps, 30), steps > 30))])
        assert sign * result.effect > 0.9
        assert result.pvalue < 0.01


def test_holm_is_the_textbook_s():
    """0.01, 0.04, 0.03 become 0.03, 0.06, 0.06."""
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])


def test_never_is_dearer_than_any_price():
    """An infinite price loses against a finite one, and ties with another."""
    inf = math.inf
    assert statistics.wins([1.0, inf, inf], [0.5, 2.0, inf])[0] == 1.0
    assert statistics.wins([inf], [inf]).pvalue == 1
